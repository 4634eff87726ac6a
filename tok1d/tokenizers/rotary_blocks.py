"""Rotary transformer blocks over a sequence of latents and a grid of patches, which can be merged and split.

SwiGLU: https://arxiv.org/abs/2002.05202; normalised queries and keys: https://arxiv.org/abs/2302.05442; merging and splitting
beside a shortcut without parameters: https://arxiv.org/abs/2410.10733.

Shapes: B images, T positions, S ≤ T wanted positions, W width, h heads, d = W / h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ImageError, ModelError
from tok1d.tokenizers.blocks import check_range, patch_grid
from tok1d.tokenizers.rotary import rotate


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · weight, computed in float32, in the precision of x.

    Args:
        width: W.
    """

    eps = 1e-6

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class RotaryAttention(nn.Module):
    """Self-attention without biases, with RMS-normalised, rotated queries and keys.

    Args:
        width: W.
        heads: h.
        norm: class of the norms.
    """

    def __init__(self, width: int, heads: int, norm: type[RMSNorm] = RMSNorm) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q, self.norm_k = norm(width // heads), norm(width // heads)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None = None, wanted: slice | None = None) -> Tensor:
        """Float (B, T, W), table (2, T, 1, d), bool mask (B, 1, 1, T) True = may be attended to → float (B, S, W)."""
        batch, _, width = x.shape
        asking = table if wanted is None else table[:, wanted]
        if wanted is None:
            q, k, v = self.qkv(x).view(batch, -1, 3, self.heads, width // self.heads).unbind(2)
        else:
            q = F.linear(x[:, wanted], self.qkv.weight[:width]).view(batch, -1, self.heads, width // self.heads)
            kv = F.linear(x, self.qkv.weight[width:])
            k, v = kv.view(batch, -1, 2, self.heads, width // self.heads).unbind(2)
        q, k = rotate(self.norm_q(q), asking).to(v.dtype), rotate(self.norm_k(k), table).to(v.dtype)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return self.proj(y.transpose(1, 2).reshape(batch, -1, width))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), without biases; gate and up are one layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class RotaryBlock(nn.Module):
    """Pre-norm block: ``x + attention(norm1(x))``, then ``x + mlp(norm2(x))``.

    Args:
        width, heads, norm: as :class:`RotaryAttention`.
        hidden: width inside the SwiGLU.
    """

    def __init__(self, width: int, heads: int, hidden: int, norm: type[RMSNorm] = RMSNorm) -> None:
        super().__init__()
        self.norm1 = norm(width)
        self.attn = RotaryAttention(width, heads, norm)
        self.norm2 = norm(width)
        self.mlp = SwiGLU(width, hidden)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None = None, wanted: slice | None = None) -> Tensor:
        """Float (B, T, W) → float (B, S, W): the outputs at the positions ``wanted``, all T by default."""
        kept = x if wanted is None else x[:, wanted]
        x = kept + self.attn(self.norm1(x), table, mask, wanted)
        return x + self.mlp(self.norm2(x))


def conv3x3(x: Tensor, conv: nn.Conv2d, stride: int = 1) -> Tensor:
    """A 3 × 3 convolution with padding 1 on channels-last patches, as one matrix product.

    Few patches meet many channels here: copying 9 neighbours of each patch costs a fraction of what convolution routines
    spend on bringing the weights into their own order in every call (on CPUs 1.3 to 3 times the whole).

    Args:
        x: float (B, rows, cols, C).
        conv: its weights, (O, C, 3, 3).
        stride: 1 or 2.

    Returns:
        float (B, rows / stride, cols / stride, O).
    """
    neighbours = F.pad(x, (0, 0, 1, 1, 1, 1)).unfold(1, 3, stride).unfold(2, 3, stride)  # (B, rows, cols, C, 3, 3)
    return F.linear(neighbours.flatten(3), conv.weight.flatten(1), conv.bias)


class Merge(nn.Module):
    """Every 2 × 2 patches become one: a 3 × 3 convolution of stride 2 beside their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Float (B, rows · cols, W), even rows and cols → float (B, rows · cols / 4, W)."""
        x = x.unflatten(1, grid)  # (B, rows, cols, W)
        mean = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4))  # (B, rows / 2, cols / 2, W)
        return (conv3x3(x, self.conv, 2) + mean).flatten(1, 2)


class Split(nn.Module):
    """Every patch becomes 2 × 2: a 3 × 3 convolution to four times the channels and a pixel shuffle, beside four copies."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * width, 3, padding=1)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Float (B, rows · cols, W) → float (B, 4 · rows · cols, W)."""
        x = x.unflatten(1, grid)  # (B, rows, cols, W)
        fine = conv3x3(x, self.conv).unflatten(3, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3)  # (B, rows, 2, cols, 2, W)
        return (fine + x[:, :, None, :, None]).flatten(1, 4)


def rotary_blocks(
    width: int, depth: int, heads: int | None, mlp_ratio: float, norm: type[RMSNorm] = RMSNorm
) -> nn.ModuleList:
    """``depth`` blocks, sizes checked before anything is allocated.

    Args:
        width: W.
        depth: number of blocks.
        heads: W // 64 if None.
        mlp_ratio: hidden width of the MLPs over W.
        norm: as :class:`RotaryAttention`.

    Raises:
        ModelError: a size no model has, or a width that cannot be split.
    """
    check_range("width", width, 1, 16384)
    check_range("depth", depth, 1, 256)
    heads = width // 64 if heads is None else heads
    if heads < 1 or width % heads or width // heads % 2 or width // heads < 6:
        raise ModelError(f"width {width} cannot be split into {heads} heads of an even width of 6 or more; choose other heads")
    hidden = round(width * mlp_ratio)
    check_range(f"width * mlp_ratio = {width} * {mlp_ratio}", hidden, 1, 131072)
    return nn.ModuleList(RotaryBlock(width, heads, hidden, norm) for _ in range(depth))


def check_moves(name: str, after: Sequence[int], depth: int) -> tuple[int, ...]:
    """Numbers of blocks after which patches are merged or split, as a tuple.

    Raises:
        ModelError: they do not ascend between the first and the last block.
    """
    for count in after:
        check_range(f"every entry of {name} (with depth {depth})", count, 1, depth - 1)
    if sorted(set(after)) != list(after) or len(after) > 8:
        raise ModelError(f"{name} must be at most 8 ascending numbers of blocks, got {list(after)}")
    return tuple(after)


def check_limit(size_limit: int, patch_size: int, moves: int) -> int:
    """The step of image sizes of a model that merges ``moves`` times.

    Raises:
        ModelError: ``size_limit`` is no multiple of it.
    """
    patch_grid(size_limit, patch_size)
    step = patch_size * 2**moves
    if size_limit % step:
        raise ModelError(f"size_limit {size_limit} is not a multiple of {step}, the patch size times 2 for each merge; choose one that is")
    return step


def check_size(size: Sequence[int], step: int, limit: int) -> tuple[int, int]:
    """(height, width) in pixels, if a model of any size takes it.

    Raises:
        ImageError: the size is not a multiple of ``step``, or above ``limit``.
    """
    height, width = size
    if not all(0 < s <= limit and s % step == 0 for s in (height, width)):
        raise ImageError(
            f"image sizes must be multiples of {step} up to {limit} pixels a side, got {height} × {width}. Resize, crop or pad to one"
        )
    return int(height), int(width)
