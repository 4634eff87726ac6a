"""Write the tables of docs/evaluation.md from benchmarks/results/evaluation/*.json.

    python -m benchmarks.evaluation_tables            rewrites what stands between <!-- table SET --> and <!-- end -->
    python -m benchmarks.evaluation_tables --check    exit code 1 if that would change the document
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from benchmarks.record import RESULTS, ROOT

DOCUMENT = ROOT / "docs" / "evaluation.md"
ORDER = ("default", "webp", "jxl", "avif", "jpeg", "resize")
Column = tuple[str, Any]


def mean(name: str, digits: int) -> Column:
    def cell(rate: dict[str, Any]) -> str:
        value = rate["metrics"].get(name)
        return "–" if value is None else f"{value['mean']:.{digits}f}"

    return name, cell


def interval(title: str, digits: int, *path: str) -> Column:
    def cell(rate: dict[str, Any]) -> str:
        value: Any = rate.get("measures", {})
        for key in path:
            value = (value or {}).get(key)
        if not isinstance(value, dict) or value.get("mean") is None:
            return "–"
        return f"{value['mean']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"

    return title, cell


def plain(title: str, digits: int, *path: str) -> Column:
    def cell(rate: dict[str, Any]) -> str:
        value: Any = rate.get("measures", {})
        for key in path:
            value = (value or {}).get(key)
        return "–" if value is None else f"{value:.{digits}f}"

    return title, cell


PHOTOS = [
    mean("psnr", 2), mean("ms_ssim", 3), mean("lpips_vgg", 3), mean("lpips_alex", 3),
    plain("FD EfficientNet-Lite0", 0, "features/tf_efficientnet_lite0", "fd_tf_efficientnet_lite0"),
]  # fmt: skip
COLUMNS: dict[str, list[Column]] = {
    "photos-free": PHOTOS,
    "photos-research": PHOTOS,
    "text": [
        mean("psnr", 2), interval("T-ACC", 3, "text", "all", "t_acc_raw", "micro"), interval("T-NED", 3, "text", "all", "t_ned_raw", "micro"),
        interval("T-NED of readable words", 3, "text", "recognisable", "t_ned_raw", "micro"),
        plain("chance T-NED", 3, "text", "all", "chance_ned", "micro"), interval("originals' T-NED", 3, "text", "ceiling", "t_ned_raw", "micro"),
    ],
    "faces": [
        mean("psnr", 2), interval("F-Sim", 3, "faces", "f_sim", "micro"), interval("chance", 3, "faces", "chance", "micro"),
        interval("verified", 2, "faces", "verified", "micro"),
    ],
}  # fmt: skip


BD_COLUMNS = ("psnr", "ms_ssim", "lpips_vgg", "lpips_alex", "fd_tf_efficientnet_lite0", "t_ned", "f_sim")


def table(name: str) -> str:
    """One set: a row a system and rate."""
    held = [(s, RESULTS / "evaluation" / f"{name}-{s}.json") for s in ORDER]
    summaries = [(s, json.loads(p.read_text("utf-8"))) for s, p in held if p.is_file()]
    if not summaries:
        return "Not measured."
    data = summaries[0][1]["conditions"]["data"]
    assert all(s["conditions"]["data"] == data for _, s in summaries), f"{name}: systems were measured on different images"
    columns = COLUMNS[name]
    lines = [
        f"{data['name']}, {data['images']} images (hash `{data['hash']}`), {summaries[0][1]['conditions']['protocol']['id']}.",
        "",
        "| system | rate | images | file bytes | " + " | ".join(title for title, _ in columns) + " |",
        "| --- | --- | ---: | ---: |" + " ---: |" * len(columns),
    ]
    for system, summary in summaries:
        for rate in summary["rates"]:
            cost = rate["metrics"].get("file_bytes")
            cells = [system, rate["rate"], str(rate["ok"]), "–" if cost is None or system == "resize" else f"{cost['mean']:.0f}"]
            lines.append("| " + " | ".join(cells + [cell(rate) for _, cell in columns]) + " |")
    return "\n".join([*lines, *(bd_rates(name, dict(summaries)) if summaries[0][0] == "default" else [])])


def bd_rates(name: str, summaries: dict[str, dict[str, Any]]) -> list[str]:
    """Rows of BD-rates in file bytes against the default; none where no curve has enough points."""
    from tok1d.eval.compare import compare

    found = {}
    for system in [s for s in ORDER if s in summaries and s not in ("default", "resize")]:
        paths = [RESULTS / "evaluation" / f"{name}-{s}.json" for s in ("default", system)]
        rates = compare(*paths, match="none")["bd_rate"]
        found[system] = {k.removesuffix(" over file_bytes"): v["percent"] for k, v in rates.items() if k.endswith(" over file_bytes")}
    columns = [c for c in BD_COLUMNS if any(f.get(c) is not None for f in found.values())]
    if not columns:
        return []
    lines = ["", "BD-rate in whole files against the default, at equal quality (negative: needs fewer bytes):", ""]
    lines += ["| system | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for system, rates in found.items():
        cells = ["–" if rates.get(c) is None else f"{rates[c]:+.0f} %" for c in columns]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return lines


def main(check: bool) -> int:
    text = DOCUMENT.read_text("utf-8")
    made = re.sub(
        r"<!-- table (\S+) -->\n.*?<!-- end -->", lambda m: f"<!-- table {m[1]} -->\n{table(m[1])}\n<!-- end -->", text, flags=re.DOTALL
    )
    if check:
        return int(made != text)
    DOCUMENT.write_text(made, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
