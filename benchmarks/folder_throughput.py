"""Images/s and peak memory of `tok encode FOLDER` and `tok decode FOLDER`, for a small and a large folder.

Memory must not grow with the number of files. The photos are drawn (smooth colours, shapes, texture; JPEG 512 × 384), so
that anybody can repeat this. Peak memory is the operating system's account of that one process (wait4).

    python -m benchmarks.folder_throughput                             # 100 and 2,000 files, batch 16
    python -m benchmarks.folder_throughput --files 4 12 --model runs/spectral

Results: benchmarks/results/folder_throughput.json.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.record import RESULTS, run, save, say, tok_command

WIDTH, HEIGHT = 512, 384


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs=2, default=(100, 2000), metavar=("FEW", "MANY"))
    parser.add_argument("--model", default="default")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)

    runs: dict[str, dict[str, Any]] = {"encode": {}, "decode": {}}
    common = ["--model", args.model, "--batch-size", str(args.batch_size), "-q"]
    with tempfile.TemporaryDirectory() as folder:
        for count in sorted(args.files):
            photos, tokens, images = (Path(folder) / f"{name}{count}" for name in ("photos", "tokens", "images"))
            photos.mkdir()
            say(f"drawing {count} photos")
            for i in range(count):
                (photos / f"{i:05d}.jpg").write_bytes(draw(i))
            encode = ["encode", str(photos), "-o", f"{tokens}/", "--tokens", str(args.tokens), *common]
            decode = ["decode", str(tokens), "-o", f"{images}/", "--format", "jpg", *common]
            for verb, arguments, made in (("encode", encode, tokens), ("decode", decode, images)):
                done = run([*tok_command(), *arguments])
                written = sum(p.is_file() for p in made.rglob("*"))
                if written != count:
                    raise SystemExit(f"tok {verb} wrote {written} of {count} files")
                runs[verb][str(count)] = {
                    "files": count,
                    "seconds": round(done.seconds, 1),
                    "cpu_seconds": round(done.cpu_seconds, 1),
                    "images_per_second": round(count / done.seconds, 2),
                    "peak_mib": round(done.peak_mib, 1),
                }
                print(f"{verb} {count:5d} files  {done.seconds:7.1f} s  {count / done.seconds:6.2f} images/s  peak {done.peak_mib:7.1f} MiB")
    for verb, by_count in runs.items():
        few, many = by_count.values()
        by_count["difference"] = {
            "images_per_second": round((many["files"] - few["files"]) / (many["seconds"] - few["seconds"]), 2),
            "peak_mib": round(many["peak_mib"] - few["peak_mib"], 1),
        }
        print(f"{verb}: {by_count['difference']['images_per_second']} images/s without the start, {by_count['difference']['peak_mib']:+} MiB")
    body = {
        "protocol": f"Whole processes, drawn JPEG {WIDTH} x {HEIGHT}, batch {args.batch_size}, {args.tokens} tokens, one run each",
        "seed": 0,
        "model": args.model if args.model == "default" else "another than default",
        "runs": runs,
    }
    print(save("folder_throughput", body, folder=args.results))


def draw(seed: int) -> bytes:
    """A JPEG with gradients, discs and texture, another one for every seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / HEIGHT
    a, b, c = rng.uniform(0, 1, (3, 3))
    image = a + (b - a) * y[..., None] + (c - 0.5) * 0.5 * x[..., None]
    for _ in range(6):
        cy, cx, radius = rng.uniform(0, 1), rng.uniform(0, WIDTH / HEIGHT), rng.uniform(0.05, 0.35)
        inside = ((y - cy) ** 2 + (x - cx) ** 2 < radius**2)[..., None]
        image = np.where(inside, rng.uniform(0, 1, 3) + 0.2 * (y - cy)[..., None], image)
    image = image + 0.05 * np.sin(x * rng.uniform(20, 90) + y * rng.uniform(20, 90))[..., None]
    image = image + rng.normal(0, 0.02, image.shape)
    out = io.BytesIO()
    Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


if __name__ == "__main__":
    main()
