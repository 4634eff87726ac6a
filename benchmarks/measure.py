"""PSNR and LPIPS of reconstructions of one set of views, image by image, resumable.

Protocol ``view256-v1``: shorter edge to 256 (bicubic, antialias), centre crop 256 × 256; reconstructions rounded to 8 bits
before anything is measured; PSNR per image over all pixels and channels, then the mean over images; LPIPS 0.1 with VGG16.
An interrupted run continues: every measured image is one line of a JSON-lines file under runs/benchmarks.

Shapes: pixels are uint8 (3, 256, 256).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import say
from tok1d.data.photos import Sample, centre_crop, decode_rgb, index_images, read_sample
from tok1d.eval.perceptual import Perceptual

SIDE = 256
PROTOCOL = {
    "id": "view256-v1",
    "view": "shorter edge to 256 (bicubic, antialias), centre crop 256 x 256",
    "psnr": "8-bit reconstruction, all pixels and channels of an image, 100 dB at most, mean over images",
    "lpips": "LPIPS 0.1, VGG16, 8-bit reconstruction, mean over images",
    "interval": "95 %, percentile bootstrap over images, 2000 draws, seed 0",
}
TOKEN_STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BUDGETS = (12, 24, 48, 96, 192, 384)  # bytes
Row = dict[str, Any]


@dataclass(frozen=True)
class View:
    """One image as it is measured.

    Attributes:
        key: name in its set.
        digest: of the encoded source, hexadecimal.
        pixels: uint8 (3, 256, 256).
    """

    key: str
    digest: str
    pixels: Tensor


@dataclass
class Rendered:
    """A reconstruction: uint8 (3, 256, 256), and what else is worth keeping about it."""

    pixels: Tensor
    extra: Row = field(default_factory=dict)


class ViewSet:
    """Evenly spaced images of one shard or folder, in a fixed order.

    Args:
        path: .tar shard, folder or image.
        count: how many; all if None or more than there are.
    """

    def __init__(self, path: str | Path, count: int | None = None) -> None:
        self.name = re.sub(r"-\d+$", "", Path(path).stem)
        samples = index_images([path])
        self.of = len(samples)
        self.samples: list[Sample] = [samples[i] for i in spread(len(samples), count)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> View:
        data = read_sample(self.samples[index])
        digest = hashlib.sha256(data).hexdigest()[:16]
        return View(self.samples[index][0], digest, centre_crop(decode_rgb(data), SIDE))

    def __iter__(self) -> Iterator[View]:
        return (self[i] for i in range(len(self)))

    def describe(self) -> Row:
        """Name, counts and a hash of exactly these images in this order."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(hashlib.sha256(read_sample(sample)).digest())
        return {"set": self.name, "images": len(self), "of": self.of, "sha256": digest.hexdigest()[:16]}


def spread(total: int, count: int | None) -> list[int]:
    """``count`` evenly spaced indices below ``total``.

    Example:
        >>> spread(10, 4), spread(3, 8)
        ([0, 2, 5, 7], [0, 1, 2])
    """
    return list(range(total)) if count is None or count >= total else [i * total // count for i in range(count)]


class Cache:
    """Rows by (image digest, condition) in a JSON-lines file; the file's name says what made them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], Row] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a run that was killed
                self.rows[row["image"], row["condition"]] = row
        self._file = path.open("a", encoding="utf-8")
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")

    def get(self, image: str, condition: str) -> Row | None:
        return self.rows.get((image, condition))

    def put(self, image: str, condition: str, row: Row) -> Row:
        row = {"image": image, "condition": condition, **row}
        self.rows[image, condition] = row
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        return row


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels between two uint8 images, 100 where they are equal or nearly so.

    Example:
        >>> black = torch.zeros(3, 8, 8, dtype=torch.uint8)
        >>> psnr(black, black), round(psnr(black, black + 16), 2)
        (100.0, 24.05)
    """
    error = (a.float() - b.float()).square().mean().item()
    return 100.0 if error < 255**2 * 1e-10 else 10 * math.log10(255**2 / error)


def to_bytes(images: Tensor) -> Tensor:
    """Float in about [0, 1] → uint8, clamped and rounded to nearest."""
    return images.clamp(0, 1).mul(255).round_().to(torch.uint8)


def measure(
    views: ViewSet,
    conditions: Sequence[str],
    render: Callable[[int, View, list[str]], dict[str, Rendered | None]],
    cache: Cache,
    lpips: Perceptual,
    *,
    at_once: int = 4,
) -> list[dict[str, Row]]:
    """Rows of every view and condition, computing those the cache lacks.

    Args:
        views: V images.
        conditions: names of the reconstructions of each.
        render: (index, view, missing conditions) → a reconstruction of each, None where there is none (kept as a row
            without scores).
        cache: rows measured before.
        lpips: the features of the original are computed once a view.
        at_once: reconstructions in one LPIPS batch.

    Returns:
        V dicts: condition → row with psnr, lpips and the extras.
    """
    table, start, done, last = [], time.monotonic(), 0, 0.0
    for index, view in enumerate(views):
        missing = [c for c in conditions if cache.get(view.digest, c) is None]
        if missing:
            made = render(index, view, missing)
            names = [c for c in missing if made[c] is not None]
            distances = _lpips(lpips, view.pixels, [made[c].pixels for c in names], at_once)  # type: ignore[union-attr]
            for name in missing:
                if (one := made[name]) is None:
                    cache.put(view.digest, name, {})
                else:
                    scores = {"psnr": psnr(one.pixels, view.pixels), "lpips": distances[names.index(name)]}
                    cache.put(view.digest, name, {**scores, **one.extra})
            done += 1
        table.append({c: cache.rows[view.digest, c] for c in conditions})
        now = time.monotonic()
        if now - last > 10 or index == len(views) - 1:
            last = now
            left = (now - start) / done * (len(views) - index - 1) if done else 0
            say(f"{views.name}: {index + 1} of {len(views)} images, {now - start:.0f} s, about {left:.0f} s left")
    return table


@torch.inference_mode()
def _lpips(lpips: Perceptual, reference: Tensor, images: list[Tensor], at_once: int) -> list[float]:
    if not images:
        return []
    wanted = lpips.features(reference[None].float() / 255)
    found: list[float] = []
    for start in range(0, len(images), at_once):
        part = lpips.features(torch.stack(images[start : start + at_once]).float() / 255)
        found += lpips.compare(part, wanted).tolist()
    return found


def interval(values: Sequence[float], draws: int = 2000) -> dict[str, float]:
    """Mean and its 95 % percentile bootstrap interval.

    Example:
        >>> interval([1.0, 1.0, 1.0])
        {'mean': 1.0, 'low': 1.0, 'high': 1.0}
    """
    x = np.asarray(values, dtype=np.float64)
    means = x[np.random.default_rng(0).integers(0, len(x), (draws, len(x)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": round(float(x.mean()), 5), "low": round(float(low), 5), "high": round(float(high), 5)}


def point(rows: Sequence[Row]) -> Row:
    """One point of a curve: means over the images that have a reconstruction, and how many they are."""
    scored = [r for r in rows if "psnr" in r]
    scores = {name: interval([r[name] for r in scored]) for name in ("psnr", "lpips")} if scored else {}
    return {"images": len(scored), **scores}
