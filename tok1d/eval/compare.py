"""Compare two runs: paired differences on the same images, words and faces with intervals, and the Bjøntegaard delta of their curves.

Runs are compared only when data, protocol and the networks of shared measures are the same (:func:`tok1d.eval.protocol.require_same`).
BD-rate: G. Bjøntegaard, VCEG-M33 (2001); interpolated by PCHIP, through points that cover all images, with a test that the curves
overlap — otherwise there is no number, but a reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tok1d.errors import UsageError
from tok1d.eval.bootstrap import by_cluster, quantiles, replicates
from tok1d.eval.protocol import require_same
from tok1d.extras import require

LOWER_IS_BETTER = ("lpips", "dists", "mae", "fd_", "fid", "kernel_distance", "bytes", "bpp")
FLOOR = 0.1  # of a curve's quality range: lowest points that do not rise by so much lie at the floor of the measure, as chance is one
LEAST_OVERLAP = 0.25  # of the shorter quality range; less is extrapolation in disguise
COSTS = ("bytes", "file_bytes")


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


@dataclass(frozen=True)
class Point:
    """One point of a curve.

    Attributes:
        rate: bytes, bits or tokens of an image.
        quality: mean.
        covers: images, words or faces that the mean covers.
    """

    rate: float
    quality: float
    covers: int


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
            return Delta(None, f"curve {name} has {len(r)} point{'s' * (len(r) != 1)}, 4 are needed")
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


def bd_of(a: Sequence[Point], b: Sequence[Point], better: int = 1) -> Delta:
    """:func:`bd_rate` of the points that cover everything and lie above the floor of their measure.

    A mean over other images is no point of the same curve. Lowest rates whose quality is that of chance, up and down by noise, say
    nothing about rates; other falls of a curve stay a reason not to compare.

    Args:
        a, b: points of both curves.
        better: 1 if more is better, -1 if less.
    """
    most = max((p.covers for p in (*a, *b)), default=0)
    curves, left = [], []
    for name, points in (("A", a), ("B", b)):
        whole = [p for p in points if p.covers == most]
        left += [f"{len(points) - len(whole)} of curve {name}"] if len(whole) < len(points) else []
        curves.append(_above_floor([(p.rate, better * p.quality) for p in sorted(whole, key=lambda p: p.rate)]))
    delta = bd_rate(*[[p[i] for p in curve] for curve in curves for i in (0, 1)])
    if better < 0:  # a reason speaks of the measure as it is
        delta = replace(delta, reason=re.sub(r"-(?=[\d.]+(?:e[-+]?\d+)? at )", "", delta.reason).replace("does not rise", "does not fall"))
    if delta.percent is None and left:
        return replace(delta, reason=f"{delta.reason}; rates that do not cover all {most} are left out: {', '.join(left)}")
    return delta


def _above_floor(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Without the lowest points that the next one does not exceed, if they lie in the lowest part of the quality range."""
    quality = [q for _, q in points]
    falls = [i for i in range(len(quality) - 1) if quality[i + 1] <= quality[i]]
    start = falls[-1] + 1 if falls else 0
    at_floor = all(q <= min(quality) + FLOOR * (max(quality) - min(quality)) for q in quality[:start])
    return points[start:] if at_floor else points


def paired(a: ArrayLike, b: ArrayLike, clusters: Sequence[str] | None = None, *, draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """Mean of b - a over pairs with a 95 % bootstrap interval, and the share of pairs where b is larger.

    Args:
        a, b: values of the same images, words or faces in the same order.
        clusters: the image of each pair, drawn together or not at all; each pair is its own if None.
        draws, seed: of the bootstrap.
    """
    difference = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    names = np.arange(len(difference)).astype(np.str_) if clusters is None else np.asarray(clusters, np.str_)
    sums, counts, _ = by_cluster(difference, np.zeros(len(difference), np.int64), names, 1)
    low, high = quantiles(replicates(sums, counts, draws, seed)[:, :1], 0.95)
    return {
        "mean": float(difference.mean()), "low": float(low[0]), "high": float(high[0]), "n": len(difference), "larger": float((difference > 0).mean()),
    }  # fmt: skip


def compare(a: Path, b: Path, *, match: str = "rate") -> dict[str, Any]:
    """Compare two runs.

    Args:
        a, b: folders of ``tok eval``, or their summaries alone, which have no rows to pair.
        match: ``rate`` pairs rates of one name; ``bytes`` gives each rate of B the rate of A whose mean bytes are nearest (within a third);
            ``none`` pairs nothing, for curves alone.

    Returns:
        ``pairs`` of rates with paired differences by column (B - A), ``bd_rate`` by quality over ``bytes`` and ``file_bytes``, and ``notes``.

    Raises:
        UsageError: measured under different conditions (spelt out), or no rates to pair.
    """
    from tok1d.eval.summary import clean, load_summary

    sides = [load_summary(a), load_summary(b)]
    held = [s["conditions"]["measures"] for s in sides]
    # Nets of the perceptual measure are columns of their own; what one side did not measure is not compared.
    shared = held[0].keys() & held[1].keys() - {"perceptual"}
    both = [{**{k: s["conditions"][k] for k in ("protocol", "data")}, "measures": {k: m[k] for k in shared}} for s, m in zip(sides, held)]
    require_same(both[0], both[1], (str(a), str(b)))
    notes = [f"only {path} measured {', '.join(sorted(m.keys() - o.keys()))}" for path, m, o in ((a, *held), (b, *held[::-1])) if m.keys() - o.keys()]
    tables = [_values(p if p.is_dir() else p.parent) for p in (a, b)]
    notes += [f"{path} has no rows beside it: no paired differences" for path, table in zip((a, b), tables) if not table]
    matched = _match(sides[0]["rates"], sides[1]["rates"], match)
    if not matched and match != "none":
        raise UsageError(f"{a} and {b} have no rates in common ({_names(sides[0])}; {_names(sides[1])}); try --match bytes")
    pairs = [{"a": r["rate"], "b": s["rate"], "differences": _differences(tables[0].get(r["rate"], {}), tables[1].get(s["rate"], {}))} for r, s in matched]
    curves = {}
    for cost in COSTS:
        points = [[_points(r, cost) for r in s["rates"]] for s in sides]
        names = [{k for rate in side for k in rate} for side in points]
        for column in sorted(names[0] & names[1]):
            one, other = ([rate[column] for rate in side if column in rate] for side in points)
            curves[f"{column} over {cost}"] = vars(bd_of(one, other, -1 if column.startswith(LOWER_IS_BETTER) else 1))
    whole = {"a": str(a), "b": str(b), "systems": [s["conditions"]["system"] for s in sides], "notes": notes, "pairs": pairs, "bd_rate": curves}
    return dict(clean(whole))


def _points(rate: dict[str, Any], cost: str) -> dict[str, Point]:
    """Every quality of a rate over its bytes: means of columns, T-ACC, T-NED, F-Sim, Fréchet distances."""
    at = rate["metrics"].get(cost, {}).get("mean")
    if not _number(at):
        return {}
    found = {k: (m.get("mean"), m.get("n", 0)) for k, m in rate["metrics"].items() if k not in (*COSTS, "bpp", "file_bpp")}
    measures = rate.get("measures", {})
    for measure, path, name in (("text", ("all", "t_acc_raw"), "t_acc"), ("text", ("all", "t_ned_raw"), "t_ned"), ("faces", ("f_sim",), "f_sim")):
        held = measures.get(measure, {})
        for key in (*path, "micro"):
            held = held.get(key) or {}
        found[name] = (held.get("mean"), held.get("n", 0))
    for measure, held in measures.items():
        if measure.startswith("features/"):
            found |= {k: (v, held.get("images", rate["ok"])) for k, v in held.items() if k.startswith(("fd_", "fid"))}
    return {name: Point(at, value, n) for name, (value, n) in found.items() if _number(value)}


def _values(folder: Path) -> dict[str, dict[str, dict[tuple[str, int], float]]]:
    """rate → column → (image, number of the word or face) → value, of the rows of a run."""
    from tok1d.eval.run import read_rows
    from tok1d.eval.text import text_scores

    found: dict[str, dict[str, dict[tuple[str, int], float]]] = {}
    for row in read_rows(folder, "images"):
        for column, value in row.items():
            if _number(value) and column not in ("bpp", "file_bpp"):
                found.setdefault(row["rate"], {}).setdefault(column, {})[row["id"], 0] = value
    words = [r for r in read_rows(folder, "words") if r["status"] == "ok" and r["read"] is not None]
    for score in ("acc", "ned"):
        values = text_scores([r["truth"] for r in words], [r["read"] for r in words], score, "raw").tolist()
        for row, value in zip(words, values):
            found.setdefault(row["rate"], {}).setdefault(f"t_{score}", {})[row["id"], row["word"]] = value
    for row in read_rows(folder, "faces"):
        if _number(row["similarity"]):
            found.setdefault(row["rate"], {}).setdefault("f_sim", {})[row["id"], row["face"]] = row["similarity"]
    return found


def _differences(a: dict[str, dict[tuple[str, int], float]], b: dict[str, dict[tuple[str, int], float]]) -> dict[str, dict[str, float]]:
    found = {}
    for column in sorted(a.keys() & b.keys()):
        keys = sorted(a[column].keys() & b[column].keys())
        if len(keys) >= 2:
            found[column] = paired([a[column][k] for k in keys], [b[column][k] for k in keys], [image for image, _ in keys])
    return found


def _match(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], how: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    if how == "rate":
        held = {r["rate"]: r for r in a}
        return [(held[r["rate"]], r) for r in b if r["rate"] in held]
    if how == "none":
        return []
    if how != "bytes":
        raise UsageError(f"rates are matched by rate, bytes or none, got {how!r}")
    pairs = []
    for other in b:
        cost = other["metrics"].get("file_bytes", {}).get("mean")
        near = [(abs(math.log(r["metrics"]["file_bytes"]["mean"] / cost)), r) for r in a if cost and r["metrics"].get("file_bytes", {}).get("mean")]
        distance, one = min(near, key=lambda p: p[0], default=(math.inf, {}))
        if distance <= math.log(4 / 3):
            pairs.append((one, other))
    return pairs


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names(summary: dict[str, Any]) -> str:
    return ", ".join(r["rate"] for r in summary["rates"])
