"""What every result file says about itself: date, commit, machine, versions. Imports nothing heavy.

Programs that time other processes import only this, so that they stay small beside what they measure.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CACHE = ROOT / "runs" / "benchmarks"


def machine(threads: int | None = None) -> dict[str, Any]:
    """CPU, cores, memory and library versions.

    Args:
        threads: that torch computes with; None takes what torch would take by itself.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "ram_gib": round(int((_proc("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) / 2**20, 1),
        "threads": threads or int(os.environ.get("OMP_NUM_THREADS", cores)),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "pillow", "numpy")},
    }


def commit() -> str:
    """Hash of the commit that ran; ``+changes`` if the code differs from it, ``unknown`` outside a repository."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        same = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "tok1d", "benchmarks/*.py"]).returncode == 0
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head if same else f"{head}+changes"


def save(name: str, body: dict[str, Any], *, threads: int | None = None, folder: Path = RESULTS) -> Path:
    """Write ``folder/name.json``: the header common to all results, then ``body``; the old file is replaced at once."""
    folder.mkdir(parents=True, exist_ok=True)
    head = {
        "benchmark": name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "machine": machine(threads),
    }
    path = folder / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(head | body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def load(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """A result, or None if it was not measured."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def tok_command() -> list[str]:
    """How to start ``tok``: the console script beside this Python, as users have it."""
    script = Path(sys.executable).with_name("tok")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "tok1d.cli.main"]


@dataclass(frozen=True)
class Finished:
    """What one process took: wall and processor seconds, peak resident MiB, and its standard output."""

    seconds: float
    cpu_seconds: float
    peak_mib: float
    output: str


# A process starts with the peak memory of the one that started it, so a small one stands between us and what we weigh.
_WATCH = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[2:])
_, status, used = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
report = [time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss]
json.dump(report, open(sys.argv[1], "w"))
sys.exit(process.returncode != 0)
"""


def run(command: list[str]) -> Finished:
    """Run a process from the repository root and account for it alone (wait4), not for its siblings.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        watched = [sys.executable, "-I", "-S", "-c", _WATCH, str(report), *command]
        done = subprocess.run(watched, capture_output=True, text=True, errors="replace", cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"{' '.join(command[:3])[:200]} … failed: {done.stderr.strip()[-500:]}")
        seconds, cpu_seconds, peak = json.loads(report.read_text())
    scale = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB on Linux
    return Finished(seconds, cpu_seconds, peak / scale, done.stdout)


def say(text: str) -> None:
    """One line of progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def _proc(path: str, field: str) -> str | None:
    """The first ``field: value`` of a /proc file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
