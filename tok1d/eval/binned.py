"""Means by size of the instance: the bins that text and faces are reported in, and the torchmetric that fills them.

A bin is half-open, ``[low, high)``, over the relative size of a word's character or of a face (TokBench,
https://arxiv.org/abs/2505.18142). What is smaller than the lowest edge is left out of the table but counted. Sums are split
on two grids, so that they are exact: any order, batch, merge or number of ranks gives the same bits.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tok1d.errors import TokError
from tok1d.extras import require

torchmetrics = require("torchmetrics", "eval")

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution
GRID, FINE = 2.0**20, 2.0**44  # sums of multiples of 2^-20 and 2^-44 stay below 2^53 units for 10^9 values up to 8


@dataclass(frozen=True)
class Bins:
    """Half-open bins.

    Attributes:
        name: part of protocols and results; the face bins changed between releases of TokBench, hence v1 and v2.
        edges: ascending, one more than there are bins.
        labels: of the bins, smallest first.

    Example:
        >>> bins = Bins.named("text-v1-256")
        >>> [bins.index(scale) for scale in (0.0199, 0.02, 0.03, 0.9)]
        [-1, 0, 1, 2]
    """

    name: str
    edges: tuple[float, ...]
    labels: tuple[str, ...] = ("small", "medium", "large")

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.labels) + 1 or any(a >= b for a, b in zip(self.edges, self.edges[1:])):
            raise TokError(f"bins {self.name}: need ascending edges, one more than the {len(self.labels)} labels, got {self.edges}")

    def __len__(self) -> int:
        return len(self.labels)

    @staticmethod
    def named(name: str) -> Bins:
        """One of ``BINS``.

        Raises:
            TokError: no such bins.
        """
        if name not in BINS:
            raise TokError(f"no bins are called {name!r}; there are {', '.join(BINS)}")
        return BINS[name]

    def index(self, scale: float) -> int:
        """Number of the bin, -1 for what is below the lowest or not below the highest edge."""
        place = bisect_right(self.edges, scale)
        return place - 1 if place <= len(self) else -1

    def cells(self, scales: Tensor) -> Tensor:
        """Float (n,) → int64 (n,): 0 below the lowest edge, 1 … B for the bins, B + 1 from the highest edge on.

        Raises:
            TokError: a scale is NaN.
        """
        if scales.isnan().any():
            raise TokError(f"a size is not a number (instance {int(scales.isnan().nonzero()[0])}); give every word and face a scale")
        return torch.bucketize(scales.double(), torch.tensor(self.edges, dtype=torch.float64, device=scales.device), right=True)


def _table() -> dict[str, Bins]:
    rows = {
        "text-v1-256": (0.02, 0.03, 0.04, 1.0),
        "text-v1-512": (0.01, 0.02, 0.03, 1.0),
        "text-v1-1024": (0.005, 0.01, 0.02, 1.0),
        "text-v1-video256": (0.01, 0.02, 0.03, 1.0),
        "text-v1-video480": (0.005, 0.01, 0.02, 1.0),
        "face-v1-256": (0.0, 0.1, 0.2, 1.0),
        "face-v1-512": (0.0, 0.05, 0.2, 1.0),
        "face-v1-1024": (0.0, 0.05, 0.1, 1.0),
        "face-v2-256": (0.1, 0.2, 0.3, 1.0),
        "face-v2-512": (0.05, 0.1, 0.2, 1.0),
        "face-v2-1024": (0.02, 0.05, 0.1, 1.0),
        "face-v2-video256": (0.05, 0.1, 0.2, 1.0),
        "face-v2-video480": (0.02, 0.05, 0.1, 1.0),
    }
    return {name: Bins(name, edges) for name, edges in rows.items()}


BINS = _table()


@dataclass
class Binned:
    """A row of a table; a mean is NaN where nothing was measured.

    Attributes:
        bins: name of the bins.
        labels, mean, n: one entry a bin.
        low, high: of the 95 % normal interval of each mean, as if instances were independent. Words of one picture are not;
            reports use :func:`tok1d.eval.bootstrap.clustered_intervals`.
        macro: unweighted mean over the bins that hold something (what TokBench calls the mean).
        macro_bins: how many bins that is.
        micro: mean over the instances in all bins.
        overall: mean over all instances, also those outside of the bins.
        outside: instances smaller than the lowest edge, or not smaller than the highest.
        uncovered: instances that the metric does not apply to (NaN), in no mean.
    """

    bins: str
    labels: tuple[str, ...]
    mean: list[float]
    n: list[int]
    low: list[float]
    high: list[float]
    macro: float
    macro_bins: int
    micro: float
    overall: float
    outside: int
    uncovered: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, NaN as None."""
        return _jsonable(asdict(self))


class BinnedMean(torchmetrics.Metric):
    """Mean of a value by bin, and by group × bin, with numbers and intervals.

    Args:
        bins: by size.
        groups: names of the sets an instance may belong to; none for one table over everything.

    Example::

        metric = BinnedMean(Bins.named("face-v2-256"))
        metric.update(cosines, scales)          # float (n,) twice; NaN: the metric does not apply, counted
        metric.compute().macro
    """

    full_state_update = False

    def __init__(self, bins: Bins, groups: Sequence[str] = ()) -> None:
        super().__init__()
        if len(set(groups)) < len(groups):
            raise TokError(f"a group is named twice: {', '.join(groups)}")
        self.bins, self.groups = bins, tuple(groups)
        cells = (max(1, len(groups)), len(bins) + 2)
        self.add_state("n", torch.zeros(cells, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("uncovered", torch.zeros(cells[:1], dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("s", "ss"):  # sums of values and of their squares: coarse part, fine part
            self.add_state(name, torch.zeros((2, *cells), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, scales: Tensor, groups: Sequence[str] | None = None) -> None:
        """Float (n,) values and (n,) relative sizes; the group of each where the metric has groups.

        Raises:
            TokError: different lengths, an infinite value, a NaN size, an unknown or missing group.
        """
        values, scales = values.detach().double().to(self.n.device), scales.detach().double().to(self.n.device)
        if values.shape != scales.shape or values.dim() != 1:
            raise TokError(f"values and sizes must be two lists of one length, got shapes {tuple(values.shape)} and {tuple(scales.shape)}")
        if values.isinf().any():
            raise TokError(f"value {int(values.isinf().nonzero()[0])} is infinite; a mean needs finite values, or NaN where it does not apply")
        rows = self._rows(groups, len(values)).to(values.device)
        cell = rows * self.n.shape[1] + self.bins.cells(scales)
        known = ~values.isnan()
        self.uncovered += torch.bincount(rows[~known], minlength=len(self.uncovered)).double()
        cell, values = cell[known], values[known]
        self.n += torch.bincount(cell, minlength=self.n.numel()).reshape(self.n.shape).double()
        for state, x in ((self.s, values), (self.ss, values.square())):
            coarse = (x * GRID).round() / GRID
            fine = ((x - coarse) * FINE).round() / FINE
            for part, weights in ((0, coarse), (1, fine)):
                state[part] += torch.bincount(cell, weights, self.n.numel()).reshape(self.n.shape)

    def _rows(self, groups: Sequence[str] | None, count: int) -> Tensor:
        if not self.groups:
            return torch.zeros(count, dtype=torch.int64)
        if groups is None or len(groups) != count:
            raise TokError(f"this metric keeps groups ({', '.join(self.groups)}): give the group of each of the {count} values")
        place = {name: i for i, name in enumerate(self.groups)}
        unknown = sorted(set(groups) - set(place))
        if unknown:
            raise TokError(f"unknown groups {', '.join(unknown)}; this metric keeps {', '.join(self.groups)}")
        return torch.tensor([place[g] for g in groups], dtype=torch.int64)

    def compute(self) -> Binned:
        """The table over all groups."""
        return self._table(self.n.sum(0), self.s.sum((0, 1)), self.ss.sum((0, 1)), float(self.uncovered.sum()))

    def by_group(self) -> dict[str, Binned]:
        """One table a group, in the order they were named; call after a sync, as :meth:`compute` is."""
        s, ss = self.s.sum(0), self.ss.sum(0)
        return {g: self._table(self.n[i], s[i], ss[i], float(self.uncovered[i])) for i, g in enumerate(self.groups)}

    def _table(self, n: Tensor, s: Tensor, ss: Tensor, uncovered: float) -> Binned:
        inner = slice(1, -1)
        mean = s[inner] / n[inner]
        spread = ((ss[inner] - mean * s[inner]).clamp(min=0) / (n[inner] - 1)).sqrt()  # NaN for a single instance
        half = Z95 * spread / n[inner].sqrt()
        full = mean[n[inner] > 0]
        return Binned(
            bins=self.bins.name,
            labels=self.bins.labels,
            mean=mean.tolist(),
            n=[int(c) for c in n[inner].tolist()],
            low=(mean - half).tolist(),
            high=(mean + half).tolist(),
            macro=float(full.mean()) if len(full) else math.nan,
            macro_bins=len(full),
            micro=float(s[inner].sum() / n[inner].sum()),
            overall=float(s.sum() / n.sum()),
            outside=int(n[0] + n[-1]),
            uncovered=int(uncovered),
        )


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
