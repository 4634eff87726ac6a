"""Photos from plain folders and WebDataset tar shards, with random access.

A shard is indexed once (offsets of its image members) and samples are read by seeking, so the order of a run is a pure
function of seed and step: an interrupted run continues with exactly the samples it would have seen. Small sets can be
kept decoded in memory. Broken images are counted and skipped in favour of the next sample, never silently.

Shapes: images are uint8, (H, W, 3) as read. A sample is ``image``, (3, size, size), and ``key``, its name.
"""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from tok1d.errors import ImageError
from tok1d.image_io import read_uint8

log = logging.getLogger(__name__)
SUFFIXES = (".webp", ".png", ".jpg", ".jpeg")
BLOCK = 512  # of a tar file
Sample = tuple[str, str, int, int]  # key, file, offset, size


def index_images(paths: Sequence[str | Path]) -> list[Sample]:
    """List the images of folders (recursively), .tar shards and single files, sorted by key within each path.

    Hidden files and folders (a leading dot) are left out.

    Raises:
        ImageError: a path does not exist, a shard is damaged, or nothing was found.
    """
    samples: list[Sample] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if not any(n.startswith(".") for n in p.relative_to(path).parts))
            samples += [s for p in found if p.suffix == ".tar" for s in _index_shard(p)]
            files = [p for p in found if p.suffix.lower() in SUFFIXES and p.is_file()]
            samples += [(str(p.relative_to(path)), str(p), 0, p.stat().st_size) for p in files]
        elif path.suffix == ".tar" and path.is_file():
            samples += _index_shard(path)
        elif path.suffix.lower() in SUFFIXES and path.is_file():
            samples.append((path.name, str(path), 0, path.stat().st_size))
        elif path.exists():
            raise ImageError(f"{path} is neither a folder, a .tar shard nor an image ({', '.join(SUFFIXES)})")
        else:
            raise ImageError(f"{path}: no such file or folder; give photos with --data.train \"[FOLDER_OR_SHARD, …]\"")
    if not samples:
        raise ImageError(f"no images found under {', '.join(map(str, paths))}; looked for {', '.join(SUFFIXES)} and .tar")
    return samples


def _index_shard(path: Path) -> list[Sample]:
    try:
        with tarfile.open(path, "r:") as tar:
            members = list(tar)
            end = max((m.offset_data + -(-m.size // BLOCK) * BLOCK for m in members), default=0)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ImageError(f"{path} is not a readable uncompressed tar shard: {error}") from error
    # Python's reader takes a damaged header for the end of the archive; the end proper is a block of zeros.
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(BLOCK).strip(b"\0"):
            raise ImageError(f"{path} is damaged after its member {len(members)} (byte {end}); copy or make the shard again")
    images = [m for m in members if m.isfile() and m.name.lower().endswith(SUFFIXES) and m.name.rpartition("/")[2][0] != "."]
    return sorted((m.name.rsplit(".", 1)[0], str(path), m.offset_data, m.size) for m in images)


def read_sample(sample: Sample) -> bytes:
    """The encoded bytes of one indexed image."""
    _, file, offset, size = sample
    with open(file, "rb") as f:
        f.seek(offset)
        return f.read(size)


def decode_rgb(data: bytes) -> np.ndarray:
    """Encoded image → uint8 (H, W, 3), as :func:`tok1d.read` sees it (orientation, white behind alpha, first frame).

    Raises:
        ImageError: not an image, damaged, or not representable.
    """
    return read_uint8(data, frame=0)[0].permute(1, 2, 0).numpy()


def centre_crop(image: np.ndarray, size: int) -> Tensor:
    """Shorter edge to ``size`` (bicubic, antialias), centre crop: the field's evaluation view, uint8 (3, size, size)."""
    h, w = image.shape[:2]
    side = min(h, w)
    return _resize(image, (h - side) // 2, (w - side) // 2, side, side, size)


def random_resized_crop(image: np.ndarray, size: int, area: tuple[float, float], rng: np.random.Generator) -> Tensor:
    """Square crop holding a random share (``area``) of the largest square, mirrored half the time: uint8 (3, size, size)."""
    h, w = image.shape[:2]
    side = max(1, round(float(np.sqrt(rng.uniform(*area))) * min(h, w)))
    top, left = int(rng.integers(0, h - side + 1)), int(rng.integers(0, w - side + 1))
    crop = _resize(image, top, left, side, side, size)
    return crop.flip(2) if rng.random() < 0.5 else crop


def _resize(image: np.ndarray, top: int, left: int, h: int, w: int, size: int) -> Tensor:
    x = torch.from_numpy(np.ascontiguousarray(image[top : top + h, left : left + w])).permute(2, 0, 1)[None]
    if (h, w) != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True)
    return x[0].contiguous()


class Photos(Dataset):
    """Random-access photos for training or evaluation.

    Args:
        samples: from :func:`index_images`.
        size: side of the square views.
        area: random-resized-crop share for training; None for the centre crop.
        seed: with the draw number it decides every crop.
        cache: keep decoded images in memory (about 0.2 MB each at 256 pixels).

    Indexing takes an int (the n-th view, without augmentation randomness) or a pair (sample, draw).

    Attributes:
        broken: bool (samples,), True where an image could not be read; shared with loader processes.
    """

    def __init__(
        self, samples: Sequence[Sample], size: int, area: tuple[float, float] | None = None, seed: int = 0, cache: bool = False
    ) -> None:
        self.samples, self.size, self.area, self.seed = list(samples), size, area, seed
        self.broken = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()
        self._cache: dict[int, np.ndarray] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.samples)

    def image(self, index: int) -> np.ndarray:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        image = decode_rgb(read_sample(self.samples[index]))
        if self._cache is not None:
            self._cache[index] = image
        return image

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        index, draw = index if isinstance(index, tuple) else (index, index)
        if not 0 <= index < len(self.samples):
            raise IndexError(f"{index} of {len(self.samples)} images")
        for step in range(len(self.samples)):
            at = (index + step) % len(self.samples)
            if self.broken[at]:
                continue
            try:
                image = self.image(at)
                break
            except (OSError, ImageError) as error:
                self.broken[at] = True
                key, file, *_ = self.samples[at]
                log.warning("skipping %s of %s: %s (%d broken so far)", key, file, error, int(self.broken.sum()))
        else:
            raise ImageError(f"none of the {len(self.samples)} images can be read, {self.samples[0][1]} first among them")
        if self.area is None:
            view = centre_crop(image, self.size)
        else:
            view = random_resized_crop(image, self.size, self.area, np.random.default_rng((self.seed, draw)))
        return {"image": view, "key": self.samples[at][0]}
