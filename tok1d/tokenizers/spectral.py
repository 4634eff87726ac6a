"""The whole-image spectrum shared by the spectral encoder and decoder: colour rotation and low-frequency 2-D DCT.

A photo's energy sits in few low frequencies, so a prefix of its largest-variance DCT coefficients is already a nested
code; what is learned on top only has to add what a linear code cannot do.

Shapes: B images, C = 3 rotated colours, G × G lowest frequencies, N tokens, D coefficients of a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dct_matrix(frequencies: int, size: int) -> Tensor:
    """Rows 0..frequencies-1 of the orthonormal DCT-II of length ``size``: float32 (frequencies, size).

    Example:
        >>> d = dct_matrix(8, 8)
        >>> torch.allclose(d @ d.T, torch.eye(8), atol=1e-6)
        True
    """
    k = torch.arange(frequencies, dtype=torch.float64)[:, None]
    x = torch.arange(size, dtype=torch.float64)[None]
    d = torch.cos(math.pi * (2 * x + 1) * k / (2 * size)) * math.sqrt(2 / size)
    d[0] /= math.sqrt(2)
    return d.float()


def analyse(images: Tensor, colour: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Float (B, 3, H, W) → lowest DCT coefficients of each rotated colour, (B, 3, G, G), scaled so that the size cancels.

    ``rows`` is dct_matrix(G, H), ``cols`` dct_matrix(G, W); coefficient (0, 0) of a constant image equals its value.
    """
    scale = 1 / math.sqrt(rows.shape[1] * cols.shape[1])
    with torch.autocast(images.device.type, enabled=False):  # eight bits of mantissa would change the codes
        mixed = torch.einsum("bchw,dc->bdhw", images.to(rows.dtype), colour)
        return rows @ mixed @ cols.T * scale


def synthesise(spectrum: Tensor, colour: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Inverse of :func:`analyse` for any output size: (B, 3, G, G) → float (B, 3, H, W), band-limited."""
    scale = math.sqrt(rows.shape[1] * cols.shape[1])
    with torch.autocast(spectrum.device.type, enabled=False):
        mixed = rows.T @ spectrum.to(rows.dtype) @ cols * scale
        return torch.einsum("bdhw,dc->bchw", mixed, colour)


def zigzag_support(tokens: int, dim: int, grid: int) -> Tensor:
    """A data-free order: coefficients by frequency, brightness before colour; int64 (tokens, dim) into 3 · grid².

    Raises:
        ValueError: more coefficients asked for than there are.
    """
    if tokens * dim > 3 * grid * grid:
        raise ValueError(f"{tokens} tokens of {dim} coefficients do not fit 3 × {grid} × {grid}; use a larger grid")
    f = torch.arange(grid, dtype=torch.float64)
    radius = (f[:, None] ** 2 + f[None] ** 2).sqrt() + 1
    cost = torch.stack([radius, radius * 3, radius * 3.5])
    return cost.flatten().argsort(stable=True)[: tokens * dim].view(tokens, dim)
