"""Annotations in lines of text: ICDAR's file an image, WFLW's list of faces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tok1d.data.photos import SUFFIXES
from tok1d.errors import TokError, UsageError
from tok1d.eval.import_tools import (
    ILLEGIBLE,
    Notes,
    find_image,
    folder_with,
    image_size,
    is_illegible,
    numbers,
    read_text,
    slanted_word,
)
from tok1d.eval.manifest import Face, Manifest, Sample

FIVE = (96, 97, 54, 76, 82)  # of WFLW's 98 landmarks: pupils, tip of the nose, corners of the mouth, left ones in the image first
_UPRIGHT = re.compile(r'\s*([^\s,"]+)[\s,]+([^\s,"]+)[\s,]+([^\s,"]+)[\s,]+([^\s,"]+)[\s,]+"(.*)"\s*')


def icdar(source: Path, images: Path | None) -> Manifest:
    """A text file an image, ``gt_<image>.txt``, one word a line.

    2015: ``x1,y1,x2,y2,x3,y3,x4,y4,transcription``, clockwise from the upper left of the text, the transcription as it is, commas and all.
    2013: ``x0, y0, x1, y1, "word"``, with or without commas, a backslash before quotes and backslashes of the word. ``###`` is illegible.
    """
    files = [source] if source.is_file() else sorted(source.rglob("gt_*.txt")) or sorted(source.glob("*.txt"))
    if not files:
        raise TokError(f"{source}: no gt_<image>.txt there")
    root = source.parent if source.is_file() else source
    notes, samples, used = Notes(), [], set()
    for file in files:
        path = find_image(file.stem.removeprefix("gt_"), [images] if images else [file.parent, file.parent.parent, file.parent.parent / "images"], file)
        width, height = image_size(path)
        words = []
        for at, line in enumerate(read_text(file), 1):
            if not line.strip():
                continue
            try:
                quad, value = _icdar_line(line)
            except ValueError as error:
                raise TokError(f"{file}: line {at}: {error}") from error
            if is_illegible(value):
                notes.add(ILLEGIBLE)
            else:
                words.append(slanted_word(quad, value, width, height))
        used.add(path)
        name = (file.relative_to(root).parent / path.name).as_posix()
        samples.append(Sample(name, str(path), width, height, words=tuple(words), group=root.name))
    for base in {p.parent for p in used} if source.is_dir() else ():
        for path in sorted(p for p in base.iterdir() if p.suffix.lower() in SUFFIXES and p not in used):
            notes.add("images without a gt file, left out", path.name)
    return Manifest(root.name, Path("/"), tuple(samples), notes=notes.lines())


def _icdar_line(line: str) -> tuple[list[float], str]:
    upright = _UPRIGHT.fullmatch(line)
    if upright:
        x0, y0, x1, y1 = numbers(upright.groups()[:4])
        return [x0, y0, x1, y0, x1, y1, x0, y1], re.sub(r"\\(.)", r"\1", upright[5])
    parts = line.split(",", 8)
    if len(parts) < 9:
        raise ValueError(f'should be x1,y1,x2,y2,x3,y3,x4,y4,transcription or x0,y0,x1,y1,"word", got {line[:60]!r}')
    return numbers(parts[:8]), parts[8]


def wflw(source: Path, images: Path | None) -> Manifest:
    """A list of faces, one a line: 98 landmarks, box, six attributes (not used), and the path of the image.

    Lists without box and attributes are read, too; a face's box is then that of its landmarks.
    """
    if source.is_dir():
        lists = sorted(source.rglob("list_98pt*.txt"))
        if len(lists) != 1:
            found = ", ".join(str(p.relative_to(source)) for p in lists) or "none"
            raise UsageError(f"{source}: give one list of faces by its file; there are: {found}")
        source = lists[0]
    held: dict[str, list[list[float]]] = {}
    for at, line in enumerate(read_text(source), 1):
        if not line.strip():
            continue
        try:
            values, path = _wflw_line(line.strip())
        except ValueError as error:
            raise TokError(f"{source}: line {at}: {error}") from error
        held.setdefault(path, []).append(values)
    if not held:
        raise TokError(f"{source}: no faces in it")
    near = (source.parent, source.parent.parent, source.parent.parent.parent)
    base = folder_with([images] if images else [p / d for p in near for d in ("WFLW_images", ".")], list(held), source)
    notes, samples = Notes(), []
    for path, faces in held.items():
        if not (base / path).is_file():
            notes.add("images missing, left out because sizes of faces are relative to them", path)
            continue
        width, height = image_size(base / path)
        samples.append(Sample(path, str(base / path), width, height, faces=tuple(_face(f, width, height) for f in faces), group="wflw"))
    return Manifest(source.stem, Path("/"), tuple(samples), notes=notes.lines())


def _wflw_line(line: str) -> tuple[list[float], str]:
    """200 numbers, landmarks and box."""
    many = line.split(maxsplit=206)
    if len(many) == 207:
        return numbers(many[:206])[:200], many[206]
    few = line.split(maxsplit=196)
    if len(few) == 197:
        points = numbers(few[:196])
        return [*points, min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2])], few[196]
    raise ValueError(f"should be 196 coordinates, 4 of the box, 6 attributes and a path (or 196 and a path), got {len(line.split())} fields")


def _face(values: Sequence[float], width: int, height: int) -> Face:
    points = list(zip(values[:196:2], values[1:196:2]))
    x0, y0, x1, y1 = values[196:200]
    return Face(tuple(points[i] for i in FIVE), max(x1 - x0, y1 - y0) / max(width, height), (x0, y0, x1, y1))  # type: ignore[arg-type]
