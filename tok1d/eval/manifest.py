"""Manifests: what is measured, one row an image — where it lies, which words and faces it holds, and how large they are.

A manifest is a JSONL file (a header line, then a row an image; easy to write by hand) or a Parquet file (large sets). Paths are
relative to it. Its hash names the data in every result: ids, sizes, words, faces and, where known, the images' own hashes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tok1d.errors import ImageError, TokError
from tok1d.extras import require

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
    """

    name: str
    base: Path
    samples: tuple[Sample, ...]
    version: str = "1"
    licence: str = ""

    def __post_init__(self) -> None:
        ids = [s.id for s in self.samples]
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise TokError(f"manifest {self.name}: the id {twice!r} appears twice; ids must be unique")
        object.__setattr__(self, "samples", tuple(sorted(self.samples, key=lambda s: s.id)))

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def hash(self) -> str:
        """16 hex digits over everything that is scored, independent of where the files lie."""
        digest = hashlib.sha256()
        for sample in self.samples:
            row = _row(sample)
            for field in ("path", "offset", "tags", "split"):
                row.pop(field, None)
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
        return digest.hexdigest()[:16]

    def choose(self, count: int | None) -> Manifest:
        """``count`` evenly spaced samples; all if None or more than there are."""
        if count is None or count >= len(self):
            return self
        return replace(self, samples=tuple(self.samples[i * len(self) // count] for i in range(count)))

    def read(self, sample: Sample) -> Tensor:
        """The image, uint8 (3, H, W).

        Raises:
            ImageError: missing, damaged, or another size or hash than the manifest says.
        """
        from tok1d.image_io import read_uint8

        path = self.base / sample.path
        try:
            with open(path, "rb") as file:
                file.seek(sample.offset)
                data = file.read(sample.size or -1)
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror or error}") from error
        if sample.sha256 and hashlib.sha256(data).hexdigest() != sample.sha256:
            raise ImageError(f"{path}: {sample.id} is another file than the manifest names (SHA-256 differs)")
        try:
            image = read_uint8(data, frame=0)[0]
        except ImageError as error:
            raise ImageError(f"{sample.id}: {error}") from error
        height, width = image.shape[-2:]
        if sample.width and (width, height) != (sample.width, sample.height):
            raise ImageError(
                f"{sample.id} is {width}×{height} pixels after orientation, the manifest says {sample.width}×{sample.height} (width×height)"
            )
        return image.contiguous()

    # disk --------------------------------------------------------------------------------------------------------

    def write(self, path: Path) -> None:
        """Write ``.jsonl`` or ``.parquet``, atomically; paths become relative to it."""
        from tok1d.disk import atomic_write

        here = path.parent.resolve()
        moved = [replace(s, path=_relative(self.base / s.path, here)) for s in self.samples]
        head = {"manifest": VERSION, "name": self.name, "version": self.version, "licence": self.licence}
        rows = [_row(s) for s in moved]
        if path.suffix == ".parquet":
            pa, parquet = require("pyarrow", "eval"), require("pyarrow.parquet", "eval")
            columns = {"id": [r["id"] for r in rows], "row": [json.dumps(r, ensure_ascii=False) for r in rows]}
            table = pa.table(columns).replace_schema_metadata({"tok1d": json.dumps(head)})
            sink = pa.BufferOutputStream()
            parquet.write_table(table, sink)
            atomic_write(path, sink.getvalue().to_pybytes())
        else:
            lines = [json.dumps(r, ensure_ascii=False) for r in (head, *rows)]
            atomic_write(path, ("\n".join(lines) + "\n").encode())

    @staticmethod
    def load(path: Path) -> Manifest:
        """Read a manifest, or make one of a folder of images, a tar shard or an image file.

        Raises:
            TokError: missing, damaged, or a row that lacks what it needs (the line is named).
        """
        if path.suffix == ".parquet":
            head, rows = _parquet(path)
        elif path.suffix == ".jsonl":
            head, rows = _jsonl(path)
        else:
            return of_images([path], path.name)
        if head.get("manifest") != VERSION:
            raise TokError(f"{path}: not a manifest of version {VERSION} (first line: {str(head)[:80]})")
        samples = []
        for number, row in rows:
            try:
                samples.append(_sample(row))
            except (TypeError, ValueError, KeyError) as error:
                raise TokError(f"{path}: row {number} is not a sample: {error}") from error
        base = path.parent
        return Manifest(str(head.get("name", path.stem)), base, tuple(samples), str(head.get("version", "1")), str(head.get("licence", "")))


def of_images(paths: Sequence[Path], name: str) -> Manifest:
    """Folders, tar shards and image files as a manifest without words and faces; damaged images appear when they are read."""
    from tok1d.data.photos import index_images

    samples, seen = [], set()
    for key, file, offset, size in index_images(paths):
        stem = key if key not in seen else f"{Path(file).name}/{key}"
        seen.add(stem)
        alone = not file.endswith(".tar")
        samples.append(Sample(stem, str(Path(file).resolve()), offset=0 if alone else offset, size=0 if alone else size, group=Path(file).stem))
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


def _row(sample: Sample) -> dict[str, Any]:
    """Plain data without empty fields."""
    row = {k: v for k, v in asdict(sample).items() if v not in (0, "", (), None)}
    for field in ("words", "faces"):
        if field in row:
            row[field] = [{k: v for k, v in item.items() if v not in ((), None)} for item in row[field]]
    return row


def _sample(row: dict[str, Any]) -> Sample:
    known = Sample.__dataclass_fields__
    unknown = set(row) - set(known)
    if unknown:
        raise ValueError(f"unknown fields {sorted(unknown)}; there are {', '.join(known)}")
    width, height = int(row.get("width", 0)), int(row.get("height", 0))
    words = []
    for item in row.get("words", ()):
        if "scale" not in item and not width:
            raise ValueError("a word without scale needs the width and height of the image")
        made = word(item["box"], str(item["value"]), width, height, item.get("poly"))
        scale = float(item.get("scale", made.scale))
        if not (math.isfinite(scale) and all(map(math.isfinite, made.box))):
            raise ValueError(f"the word {made.value!r} has a box or scale that is not finite")
        words.append(replace(made, scale=scale, tags=tuple(item.get("tags", ()))))
    faces = []
    for item in row.get("faces", ()):
        kps = tuple((float(x), float(y)) for x, y in item["kps"])
        if len(kps) != 5:
            raise ValueError(f"a face needs 5 landmarks, got {len(kps)}")
        box = None if item.get("box") is None else tuple(map(float, item["box"]))
        if "scale" not in item and (box is None or not width):
            raise ValueError("a face without scale needs a box and the width and height of the image")
        scale = float(item["scale"]) if "scale" in item else max(box[2] - box[0], box[3] - box[1]) / max(width, height)  # type: ignore[index]
        faces.append(Face(kps, scale, box, item.get("person")))  # type: ignore[arg-type]
    plain = {k: v for k, v in row.items() if k not in ("words", "faces", "tags", "width", "height")}
    return Sample(**plain, width=width, height=height, words=tuple(words), faces=tuple(faces), tags=tuple(row.get("tags", ())))


def _jsonl(path: Path) -> tuple[dict[str, Any], list[tuple[int, dict[str, Any]]]]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TokError(f"{path}: cannot be read ({error})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TokError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise TokError(f"{path}: line {number} is not a JSON object")
        rows.append((number, row))
    if not rows:
        raise TokError(f"{path}: an empty manifest")
    return rows[0][1], rows[1:]


def _parquet(path: Path) -> tuple[dict[str, Any], list[tuple[int, dict[str, Any]]]]:
    parquet = require("pyarrow.parquet", "eval")
    try:
        table = parquet.read_table(path)
        head = json.loads((table.schema.metadata or {})[b"tok1d"])
        return head, [(i, json.loads(r)) for i, r in enumerate(table.column("row").to_pylist(), 1)]
    except (OSError, KeyError, ValueError) as error:  # pyarrow's own errors are ValueErrors and OSErrors
        raise TokError(f"{path}: not a manifest in Parquet ({error})") from error


def _relative(path: Path, here: Path) -> str:
    import os

    return os.path.relpath(path.resolve(), here)
