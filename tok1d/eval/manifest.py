"""Manifests: what is measured, one row an image — where it lies, which words and faces it holds, and how large they are.

A manifest is a JSONL file (a header line, then a row an image; easy to write by hand) or a Parquet file (large sets). Paths are
relative to it. Its hash names the data in every result: ids, sizes, words, faces and, where known, the images' own hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tok1d.errors import ImageError, TokError, UsageError

VERSION = 1
Point = tuple[float, float]


@dataclass(frozen=True)
class Word:
    """One word.

    Attributes:
        box: (x0, y0, x1, y1) in pixels of the image, upright.
        value: what is written there.
        scale: size of a character relative to the image: longer side of the box / characters / longer side of the image.
        poly: clockwise corners of a slanted word, first the upper left one; None for upright ones.
        tags: free words, kept.
    """

    box: tuple[float, float, float, float]
    value: str
    scale: float
    poly: tuple[Point, ...] | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Face:
    """One face.

    Attributes:
        kps: (x, y) of the two eyes, the nose and the two corners of the mouth, left ones (in the image) first.
        scale: longer side of the face's box relative to the longer side of the image.
        box: (x0, y0, x1, y1) in pixels, if known.
        person: who it is, if known.
    """

    kps: tuple[Point, Point, Point, Point, Point]
    scale: float
    box: tuple[float, float, float, float] | None = None
    person: str | None = None


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        id: unique and stable; the key of results and of resuming.
        path: of the image, or of the tar it lies in, relative to the manifest.
        width, height: in pixels after orientation; checked when the image is read. 0 if not yet known.
        offset, size: where it lies in the tar; size 0 for a file of its own.
        words, faces: what is scored in it.
        group: set it comes from, for tables by set.
        split, tags: free.
        sha256: of the encoded bytes, checked when given.
    """

    id: str
    path: str
    width: int = 0
    height: int = 0
    offset: int = 0
    size: int = 0
    words: tuple[Word, ...] = ()
    faces: tuple[Face, ...] = ()
    group: str = ""
    split: str = ""
    tags: tuple[str, ...] = ()
    sha256: str = ""


@dataclass(frozen=True)
class Manifest:
    """A named list of samples.

    Attributes:
        name, version, licence: of the data.
        base: folder that paths are relative to.
        samples: in the order of their ids.
        notes: what was left out when it was made, and why.
    """

    name: str
    base: Path
    samples: tuple[Sample, ...]
    version: str = "1"
    licence: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ids = [s.id for s in self.samples]
        if len(set(ids)) < len(ids):
            twice = Counter(ids).most_common(1)[0][0]
            raise TokError(f"manifest {self.name}: the id {twice!r} appears twice; ids must be unique")
        object.__setattr__(self, "samples", tuple(sorted(self.samples, key=lambda s: s.id)))

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def hash(self) -> str:
        """16 hex digits over everything that is scored, independent of where the files lie, alone or in a tar."""
        from tok1d.eval.manifest_rows import to_row

        digest = hashlib.sha256()
        for sample in self.samples:
            row = to_row(sample)
            for field in ("path", "offset", "size", "group", "split", "tags"):
                row.pop(field, None)
            digest.update(json.dumps(row, sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def choose(self, count: int | None) -> Manifest:
        """``count`` evenly spaced samples; all if None or more than there are."""
        if count is None or count >= len(self):
            return self
        return replace(self, samples=tuple(self.samples[i * len(self) // count] for i in range(count)))

    def encoded(self, sample: Sample) -> bytes:
        """The file of the image, out of its tar if it lies in one.

        Raises:
            ImageError: missing, or another hash than the manifest says.
        """
        path = self.base / sample.path
        try:
            with open(path, "rb") as file:
                file.seek(sample.offset)
                data = file.read(sample.size or -1)
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror or error}") from error
        if sample.sha256 and hashlib.sha256(data).hexdigest() != sample.sha256:
            raise ImageError(f"{path}: {sample.id} is another file than the manifest names (SHA-256 differs)")
        return data

    def read(self, sample: Sample) -> Tensor:
        """The image, uint8 (3, H, W).

        Raises:
            ImageError: missing, damaged, or another size or hash than the manifest says.
        """
        from tok1d.image_io import read_uint8

        data = self.encoded(sample)
        try:
            image = read_uint8(data, frame=0)[0]
        except ImageError as error:
            raise ImageError(f"{sample.id}: {error}") from error
        height, width = image.shape[-2:]
        if sample.width and (width, height) != (sample.width, sample.height):
            swapped = ": its width and height are swapped" if (height, width) == (sample.width, sample.height) else ""
            raise ImageError(
                f"{sample.id} is {width}×{height} pixels after orientation, the manifest says {sample.width}×{sample.height} (width×height){swapped}"
            )
        return image.contiguous()

    # disk --------------------------------------------------------------------------------------------------------

    def write(self, path: Path) -> None:
        """Write ``.jsonl`` or ``.parquet``, atomically; paths become relative to it.

        Raises:
            UsageError: another suffix.
            TokError: it cannot be written.
        """
        from tok1d.disk import atomic_write
        from tok1d.eval.manifest_rows import line, parquet_bytes, to_row

        if path.suffix not in (".jsonl", ".parquet"):
            raise UsageError(f"{path}: a manifest is written as .jsonl or .parquet")
        here = path.parent.resolve()
        rows = [to_row(replace(s, path=_relative(self.base / s.path, here))) for s in self.samples]
        head = {"manifest": VERSION, "name": self.name, "version": self.version, "licence": self.licence, "notes": list(self.notes)}
        if path.suffix == ".parquet":
            atomic_write(path, parquet_bytes(head, rows))
        else:
            atomic_write(path, "".join(line(r) + "\n" for r in (head, *rows)).encode())

    @staticmethod
    def load(path: Path) -> Manifest:
        """Read a manifest, or make one of a folder of images, a tar shard or an image file.

        Raises:
            TokError: missing, damaged, or a row that lacks what it needs (the line is named).
        """
        from tok1d.eval.manifest_rows import read_jsonl, read_parquet, to_sample

        if path.suffix not in (".jsonl", ".parquet"):
            return of_images([path], path.name)
        head, rows = (read_parquet if path.suffix == ".parquet" else read_jsonl)(path)
        if not isinstance(head, dict) or head.get("manifest") != VERSION:
            raise TokError(f'{path}: not a manifest of version {VERSION}; its header should be {{"manifest": {VERSION}, "name": …}}, got {str(head)[:80]}')
        samples: list[Sample] = []
        lines: dict[str, int] = {}
        for at, row in rows:
            where = f"{path}: {'line' if path.suffix == '.jsonl' else 'row'} {at}"
            try:
                sample = to_sample(row)
            except ValueError as error:
                raise TokError(f"{where} is not a sample: {error}") from error
            if sample.id in lines:
                raise TokError(f"{where}: the id {sample.id!r} appears in {lines[sample.id]} already; ids must be unique")
            lines[sample.id] = at
            samples.append(sample)
        name, version, licence = (str(head.get(k, default)) for k, default in (("name", path.stem), ("version", "1"), ("licence", "")))
        return Manifest(name, path.parent, tuple(samples), version, licence, tuple(map(str, head.get("notes") or ())))


def of_images(paths: Sequence[Path], name: str) -> Manifest:
    """Folders, tar shards and image files as a manifest without words and faces; damaged images appear when they are read."""
    from tok1d.data.photos import index_images

    samples, seen = [], set()
    for key, file, offset, size, *_ in index_images(paths):
        stem = key if key not in seen else f"{Path(file).name}/{key}"
        seen.add(stem)
        path, alone = str(Path(file).resolve()), not file.endswith(".tar")
        if alone:
            samples.append(Sample(stem, path, group=Path(key).parent.as_posix().removeprefix(".")))
        else:
            samples.append(Sample(stem, path, offset=offset, size=size, group=Path(file).stem))
    return Manifest(name, Path("/"), tuple(samples))


def word(box: Sequence[float], value: str, width: int, height: int, poly: Iterable[Sequence[float]] | None = None) -> Word:
    """A word whose scale follows from its box and the size of the image."""
    x0, y0, x1, y1 = map(float, box)
    extent = max(x1 - x0, y1 - y0)
    corners = None if poly is None else tuple((float(x), float(y)) for x, y in poly)
    return Word((x0, y0, x1, y1), value, extent / max(1, len(value)) / max(width, height), corners)


def landmarks(faces: Sequence[Face]) -> Tensor:
    """Landmarks of faces, float32 (n, 5, 2)."""
    return torch.tensor([f.kps for f in faces], dtype=torch.float32).reshape(-1, 5, 2)


def _relative(path: Path, here: Path) -> str:
    return os.path.relpath(path.resolve(), here)
