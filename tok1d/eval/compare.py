"""Compare two runs: paired differences on the same images with intervals, and the Bjøntegaard delta of their curves.

Runs are compared only when data, protocol and networks are the same (:func:`tok1d.eval.protocol.require_same`). BD-rate: G. Bjøntegaard,
VCEG-M33 (2001); interpolated by PCHIP, with a test that the curves overlap — otherwise there is no number, but a reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tok1d.errors import UsageError
from tok1d.eval.bootstrap import quantiles, replicates
from tok1d.eval.protocol import require_same
from tok1d.extras import require

LOWER_IS_BETTER = ("lpips", "dists", "mae", "fd_", "fid", "kernel_distance", "bytes", "bpp")
LEAST_OVERLAP = 0.25  # of the shorter quality range; less is extrapolation in disguise


@dataclass(frozen=True)
class Delta:
    """Difference of two curves.

    Attributes:
        percent: mean difference in rate of B against A at equal quality, negative where B needs less; None if not comparable.
        reason: why not, or empty.
        overlap: (low, high) quality that both curves reach.
        share: overlap over the shorter of both quality ranges.
    """

    percent: float | None
    reason: str = ""
    overlap: tuple[float, float] | None = None
    share: float = 0.0


def bd_rate(
    rate_a: ArrayLike, quality_a: ArrayLike, rate_b: ArrayLike, quality_b: ArrayLike, *, method: str = "pchip"
) -> Delta:
    """Bjøntegaard delta rate of B against A.

    Args:
        rate_a, quality_a, rate_b, quality_b: points of both curves, at least 4 each; higher quality is better.
        method: ``pchip`` or ``akima``, through log rate as a function of quality.

    Example:
        >>> delta = bd_rate([1, 2, 4, 8], [30, 33, 36, 39], [2, 4, 8, 16], [30, 33, 36, 39])
        >>> round(delta.percent, 6)
        100.0
    """
    if method not in ("pchip", "akima"):
        raise UsageError(f"curves are interpolated by pchip or akima, got {method!r}")
    interpolate = require("scipy.interpolate", "eval")
    curves = []
    for name, rate, quality in (("A", rate_a, quality_a), ("B", rate_b, quality_b)):
        r, q = np.asarray(rate, np.float64), np.asarray(quality, np.float64)
        keep = np.isfinite(r) & np.isfinite(q) & (r > 0)
        r, q = r[keep], q[keep]
        order = np.argsort(r)
        r, q = r[order], q[order]
        if len(r) < 4:
            return Delta(None, f"curve {name} has {len(r)} points, 4 are needed")
        if (np.diff(q) <= 0).any():
            at = int(np.argmax(np.diff(q) <= 0))
            return Delta(None, f"curve {name} does not rise: {q[at]:.4g} at rate {r[at]:.4g}, {q[at + 1]:.4g} at {r[at + 1]:.4g}")
        curves.append((np.log(r), q))
    (log_a, qa), (log_b, qb) = curves
    low, high = max(qa[0], qb[0]), min(qa[-1], qb[-1])
    shorter = min(qa[-1] - qa[0], qb[-1] - qb[0])
    share = max(0.0, high - low) / shorter
    if share < LEAST_OVERLAP:
        return Delta(None, f"the curves share {share:.0%} of the shorter one's quality range, {LEAST_OVERLAP:.0%} are needed", None, share)
    kind = interpolate.PchipInterpolator if method == "pchip" else interpolate.Akima1DInterpolator
    areas = [float(kind(q, log).antiderivative()(high) - kind(q, log).antiderivative()(low)) for log, q in ((log_a, qa), (log_b, qb))]
    return Delta(100 * (math.exp((areas[1] - areas[0]) / (high - low)) - 1), "", (float(low), float(high)), share)


def paired(a: ArrayLike, b: ArrayLike, *, draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """Mean of b - a over pairs with a 95 % bootstrap interval, and the share of pairs where b is larger.

    Args:
        a, b: values of the same images in the same order.
        draws, seed: of the bootstrap.
    """
    difference = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    drawn = replicates(difference[:, None], np.ones((len(difference), 1)), draws, seed)[:, :1]
    low, high = quantiles(drawn, 0.95)
    return {
        "mean": float(difference.mean()), "low": float(low[0]), "high": float(high[0]), "n": len(difference), "larger": float((difference > 0).mean()),
    }  # fmt: skip


def compare(a: Path, b: Path, *, match: str = "rate") -> dict[str, Any]:
    """Compare the runs of two folders.

    Args:
        a, b: folders of ``tok eval``.
        match: ``rate`` pairs rates of one name; ``bytes`` gives each rate of B the rate of A whose mean bytes are nearest (within a third).

    Returns:
        ``pairs`` of rates with paired differences by column (B - A), and ``bd_rate`` by quality over ``bytes`` and ``file_bytes``.

    Raises:
        UsageError: measured under different conditions (spelt out), or no rates to pair.
    """
    from tok1d.eval.run import read_rows
    from tok1d.eval.summary import clean, load_summary

    sides = [load_summary(a), load_summary(b)]
    shared = [{k: s["conditions"][k] for k in ("protocol", "data", "measures")} for s in sides]
    require_same(shared[0], shared[1], (str(a), str(b)))
    tables = [_by_rate(read_rows(p, "images")) for p in (a, b)]
    pairs = []
    for one, other in _match(sides[0]["rates"], sides[1]["rates"], match):
        rows = [tables[0][one["rate"]], tables[1][other["rate"]]]
        columns = sorted(set(one["metrics"]) & set(other["metrics"]) - {"bpp", "file_bpp"})
        found = {}
        for column in columns:
            ids = sorted(i for i in rows[0].keys() & rows[1].keys() if all(_number(r[i].get(column)) for r in rows))
            if len(ids) >= 2:
                found[column] = paired([rows[0][i][column] for i in ids], [rows[1][i][column] for i in ids])
        pairs.append({"a": one["rate"], "b": other["rate"], "differences": found})
    if not pairs:
        raise UsageError(f"{a} and {b} have no rates in common ({_names(sides[0])}; {_names(sides[1])}); try --match bytes")
    curves = {}
    for cost in ("bytes", "file_bytes"):
        for column in _columns(sides):
            points = [[(r["metrics"][cost]["mean"], r["metrics"][column]["mean"]) for r in s["rates"] if {cost, column} <= set(r["metrics"])] for s in sides]
            sign = -1.0 if column.startswith(LOWER_IS_BETTER) else 1.0
            flat = [([p[0] for p in curve], [sign * p[1] for p in curve]) for curve in points]
            curves[f"{column} over {cost}"] = vars(bd_rate(*flat[0], *flat[1]))
    return clean({"a": str(a), "b": str(b), "systems": [s["conditions"]["system"] for s in sides], "pairs": pairs, "bd_rate": curves})


def _match(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], how: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    if how == "rate":
        held = {r["rate"]: r for r in a}
        return [(held[r["rate"]], r) for r in b if r["rate"] in held]
    if how != "bytes":
        raise UsageError(f"rates are matched by rate or bytes, got {how!r}")
    pairs = []
    for other in b:
        cost = other["metrics"].get("file_bytes", {}).get("mean")
        near = [(abs(math.log(r["metrics"]["file_bytes"]["mean"] / cost)), r) for r in a if cost and r["metrics"].get("file_bytes", {}).get("mean")]
        distance, one = min(near, key=lambda p: p[0], default=(math.inf, {}))
        if distance <= math.log(4 / 3):
            pairs.append((one, other))
    return pairs


def _columns(sides: Sequence[dict[str, Any]]) -> list[str]:
    held = [{c for r in s["rates"] for c in r["metrics"]} for s in sides]
    return sorted((held[0] & held[1]) - {"bytes", "file_bytes", "bpp", "file_bpp"})


def _by_rate(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["rate"], {})[row["id"]] = row
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _names(summary: dict[str, Any]) -> str:
    return ", ".join(r["rate"] for r in summary["rates"])
