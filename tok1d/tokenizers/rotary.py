"""Rotary positions of a sequence of latents and a grid of patches of any size.

Positions are triples: latent i sits at (i, 0, 0), a patch at (0, y, x). Every picture spans the same range of y and x,
whatever its size, so that a model meets no new position at a new size. Paper: https://arxiv.org/abs/2104.09864.

Shapes: B images, n latents, T = n + rows · cols positions, h heads of d channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
