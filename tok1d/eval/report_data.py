"""What a report is made of: runs read from their folders, checked to be comparable, and the columns that any of them measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tok1d.errors import TokError, UsageError
from tok1d.eval.compare import LOWER_IS_BETTER
from tok1d.eval.measures import Measure, Row, State
from tok1d.eval.protocol import differences, require_same
from tok1d.eval.report_html import Value, number
from tok1d.eval.summary import load_summary

RATE_COLUMNS = ("bytes", "file_bytes", "bpp", "file_bpp")
TITLES = {
    "bytes": "bytes, payload", "file_bytes": "bytes, file", "bpp": "bpp, payload", "file_bpp": "bpp, file", "psnr": "PSNR (dB)", "ssim": "SSIM",
    "ms_ssim": "MS-SSIM", "mae": "MAE (grey levels)", "lpips_vgg": "LPIPS (VGG)", "lpips_alex": "LPIPS (Alex)", "dists": "DISTS",
    "inception_score": "inception score", "precision": "precision", "recall": "recall", "density": "density", "coverage": "coverage",
}  # fmt: skip
ORDER = ("psnr", "ssim", "ms_ssim", "mae", "lpips_vgg", "lpips_alex", "dists")


@dataclass
class Run:
    """One folder of ``tok eval``.

    Attributes:
        label: unique name of the system in the report.
        folder: of the run.
        summary: as :func:`tok1d.eval.summary.load_summary` reads it.
        notes: what could not be shown, and why.
    """

    label: str
    folder: Path
    summary: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def conditions(self) -> dict[str, Any]:
        """Protocol, data, system and measures."""
        return dict(self.summary["conditions"])

    @property
    def system(self) -> dict[str, Any]:
        """How the system describes itself."""
        return dict(self.conditions.get("system", {}))

    @property
    def kind(self) -> str:
        """``tokenizer``, ``codec``, ``resize`` or ``folder``."""
        return str(self.system.get("kind", ""))

    @property
    def rates(self) -> list[Row]:
        """Of the summary, fewest bytes first."""
        return list(self.summary["rates"])

    def tokens(self, rate: Row) -> int | None:
        """Of a tokenizer, whose rates are named k and their number."""
        name = str(rate["rate"])
        return int(name[1:]) if self.kind == "tokenizer" and name[:1] == "k" and name[1:].isdecimal() else None

    def bits(self, rate: Row) -> float | None:
        """Nominal bits of an image."""
        tokens, each = self.tokens(rate), self.system.get("bits_per_token")
        return tokens * each if tokens is not None and isinstance(each, int | float) else None

    def rows(self, table: str) -> list[Row]:
        """Of ``images``, ``words`` or ``faces``; none, and a note, if they cannot be read."""
        from tok1d.eval.run import read_rows

        if table not in self._rows:
            try:
                self._rows[table] = read_rows(self.folder, table)
            except (OSError, ValueError, KeyError, TypeError) as error:
                self._rows[table] = []
                self.notes.append(f"{self.label}: the rows cannot be read ({error}); names, sources and readings are left out")
        return self._rows[table]

    @cached_property
    def _rows(self) -> dict[str, list[Row]]:
        return {}

    def state(self, measure: Measure) -> State:
        """Of one measure, of all ranks together; only its own tensors are read."""
        from safetensors import SafetensorError, safe_open

        whole: State = {}
        prefix = f"{measure.name}|"
        try:
            for path in sorted((self.folder / "states").glob("rank*.safetensors")):
                with safe_open(path, "pt") as file:
                    part = {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
                whole = measure.add(whole, part) if whole else part
        except (OSError, SafetensorError, ValueError) as error:
            self.notes.append(f"{self.label}: kept pictures cannot be read ({error})")
            return {}
        return whole


@dataclass(frozen=True)
class Column:
    """Something measured, one number a rate.

    Attributes:
        key: unique.
        title: for people.
        better: 1 if more is better, -1 if less, 0 if it is not a quality.
        find: the number in a rate of a summary.
        style: of :func:`tok1d.eval.report_html.number`.
        counted: its numbers cover words or faces, whose count is always shown.
    """

    key: str
    title: str
    better: int
    find: Callable[[Row], Value | None]
    style: str = "g"
    counted: bool = False

    @property
    def arrow(self) -> str:
        """The title with its direction."""
        return self.title + {1: " ↑", -1: " ↓", 0: ""}[self.better]


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs and refuse what cannot stand in one table.

    Args:
        paths: folders of runs, or folders that hold such folders.

    Raises:
        TokError: no run, or a damaged summary.
        UsageError: different data, protocols, or settings of a measure; the differences are spelt out.
    """
    folders: list[Path] = []
    for path in paths:
        inside = sorted(p.parent for p in path.glob("*/summary.json")) if not (path / "summary.json").is_file() else []
        folders += inside or [path]
    folders = list(dict.fromkeys(folders))
    runs = [Run(_name(s := load_summary(f)), f if f.is_dir() else f.parent, s) for f in folders]
    if not runs:
        raise UsageError("a report needs at least one folder of tok eval")
    for run in runs:
        if not isinstance(run.summary.get("conditions"), dict) or not isinstance(run.summary["rates"], list):
            raise TokError(f"{run.folder}: not a summary of tok eval")
    first = runs[0]
    for other in runs[1:]:
        both = [{k: r.conditions.get(k) for k in ("protocol", "data")} for r in (first, other)]
        # Nets of the perceptual measure are columns of their own; everything else a measure says is a setting of its numbers.
        nets = [{k: v for k, v in r.conditions.get("measures", {}).items() if k != "perceptual"} for r in (first, other)]
        shared = set(nets[0]) & set(nets[1])
        both = [{**b, "measures": {k: n[k] for k in shared}} for b, n in zip(both, nets)]
        require_same(both[0], both[1], (str(first.folder), str(other.folder)))
    names = [run.label for run in runs]
    for run in runs:
        if names.count(run.label) > 1:
            run.label = f"{run.label} ({run.folder.name})"
    return runs


def _name(summary: dict[str, Any]) -> str:
    system = summary.get("conditions", {}).get("system", {})
    name, side = str(system.get("name", "?")), system.get("side")
    return f"{name}@{side}" if system.get("kind") == "codec" and side else name


def versions_differ(runs: Sequence[Run]) -> list[str]:
    """Packages and machines that are not the same in all runs."""
    found = []
    held = [r.summary.get("provenance", {}) for r in runs]
    for other in held[1:]:
        a, b = ({"versions": h.get("versions", {}), "machine": h.get("machine"), "gpu": h.get("gpu")} for h in (held[0], other))
        found += [d for d in differences(a, b) if d not in found]
    return found


def columns(runs: Sequence[Run]) -> list[Column]:
    """All that any run measured, in a fixed order; bytes and bits per pixel first."""
    rates = [rate for run in runs for rate in run.rates]
    names = {name for rate in rates for name in rate.get("metrics", {})}
    ordered = [*(n for n in (*RATE_COLUMNS, *ORDER) if n in names), *sorted(names - {*RATE_COLUMNS, *ORDER})]
    found = [Column(n, TITLES.get(n, n), _better(n), _metric(n)) for n in ordered]
    nets = sorted({m for rate in rates for m in rate.get("measures", {}) if m.startswith("features/")})
    for net in nets:
        keys = {k for rate in rates for k in rate.get("measures", {}).get(net, {})} - {"real_images", "images"}
        distances = sorted(k for k in keys if k.startswith(("fd_", "fid")))
        for key in (*distances, *(k for k in ("kernel_distance", "inception_score", "precision", "recall", "density", "coverage") if k in keys)):
            short = net.removeprefix("features/")
            title = key if key in distances else f"{TITLES.get(key, key.replace('_', ' '))} ({short})"
            found.append(Column(f"{net}/{key}", title, _better(key), _feature(net, key)))
    if any("all" in rate.get("measures", {}).get("text", {}) for rate in rates):
        found += [Column(f"t_{s}", t, 1, binned("text", "all", f"t_{s}_raw", "micro"), "%", True) for s, t in (("acc", "T-ACC"), ("ned", "T-NED"))]
    if any("f_sim" in rate.get("measures", {}).get("faces", {}) for rate in rates):
        found.append(Column("f_sim", "F-Sim", 1, binned("faces", "f_sim", "micro"), "g", True))
    return found


def binned(measure: str, *path: str) -> Callable[[Row], Value | None]:
    """Finds a mean with its interval in the results of text or faces."""

    def find(rate: Row) -> Value | None:
        held: Any = rate.get("measures", {}).get(measure, {})
        for key in path:
            held = held.get(key) if isinstance(held, Mapping) else None
        return as_value(held, "words" if measure == "text" else "faces")

    return find


def as_value(held: Any, unit: str = "images") -> Value | None:
    """Of a dictionary with ``mean`` and perhaps an interval, or of a number."""
    if isinstance(held, Mapping):
        return Value(held.get("mean"), held.get("low"), held.get("high"), held.get("n"), unit)
    return Value(float(held)) if isinstance(held, int | float) else None


def _metric(name: str) -> Callable[[Row], Value | None]:
    return lambda rate: as_value(rate.get("metrics", {}).get(name))


def _feature(net: str, key: str) -> Callable[[Row], Value | None]:
    def find(rate: Row) -> Value | None:
        found = rate.get("measures", {}).get(net, {})
        value = as_value(found.get(key))
        if value is None:
            return None
        deviation = found[key].get("deviation") if isinstance(found[key], Mapping) else None
        return Value(value.mean, n=found.get("images"), extra="" if deviation is None else f"± {number(deviation)}")

    return find


def _better(name: str) -> int:
    if name in RATE_COLUMNS:
        return 0
    return -1 if name.startswith(LOWER_IS_BETTER) else 1


def as_json(run: Run) -> str:
    """The summary as it was read, a line a rate."""
    head = {k: v for k, v in run.summary.items() if k != "rates"}
    whole = json.dumps(head, ensure_ascii=False)[:-1] + ', "rates": [\n'
    return whole + ",\n".join(json.dumps(rate, ensure_ascii=False) for rate in run.rates) + "\n]}"


def curves(runs: Sequence[Run], found: Sequence[Column]) -> list[dict[str, Any]]:
    """What other plotting programs read: a curve a run in CompressAI's form, ``results`` of equally long lists; bpp is that of whole files."""
    keys = {"psnr": "psnr-rgb", "ms_ssim": "ms-ssim-rgb"}
    made = []
    for run in runs:
        points = [rate for rate in run.rates if rate["ok"]]
        lists = {c.key: [v.mean if (v := c.find(rate)) else None for rate in points] for c in found}
        lists = {keys.get(k, k): values for k, values in lists.items() if any(v is not None for v in values)}
        lists = {"bpp": lists.pop("file_bpp", []), **({"payload_bpp": lists.pop("bpp")} if "bpp" in lists else {}), **lists}
        rates = {"rate": [rate["rate"] for rate in points], "images": [rate["ok"] for rate in points], "tokens": [run.tokens(rate) for rate in points]}
        made.append({"name": run.label, "description": f"{run.conditions['data']['name']}, {run.conditions['protocol']['id']}", "results": lists, **rates})
    return made
