"""One page of one or more runs: tables, curves, codebooks, pictures, failures; a single HTML file, and its plots as PNG.

The page is a function of the runs alone: the same runs give the same bytes. What a run lacks is left out and said.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tok1d.disk import atomic_write
from tok1d.errors import UsageError
from tok1d.eval import report_pictures as pictures
from tok1d.eval import report_plots as plots
from tok1d.eval import report_tables as tables
from tok1d.eval.report_data import Column, Run, as_json, columns, curves, load_runs, versions_differ
from tok1d.eval.report_html import (
    Value,
    cell,
    details,
    esc,
    line,
    note,
    page,
    plot,
    row_head,
    section,
    table,
    text_cell,
)

ANCHORS = {
    "overview": "Overview", "curves": "Rate and quality", "text": "Text", "faces": "Faces", "sources": "By source", "codes": "Codebooks",
    "pictures": "Pictures", "failures": "Failures", "provenance": "Provenance",
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: the HTML file.
        images: PNG files, and ``curves.json``.
        notes: what could not be shown.
    """

    page: Path
    images: list[Path]
    notes: list[str]


def make_report(paths: Sequence[Path], output: Path, images: Path | None = None, *, gallery: int = 4) -> Report:
    """Write a report.

    Args:
        paths: folders of ``tok eval`` runs, or folders that hold some; tokenizers are shown first, codecs and resizes last.
        output: the HTML file.
        images: folder of the PNG files and of ``curves.json``; none are written if None.
        gallery: images shown at every rate, and words and faces of each size, of those that the runs kept (8, and 6 faces); a
            quarter as many best and worst of each rate. The bytes of the page are mostly theirs.

    Raises:
        TokError: no run there, or a damaged one.
        UsageError: runs of different data or protocols, or ``output`` is not named as a page.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"a report is an HTML file, got {output}; name it report.html")
    runs = sorted(load_runs(paths), key=lambda run: ("tokenizer", "folder", "codec", "resize", run.kind).index(run.kind))
    text, drawn = render(runs, gallery)
    for folder in {output.parent, *([images] if images else ())}:
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write(output, text.encode("utf-8"))
    written = []
    drawn["curves.json"] = (json.dumps(curves(runs, columns(runs)), indent=1, ensure_ascii=False) + "\n").encode()
    for name, data in drawn.items() if images else ():
        path = images / name  # type: ignore[operator]
        atomic_write(path, data)
        written.append(path)
    return Report(output, written, _notes(runs))


def render(runs: Sequence[Run], gallery: int = 4) -> tuple[str, dict[str, bytes]]:
    """The page, and its plots and grids of pictures as PNG by file name."""
    drawn: dict[str, bytes] = {}
    found = columns(runs)
    parts = {
        "overview": tables.overview(runs, found),
        "curves": _curves(runs, found, drawn) + tables.bd_tables(runs, found),
        "text": _by_size(runs, "text", drawn) + tables.text_tables(runs) + _shots("Words", pictures.words(runs, gallery)),
        "faces": _by_size(runs, "faces", drawn) + tables.face_tables(runs) + _shots("Faces", pictures.faces(runs, gallery)),
        "sources": tables.group_tables(runs, found),
        "codes": _positions(runs, drawn) + tables.codebook_table(runs),
        "pictures": pictures.fixed(runs, gallery) + "".join(pictures.extremes(run, -(-gallery // 4)) for run in runs),
        "failures": tables.failures(runs) or note("None: every image has a picture at every rate, every word and face a score."),
        "provenance": _provenance(runs),
    }
    for run in runs:
        grid = pictures.grid(run)
        if grid is not None:
            drawn[f"pictures_{_file(run.label)}.png"] = grid
    chapters = [section(anchor, ANCHORS[anchor], part) for anchor, part in parts.items()]
    links = "".join(f'<a href="#{a}">{esc(ANCHORS[a])}</a>' for a, part in parts.items() if part)
    data = runs[0].conditions["data"]
    title = f"{', '.join(run.label for run in runs)} on {data['name']}"
    warnings = "".join(f'<p class="warn">{esc(n)}</p>' for n in _notes(runs))
    return page(title, f"{_header(runs, title)}<nav>{links}</nav>{warnings}{''.join(chapters)}"), drawn


def _header(runs: Sequence[Run], title: str) -> str:
    asked = runs[0].conditions
    rule, data = asked["protocol"], asked["data"]
    dates = sorted({str(r.summary.get("provenance", {}).get("date", "")) for r in runs} - {""})
    nets = {str(n) for r in runs for m in r.conditions.get("measures", {}).values() for k, n in m.items() if k in ("net", "recogniser", "embedder")}
    facts = {
        "data": f"{data['name']}, {data['images']} images, hash {data['hash']}",
        "protocol": f"{rule['id']}: {rule['note']}" if rule.get("note") else rule["id"],
        "view": f"{rule['size']} × {rule['size']} pixels, {rule['fit']}, {rule['resample']}; text and faces judged in "
        + ("the view" if rule["space"] == "model" else "pictures brought back to their original size"),
        "size bins": f"{rule['text_bins']}, {rule['face_bins']}",
        "networks": ", ".join(sorted(nets)),
        "measured": dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "",
    }
    rows = "".join(f"<dt>{esc(k)}</dt><dd>{esc(v)}</dd>" for k, v in facts.items() if v)
    made = sorted({str(r.summary.get("provenance", {}).get("versions", {}).get("tok1d", "")) for r in runs} - {""})
    counts = [f"{len(items)} {name}{'s' * (len(items) != 1)}" for name, items in (("system", runs), ("rate", [x for r in runs for x in r.rates]))]
    lead = f"Measured with tok1d {', '.join(made)}: {', '.join(counts)}, {data['images']} images".replace("tok1d :", "tok1d:")
    return f'<h1>{esc(title)}</h1><p class="lead">{esc(lead)}</p><dl>{rows}</dl>'


def _curves(runs: Sequence[Run], found: Sequence[Column], drawn: dict[str, bytes]) -> str:
    parts = []
    for column in found:
        if column.better and not column.key.startswith("cosine_"):
            panels = plots.rate_panels(column, runs)
            said = {1: "higher is better", -1: "lower is better"}[column.better]
            parts.append(_plot(panels, column.key, f"{column.title}, {said}", column.style, drawn))
    lines = "Lines: solid, tokenizers; dashed, codecs; dotted, files made elsewhere. Bands: 95 % intervals over images."
    return (note(lines) if any(parts) else "") + "".join(parts)


def _by_size(runs: Sequence[Run], measure: str, drawn: dict[str, bytes]) -> str:
    from tok1d.eval.binned import BINS

    names = [r.conditions.get("measures", {}).get(measure, {}).get("bins") for r in runs]
    labels = next((BINS[n].labels for n in names if n in BINS), ())
    if measure == "faces":
        return _plot(plots.bin_panels("faces", ["f_sim"], ["chance"], labels, runs), "faces_by_size", "F-Sim, higher is better", "g", drawn)
    return "".join(
        _plot(plots.bin_panels("text", ["all", f"t_{s}_raw"], ["all", f"chance_{s}"], labels, runs), f"t_{s}_by_size", f"{t}, higher is better", "%", drawn)
        for s, t in (("acc", "T-ACC"), ("ned", "T-NED"))
    )


def _positions(runs: Sequence[Run], drawn: dict[str, bytes]) -> str:
    return _plot(plots.position_panels(runs), "entropy_by_position", "entropy (bits)", "g", drawn)


def _plot(panels: Sequence[plots.Panel], name: str, label: str, style: str, drawn: dict[str, bytes]) -> str:
    if not panels:
        return ""
    drawn[f"{_file(name)}.png"] = plots.draw(panels, label, style=style)
    return plot(plots.lossless_webp(drawn[f"{_file(name)}.png"]), label, narrow=len(panels) < 3)


def _shots(title: str, shown: str) -> str:
    return f"<h3>{esc(title)} at every rate</h3>{shown}" if shown else ""


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = list(dict.fromkeys(n for run in runs for n in run.notes))
    changed = versions_differ(runs)
    if changed:
        notes.append(f"The runs were made with different software or machines: {'; '.join(changed)}")
    empty = [run.label for run in runs if not any(r["ok"] for r in run.rates)]
    return notes + [f"{label} has no picture of any image" for label in empty]


def _provenance(runs: Sequence[Run]) -> str:
    rows, versions = [], sorted({k for r in runs for k in r.summary.get("provenance", {}).get("versions", {})})
    packages = []
    for run in runs:
        made = run.summary.get("provenance", {})
        described = ", ".join(f"{k} {_short(v)}" for k, v in run.system.items() if v not in (None, {}, ""))
        speed = [cell(Value(made.get(k)), style) for k, style in (("seconds", "g"), ("images_per_second", "g"), ("peak_memory_mib", "d"))]
        machine = ", ".join(str(made[k]) for k in ("machine", "gpu") if made.get(k))
        rows.append(line(row_head(run.label), text_cell(described, wrap=True), text_cell(made.get("date", "")), text_cell(machine, wrap=True), *speed))
        packages.append(line(row_head(run.label), *(text_cell(made.get("versions", {}).get(k, "–")) for k in versions)))
    measures = [
        line(row_head(run.label), text_cell(name), text_cell(", ".join(f"{k} {_short(v)}" for k, v in settings.items()), wrap=True))
        for run in runs
        for name, settings in run.conditions.get("measures", {}).items()
    ]
    return "".join((
        table(["system", "what it is", "date", "machine", "seconds", "images/s", "peak memory (MiB)"], rows, left=3),
        note("Seconds are those of the last go of a run: reading, coding and measuring together."),
        details("Measures and their networks", table(["system", "measure", "settings"], measures, left=2)),
        details("Versions", table(["system", *versions], packages, left=len(versions))),
        *(details(f"{run.label}: summary.json", f"<pre>{html.escape(as_json(run), quote=False)}</pre>") for run in runs),
    ))  # fmt: skip


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k}={_short(v)}" for k, v in value.items())
    return ", ".join(map(_short, value)) if isinstance(value, list | tuple) else str(value)


def _file(name: str) -> str:
    """A safe file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "plot"
