"""Plots of the report: quality over rate with intervals, by size of words and faces, and the entropy of tokens by position.

Tokenizers are solid, codecs dashed, reconstructions made elsewhere dotted; what has no rate of its own (a resize, files of unknown
cost) is a level. Colours of Okabe and Ito, distinguishable for colour-blind readers. Twice the pixels of the page.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tok1d.eval.measures import Row
from tok1d.eval.report_data import Column, Run, binned
from tok1d.eval.report_html import Value
from tok1d.extras import require

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#3A9BD1")
MARKERS = "osD^vPX"
STYLES = {"tokenizer": "-", "codec": "--"}
PAPER, INK, MUTED, GRID = "#ffffff", "#1d2126", "#667078", "#e4e7e9"

Point = tuple[float, float, float, float]  # x, mean, low, high


@dataclass(frozen=True)
class Line:
    """A curve; ``slot`` chooses its colour and marker."""

    label: str
    slot: int
    style: str
    points: list[Point]


@dataclass(frozen=True)
class Panel:
    """One of the axes side by side.

    Attributes:
        title: above it.
        xlabel: below it.
        scale: ``log``, ``octaves`` (ticks at powers of two) or ``linear``.
        lines: with at least one point together.
        levels: (y, text) horizontal lines, drawn where they do not stretch the axis.
    """

    title: str
    xlabel: str
    scale: str
    lines: list[Line]
    levels: list[tuple[float, str]]


def rate_panels(column: Column, runs: Sequence[Run]) -> list[Panel]:
    """A quality over bits per pixel of files and of payloads, and over tokens; those with anything to show."""
    return _panels(column.find, runs, (("file_bpp", "bits per pixel, whole file"), ("bpp", "bits per pixel, payload"), ("tokens", "tokens")))


def bin_panels(measure: str, path: Sequence[str], chance: Sequence[str], labels: Sequence[str], runs: Sequence[Run]) -> list[Panel]:
    """A score over bits per pixel of files, one panel a size bin, with the mean chance floor as a level."""
    found = []
    for label in labels:
        for panel in _panels(binned(measure, *path, label), runs, (("file_bpp", "bits per pixel, whole file"),)):
            floors = [v.mean for r in runs for rate in r.rates if (v := binned(measure, *chance, label)(rate)) and v.mean is not None]
            level = [(sum(floors) / len(floors), "chance")] if floors else []
            ceiling = [v.mean for r in runs for rate in r.rates if (v := binned(measure, "ceiling", path[-1], label)(rate)) and v.mean is not None]
            found.append(Panel(label, panel.xlabel, panel.scale, panel.lines, [*panel.levels, *level, *((c, "originals") for c in ceiling[:1])]))
    return found


def position_panels(runs: Sequence[Run]) -> list[Panel]:
    """Entropy of the tokens at each position, at the highest rate of each tokenizer; what a token could carry is a level."""
    lines, levels, images = [], {}, 0
    for slot, run in enumerate(runs):
        rates = [r for r in run.rates if r.get("measures", {}).get("codes", {}).get("bits_by_position")]
        if rates:
            bits = rates[-1]["measures"]["codes"]["bits_by_position"]
            lines.append(Line(run.label, slot, "-", [(i + 1.0, b, b, b) for i, b in enumerate(bits)]))
            levels[float(run.system.get("bits_per_token") or math.nan)] = "bits of a token"
            images = max(images, rates[-1]["ok"])
    if not lines:
        return []
    levels.setdefault(math.log2(images), f"most that {images} images can show")
    return [Panel("", "position of the token", "linear", lines, [(y, t) for y, t in levels.items() if math.isfinite(y)])]


def _panels(find: Callable[[Row], Value | None], runs: Sequence[Run], axes: Sequence[tuple[str, str]]) -> list[Panel]:
    found = []
    for key, xlabel in axes:
        lines: list[Line] = []
        levels: list[tuple[float, str]] = []
        others = any(r.kind != "resize" and any(find(rate) for rate in r.rates) for r in runs)
        for slot, run in enumerate(runs):
            points: list[Point] = []
            for rate in run.rates:
                value = find(rate)
                if value is None or value.mean is None:
                    continue
                x = run.tokens(rate) if key == "tokens" else rate.get("metrics", {}).get(key, {}).get("mean")
                if x and not (run.kind == "resize" and others):
                    points.append((float(x), value.mean, *_bounds(value)))
                elif key != "tokens" or run.kind == "resize":
                    levels.append((value.mean, f"{run.label} {rate['rate']}"))
            if points:
                lines.append(Line(run.label, slot, STYLES.get(run.kind, ":"), sorted(points)))
        if lines:
            found.append(Panel("", xlabel, "octaves" if key == "tokens" else "log", lines, levels))
    return found


def _bounds(value: Value) -> tuple[float, float]:
    assert value.mean is not None
    return (value.mean if value.low is None else value.low, value.mean if value.high is None else value.high)


def draw(panels: Sequence[Panel], ylabel: str, *, style: str = "g") -> bytes:
    """PNG of panels side by side with one legend; 2400 pixels wide for three, 1640 for one or two."""
    require("matplotlib", "eval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(12.0 if len(panels) > 2 else 8.2, 3.9), dpi=200, facecolor=PAPER, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes, panels):
        axis.set_facecolor(PAPER)
        for line in panel.lines:
            handles.setdefault(_plain(line.label), _curve(axis, line, panel.scale))
        _ticks(axis, panel)
        axis.set_xlabel(panel.xlabel, color=INK, fontsize=9)
        if panel.title:
            axis.set_title(panel.title, loc="left", fontsize=10, color=INK)
        axis.grid(color=GRID, linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(MUTED)
        axis.tick_params(colors=MUTED, labelsize=8, length=3)
        axis.margins(y=0.07)
    axes[0].set_ylabel(_plain(ylabel if len(ylabel) < 44 else ",\n".join(ylabel.rsplit(", ", 1))), color=INK, fontsize=9)
    if style == "%":
        axes[0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    _levels(axes, panels, MUTED)
    legend = figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)), frameon=False, fontsize=9, handlelength=3.2
    )
    for text in legend.get_texts():
        text.set_color(INK)
    canvas.draw()
    return _png(canvas.buffer_rgba())


def _curve(axis: Any, line: Line, scale: str) -> Any:
    colour = COLOURS[line.slot % len(COLOURS)]
    x, y, low, high = zip(*line.points)
    marker = "" if scale == "linear" else MARKERS[line.slot % len(MARKERS)]
    if len(x) > 1:
        axis.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    else:
        axis.errorbar(x, y, [[max(0.0, y[0] - low[0])], [max(0.0, high[0] - y[0])]], color=colour, capsize=3, linewidth=1.2)
    return axis.plot(x, y, line.style, color=colour, marker=marker or ("o" if len(x) == 1 else ""), markersize=4.5, linewidth=1.6)[0]


def _ticks(axis: Any, panel: Panel) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    x = [p[0] for line in panel.lines for p in line.points]
    if panel.scale == "linear":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylim(bottom=0)
        return
    low, high = math.log10(min(x)), math.log10(max(x))
    if panel.scale == "octaves":
        octaves = range(math.floor(math.log2(min(x))), math.ceil(math.log2(max(x))) + 1)
        places = [2.0**i for i in octaves]
    else:
        steps = (1, 2, 5) if high - low < 1.6 else (1, 3) if high - low < 3 else (1,)
        places = [s * 10.0**e for e in range(math.floor(low) - 1, math.ceil(high) + 1) for s in steps]
    axis.set_xscale("log")
    margin = 10 ** max(0.05, 0.04 * (high - low))
    left, right = min(x) / margin, max(x) * margin
    shown = [p for p in places if left <= p <= right] or [min(x)]
    axis.xaxis.set_major_locator(FixedLocator(shown))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_xlim(left, right)


def _levels(axes: Sequence[Any], panels: Sequence[Panel], colour: str) -> None:
    """Horizontal lines with their names, at the side that curves leave free; those that would stretch the axis much are left out."""
    held = [p for panel in panels for line in panel.lines for p in line.points]
    low, high = min(p[2] for p in held), max(p[3] for p in held)
    reach = 0.35 * (high - low) or abs(high) or 1.0
    for axis, panel in zip(axes, panels):
        near: list[list[tuple[float, str]]] = []
        for y, text in sorted(level for level in panel.levels if low - reach <= level[0] <= high + reach):
            axis.axhline(y, color=colour, linewidth=0.9, linestyle=(0, (1, 2)))
            if near and y - near[-1][0][0] < 0.2 * reach:  # names would lie upon one another: they share a line
                near[-1].append((y, text))
            else:
                near.append([(y, text)])
        for group in near:
            y = group[-1][0]
            right = _room(panel, y, 1) >= _room(panel, y, -1)
            axis.annotate(
                _plain(", ".join(_shortened([t for _, t in group]))), (0.995 if right else 0.01, y), (0, 2), ("axes fraction", "data"),
                textcoords="offset points", ha="right" if right else "left", va="bottom", fontsize=7, color=colour,
            )  # fmt: skip


def _room(panel: Panel, y: float, side: int) -> float:
    """How far the curves stay from a level in the left (-1) or right (1) third of a panel."""
    points = sorted((p for line in panel.lines for p in line.points), key=lambda p: side * p[0])
    ends = points[-max(1, len(points) // 3) :]
    return min(max(p[2] - y, y - p[3], 0.0) for p in ends)


def _shortened(names: Sequence[str]) -> list[str]:
    """Rates of one system under its name once.

    Example:
        >>> _shortened(["resize s64", "resize s128", "chance"])
        ['resize s64', 's128', 'chance']
    """
    found, before = [], ""
    for name in names:
        system, _, rate = name.rpartition(" ")
        found.append(rate if system and system == before else name)
        before = system
    return found


def _plain(text: str) -> str:
    """Without what matplotlib would take for mathematics or leave out of a legend."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.replace("$", r"\$")).lstrip("_")


def _png(rgba: Any) -> bytes:
    """256 colours are enough for lines, and a quarter of the bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    pixels = np.asarray(rgba)
    image = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    small = image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    palette, paper = small.getpalette() or [], 3 * int(small.getpixel((0, 0)))  # type: ignore[arg-type]
    palette[paper : paper + 3] = pixels[0, 0, :3].tolist()  # exactly the page's own, so that no edge shows
    small.putpalette(palette)
    small.save(buffer, "PNG")
    return buffer.getvalue()


def lossless_webp(png: bytes) -> bytes:
    """The same pixels in half the bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").save(buffer, "WEBP", lossless=True, quality=100, method=4)
    return buffer.getvalue()
