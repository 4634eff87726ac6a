"""The linear line: what an ideal linear code makes of the same images at the same bits.

Two of them. Both take the Gaussian rate–distortion function itself for their rate, which no quantizer of finite length
reaches on Gaussian coefficients (real photos are not Gaussian, so a learned code may still pass them):

* ``pca32``: principal components of the whole view at 32 × 32, upsampled bicubically.
* ``dct64``: the 64 × 64 lowest DCT frequencies of the whole 256 × 256 view in principal colour axes, as independent
  coefficients.

Each coefficient is a Gaussian of the variance measured on training photos. R bits are spread by reverse water-filling and
the coefficients go through the Gaussian test channel at exactly that rate (one seeded noise vector an image).

    python -m benchmarks.linear_line --train photos-free-train-*.tar --data photos-free-val-00000.tar --images 128

Results: benchmarks/results/linear_line.json.

Shapes: F coefficients; PCA has F = 3 · 32 · 32, the DCT F = 3 · 64 · 64.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.measure import BUDGETS, PROTOCOL, SIDE, Cache, Rendered, Row, View, ViewSet, measure, point, to_bytes
from benchmarks.record import CACHE, RESULTS, save, say
from tok1d.data.photos import Photos, index_images
from tok1d.eval.perceptual import Perceptual
from tok1d.tokenizers.spectral import analyse, dct_matrix, synthesise

SMALL, GRID = 32, 64
BITS = sorted({12 * 2**i for i in range(9)} | {8 * b for b in BUDGETS})
LINES = ("pca32", "dct64")
Stats = dict[str, Tensor]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="shards or folders the statistics come from")
    parser.add_argument("--data", nargs="+", required=True, help="shards or folders to measure; each is a set of its own")
    parser.add_argument("--images", type=int, metavar="N", help="evenly spaced images of each set; default: all")
    parser.add_argument("--views", type=int, default=3, help="random crops of each training photo (and their mirror images)")
    parser.add_argument("--area", type=float, nargs=2, default=(0.35, 1.0), help="share of the photo in a crop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)

    samples = index_images(args.train)
    what = repr((sorted(s[0] for s in samples), args.views, tuple(args.area), args.seed))
    name = hashlib.sha256(what.encode()).hexdigest()[:12]
    stored = args.cache / f"linear_line-{name}.safetensors"
    if stored.is_file():
        stats = load_file(stored)
    else:
        stats = fit(crops(Photos(samples, SIDE, tuple(args.area), args.seed), args.views))
        stored.parent.mkdir(parents=True, exist_ok=True)
        save_file(stats, stored)

    lpips, cache = Perceptual("vgg"), Cache(args.cache / f"linear_line-{name}.jsonl")
    sets = [score_set(stats, ViewSet(path, args.images), cache, lpips, args.seed) for path in args.data]
    body: Row = {
        "protocol": PROTOCOL,
        "seed": args.seed,
        "train": {"photos": len(samples), "views": args.views, "area": list(args.area), "mirrored": True},
        "sets": sets,
    }
    print(save("linear_line", body, threads=torch.get_num_threads(), folder=args.results))


def crops(photos: Photos, views: int, batch: int = 64) -> Iterable[Tensor]:
    """Batches of random crops, float (B, 3, 256, 256), every photo equally often."""
    order = np.random.default_rng(photos.seed).permutation(len(photos) * views)
    for number, start in enumerate(range(0, len(order), batch)):
        if number % 50 == 0:
            say(f"statistics: {start} of {len(order)} crops")
        yield torch.stack([photos[int(i) % len(photos), int(i)]["image"] for i in order[start : start + batch]]).float() / 255


def fit(batches: Iterable[Tensor]) -> Stats:
    """Means, axes and variances of both lines, of the crops and their mirror images together."""
    rows = dct_matrix(GRID, SIDE)
    plain = torch.eye(3)
    count, small_sum, small_square = 0, torch.zeros(3 * SMALL**2).double(), torch.zeros(3 * SMALL**2, 3 * SMALL**2).double()
    dct_sum, dct_square = torch.zeros(3, GRID, GRID).double(), torch.zeros(3, 3, GRID, GRID).double()
    colour_sum, colour_square = torch.zeros(3).double(), torch.zeros(3, 3).double()
    for x in batches:
        count += len(x)
        small = shrink(x).flatten(1) - 0.5
        small_sum += small.sum(0)
        small_square += small.T @ small
        spectrum = analyse(x - 0.5, plain, rows, rows)
        dct_sum += spectrum.sum(0)
        dct_square += torch.einsum("bcuv,bduv->cduv", spectrum, spectrum)
        colours = x.mean((0, 2, 3)) - 0.5
        colour_sum += colours * len(x)
        colour_square += torch.einsum("bchw,bdhw->cd", x - 0.5, x - 0.5) / SIDE**2

    mirror = torch.arange(3 * SMALL**2).view(3, SMALL, SMALL).flip(2).flatten()
    small_mean, small_square = small_sum / count, small_square / count
    small_mean, small_square = (small_mean + small_mean[mirror]) / 2, (small_square + small_square[mirror][:, mirror]) / 2
    variance, axes = torch.linalg.eigh((small_square - small_mean[:, None] * small_mean).float())
    colour_mean = colour_sum / count
    _, colour = torch.linalg.eigh(colour_square / count - colour_mean[:, None] * colour_mean)
    colour = colour.flip(1).T
    # a mirror image flips the sign of odd horizontal frequencies: their mean over both is 0
    dct_mean = torch.einsum("dc,cuv->duv", colour, dct_sum / count)
    dct_mean[:, :, 1::2] = 0
    dct_variance = torch.einsum("dc,de,ceuv->duv", colour, colour, dct_square / count) - dct_mean.square()
    return {
        "pca32_mean": (small_mean + 0.5).float(),
        "pca32_axes": axes.T.contiguous(),
        "pca32_variance": variance.clamp(min=0),
        "dct64_colour": colour.float().contiguous(),
        "dct64_mean": dct_mean.float().flatten(),
        "dct64_variance": dct_variance.clamp(min=0).float().flatten(),
    }


def shrink(images: Tensor) -> Tensor:
    """Float (B, 3, 256, 256) → (B, 3, 32, 32), bicubic with antialias."""
    return F.interpolate(images, size=(SMALL, SMALL), mode="bicubic", antialias=True)


def water_level(variance: Tensor, bits: float) -> float:
    """The distortion D at which sum(max(0, log2(variance / D) / 2)) is ``bits``.

    Example:
        >>> round(water_level(torch.tensor([16.0, 1.0]), 2.0), 3), round(water_level(torch.tensor([16.0, 1.0]), 4.0), 3)
        (1.0, 0.25)
    """
    v = variance[variance > 0].double()
    low, high = v.min().log2().item() - bits, v.max().log2().item()
    for _ in range(80):
        middle = (low + high) / 2
        if (v.log2() - middle).clamp(min=0).sum().item() / 2 > bits:
            low = middle
        else:
            high = middle
    return float(2**high)


def channel(x: Tensor, variance: Tensor, level: float, noise: Tensor) -> Tensor:
    """The Gaussian test channel at distortion ``level``: (F,) centred coefficients → what its receiver has, (F,)."""
    gain = (1 - level / variance.clamp(min=1e-20)).clamp(min=0)
    return gain * x + (level * gain).sqrt() * noise


def score_set(stats: Stats, views: ViewSet, cache: Cache, lpips: Perceptual, seed: int) -> Row:
    """Both curves of one set of images."""
    levels = {(line, bits): water_level(stats[f"{line}_variance"], bits) for line in LINES for bits in BITS}
    conditions = [f"{line}/{bits}" for line, bits in levels]

    def render(index: int, view: View, missing: list[str]) -> dict[str, Rendered | None]:
        made: dict[str, Rendered | None] = {}
        for line in LINES:
            coefficients, back = transform(stats, line, view.pixels)
            generator = torch.Generator().manual_seed((int(view.digest, 16) ^ seed) % 2**63)
            noise = torch.randn(len(coefficients), generator=generator)
            for bits in BITS:
                if (name := f"{line}/{bits}") in missing:
                    received = channel(coefficients, stats[f"{line}_variance"], levels[line, bits], noise)
                    made[name] = Rendered(to_bytes(back(received)))
        return made

    rows = measure(views, conditions, render, cache, lpips)
    lines: Row = {}
    for line in LINES:
        lines[line] = [{"bits": bits, "bytes": bits / 8, **point([r[f"{line}/{bits}"] for r in rows])} for bits in BITS]
        for p in lines[line]:
            print(f"{views.name} {line} {p['bits']:5d} bits  {p['psnr']['mean']:6.2f} dB  LPIPS {p['lpips']['mean']:.3f}")
    return views.describe() | {"curves": lines}


def transform(stats: Stats, line: str, pixels: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Centred coefficients (F,) of a uint8 view, and the way back to a float (3, 256, 256)."""
    x = pixels[None].float() / 255
    mean = stats[f"{line}_mean"]
    if line == "pca32":
        axes = stats["pca32_axes"]

        def enlarge(c: Tensor) -> Tensor:
            small = (c @ axes + mean).view(1, 3, SMALL, SMALL)
            return F.interpolate(small, size=(SIDE, SIDE), mode="bicubic")[0]

        return axes @ (shrink(x).flatten() - mean), enlarge
    colour, rows = stats["dct64_colour"], dct_matrix(GRID, SIDE)

    def paint(c: Tensor) -> Tensor:
        return synthesise((c + mean).view(1, 3, GRID, GRID), colour, rows, rows)[0] + 0.5

    return analyse(x - 0.5, colour, rows, rows).flatten() - mean, paint


if __name__ == "__main__":
    main()
