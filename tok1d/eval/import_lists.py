"""Annotations in lines of text: the file an image of ICDAR, SROIE and Total-Text, WFLW's list of faces."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tok1d.data.photos import SUFFIXES
from tok1d.errors import TokError, UsageError
from tok1d.eval.import_tools import Notes, find_image, folder_with, image_size, numbers, read_text, words_of
from tok1d.eval.manifest import Face, Manifest, Sample, Word

FIVE = (96, 97, 54, 76, 82)  # of WFLW's 98 landmarks: pupils, tip of the nose, corners of the mouth, left ones in the image first
_UPRIGHT = re.compile(r'\s*([^\s,"]+)[\s,]+([^\s,"]+)[\s,]+([^\s,"]+)[\s,]+([^\s,"]+)[\s,]+"(.*)"\s*')
_STRING = r"""u?('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_TOTALTEXT = re.compile(rf"\s*x:\s*\[\[(.*?)\]\],\s*y:\s*\[\[(.*?)\]\],\s*ornt:\s*\[(?:u?['\"].?['\"])?\],\s*transcriptions:\s*\[(?:{_STRING})?\]\s*")


def icdar(source: Path, images: Path | None) -> Manifest:
    """A text file an image, ``gt_<image>.txt``, one word a line.

    2015: ``x1,y1,x2,y2,x3,y3,x4,y4,transcription``, clockwise from the upper left of the text, the transcription as it is, commas and all.
    2013: ``x0, y0, x1, y1, "word"``, with or without commas, a backslash before quotes and backslashes of the word. ``###`` is illegible.
    """
    files = [source] if source.is_file() else sorted(source.rglob("gt_*.txt")) or sorted(source.glob("*.txt"))
    if not files:
        raise TokError(f"{source}: no gt_<image>.txt there")
    return _file_an_image(source, files, images, "", _icdar_words)


def sroie(source: Path, images: Path | None) -> Manifest:
    """SROIE (ICDAR 2019): ``<receipt>.txt`` beside ``<receipt>.jpg``, or in ``box/`` with the images in ``img/``; a line of text a line.

    ``x1,y1,x2,y2,x3,y3,x4,y4,transcription``. Its boxes hold whole lines; those of several words are kept, spaces and all, and counted.
    """
    boxes = source / "box" if (source / "box").is_dir() else source
    files = [source] if source.is_file() else sorted(boxes.glob("*.txt"))
    if not files:
        raise TokError(f"{source}: no <receipt>.txt there, nor in {source / 'box'}")
    made = _file_an_image(source, files, images, "sroie", _icdar_words)
    lines = sum(" " in w.value.strip() for s in made.samples for w in s.words)
    return replace(made, notes=(*made.notes, *([f"lines of several words, kept as one: {lines:,}"] if lines else [])))


def totaltext(source: Path, images: Path | None) -> Manifest:
    """Total-Text: ``poly_gt_<image>.txt`` (or ``gt_<image>.txt``), a word a line.

    ``x: [[x1 x2 …]], y: [[y1 y2 …]], ornt: [u'c'], transcriptions: [u'WORD']``, clockwise; ``#`` is illegible. Numbers may go on in
    the next line. Words of four corners are straightened, curved ones are judged in their upright boxes, as TokBench does.
    """
    files = [source] if source.is_file() else sorted(source.rglob("poly_gt_*.txt")) or sorted(source.rglob("gt_*.txt"))
    if not files:
        mat = "; its MATLAB files are not read, the same words come as text files (txt_format.zip)" if any(source.rglob("*gt_*.mat")) else ""
        raise TokError(f"{source}: no poly_gt_<image>.txt there{mat}")
    return _file_an_image(source, files, images, "totaltext", _totaltext_words, ("#",))


Corners = tuple[list[float], str]


def _file_an_image(
    source: Path, files: Sequence[Path], images: Path | None, group: str, parse: Callable[[Path], Iterator[tuple[int, Corners]]],
    illegible: Sequence[str] = (),
) -> Manifest:  # fmt: skip
    """A sample a file; ``parse`` gives its words with the numbers of their lines. The folder's name is the group if it has none."""
    root = source.parent if source.is_file() else source
    notes, samples, used = Notes(), [], set()
    for file in files:
        here = file.parent
        near = [here, here.parent, here.parent / "images", here.parent / "img", *(p / "Images" / here.name for p in (here.parent, here.parent.parent))]
        path = find_image(file.stem.removeprefix("poly_").removeprefix("gt_"), [images] if images else near, file)
        width, height = image_size(path)
        words: list[Word] = []
        for at, item in parse(file):
            try:
                words += words_of([item], width, height, notes, illegible)
            except ValueError as error:
                raise TokError(f"{file}: line {at}: {error}") from error
        used.add(path)
        name = (file.relative_to(root).parent / path.name).as_posix()
        samples.append(Sample(name, str(path), width, height, words=tuple(words), group=group or root.name))
    for base in {p.parent for p in used} if source.is_dir() else ():
        for path in sorted(p for p in base.iterdir() if p.suffix.lower() in SUFFIXES and p not in used):
            notes.add("images without a file of words, left out", path.name)
    return Manifest(root.name, Path("/"), tuple(samples), notes=notes.lines())


def _icdar_words(file: Path) -> Iterator[tuple[int, Corners]]:
    for at, line in enumerate(read_text(file), 1):
        if line.strip():
            try:
                yield at, _icdar_line(line)
            except ValueError as error:
                raise TokError(f"{file}: line {at}: {error}") from error


def _totaltext_words(file: Path) -> Iterator[tuple[int, Corners]]:
    """A line goes on with the one before where that one does not end in a bracket."""
    records: list[tuple[int, str]] = []
    for at, line in enumerate(read_text(file), 1):
        if records and line.strip() and not records[-1][1].rstrip().endswith("]"):
            records[-1] = (records[-1][0], f"{records[-1][1]} {line}")
        elif line.strip():
            records.append((at, line))
    for at, record in records:
        found = _TOTALTEXT.fullmatch(record)
        try:
            if not found:
                raise ValueError(f"should be x: [[…]], y: [[…]], ornt: [u'c'], transcriptions: [u'…'], got {record[:60]!r}")
            x, y = numbers(found[1].split()), numbers(found[2].split())
            if len(x) != len(y):
                raise ValueError(f"{len(x)} x and {len(y)} y")
            value = ast.literal_eval(found[3]) if found[3] else ""  # a Python string, escapes and all
        except (ValueError, SyntaxError) as error:
            raise TokError(f"{file}: line {at}: {error}") from error
        yield at, ([v for xy in zip(x, y) for v in xy], value)


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
