"""JPEG, WebP, AVIF (and JPEG XL where a plugin is installed) at the bytes that tokens cost.

For every image and budget the file of the best PSNR is searched over downscaling and quality (tok1d/eval/codecs.py).
A codec "fits" a budget on an image if its smallest file does; means are over the images where it fits, and how many these
are stands beside them.

    python -m benchmarks.image_codecs photos-free-val-00000.tar photos-research-val-00000.tar --images 128

Results: benchmarks/results/image_codecs.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import __version__ as pillow_version

from benchmarks.measure import BUDGETS, PROTOCOL, Cache, Rendered, Row, View, ViewSet, measure, point
from benchmarks.record import CACHE, RESULTS, save, say
from tok1d.eval.codecs import Candidate, available, search, settings
from tok1d.eval.perceptual import Perceptual

Found = dict[str, dict[int, Candidate | None]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="shards or folders; each is a set of its own")
    parser.add_argument("--images", type=int, metavar="N", help="evenly spaced images of each set; default: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that search; default: all cores")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)

    skipped = {name: why for name, why in available().items() if why}
    codecs = [name for name, why in available().items() if not why]
    for name, why in skipped.items():
        say(f"{name} is skipped: {why}")
    what = hashlib.sha256(json.dumps([settings(), BUDGETS, pillow_version]).encode()).hexdigest()[:12]
    cache = Cache(args.cache / f"image_codecs-{what}.jsonl")
    lpips = Perceptual("vgg")
    sets = [score_set(ViewSet(path, args.images), codecs, cache, lpips, args.workers) for path in args.data]
    body: Row = {"protocol": PROTOCOL, "seed": 0, "skipped": skipped, "search": settings(), "sets": sets}
    print(save("image_codecs", body, threads=torch.get_num_threads(), folder=args.results))


def score_set(views: ViewSet, codecs: list[str], cache: Cache, lpips: Perceptual, workers: int) -> Row:
    """The curves of all codecs on one set of images."""
    conditions = [f"{codec}/{budget}" for codec in codecs for budget in BUDGETS]
    wanted = {i for i, view in enumerate(views) if any(cache.get(view.digest, c) is None for c in conditions)}
    found = _search_ahead(views, sorted(wanted), codecs, workers)

    def render(index: int, view: View, missing: list[str]) -> dict[str, Rendered | None]:
        at, results = next(found)
        assert at == index, (at, index)
        made: dict[str, Rendered | None] = {}
        for name in missing:
            codec, _, budget = name.partition("/")
            one = results[codec][int(budget)]
            extra = {} if one is None else {"bytes": one.bytes, "side": one.side, "quality": one.quality}
            made[name] = None if one is None else Rendered(torch.from_numpy(one.pixels).permute(2, 0, 1), extra)
        return made

    rows = measure(views, conditions, render, cache, lpips)
    curves: Row = {}
    for codec in codecs:
        curves[codec] = []
        for budget in BUDGETS:
            own = [r[f"{codec}/{budget}"] for r in rows]
            fits = [r["bytes"] for r in own if "bytes" in r]
            mean = {"bytes_mean": round(sum(fits) / len(fits), 1)} if fits else {}
            curves[codec].append({"bytes": budget, **mean, **point(own)})
            p = curves[codec][-1]
            scores = f"{p['psnr']['mean']:6.2f} dB  LPIPS {p['lpips']['mean']:.3f}" if fits else "does not fit"
            print(f"{views.name} {codec} {budget:4d} bytes  fits {len(fits)} of {len(own)}  {scores}")
    return views.describe() | {"curves": curves}


def _search_ahead(views: ViewSet, indices: list[int], codecs: list[str], workers: int) -> Iterator[tuple[int, Found]]:
    """(index, best candidates) in order, searched in other processes a few views ahead."""
    context = multiprocessing.get_context("spawn")  # forking a process that runs torch threads may hang
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs: dict[int, dict[str, Future[dict[int, Candidate | None]]]] = {}
        for position, index in enumerate(indices):
            for ahead in indices[position : position + 2 * workers]:
                if ahead not in jobs:
                    view = views[ahead].pixels.permute(1, 2, 0).numpy()
                    jobs[ahead] = {c: pool.submit(search, np.ascontiguousarray(view), c, BUDGETS) for c in codecs}
            yield index, {codec: job.result() for codec, job in jobs.pop(index).items()}


if __name__ == "__main__":
    main()
