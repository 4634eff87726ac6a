"""How long the evaluator takes, and how much memory: drawn pages of words and drawn faces, all measures with their real networks.

    python -m benchmarks.evaluator_speed                        # 200 images, all measures: about three minutes on two cores
    python -m benchmarks.evaluator_speed --memory 200,2000      # peak memory at two sizes of data, cheap measures: a quarter of an hour
    python -m benchmarks.evaluator_speed --frechet              # accumulation of a Fréchet distance alone: seconds

Each row is one `tok eval` process of the shipped default at one number of tokens; start-up, loading of networks and the summary are
inside the seconds. Accumulating a Fréchet distance at 2,048 features is timed beside a loop over images.
Results: benchmarks/results/evaluator_speed.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import CACHE, RESULTS, load, run, save, say, tok_command
from tok1d.eval.distribution import FrechetDistance
from tok1d.eval.frechet import Moments
from tok1d.eval.manifest import Manifest, Sample
from tok1d.eval.measures import Batch, Features, State
from tok1d.eval.protocol import protocol
from tok1d.eval.run import CHUNK
from tok1d.eval.systems import Pictures, Rate

ALL = "pixels,lpips_vgg,lpips_alex,dists,codes,features,text,faces"
CHEAP = "pixels,codes,text"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--tokens", default="64", help="comma-separated rates (default: 64)")
    parser.add_argument("--memory", default="", metavar="N,N", help="measure peak memory at these sizes instead")
    parser.add_argument("--frechet", action="store_true", help="time the accumulation of a Fréchet distance only")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    body: dict[str, Any] = load("evaluator_speed", args.results) or {}
    body = {k: body[k] for k in ("all_measures", "memory", "frechet") if k in body}
    if args.memory:
        rows = [measure(int(n), CHEAP, "8", args.cache) for n in args.memory.split(",")]
        body["memory"] = {"measures": CHEAP, "why": "all measures would take half an hour at 2,000 images", "tokens": 8, "rows": rows}
    elif args.frechet:
        body["frechet"] = frechet()
    else:
        body["all_measures"] = measure(args.images, ALL, args.tokens, args.cache)
        body["frechet"] = frechet()
    print(save("evaluator_speed", body, threads=torch.get_num_threads(), folder=args.results))


def measure(images: int, measures: str, tokens: str, cache: Path) -> dict[str, Any]:
    """One process of tok eval over half pages of words, half faces."""
    folder = cache / f"drawn-{images}"
    manifest = folder / "both.jsonl"
    if not manifest.is_file():
        parts = []
        for kind in ("text", "faces"):
            run([*tok_command(), "eval", "synthetic", kind, str(folder / kind), "--count", str(images // 2), "-q"])
            held = Manifest.load(folder / kind / "manifest.jsonl")
            parts += [replace(s, id=f"{kind}/{s.id}", path=f"{kind}/{s.path}") for s in held.samples]
        Manifest("drawn pages and faces", folder, tuple(parts)).write(manifest)
    out = cache / "evaluator_speed"
    done = run([*tok_command(), "eval", "default", str(manifest), "--tokens", tokens, "--measures", measures, "-o", str(out), "--restart", "-q"])
    row = {
        "images": images, "rates": len(tokens.split(",")), "seconds": round(done.seconds, 1), "cpu_seconds": round(done.cpu_seconds, 1),
        "images_per_second": round(images / done.seconds, 2), "peak_mib": round(done.peak_mib, 1),
    }  # fmt: skip
    say(str(row))
    return row


class Known:
    """A network whose features are known; "pictures" are their row numbers."""

    name = id = distance_name = "known"

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pooled": self.rows[images]}


def frechet(features: int = 2048, images: int = 512, batch: int = 16) -> dict[str, Any]:
    """Milliseconds an image to accumulate a Fréchet distance against a reference: by the measure of the pass (with its sample for the kernel
    distance and the cosine of each pair), as a metric alone, and as a loop of outer products. Medians of chunks."""
    x = torch.randn(images, features, generator=torch.Generator().manual_seed(0))
    samples = [Sample(str(i), "", 0, 0) for i in range(images)]
    measure, metric = Features(Known(x), reference=Moments.of(x[:2])), FrechetDistance(features)
    total = torch.zeros(features, features, dtype=torch.float64)
    state: State = {}
    spent: dict[str, list[tuple[float, float]]] = {"pass": [], "metric": [], "loop": []}
    for start in range(0, images, CHUNK):
        rows = torch.arange(start, start + CHUNK)
        with timed(spent["pass"]):
            for part in rows.split(batch):
                pictures = Pictures(Rate("k1"), part, [], [], ["ok"] * batch)
                measure.see(Batch(samples[part[0] : part[-1] + 1], part, [], [], protocol("recon256-v1")), [pictures])
            state = measure.add(state, measure.state())
        with timed(spent["metric"]):
            for part in rows.split(batch):
                metric.update(x[part], real=False)
        with timed(spent["loop"]):
            for row in x[rows[:8]].double():
                total += torch.outer(row, row)
    assert torch.equal(state["k1/n"].double(), metric.fake_n)
    result: dict[str, Any] = {"features": features, "batch": batch, "chunk": CHUNK}
    for name, turns in spent.items():
        wall, cpu = (1e3 * statistics.median(t) / (8 if name == "loop" else CHUNK) for t in zip(*turns[1:]))
        result[name] = {"wall_ms_per_image": round(wall, 3), "cpu_ms_per_image": round(cpu, 3)}
    result["loop / pass"] = round(result["loop"]["wall_ms_per_image"] / result["pass"]["wall_ms_per_image"], 1)
    say(str(result))
    return result


@contextmanager
def timed(turns: list[tuple[float, float]]) -> Iterator[None]:
    """Wall and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    turns.append((time.perf_counter() - wall, time.process_time() - cpu))


if __name__ == "__main__":
    main()
