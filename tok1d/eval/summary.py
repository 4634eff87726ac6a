"""The summary of a run: means with intervals and how many images they cover, by rate; distances of distributions; provenance.

Made from the rows and states on disk, so that it can be made again. Everything but ``provenance`` is a function of data, system and
protocol alone: runs on one, two or three ranks give the same numbers.
"""

from __future__ import annotations

import json
import math
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tok1d.disk import atomic_write
from tok1d.eval.bootstrap import quantiles, replicates
from tok1d.eval.measures import Measure, Row

NOT_METRICS = ("id", "rate", "status", "group")
PACKAGES = ("tok1d", "torch", "torchmetrics", "lpips", "timm", "easyocr", "insightface", "onnxruntime", "pillow", "numpy")


def summarise(out: Path, measures: Sequence[Measure], *, seconds: float = 0.0, images: int = 0) -> dict[str, Any]:
    """Write ``out``/summary.json from what lies in ``out`` and return it.

    Args:
        out: folder of a run whose chunks are all done.
        measures: those of the run; their states are brought to numbers.
        seconds, images: of the last go, for the throughput.
    """
    from tok1d.eval.run import Rank, Store, read_rows

    asked = json.loads((out / "run.json").read_text())
    states = Store(out, Rank()).merged(measures)
    table = sorted(read_rows(out, "images"), key=lambda r: r["id"])
    instances = {m.table: read_rows(out, m.table) for m in measures if m.table}
    rates = []
    for name in asked["rates"]:
        rows = [r for r in table if r["rate"] == name]
        row: dict[str, Any] = {"rate": name, **cover(rows), "metrics": column_means([r for r in rows if r["status"] == "ok"])}
        for measure in measures:
            found = measure.results(states[measure.name], name)
            if measure.table:
                found = {**found, **measure.instances(instances[measure.table], name)}
            if found:
                row.setdefault("measures", {})[measure.name] = found
        rates.append(row)
    summary = {"version": 1, "conditions": asked, "rates": rates, "provenance": provenance(seconds, images)}
    summary = clean(summary)
    atomic_write(out / "summary.json", (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    return summary


def cover(rows: Sequence[Row]) -> dict[str, Any]:
    """How many images there are, how many have a picture, and what is wrong with the others."""
    wrong = Counter(r["status"] for r in rows if r["status"] != "ok")
    return {"images": len(rows), "ok": len(rows) - sum(wrong.values()), "failed": dict(wrong.most_common(20))}


def column_means(rows: Sequence[Row], draws: int = 1000, seed: int = 0) -> dict[str, dict[str, float]]:
    """Mean of every numeric column with a 95 % bootstrap interval over images, and how many images have it.

    Images drawn depend on their number and the seed alone, so that two systems on the same images are drawn alike.
    """
    names = sorted({k for r in rows for k in r} - set(NOT_METRICS))
    found = {}
    for name in names:
        values = np.array([r[name] for r in rows if isinstance(r.get(name), int | float) and math.isfinite(r[name])])
        if len(values):
            low, high = quantiles(replicates(values[:, None], np.ones((len(values), 1)), draws, seed)[:, :1], 0.95)
            found[name] = {"mean": float(values.mean()), "low": float(low[0]), "high": float(high[0]), "n": len(values)}
    return found


def provenance(seconds: float, images: int) -> dict[str, Any]:
    """Versions, machine, date and speed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    peak = None
    if sys.platform != "win32":
        import resource

        peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), 1)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
        "seconds": round(seconds, 2),
        "images_per_second": round(images / seconds, 3) if seconds and images else None,
        "peak_memory_mib": peak,
    }


def clean(value: Any) -> Any:
    """JSON-able: floats to 9 significant digits, NaN and infinity as None."""
    if isinstance(value, dict):
        return {k: clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


def load_summary(path: Path) -> dict[str, Any]:
    """A summary by its file or the folder of its run.

    Raises:
        TokError: missing, damaged, or something else.
    """
    from tok1d.errors import TokError

    file = path / "summary.json" if path.is_dir() else path
    try:
        held = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TokError(f"{file}: no summary there ({error}); an unfinished run is finished by the same tok eval command") from error
    if not isinstance(held, dict) or held.get("version") != 1 or "rates" not in held:
        raise TokError(f"{file}: not a summary of tok eval")
    return held
