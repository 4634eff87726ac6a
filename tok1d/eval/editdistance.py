"""Levenshtein distance of many pairs of words at once (https://en.wikipedia.org/wiki/Levenshtein_distance).

The table of one pair is filled row by row; all pairs fill the same row together, and inside a row the dependence on the left
neighbour becomes a running minimum: ``d[j] = j + min over k ≤ j of (t[k] - k)``. So the only Python loop is over the
characters of the longest word. Pairs are taken in order of length, so that one long line does not pad all others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tok1d.errors import TokError

CELLS = 1 << 20  # of one row of all tables of a chunk: bounds memory to a few tens of MiB


def levenshtein(a: Sequence[str], b: Sequence[str]) -> NDArray[np.int64]:
    """Fewest insertions, deletions and substitutions of code points that turn ``a[i]`` into ``b[i]``.

    Args:
        a, b: equally many strings, any characters, nothing normalised.

    Returns:
        int64 (n,), between the difference of the lengths and the longer length.

    Raises:
        TokError: different numbers of strings.

    Example:
        >>> levenshtein(["kitten", "", "same"], ["sitting", "abc", "same"])
        array([3, 3, 0])
    """
    if len(a) != len(b):
        raise TokError(f"edit distances need as many strings on both sides, got {len(a)} and {len(b)}")
    length_a, length_b = lengths(a), lengths(b)
    # The Python loop runs over the shorter word of each pair: the distance is symmetric.
    swap = length_a > length_b
    short = [y if s else x for x, y, s in zip(a, b, swap.tolist())]
    long = [x if s else y for x, y, s in zip(a, b, swap.tolist())]
    width, height = np.maximum(length_a, length_b), np.minimum(length_a, length_b)
    order = np.lexsort((height, width))
    distance = np.zeros(len(a), np.int64)
    start = 0
    while start < len(order):
        # As many pairs as fit when padded to the longest of them, which is the last; at least one.
        fits = np.flatnonzero((np.arange(1, len(order) - start + 1)) * (width[order[start:]] + 1) <= CELLS)
        rows = order[start : start + max(1, len(fits))]
        distance[rows] = _tables([short[i] for i in rows], [long[i] for i in rows], height[rows], width[rows])
        start += len(rows)
    return distance


def similarity(a: Sequence[str], b: Sequence[str]) -> NDArray[np.float64]:
    """Normalised edit similarity ``1 - Lev / max(len)``, float64 (n,) in [0, 1]; two empty strings are alike (1).

    Example:
        >>> similarity(["word", "", "a"], ["ward", "", ""]).tolist()
        [0.75, 1.0, 0.0]
    """
    longer = np.maximum(lengths(a), lengths(b))
    return 1.0 - levenshtein(a, b) / np.maximum(longer, 1)


def lengths(strings: Sequence[str]) -> NDArray[np.int64]:
    """Numbers of code points, int64 (n,)."""
    return np.fromiter(map(len, strings), np.int64, len(strings))


def _tables(a: list[str], b: list[str], length_a: NDArray[np.int64], length_b: NDArray[np.int64]) -> NDArray[np.int64]:
    """Distances of pairs padded to the longest ``a`` (m characters) and the longest ``b`` (n characters)."""
    a_PM, b_PN = _code_points(a), _code_points(b)
    steps = np.arange(b_PN.shape[1] + 1, dtype=np.int32)
    d = np.broadcast_to(steps, (len(a), len(steps)))  # (P, n + 1): row 0 of every table
    last = length_b[:, None]
    result = length_b.copy()  # of pairs whose a is empty
    for i in range(a_PM.shape[1]):
        t = d + np.int32(1)  # a character of a is deleted
        np.minimum(t[:, 1:], d[:, :-1] + (a_PM[:, i : i + 1] != b_PN), out=t[:, 1:])  # kept or substituted
        d = np.minimum.accumulate(t - steps, axis=1) + steps  # characters of b are inserted
        ends = np.flatnonzero(length_a == i + 1)  # what follows in these rows is padding
        result[ends] = np.take_along_axis(d[ends], last[ends], 1)[:, 0]
    return result


def _code_points(strings: list[str]) -> NDArray[np.uint32]:
    """uint32 (n, longest), padded with zeros behind each string's end."""
    return np.array(strings, dtype=np.str_).view(np.uint32).reshape(len(strings), -1)
