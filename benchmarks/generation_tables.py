"""Write the tables of docs/generation.md from the rows of tok1d/generators/presets.py and from benchmarks/results/*.json.

    python -m benchmarks.generation_tables            rewrites what stands between <!-- table NAME --> and <!-- end -->
    python -m benchmarks.generation_tables --check    exit code 1 if that would change the document
"""

from __future__ import annotations

import re
import sys
from typing import Any

from benchmarks.record import ROOT, load
from benchmarks.tables import table
from tok1d.generators.presets import GENERATORS, GeneratorPreset, sampling_line

DOCUMENT = ROOT / "docs" / "generation.md"


def published() -> str:
    """A row for each published generator."""

    def line(p: GeneratorPreset) -> list[str]:
        count = f"{p.parameters / 1e6:.1f} M" if p.parameters < 1e9 else f"{p.parameters / 1e9:.2f} G"
        printed = ", ".join(f"{name} {value:g}" for name, value in p.printed.items()) or "–"
        where = "ships with tok1d" if p.where == "package" else ", ".join(w.removeprefix("hub:") for w in (p.where, *p.also))
        return [f"`{p.name}`", f"`{p.tokenizer}`", str(p.tokens), count, sampling_line(p), p.licence, where, printed]

    head = ["name", "tokenizer", "tokens", "parameters", "their sampling", "licence", "where", "printed by its paper"]
    return table(head, [line(p) for p in GENERATORS])


def cached() -> str:
    """Autoregressive sampling with and without a cache."""
    own = load("generator_speed")
    if own is None:
        return "Not measured yet: `python -m benchmarks.generator_speed`."
    head = ["images at once", "tokens", "with a cache, s", "without, s", "ratio", "tokens/s", "cache, MiB", "largest difference of states"]
    rows = [
        [
            str(r["batch"]), str(r["tokens"]), f"{r['cached_s']:.2f}", f"{r['plain_s']:.1f}", f"{r['ratio']:.1f}", f"{r['cached_tokens_per_s']:.0f}",
            f"{r['cache_bytes'] / 2**20:.0f}", f"{r['max_error']:.0e}",
        ]
        for r in own["rows"]
    ]  # fmt: skip
    return f"{_model(own)}, guidance {own['guidance']:g}; median of {own['rows'][0]['repeats']}. {_machine(own)}\n\n{table(head, rows)}"


def masked() -> str:
    """Masked sampling, a guided step as one forward or two."""
    own = load("masked_speed")
    if own is None:
        return "Not measured yet: `python -m benchmarks.masked_speed`."
    head = ["images at once", "schedule", "steps", "one forward of twice the rows, s", "two forwards, s", "ratio"]
    rows = [
        [str(r["batch"]), r["schedule"], str(r["steps"]), f"{r['ours_cpu_s']:.2f}", f"{r['plain_cpu_s']:.2f}", f"{r['ratio']:.2f}"] for r in own["rows"]
    ]
    return f"{_model(own)}, {own['tokens']} tokens, guidance {own['guidance']:g}; processor seconds. {_machine(own)}\n\n{table(head, rows)}"


def comparison() -> str:
    """Kinds of generators after the same processor time, and one kind at several lengths."""
    own = load("generator_comparison")
    if own is None:
        return "Not measured yet: `python -m benchmarks.generator_comparison`."
    head = ["generator", "tokens", "steps", "guidance", "Fréchet distance", "to photos", "precision", "recall", "class accuracy", "images/s", "with decoder"]
    rows = []
    for one in own["variants"].values():
        for g, found in one["guidance"].items():
            speed = [f"{found['images_per_second']:.1f}", f"{found['images_per_second_painted']:.1f}"]
            rows.append([one["what"], str(one["tokens"]), f"{one['steps']:,}", g, *_distances(found), *speed])
    rows += [["photos for validation, encoded and decoded", tokens, "", "", *_distances(found), "", ""] for tokens, found in sorted(own["ceiling"].items(), key=lambda i: int(i[0]))]
    few, most = (f(v["parameters"] for v in own["variants"].values()) / 1e6 for f in (min, max))
    told = own["protocol"]
    about = f"{few:.1f} to {most:.1f} M parameters, {told['minutes']:g} minutes of processor time, {told['samples']}; features of {told['features']}. {_machine(own)}"
    return f"{about}\n\n{table(head, rows)}"


def _distances(found: dict[str, Any]) -> list[str]:
    return [
        f"{found['frechet']:.1f}", f"{found['frechet_photos']:.0f}", f"{found['precision']:.2f}", f"{found['recall']:.2f}", f"{found['class_accuracy']:.0%}",
    ]  # fmt: skip


def _model(own: dict[str, Any]) -> str:
    return f"{own['parameters'] / 1e6:.1f} M parameters of random values ({own['depth']} blocks of width {own['width']}), {own['vocab']:,} ids, {own['dtype']}"


def _machine(own: dict[str, Any]) -> str:
    m = own["machine"]
    threads = f"{m['threads']} thread{'s' if m['threads'] > 1 else ''}"
    return f"{m['cpu']}, {threads} of {m['cores']} cores, load {m['load_average']}, torch {m['torch']}, {own['date'][:10]}."


TABLES = {"published": published, "cached": cached, "masked": masked, "comparison": comparison}


def main(check: bool) -> int:
    text = DOCUMENT.read_text("utf-8")
    made = re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", lambda m: f"<!-- table {m[1]} -->\n{TABLES[m[1]]()}\n<!-- end -->", text, flags=re.DOTALL)
    if check:
        return int(made != text)
    DOCUMENT.write_text(made, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
