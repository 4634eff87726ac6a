"""docs/figures/psnr_bytes.png and lpips_bytes.png: the default tokenizer beside image codecs and the linear line.

    python -m benchmarks.plots        # from benchmarks/results/{default_scores,linear_line,image_codecs}.json
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, ROOT, load

FIGURES = ROOT / "docs" / "figures"
TICKS = (1.5, 3, 6, 12, 24, 48, 96, 192, 384)
NAMES = {"jpeg": "JPEG", "webp": "WebP", "avif": "AVIF", "jxl": "JPEG XL"}
COLOURS = {  # Okabe and Ito: distinguishable for colour-blind readers
    "tokens": "#0072B2",
    "file": "#56B4E9",
    "pca32": "#555555",
    "dct64": "#999999",
    "webp": "#D55E00",
    "avif": "#009E73",
    "jpeg": "#CC79A7",
    "jxl": "#E69F00",
}
AXES = {"psnr": "PSNR (dB), higher is better", "lpips": "LPIPS (VGG), lower is better"}


@dataclass(frozen=True)
class Curve:
    """One line of a plot; ``points`` are (bytes, mean, low, high)."""

    label: str
    colour: str
    style: str
    points: list[tuple[float, float, float, float]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=FIGURES)
    args = parser.parse_args(argv)
    results = {name: load(name, args.results) for name in ("default_scores", "linear_line", "image_codecs")}
    names = sorted({s["set"] for r in results.values() if r for s in r["sets"]})
    if not names:
        raise SystemExit(f"nothing to plot: {args.results} holds no scores")
    args.out.mkdir(parents=True, exist_ok=True)
    for metric in AXES:
        print(draw(metric, {name: curves(results, name, metric) for name in names}, args.out / f"{metric}_bytes.png"))


def curves(results: dict[str, Any], name: str, metric: str) -> list[Curve]:
    """All lines of one set of images; points of codecs only where every image fits."""

    def find(benchmark: str) -> dict[str, Any]:
        return next((s for s in (results[benchmark] or {"sets": []})["sets"] if s["set"] == name), {})

    def row(p: dict[str, Any], size: float) -> tuple[float, float, float, float]:
        return size, p[metric]["mean"], p[metric]["low"], p[metric]["high"]

    found = []
    if own := find("default_scores"):
        found.append(Curve("tok1d default\n(token payload)", COLOURS["tokens"], "-", [row(p, p["payload_bytes"]) for p in own["curve"]]))
        found.append(Curve("tok1d default\n(whole .tok file)", COLOURS["file"], "--", [row(p, p["file_bytes"]) for p in own["curve"]]))
    for line, points in find("linear_line").get("curves", {}).items():
        label = {"pca32": "linear line, ideal\n(PCA 32×32)", "dct64": "linear line, ideal\n(DCT 64×64)"}[line]
        found.append(Curve(label, COLOURS[line], ":", [row(p, p["bytes"]) for p in points]))
    codecs = find("image_codecs")
    for codec, points in codecs.get("curves", {}).items():
        fitting = [row(p, p["bytes"]) for p in points if p["images"] == codecs["images"]]
        if fitting:
            found.append(Curve(f"{NAMES[codec]} (whole file)", COLOURS[codec], "-", fitting))
    return found


def draw(metric: str, panels: dict[str, list[Curve]], path: Path) -> Path:
    """One panel a set of images, labels beside the ends of the lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(7.2 * len(panels), 4.8), squeeze=False, sharey=True)
    for axis, (name, lines) in zip(axes[0], panels.items()):
        for line in lines:
            x, y, low, high = zip(*line.points)
            marker = "o" if len(x) < 4 or line.style == "-" else ""
            axis.plot(x, y, line.style, color=line.colour, marker=marker, markersize=4, linewidth=1.8)
            if len(x) > 1:
                axis.fill_between(x, low, high, color=line.colour, alpha=0.13, linewidth=0)
            else:
                axis.errorbar(x, y, [[y[0] - low[0]], [high[0] - y[0]]], color=line.colour, capsize=3)
        axis.set_xscale("log", base=2)
        axis.set_xticks(TICKS, [f"{t:g}" for t in TICKS])
        axis.minorticks_off()
        axis.set_xlim(1.3, 2600)
        axis.set_title(name, loc="left", fontsize=11, fontweight="bold")
        axis.set_xlabel("bytes per image (256 × 256)")
        axis.grid(color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.04)
    axes[0][0].set_ylabel(AXES[metric])
    figure.tight_layout()
    for axis, lines in zip(axes[0], panels.values()):
        _label(axis, lines)
    figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": ""})
    plt.close(figure)
    return path


def _label(axis: Any, lines: list[Curve]) -> None:
    """Names at the right end, moved apart vertically, each tied to its line."""
    low, high = axis.get_ylim()
    inch = (high - low) / axis.get_window_extent().transformed(axis.figure.dpi_scale_trans.inverted()).height
    wanted = sorted(lines, key=lambda c: c.points[-1][1])
    heights = [inch * (0.15 * (c.label.count("\n") + 1) + 0.05) for c in wanted]
    for line, y in zip(wanted, spread_apart([c.points[-1][1] for c in wanted], heights)):
        axis.annotate(
            line.label,
            line.points[-1][:2],
            xytext=(640, y),
            color=line.colour,
            fontsize=8.5,
            va="center",
            linespacing=1.05,
            arrowprops={"arrowstyle": "-", "color": line.colour, "linewidth": 0.6, "alpha": 0.7, "shrinkA": 1, "shrinkB": 4},
        )


def spread_apart(places: list[float], heights: list[float]) -> list[float]:
    """Ascending centres moved as little as needed for boxes of these heights not to overlap.

    Example:
        >>> spread_apart([0.0, 0.0, 5.0], [2.0, 2.0, 2.0])
        [-1.0, 1.0, 5.0]
    """
    blocks: list[tuple[float, list[float]]] = []  # centre of the block, heights in it
    for place, height in zip(places, heights):
        block = (place, [height])
        while blocks and blocks[-1][0] + sum(blocks[-1][1]) / 2 > block[0] - sum(block[1]) / 2 + 1e-12:
            centre, own = blocks.pop()
            total = own + block[1]
            block = ((centre * len(own) + block[0] * len(block[1])) / len(total), total)
        blocks.append(block)
    found = []
    for centre, own in blocks:
        bottom = centre - sum(own) / 2
        for height in own:
            found.append(bottom + height / 2)
            bottom += height
    return found


if __name__ == "__main__":
    main()
