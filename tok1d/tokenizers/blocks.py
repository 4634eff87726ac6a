"""Transformer blocks and patch arithmetic shared by encoders and decoders.

Everything is batch-first and runs on ``scaled_dot_product_attention``. The last block of a tokenizer is read at some
positions only, so a block can be told which outputs are wanted and computes nothing else (exact, not an approximation).

Shapes: B images, T positions, S ≤ T wanted positions, W width, h heads, p patch size, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection.

    Args:
        width: W.
        heads: h; W / h is the head width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, wanted: slice | None = None) -> Tensor:
        """Float (B, T, W), bool mask (B, 1, 1, T) True = may be attended to → float (B, S, W)."""
        batch, width, heads = x.shape[0], x.shape[2], self.heads
        if wanted is None:
            q, k, v = self.qkv(x).view(batch, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(x[:, wanted], weight[:width], bias[:width])
            q = q.view(batch, -1, heads, width // heads).transpose(1, 2)
            kv = F.linear(x, weight[width:], bias[width:])
            k, v = kv.view(batch, -1, 2, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(y.transpose(1, 2).reshape(batch, -1, width))


class MLP(nn.Module):
    """Linear, GELU (erf), Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: ``x + attention(norm1(x))``, then ``x + mlp(norm2(x))``.

    Args:
        width, heads: as :class:`Attention`.
        mlp_ratio: hidden width of the MLP over W.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, mask: Tensor | None = None, wanted: slice | None = None) -> Tensor:
        """Float (B, T, W) → float (B, S, W): the outputs at the positions ``wanted``, all T by default."""
        kept = x if wanted is None else x[:, wanted]
        x = kept + self.attn(self.norm1(x), mask, wanted)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """``norm_pre``, ``depth`` blocks, ``norm_post``; returns the positions that are asked for.

    Args:
        width, depth, mlp_ratio: as :class:`Block`.
        heads: W // 64 if None.
    """

    def __init__(self, width: int, depth: int, heads: int | None = None, mlp_ratio: float = 4) -> None:
        super().__init__()
        heads = width // 64 if heads is None else heads
        check_range("width", width, 1, 16384)
        check_range("depth", depth, 1, 256)
        if heads < 1 or width % heads:
            raise ModelError(f"width {width} cannot be split into {heads} heads; choose heads that divide the width")
        self.norm_pre = nn.LayerNorm(width, eps=1e-5)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm_post = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor, wanted: slice, mask: Tensor | None = None) -> Tensor:
        """Float (B, T, W), bool mask (B, T) True = may be attended to → float (B, S, W)."""
        attended = None if mask is None else mask[:, None, None, :]
        x = self.norm_pre(x)
        *body, last = self.blocks
        for block in body:
            x = block(x, attended)
        return self.norm_post(last(x, attended, wanted))


def init_weights(module: nn.Module) -> None:
    """Truncated normal of deviation ``inputs ** -0.5`` for linear and convolution weights, zero biases; use with ``module.apply``.

    The published code takes 0.02 at every width, which is this for 2,500 inputs. At a width of 64 it shrinks the image's
    part of a latent to a thousandth: every image gets the same ids, and a quantizer in between never learns otherwise.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def learned(*shape: int) -> nn.Parameter:
    """A learned table, normal with deviation ``width ** -0.5`` (the width is the last dimension)."""
    return nn.Parameter(torch.randn(*shape) * shape[-1] ** -0.5)


def patchify(x: Tensor, patch: int) -> Tensor:
    """Float (B, C, H, W) → float (B, H/p · W/p, C · p · p), patches in raster order, channel slowest inside one.

    Example:
        >>> patchify(torch.zeros(2, 3, 32, 64), 16).shape
        torch.Size([2, 8, 768])
    """
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpatchify(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Float (B, rows · cols, p · p · C) → float (B, C, rows · p, cols · p); channel fastest, unlike :func:`patchify`."""
    batch, (rows, cols) = x.shape[0], grid
    x = x.view(batch, rows, cols, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * patch, cols * patch)


def patch_grid(image_size: int | Sequence[int], patch: int) -> tuple[int, int]:
    """Rows and columns of patches of an image size, an int for square or (height, width).

    Raises:
        ModelError: the size is not a multiple of the patch, or makes more than 65,536 patches.

    Example:
        >>> patch_grid(256, 16), patch_grid([128, 256], 16)
        ((16, 16), (8, 16))
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(s, int) and 0 < s <= 65535 for s in size):
        raise ModelError(f"image_size must be an int or [height, width] in pixels, got {image_size!r:.100}")
    check_range("patch_size", patch, 1, 1024)
    if size[0] % patch or size[1] % patch:
        raise ModelError(f"image_size {list(size)} is not a multiple of patch_size {patch}; choose sizes that are")
    rows, cols = size[0] // patch, size[1] // patch
    check_range(f"patches of image_size {list(size)} with patch_size {patch}", rows * cols, 1, 65536)
    return rows, cols


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Refuse a size no model has, before anything is allocated.

    Raises:
        ModelError: ``value`` is no integer in low..high.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ModelError(f"{name} must be an integer in {low}..{high}, got {value!r:.100}")
