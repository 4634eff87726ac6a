"""Confidence intervals that respect pictures: the words or faces of one image are drawn together or not at all.

A cluster bootstrap over images (Davison and Hinkley 1997, §3.8), vectorised: each image becomes its sums and counts by cell,
a draw is a multiset of images, and one matrix product gives the means of all cells under many draws. Rows are put in a
canonical order first, so the result depends on the rows and the seed only. Shapes: I images, C cells, R draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tok1d.errors import TokError
from tok1d.eval.binned import Bins

Floats = NDArray[np.float64]
BLOCK = 1 << 18  # entries of the weight matrix made at once: 2 MiB, so that memory does not grow with the images


@dataclass(frozen=True)
class Interval:
    """Percentile interval of a mean; NaN where nothing was measured.

    Attributes:
        mean: of the rows themselves.
        low, high: bounds.
        n: instances.
        clusters: images that hold them; the interval can be no better than these allow.
    """

    mean: float
    low: float
    high: float
    n: int
    clusters: int


def clustered_intervals(
    values: ArrayLike,
    scales: ArrayLike,
    clusters: Sequence[str],
    bins: Bins,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals for each bin, for the macro and the micro mean.

    Args:
        values: float (n,); NaN rows (the metric does not apply) are left out.
        scales: float (n,) relative sizes; rows outside of the bins are left out.
        clusters: id of the image of each row.
        bins: by size.
        draws: resampled sets of images.
        level: of the two-sided interval.
        seed: of the draws. Two runs over the same images with one seed draw the same images, so that differences of
            :func:`replicates` are paired.

    Returns:
        One :class:`Interval` under each bin's label, ``macro`` (over the bins that hold something) and ``micro``.

    Raises:
        TokError: lengths differ, or draws and level out of range.
    """
    value, scale, names = np.asarray(values, np.float64), np.asarray(scales, np.float64), np.asarray(clusters, dtype=np.str_)
    if not value.shape == scale.shape == names.shape or value.ndim != 1:
        raise TokError(f"values, sizes and image ids must have one length, got {value.shape}, {scale.shape} and {names.shape}")
    if draws < 1 or not 0 < level < 1:
        raise TokError(f"a bootstrap needs at least one draw and a level inside (0, 1), got {draws} and {level}")
    cell = np.searchsorted(bins.edges, scale, side="right") - 1
    keep = (cell >= 0) & (cell < len(bins)) & ~np.isnan(value)
    sums_IC, counts_IC, _ = by_cluster(value[keep], cell[keep], names[keep], len(bins))
    mean, drawn = summarise(sums_IC.sum(0), counts_IC.sum(0)), replicates(sums_IC, counts_IC, draws, seed)
    low, high = quantiles(drawn, level)
    n, images = counts_IC.sum(0), (counts_IC > 0).sum(0)
    total = (int(n.sum()), len(counts_IC))
    keys = [*bins.labels, "macro", "micro"]
    sizes = [*zip(n.astype(int).tolist(), images.tolist()), total, total]
    return {k: Interval(float(m), float(a), float(b), *size) for k, m, a, b, size in zip(keys, mean, low, high, sizes)}


def by_cluster(value: Floats, cell: NDArray[np.int64], names: NDArray[np.str_], cells: int) -> tuple[Floats, Floats, list[str]]:
    """Rows (n,) → sums (I, C), counts (I, C) and the images' ids in sorted order, whatever the order of the rows."""
    order = np.lexsort((value, cell, names))
    ids, image = np.unique(names[order], return_inverse=True)
    place = image * cells + cell[order]
    size = len(ids) * cells
    sums = np.bincount(place, value[order], size)[:size].reshape(len(ids), cells)
    counts = np.bincount(place, minlength=size)[:size].reshape(len(ids), cells)
    return sums, counts.astype(np.float64), ids.tolist()


def replicates(sums_IC: Floats, counts_IC: Floats, draws: int = 1000, seed: int = 0) -> Floats:
    """Means under resampled images, float64 (R, C + 2): each cell, then macro and micro; NaN for a cell no draw has.

    The images drawn depend on their number, ``draws`` and ``seed`` alone.
    """
    images, cells = sums_IC.shape
    if images == 0:
        return np.full((draws, cells + 2), np.nan)
    generator = np.random.Generator(np.random.PCG64(seed))
    block = max(1, BLOCK // images)
    both = np.concatenate([sums_IC, counts_IC], axis=1)
    filled = counts_IC.sum(0) > 0
    parts = []
    for start in range(0, draws, block):
        rows = min(block, draws - start)
        drawn = generator.integers(images, size=(rows, images)) + np.arange(rows)[:, None] * images
        weights = np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(np.float64)
        total = weights @ both
        parts.append(summarise(total[:, :cells], total[:, cells:], filled))
    return np.concatenate(parts)


def summarise(sums: Floats, counts: Floats, filled: NDArray[np.bool_] | None = None) -> Floats:
    """Sums and counts (…, C) → means (…, C + 2): cells, macro over the ``filled`` cells, micro."""
    filled = counts > 0 if filled is None else filled
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums / counts
        macro = np.where(filled, mean, 0.0).sum(-1, keepdims=True) / filled.sum()
        micro = sums.sum(-1, keepdims=True) / counts.sum(-1, keepdims=True)
    return np.concatenate([mean, macro, micro], axis=-1)


def quantiles(drawn: Floats, level: float) -> tuple[Floats, Floats]:
    """Bounds (C,) of the central ``level`` of draws (R, C), leaving out draws in which a cell is empty."""
    tail = (1 - level) / 2
    bounds = np.full((2, drawn.shape[1]), np.nan)
    some = ~np.isnan(drawn).all(0)
    bounds[:, some] = np.nanquantile(drawn[:, some], [tail, 1 - tail], axis=0)
    return bounds[0], bounds[1]
