"""Rotary transformer blocks over a sequence of latents and a grid of patches of any size, which can be merged and split.

Positions are triples: latent i sits at (i, 0, 0), a patch at (0, y, x). Every picture spans the same range of y and x,
whatever its size, so that a model meets no new position at a new size. Rotary embedding: https://arxiv.org/abs/2104.09864;
SwiGLU: https://arxiv.org/abs/2002.05202; normalised queries and keys: https://arxiv.org/abs/2302.05442; merging and
splitting beside a shortcut without parameters: https://arxiv.org/abs/2410.10733.

Shapes: B images, n latents, T = n + rows · cols positions, S ≤ T wanted positions, W width, h heads, d = W / h.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ImageError, ModelError
from tok1d.tokenizers.blocks import check_range, patch_grid


def rotary_axes(head_width: int) -> tuple[int, int, int]:
    """How many channels of a head turn with the number of the latent, with y and with x; 1/8 and twice 7/16, made even.

    Example:
        >>> rotary_axes(64)
        (8, 28, 28)
    """
    spatial = 2 * (7 * head_width // 32)
    return head_width - 2 * spatial, spatial, spatial


def angles(positions: Tensor, axes: Sequence[int]) -> Tensor:
    """Position p on an axis of c channels turns its pair i by p · 10000^(-2i/c).

    Args:
        positions: float64 (T, number of axes).
        axes: channels of each axis, even.

    Returns:
        float64 (T, sum of axes / 2), one angle a pair.
    """
    turns = []
    for p, channels in zip(positions.unbind(1), axes, strict=True):
        exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=p.device) / channels
        turns.append(p[:, None] * 10000.0**-exponents)
    return torch.cat(turns, dim=1)


def sequence_positions(latents: int, y: Tensor, x: Tensor) -> Tensor:
    """Positions of n latents, then of a grid of patches with float64 coordinates y (rows,) and x (cols,): float64 (T, 3)."""
    index = F.pad(torch.arange(latents, dtype=torch.float64, device=y.device)[:, None], (0, 2))
    return torch.cat([index, torch.cartesian_prod(y.new_zeros(1), y, x)])


def centred_turns(latents: int, grid: tuple[int, int], axes: tuple[int, int, int], span: int, device: torch.device) -> Tensor:
    """The angle of every channel; channels j and j + d/2 are a pair.

    A patch is where its centre is: patch i of n along an axis at (i + 1/2) · span / n - 1/2. Patches of a picture of
    ``span`` patches sit at 0, 1, 2 …, and a merged patch in the middle of those it was merged from.

    Args:
        latents: n.
        grid: rows and columns of patches.
        axes: see :func:`rotary_axes`.
        span: length of a picture's sides, in positions.
        device: to compute on.

    Returns:
        float64 (T, d).
    """
    y, x = ((torch.arange(n, dtype=torch.float64, device=device) + 0.5) * (span / n) - 0.5 for n in grid)
    turn = angles(sequence_positions(latents, y, x), axes)
    return torch.cat([turn, turn], dim=1)


def rotary_table(turns: Callable[..., Tensor], *sizes: Any, device: torch.device) -> Tensor:
    """Cosines and signed sines for :func:`rotate`; made once for each size, or once a graph inside ``torch.compile``.

    Args:
        turns: such as :func:`centred_turns`.
        sizes: its arguments but the device, all hashable.
        device: of the table.

    Returns:
        float32 (2, T, 1, d).
    """
    return (_table if torch.compiler.is_compiling() else _cached_table)(turns, sizes, device)


def _table(turns: Callable[..., Tensor], sizes: tuple[Any, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a table that is cached under inference mode could not be trained with later
        turn = turns(*sizes, torch.device("cpu") if device.type == "mps" else device)  # mps has no float64
        first, second = turn.sin().chunk(2, dim=1)
        return torch.stack([turn.cos(), torch.cat([-first, second], dim=1)]).float()[:, :, None].to(device)


_cached_table = functools.lru_cache(maxsize=32)(_table)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x · cos + [-x₂, x₁] · sin, where x₁ and x₂ are the halves of x: float (B, T, h, d) → float32 of that shape."""
    cos, sin = table.unbind(0)  # the minus sign is in the table
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1).to(cos.dtype), sin)


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


class Merge(nn.Module):
    """Every 2 × 2 patches become one: a 3 × 3 convolution of stride 2 beside their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Float (B, rows · cols, W), even rows and cols → float (B, rows · cols / 4, W)."""
        x = x.unflatten(1, grid).permute(0, 3, 1, 2)  # (B, W, rows, cols), channels last in memory
        x = self.conv(x) + F.avg_pool2d(x, 2)
        return x.permute(0, 2, 3, 1).flatten(1, 2)


class Split(nn.Module):
    """Every patch becomes 2 × 2: a 3 × 3 convolution to four times the channels and a pixel shuffle, beside four copies."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * width, 3, padding=1)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Float (B, rows · cols, W) → float (B, 4 · rows · cols, W)."""
        x = x.unflatten(1, grid)  # (B, rows, cols, W)
        fine = F.pixel_shuffle(self.conv(x.permute(0, 3, 1, 2)), 2).permute(0, 2, 3, 1)  # (B, 2 · rows, 2 · cols, W)
        fine = fine.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)) + x[:, :, None, :, None]  # each half (2) gets its own copy
        return fine.flatten(1, 4)


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
