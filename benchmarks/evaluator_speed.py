"""How long the evaluator takes, and how much memory: drawn pages of words and drawn faces, all measures with their real networks.

    python -m benchmarks.evaluator_speed                        # 200 images, all measures: about three minutes on two cores
    python -m benchmarks.evaluator_speed --memory 200,2000      # peak memory at two sizes of data, cheap measures

Each row is one `tok eval` process of the shipped default at one number of tokens; start-up, loading of networks and the summary are
inside the seconds. Accumulating a Fréchet distance at 2,048 features is timed alone, beside a loop over images.
Results: benchmarks/results/evaluator_speed.json.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import CACHE, RESULTS, load, run, save, say, tok_command
from tok1d.eval.distribution import FrechetDistance
from tok1d.eval.manifest import Manifest

ALL = "pixels,lpips_vgg,lpips_alex,dists,codes,features,text,faces"
CHEAP = "pixels,codes,text"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--tokens", default="64", help="comma-separated rates (default: 64)")
    parser.add_argument("--memory", default="", metavar="N,N", help="measure peak memory at these sizes instead")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    body: dict[str, Any] = load("evaluator_speed", args.results) or {}
    body = {k: body[k] for k in ("all_measures", "memory", "frechet") if k in body}
    if args.memory:
        rows = [measure(int(n), CHEAP, "8", args.cache) for n in args.memory.split(",")]
        body["memory"] = {"measures": CHEAP, "rows": rows}
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


def frechet(features: int = 2048, images: int = 256, batch: int = 32) -> dict[str, float]:
    """Milliseconds an image to accumulate the sums, as one product a batch and as a loop of outer products."""
    x = torch.randn(images, features, generator=torch.Generator().manual_seed(0))
    metric = FrechetDistance(features)
    metric.update(x[:batch], real=False)
    start = time.perf_counter()
    for part in x.split(batch):
        metric.update(part, real=False)
    ours = (time.perf_counter() - start) / images
    total, few = torch.zeros(features, features, dtype=torch.float64), x[:16].double()
    start = time.perf_counter()
    for row in few:
        total += torch.outer(row, row)
    loop = (time.perf_counter() - start) / len(few)
    result = {"ms_per_image": round(1e3 * ours, 4), "loop_ms_per_image": round(1e3 * loop, 3), "ratio": round(loop / ours, 1), "batch": batch}
    say(str(result))
    return result


if __name__ == "__main__":
    main()
