"""Tables of K numbers that one number is rounded to: for a normal variable in closed form, for samples by measuring.

Lloyd's condition (each entry the mean of what is nearest to it): https://ieeexplore.ieee.org/document/1056489. The least error
wants entries with the density of f^(1/3) (Panter & Dite 1951), which is where the searches here start.

Shapes: K entries, increasing; M samples. Everything is float64 on the CPU.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.special import ndtr, ndtri

ROUNDS = 100  # of Lloyd's iteration; from good starts the error has stopped falling by then
LEAST_GAP = 1e-4  # between entries, in deviations: equal ones could not be told apart


@functools.cache
def normal_table(size: int) -> Tensor:
    """The least squared error for a standard normal variable, float64 (K,), K even.

    Example:
        >>> [round(x, 3) for x in normal_table(4).tolist()]
        [-1.51, -0.453, 0.453, 1.51]
    """
    # f^(1/3) of a normal density is one of deviation sqrt(3). The lower half is computed, where tails keep their digits.
    cuts = math.sqrt(3) * ndtri(torch.arange(size // 2 + 1, dtype=torch.float64, device="cpu") / size)
    for _ in range(ROUNDS):
        entries = _normal_means(cuts)
        cuts = torch.cat([cuts[:1], (entries[1:] + entries[:-1]) / 2, cuts[-1:]])
    return torch.cat([entries, -entries.flip(0)])


def truncated_normal_table(size: int, limit: float = 3.0) -> Tensor:
    """TokenBridge: means of K equally probable parts of a standard normal variable, the cuts clipped to ±limit.

    K is at most 512 for a limit of 3: the outermost cut of more parts lies beyond it.

    Example:
        >>> [round(x, 3) for x in truncated_normal_table(4).tolist()]
        [-1.26, -0.325, 0.325, 1.26]
    """
    cuts = ndtri(torch.arange(size // 2 + 1, dtype=torch.float64, device="cpu") / size).clamp(-limit, limit)
    entries = _normal_means(cuts)
    return torch.cat([entries, -entries.flip(0)])


def quantile_table(samples: Tensor, size: int) -> Tensor:
    """Means of K equally filled parts of the samples: float64 (M,), M ≥ K → (K,).

    Example:
        >>> quantile_table(torch.tensor([0.0, 1, 10, 20], dtype=torch.float64), 2).tolist()
        [0.5, 15.0]
    """
    parts = samples.sort().values.tensor_split(size)
    return _spread(torch.stack([part.mean() for part in parts]))


def lloyd_table(samples: Tensor, size: int) -> Tensor:
    """The least squared error on the samples that Lloyd's iteration finds: float64 (M,), M ≥ K → (K,).

    Example:
        >>> lloyd_table(torch.tensor([0.0, 1, 10, 20, 21], dtype=torch.float64), 3).tolist()
        [0.5, 10.0, 20.5]
    """
    x = samples.sort().values
    gaps = x.diff() ** (2 / 3)  # a gap is about 1 / (M f), so that entries get the density of f^(1/3)
    mass = torch.cat([gaps.new_zeros(1), gaps.cumsum(0)])
    wanted = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) / size * mass[-1]
    by_gaps = _spread(x[torch.searchsorted(mass, wanted).clamp(max=len(x) - 1)])
    # That start counts on many samples; for few the quantiles can be the better one.
    found = [_lloyd(x, start) for start in (by_gaps, quantile_table(x, size))]
    return min(found, key=lambda entries: _error(x, entries))


def _lloyd(x: Tensor, entries: Tensor) -> Tensor:
    """Sorted samples (M,), entries to start from (K,) → entries that are the means of what is nearest to them."""
    total = torch.cat([x.new_zeros(1), x.cumsum(0)])
    for _ in range(ROUNDS):
        cuts = torch.searchsorted(x, (entries[1:] + entries[:-1]) / 2)
        ends = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), len(x))])
        count = ends.diff()
        means = (total[ends[1:]] - total[ends[:-1]]) / count.clamp(min=1)
        moved = torch.where(count > 0, means, entries)  # an entry without samples stays
        if torch.equal(moved, entries):
            break
        entries = moved
    return _spread(entries)


def _error(x: Tensor, entries: Tensor) -> float:
    """Mean squared distance of samples from the nearest entry."""
    nearest = torch.searchsorted((entries[1:] + entries[:-1]) / 2, x)
    return (x - entries[nearest]).square().mean().item()


def _normal_means(cuts: Tensor) -> Tensor:
    """Increasing cuts (k + 1,) → the mean of a standard normal variable between neighbours (k,)."""
    density = torch.exp(-cuts.square() / 2) / math.sqrt(2 * math.pi)
    return -density.diff() / ndtr(cuts).diff()


def _spread(entries: Tensor) -> Tensor:
    """Entries in order, each at least a small gap above the one before."""
    steps = LEAST_GAP * torch.arange(len(entries), dtype=entries.dtype, device=entries.device)
    return (entries - steps).cummax(0).values + steps
