"""Tables of the report: overview, words and faces by size, sources, BD-rate, codebooks, failures."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from tok1d.eval.binned import BINS, Bins
from tok1d.eval.compare import Point, bd_of
from tok1d.eval.measures import Row
from tok1d.eval.report_data import Column, Run, as_value, binned
from tok1d.eval.report_html import Value, cell, details, line, note, number, row_head, table, text_cell
from tok1d.eval.text import SCORES, VARIANTS

SCORE_TITLES = {"acc": "T-ACC, words read exactly", "ned": "T-NED, 1 − edit distance / length"}
VARIANT_TITLES = {"raw": "every character counts", "caseless": "upper and lower case alike", "alnum": "letters and digits only, caseless"}
FAILURES = 50
NOT_MEASURED = "not measured"


def overview(runs: Sequence[Run], found: Sequence[Column]) -> str:
    """A row a system and rate."""
    rows = []
    tokens = any(run.kind == "tokenizer" for run in runs)
    for run, rate, first in _each(runs):
        cells = [cell(Value(run.tokens(rate)), "d"), cell(Value(run.bits(rate)), "d")] if tokens else []
        for column in found:
            value = column.find(rate)
            absent = any(r["ok"] for r in run.rates) and not any(column.find(r) is not None for r in run.rates)
            partial = column.counted or (value is not None and value.n is not None and value.n != rate["ok"])
            cells.append(cell(value, column.style, missing=NOT_MEASURED if absent else "–", count=partial))
        rows.append(line(row_head(run.label, rate["rate"]), text_cell(f"{rate['ok']} / {rate['images']}"), *cells, first=first))
    head = ["system, rate", "images ok", *(("tokens", "bits, nominal") if tokens else ()), *(c.arrow for c in found)]
    said = "Below each mean: its 95 % interval (bootstrap over images), and n where it covers other than the images that have a picture."
    return _table(head, rows, left=1) + note(said)


def text_tables(runs: Sequence[Run]) -> str:
    """T-ACC and T-NED by size, with ceiling and chance; variants, and the words that can be read at all, folded."""
    runs = [r for r in runs if any("all" in rate.get("measures", {}).get("text", {}) for rate in r.rates)]
    if not runs:
        return ""
    bins = _bins(runs[0], "text")
    parts = [f"<h3>{SCORE_TITLES[s]}</h3>" + _text(runs, bins, "all", s, "raw") for s in SCORES]
    for variant in VARIANTS[1:]:
        body = "".join(f"<h3>{SCORE_TITLES[s]}</h3>" + _text(runs, bins, "all", s, variant) for s in SCORES)
        parts.append(details(f"Other counting: {VARIANT_TITLES[variant]}", body))
    body = "".join(
        f"<h3>{SCORE_TITLES[s]}; {VARIANT_TITLES[v]}</h3>" + _text(runs, bins, "recognisable", s, v) for s in SCORES for v in VARIANTS
    )
    parts.append(details("Only words that are read right on the originals", body))
    return "".join(parts)


def _text(runs: Sequence[Run], bins: Bins, words: str, score: str, variant: str) -> str:
    keys = [*bins.labels, "macro", "micro"]
    rows = []
    ceiling = runs[0].rates[0].get("measures", {}).get("text", {})
    if words == "all" and "ceiling" in ceiling:
        cells = [cell(as_value(ceiling["ceiling"].get(f"t_{score}_{variant}", {}).get(k), "words"), "%", count=True) for k in keys]
        rows.append(line(row_head("originals", "ceiling"), *cells, *[text_cell("")] * (len(keys) if variant == "raw" else 0)))
    for run, rate, first in _each(runs):
        cells = [cell(binned("text", words, f"t_{score}_{variant}", k)(rate), "%", count=True) for k in keys]
        if variant == "raw":  # what readings of other words of the bin would score
            cells += [cell(binned("text", words, f"chance_{score}", k)(rate), "%") for k in keys]
        rows.append(line(row_head(run.label, rate["rate"]), *cells, first=first))
    sizes = [*(f"{label} {_edges(bins, i)}" for i, label in enumerate(bins.labels)), "macro", "micro"]
    groups = [("mean", len(keys)), ("chance floor", len(keys))] if variant == "raw" else []
    return _table(["system, rate", *sizes, *(keys if variant == "raw" else ())], rows, groups)


def face_tables(runs: Sequence[Run]) -> str:
    """F-Sim by size with the chance floor, the share that passes verification, and quantiles of the cosine."""
    runs = [r for r in runs if any("f_sim" in rate.get("measures", {}).get("faces", {}) for rate in r.rates)]
    if not runs:
        return ""
    bins = _bins(runs[0], "faces")
    keys = [*bins.labels, "macro", "micro"]
    verified = next((rate["measures"]["faces"]["verified"] for r in runs for rate in r.rates if "verified" in rate.get("measures", {}).get("faces", {})), None)
    quantiles = sorted({q for r in runs for rate in r.rates for q in rate.get("measures", {}).get("faces", {}).get("quantiles", {})}, key=float)
    rows, spread = [], []
    for run, rate, first in _each(runs):
        head = row_head(run.label, rate["rate"])
        cells = [cell(binned("faces", "f_sim", k)(rate), count=True) for k in keys] + [cell(binned("faces", "chance", k)(rate)) for k in keys]
        cells += [cell(binned("faces", "verified", k)(rate), "%") for k in keys] if verified else []
        rows.append(line(head, *cells, first=first))
        spread.append(line(head, *(cell(binned("faces", "quantiles", q)(rate)) for q in quantiles), first=first))
    sizes = [*(f"{label} {_edges(bins, i)}" for i, label in enumerate(bins.labels)), "macro", "micro"]
    groups = [("cosine to the original", len(keys)), ("chance: to another person", len(keys))]
    if verified:
        groups.append((f"passes verification (cosine ≥ {number(verified['threshold'])})", len(keys)))
    parts = [_table(["system, rate", *sizes, *keys * (len(groups) - 1)], rows, groups)]
    pairs = as_value(runs[0].rates[0].get("measures", {}).get("faces", {}).get("two_photos"), "pairs")
    if pairs is not None and pairs.mean is not None:
        parts.append(note(f"Two photos of one person: cosine {number(pairs.mean)} on average over {pairs.n} pairs of originals."))
    if quantiles:
        parts.append(details("Quantiles of the cosine", _table(["system, rate", *(f"{float(q):.0%}" for q in quantiles)], spread)))
    return "".join(parts)


def group_tables(runs: Sequence[Run], found: Sequence[Column]) -> str:
    """Means by source of the images, where there are several; from the rows."""
    from tok1d.eval.bootstrap import clustered_intervals
    from tok1d.eval.summary import column_means
    from tok1d.eval.text import text_scores

    groups = sorted({str(r["group"]) for run in runs for r in run.rows("images") if r.get("group")})
    if len(groups) < 2:
        return ""
    wanted = {c.key: c for c in found if c.better and "/" not in c.key and not c.counted}
    tables: dict[str, list[str]] = {}
    for run, rate, first in _each(runs):
        head = row_head(run.label, rate["rate"])
        own = [r for r in run.rows("images") if r["rate"] == rate["rate"] and r["status"] == "ok"]
        means = [column_means([r for r in own if str(r.get("group")) == g]) for g in groups]
        for key in wanted:
            cells = [cell(as_value(m.get(key)), count=True) for m in means]
            tables.setdefault(wanted[key].arrow, []).append(line(head, *cells, first=first))
        for name, key, style in (("words", "T-ACC ↑", "%"), ("faces", "F-Sim ↑", "g")):
            kept = [r for r in run.rows(name) if r["rate"] == rate["rate"] and r.get("read" if name == "words" else "similarity") is not None]
            if not kept:
                continue
            bins = _bins(run, "text" if name == "words" else "faces")
            cells = []
            for group in groups:
                some = [r for r in kept if str(r["group"]) == group]
                scores = (
                    text_scores([r["truth"] for r in some], [r["read"] for r in some], "acc", "raw").numpy()
                    if name == "words"
                    else [r["similarity"] for r in some]
                )
                micro = clustered_intervals(scores, [r["scale"] for r in some], [r["id"] for r in some], bins)["micro"]
                cells.append(cell(Value(micro.mean, micro.low, micro.high, micro.n, name), style, count=True))
            tables.setdefault(key, []).append(line(head, *cells, first=first))
    return "".join(details(title, _table(["system, rate", *groups], rows)) for title, rows in tables.items())


def bd_tables(runs: Sequence[Run], found: Sequence[Column]) -> str:
    """Difference in rate at equal quality, of each pair of curves."""
    curves = [r for r in runs if r.kind != "resize" and len(r.rates) > 1]
    quality = [c for c in found if c.better and any(c.find(rate) for r in curves for rate in r.rates)]
    rows = []
    costs: list[tuple[str, Callable[[Run, Row], float | None]]] = [
        ("bytes of files", lambda run, rate: rate["metrics"].get("file_bytes", {}).get("mean")),
        ("bytes of payload", lambda run, rate: rate["metrics"].get("bytes", {}).get("mean")),
        ("tokens", lambda run, rate: run.tokens(rate)),
    ]
    for i, a in enumerate(curves):
        for b in curves[i + 1 :]:
            for name, cost in costs:
                if name == "tokens" and not a.kind == b.kind == "tokenizer":
                    continue
                cells = [_delta([_points(run, column, cost) for run in (a, b)], column, (a.label, b.label)) for column in quality]
                rows.append(line(row_head(f"{b.label} against {a.label}", name), *_joined(cells), first=name == costs[0][0] and bool(rows)))
    if not rows:
        return ""
    said = "Mean difference in rate at equal quality (Bjøntegaard, PCHIP through the logarithm of the rate). Negative: the first needs less."
    return "<h3>BD-rate</h3>" + _table(["curves, cost", *(c.title for c in quality)], rows) + note(said)


def _joined(cells: Sequence[str]) -> list[str]:
    """Neighbours that give one reason become one cell."""
    found = []
    for content, same in groupby(cells):
        many = list(same)
        if len(many) > 1 and "data-v" not in content:
            many = [content.replace("<td ", f'<td colspan="{len(many)}" ', 1)]
        found += many
    return found


def _points(run: Run, column: Column, cost: Callable[[Run, Row], float | None]) -> list[Point]:
    held = [(cost(run, rate), column.find(rate), rate["ok"]) for rate in run.rates]
    return [Point(float(c), v.mean, ok if v.n is None else v.n) for c, v, ok in held if c and v is not None and v.mean is not None]


def _delta(curves: list[list[Point]], column: Column, labels: tuple[str, str]) -> str:
    if not all(curves):
        return text_cell(NOT_MEASURED, muted=True)
    delta = bd_of(curves[0], curves[1], column.better)
    if delta.percent is None:
        reason = re.sub(r"\bcurve ([AB])\b", lambda m: labels["AB".index(m[1])], delta.reason)
        return text_cell(reason, muted=True, wrap=True)
    sign = "+" if delta.percent > 0 else "−"
    low, high = sorted(abs(q) for q in delta.overlap or (0.0, 0.0))
    return (
        f'<td data-v="{delta.percent!r}">{sign}{abs(delta.percent):.1f}\u00a0%<small>{number(low, column.style)}–{number(high, column.style)}</small></td>'
    )


def codebook_table(runs: Sequence[Run]) -> str:
    """Usage, perplexity and bits of the tokens."""
    rows = []
    for run, rate, first in _each(runs):
        codes = rate.get("measures", {}).get("codes")
        if not codes:
            continue
        vocabulary = float(run.system.get("vocab_size") or math.nan)
        share = codes["distinct"] / vocabulary if vocabulary > 0 else math.nan
        cells = [cell(Value(codes["tokens"]), "d"), cell(Value(codes["distinct"]), "d"), cell(Value(share), "%"), cell(Value(codes["perplexity"]))]
        cells += [cell(Value(codes.get(k))) for k in ("entropy_bits", "bit_entropy_mean")]
        cells += [cell(Value(run.bits(rate)), "d"), cell(Value(codes["static_bits_per_image"]))]
        rows.append(line(row_head(run.label, rate["rate"]), *cells, first=first))
    if not rows:
        return ""
    head = ["tokens counted", "codes met", "of vocabulary", "perplexity", "entropy (bits)", "entropy of a bit", "bits an image, nominal", "after static coding"]
    said = "Estimates from the tokens counted: few images beside the vocabulary make entropy, perplexity and static bits too low."
    return _table(["system, rate", *head], rows) + note(said)


def failures(runs: Sequence[Run]) -> str:
    """What has no picture or no score, by status, with names."""
    counts: list[str] = []
    names: list[str] = []
    for run in runs:
        tables = [("images", {r["rate"]: r["failed"] for r in run.rates if r["failed"]})]
        for measure, kind in (("text", "words"), ("faces", "faces")):
            held = {r["rate"]: r.get("measures", {}).get(measure, {}).get("statuses", {}) for r in run.rates}
            tables.append((kind, {k: {s: n for s, n in v.items() if s != "ok"} for k, v in held.items() if set(v) - {"ok"}}))
        for kind, by_rate in tables:
            whole: Counter[str] = Counter()
            for rate, found in by_rate.items():
                whole.update(found)
                counts += [line(row_head(run.label, rate), text_cell(kind), text_cell(status, wrap=True), cell(Value(n), "d")) for status, n in found.items()]
            rows = [r for r in run.rows(kind) if r.get("status") != "ok" and r.get("rate") != "original"] if whole else []
            seen: dict[tuple[str, str], list[str]] = {}
            for r in rows:
                name = str(r["id"]) if kind == "images" else f"{r['id']}, {kind[:-1]} {r[kind[:-1]]}"
                seen.setdefault((name, str(r["status"])), []).append(str(r["rate"]))
            some = list(seen.items())[:FAILURES]
            names += [line(row_head(run.label), *(text_cell(t, wrap=True) for t in (n, s, ", ".join(at)))) for (n, s), at in some]
            if len(seen) > FAILURES:
                names.append(line(row_head(run.label), text_cell(f"and {len(seen) - FAILURES} more {kind}", muted=True)))
    if not counts:
        return ""
    body = _table(["system, rate", "of", "status", "how many"], counts, left=2)
    return body + (details("Names", _table(["system", "name", "status", "rates"], names, left=3)) if names else "")


def _each(runs: Sequence[Run]) -> Iterator[tuple[Run, Row, bool]]:
    for run in runs:
        for i, rate in enumerate(run.rates):
            yield run, rate, i == 0 and run is not runs[0]


def _table(head: Sequence[str], rows: Sequence[str], groups: Sequence[tuple[str, int]] = (), left: int = 0) -> str:
    return table(head, rows, groups=groups, left=left, tall=len(rows) > 24)


def _bins(run: Run, measure: str) -> Bins:
    name = run.conditions.get("measures", {}).get(measure, {}).get("bins", "")
    return BINS.get(name, Bins(str(name), (0.0, 1.0, 2.0, 3.0)))


def _edges(bins: Bins, i: int) -> str:
    low, high = bins.edges[i], bins.edges[i + 1]
    return f"({low:g} – {high:g})" if high < 1 else f"(≥ {low:g})"
