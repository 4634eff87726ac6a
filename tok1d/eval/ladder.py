"""The text ladder's table: how many words are read right, by the size of their characters in pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tok1d.eval.synthetic import STEPS


@dataclass(frozen=True)
class LadderPoint:
    """Words of one size of characters at one rate.

    Attributes:
        rate: of the system, ``original`` for the originals.
        pixels: from one character to the next, in the image: a step of the ladder.
        n: words that were read.
        accuracy: share of those read exactly right.
        low, high: of the accuracy's 95 % interval (Wilson), as if words were independent.
        ned: mean edit similarity.
    """

    rate: str
    pixels: float
    n: int
    accuracy: float
    low: float
    high: float
    ned: float


def ladder_table(rows: Sequence[Mapping[str, Any]], size: int = 256) -> list[LadderPoint]:
    """Accuracy by size of characters, from the ``words`` rows of a run over a text ladder (``read_rows(out, "words")``).

    Args:
        rows: with ``rate``, ``truth``, ``read``, ``scale`` and ``status``; those that were not read are left out.
        size: pixels of the ladder's images.
    """
    from tok1d.eval.text import text_scores

    steps = np.array(STEPS) * size / 256
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok":
            nearest = float(steps[np.abs(np.log(steps / max(1e-9, row["scale"] * size))).argmin()])
            groups.setdefault((row["rate"], nearest), []).append(row)
    points = []
    for (rate, pixels), found in sorted(groups.items()):
        truths, reads = [r["truth"] for r in found], [r["read"] for r in found]
        n, right = len(found), float(text_scores(truths, reads, "acc", "raw").sum())
        low, high = _wilson(right, n)
        points.append(LadderPoint(rate, pixels, n, right / n, low, high, float(text_scores(truths, reads, "ned", "raw").mean())))
    return points


def _wilson(right: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Interval of a share (Wilson 1927)."""
    share, middle = right / n, 1 + z * z / n
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / middle), min(1.0, (centre + half) / middle)
