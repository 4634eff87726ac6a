"""Write the tables of docs/results.md and docs/training.md from benchmarks/results/*.json, so that text and numbers never drift apart.

    python -m benchmarks.tables            # rewrites what stands between <!-- table NAME --> and <!-- end -->
    python -m benchmarks.tables --check    # exit code 1 if that would change a document
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.plots import NAMES
from benchmarks.record import RESULTS, ROOT, load

DOCUMENTS = [ROOT / "docs" / "results.md", ROOT / "docs" / "training.md"]
COMMANDS = {
    "default_scores": "default_scores default DATA…",
    "linear_line": "linear_line --train DATA… --data DATA…",
    "image_codecs": "image_codecs DATA…",
    "codebook_usage": "codebook_usage default DATA…",
    "startup": "startup",
    "folder_throughput": "folder_throughput",
    "training_speed_cpu": "training_speed DATA… --sizes S,B --batch 4 --steps 6",
}
Result = dict[str, Any]
Results = dict[str, Result | None]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, nargs="+", default=DOCUMENTS)
    parser.add_argument("--check", action="store_true", help="change nothing, say whether the documents are up to date")
    args = parser.parse_args(argv)
    results, stale = {name: load(name, args.results) for name in COMMANDS}, 0
    for path in args.document:
        old = path.read_text(encoding="utf-8")
        new = fill(old, results)
        if args.check:
            print(f"{path.name} is {'up to date' if old == new else 'out of date: run python -m benchmarks.tables'}")
            stale |= old != new
        else:
            path.write_text(new, encoding="utf-8")
    return int(stale)


def fill(text: str, results: Results) -> str:
    """The document with every marked place rewritten.

    Raises:
        SystemExit: a marker names no table, or results that stand side by side were measured on different images.
    """

    def one(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise SystemExit(f"there is no table {match[1]!r}; there are {', '.join(TABLES)}")
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]](results)}\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", one, text, flags=re.DOTALL)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; all columns but the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def missing(*names: str) -> str:
    """What stands where nothing was measured yet."""
    runs = ", ".join(f"`python -m benchmarks.{COMMANDS[name]}`" for name in names)
    return f"Not measured yet: {runs}."


def scores(results: Results) -> str:
    """PSNR and LPIPS by number of tokens, with intervals."""
    own = results["default_scores"]
    if own is None:
        return missing("default_scores")
    parts = []
    for s in own["sets"]:
        rows = [
            [str(p["tokens"]), str(p["bits"]), str(p["payload_bytes"]), str(p["file_bytes"]), _with_interval(p["psnr"], 2), _with_interval(p["lpips"], 3)]
            for p in s["curve"]
        ]
        head = ["tokens", "bits", "payload bytes", ".tok file bytes", "PSNR, dB (95 % interval)", "LPIPS (95 % interval)"]
        order = "improve with every step" if s["monotone"] else "do **not** improve with every step"
        parts.append(f"**{s['set']}**, {s['images']} of {s['of']} images; means {order}.\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def by_payload(results: Results) -> str:
    """Token payload against whole codec files of the same number of bytes."""
    return _beside_codecs(results, "payload_bytes")


def by_file(results: Results) -> str:
    """Whole .tok files, header and checksum counted, against whole codec files."""
    return _beside_codecs(results, "file_bytes")


def _beside_codecs(results: Results, size: str) -> str:
    names = ("default_scores", "linear_line", "image_codecs")
    absent = [n for n in names if results[n] is None]
    if absent:
        return missing(*absent)
    parts = []
    for own, linear, codecs in _same_sets(*(results[n] for n in names)):  # type: ignore[arg-type]
        order = [c for c in ("webp", "avif", "jxl", "jpeg") if c in codecs["curves"]]
        head = ["bytes", "tok1d default", "linear, PCA 32×32", "linear, DCT 64×64", *(NAMES[c] for c in order)]
        rows = []
        for i, point in enumerate(codecs["curves"][order[0]]):
            budget = point["bytes"]
            fitting = [p for p in own["curve"] if p[size] <= budget]
            ours = f"{_pair(fitting[-1])} ({fitting[-1]['tokens']} tokens)" if fitting else "does not fit"
            lines = [next((_pair(p) for p in linear["curves"][line] if p["bytes"] == budget), "") for line in ("pca32", "dct64")]
            rows.append([str(budget), ours, *lines, *(_codec(codecs["curves"][c][i], codecs["images"]) for c in order)])
        parts.append(f"**{own['set']}**, {own['images']} images, PSNR in dB / LPIPS:\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def _same_sets(own: Result, linear: Result, codecs: Result) -> Iterator[tuple[Result, Result, Result]]:
    for s in own["sets"]:
        others = [next((o for o in r["sets"] if o["set"] == s["set"]), None) for r in (linear, codecs)]
        if any(o is None for o in others):
            raise SystemExit(f"{s['set']} was scored, but not by linear_line and image_codecs both")
        if any(o["sha256"] != s["sha256"] for o in others):  # type: ignore[index]
            raise SystemExit(f"{s['set']}: the three programs measured different images; give all of them the same --images")
        yield s, *others  # type: ignore[misc]


def codebook(results: Results) -> str:
    """Use of the codebooks."""
    own = results["codebook_usage"]
    if own is None:
        return missing("codebook_usage")
    bits = own["entropy_bits"]
    used, expected = sorted(b["used"] for b in own["books"]), own["books"][0]["expected"]
    rows = [
        ["crops encoded", f"{own['samples']:,}"],
        [f"codes seen, all {len(own['books'])} codebooks", f"{own['codes_used']:.1%}"],
        ["the same, if all codes were equally likely", f"{own['codes_expected']:.1%}"],
        ["codes seen, the codebook with the fewest", f"{used[0]:.1%} (first codebook, if equally likely: {expected:.1%})"],
        ["entropy of a token, mean over positions", f"{bits['mean']:.2f} bits"],
        ["entropy of a token, lowest and highest position", f"{bits['lowest']:.2f} and {bits['highest']:.2f} bits"],
    ]
    return f"{own['protocol']}.\n\n{table(['', 'measured'], rows)}"


def startup(results: Results) -> str:
    """Whole processes, and the steps of one."""
    own = results["startup"]
    if own is None:
        return missing("startup")
    rows = [[f"`{name}`", f"{c['median']:.2f}", f"{c['least']:.2f} to {c['most']:.2f}", f"{c['cpu_median']:.2f}"] for name, c in own["commands"].items()]
    steps = [[name, f"{seconds:.3f}"] for name, seconds in own["steps"].items()]
    first = table(["command", "seconds", "range", "processor seconds"], rows)
    second = table(["step of `tok encode`", "seconds"], steps)
    return (
        f"{own['protocol']}.\n\n{first}\n\n`tok encode` takes {own['above_import_torch']:.2f} s above a bare `import torch`; "
        f"once warm, encoding the photo again takes {own['encode_again']:.3f} s.\n\n{second}"
    )


def folder(results: Results) -> str:
    """Folders of few and many files."""
    own = results["folder_throughput"]
    if own is None:
        return missing("folder_throughput")
    rows = []
    for verb, by_count in own["runs"].items():
        for name, r in by_count.items():
            label = f"`tok {verb}`, " + ("from the few to the many" if name == "difference" else f"{r['files']:,} files")
            peak = f"{r['peak_mib']:+.0f}" if name == "difference" else f"{r['peak_mib']:.0f}"
            rows.append([label, str(r.get("seconds", "")), f"{r['images_per_second']:.1f}", peak])
    return f"{own['protocol']}.\n\n{table(['', 'seconds', 'images/s', 'peak memory, MiB'], rows)}"


def training_speed(results: Results) -> str:
    """Steps of training, and what feeds and bounds them."""
    own = results["training_speed_cpu"]
    if own is None:
        return missing("training_speed_cpu")
    head = ["", "parameters", "batch", "training, images/s", "loader alone, images/s", "products an image, GFLOP", "of the machine's products"]
    rows = [
        [
            f"TiTok-{r['size']}", f"{r['parameters'] / 1e6:.0f} M", str(r["batch"]), f"{r['images_per_second']:.2f}",
            f"{r['loader_images_per_second']:.0f}", f"{r['gflop_an_image']:.0f}", f"{r['share_of_products']:.0%} of {r['product_gflops']:.0f} GFLOP/s",
        ]
        for r in own["rows"]
    ]  # fmt: skip
    m = own["machine"]
    return f"{m['cpu']}, {m['threads']} threads of {m['cores']} cores, float32, torch {m['torch']}, {own['date'][:10]}:\n\n{table(head, rows)}"


def provenance(results: Results) -> str:
    """Where and when each result was measured."""
    rows = []
    for name, r in results.items():
        if r is not None:
            m = r["machine"]
            where = f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['ram_gib']} GiB, torch {m['torch']}, Pillow {m['pillow']}"
            rows.append([f"`{name}`", r["date"], r["commit"][:10] + ("+" if r["commit"].endswith("+changes") else ""), where])
    return table(["program", "date", "commit", "machine"], rows) if rows else "Nothing measured yet."


TABLES: dict[str, Callable[[Results], str]] = {
    "scores": scores,
    "by-payload": by_payload,
    "by-file": by_file,
    "codebook": codebook,
    "startup": startup,
    "folder": folder,
    "training-speed": training_speed,
    "provenance": provenance,
}


def _with_interval(p: dict[str, float], digits: int) -> str:
    return f"{p['mean']:.{digits}f} ({p['low']:.{digits}f} to {p['high']:.{digits}f})"


def _pair(p: Result) -> str:
    return f"{p['psnr']['mean']:.1f} / {p['lpips']['mean']:.3f}"


def _codec(p: Result, images: int) -> str:
    """Scores where every image fits; means over the easy images alone would flatter."""
    if p["images"] == images:
        return _pair(p)
    return "does not fit" if p["images"] == 0 else f"fits {p['images']} of {images}"


if __name__ == "__main__":
    raise SystemExit(main())
