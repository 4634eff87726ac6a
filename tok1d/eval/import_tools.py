"""What all importers need: counting what is left out, finding the images of annotations, and comparing sizes with them."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tok1d.data.photos import SUFFIXES
from tok1d.errors import ImageError, TokError
from tok1d.eval.manifest import Sample, Word, word

ILLEGIBLE = "illegible words, left out"
ORIENTATION = 0x0112  # of EXIF; 5 to 8 are lying on their side


class Notes:
    """Counts what is left out or odd, with the first place it was met."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, what: str, where: str = "") -> None:
        """One more ``what``."""
        self.counts[what] += 1
        self.first.setdefault(what, where)

    def lines(self) -> tuple[str, ...]:
        """``illegible words, left out: 12`` …"""
        return tuple(f"{what}: {n:,}" + (f" (first: {self.first[what]})" if self.first[what] else "") for what, n in self.counts.items())


def is_illegible(value: str) -> bool:
    """Whether a truth says that nobody could read the word."""
    return not value.strip() or value.strip() == "###"


def image_size(path: Path, offset: int = 0, size: int = 0) -> tuple[int, int]:
    """(width, height) as the image is shown, from its header alone.

    Args:
        path: of the image, or of the tar that holds it from ``offset`` on, ``size`` bytes.

    Raises:
        ImageError: missing, or not an image.
    """
    from PIL import Image

    try:
        if size:
            with open(path, "rb") as file:
                file.seek(offset)
                source: Any = io.BytesIO(file.read(size))
        else:
            source = path
        with Image.open(source) as image:
            width, height = image.size
            return (height, width) if image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8) else (width, height)
    except Exception as error:  # broken headers make Pillow raise nearly anything
        raise ImageError(f"{path}: not a readable image ({type(error).__name__}: {str(error)[:160]})") from error


def wrong_size(sample: Sample, width: int, height: int) -> str:
    """What is wrong with the size that annotations give, or nothing."""
    if not sample.width or (sample.width, sample.height) == (width, height):
        return ""
    said = f"{sample.id}: the annotation says {sample.width}×{sample.height} (width×height), the image is {width}×{height}"
    if (sample.height, sample.width) == (width, height):
        return f"{said}: width and height are swapped. Boxes and sizes of characters may follow either; correct the annotation"
    return f"{said}. Give the images that were annotated"


def check_sizes(samples: Sequence[Sample], base: Path, file: Path, notes: Notes) -> list[Sample]:
    """Samples with absolute paths and the sizes of their images; missing or damaged images are noted and stay.

    Raises:
        TokError: an image has another size than its annotation says.
    """
    found, wrong = [], []
    for sample in samples:
        path = base / sample.path
        try:
            width, height = image_size(path)
            problem = wrong_size(sample, width, height)
            if problem:
                wrong.append(problem)
        except ImageError as error:
            notes.add("images missing or damaged, rows with a status later", str(error))
        found.append(replace(sample, path=str(path)))
    if wrong:
        raise TokError(f"{file}: {wrong[0]} ({len(wrong)} of {len(samples)} images are wrong)")
    return found


def folder_with(bases: Sequence[Path], names: Sequence[str], file: Path) -> Path:
    """The folder that holds most of the images; the first of several.

    Raises:
        TokError: none holds any.
    """
    held = [sum((base / name).is_file() for name in names) for base in bases]
    if names and not max(held):
        looked = ", ".join(dict.fromkeys(str(b) for b in bases))
        raise TokError(f"{file}: none of its {len(names)} images is there (first: {names[0]}; looked in {looked}); say where with --images")
    return bases[held.index(max(held))]


def find_image(stem: str, bases: Sequence[Path], file: Path) -> Path:
    """The image of one annotation file, by its name without suffix.

    Raises:
        TokError: there is none.
    """
    for base in bases:
        for suffix in (*SUFFIXES, *(s.upper() for s in SUFFIXES)):
            path = base / f"{stem}{suffix}"
            if path.is_file():
                return path
    looked = ", ".join(dict.fromkeys(map(str, bases)))
    raise TokError(f"{file}: no image {stem}.jpg (or {', '.join(SUFFIXES)}) in {looked}; say where the images lie with --images")


def read_text(file: Path) -> list[str]:
    """Lines of a UTF-8 file, with or without a mark at its beginning.

    Raises:
        TokError: it cannot be read, or a line is not UTF-8.
    """
    try:
        data = file.read_bytes()
        return [line.rstrip("\r") for line in data.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TokError(f"{file}: line {line} is not UTF-8 ({error.reason}); convert the file") from error
    except OSError as error:
        raise TokError(f"{file}: cannot be read ({error.strerror or error})") from error


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        TokError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads("\n".join(read_text(file)))
    except (ValueError, RecursionError) as error:
        raise TokError(f"{file}: not JSON: {error}") from error


def numbers(texts: Sequence[str]) -> list[float]:
    """Finite numbers.

    Raises:
        ValueError: something else, named.
    """
    found = []
    for text in texts:
        try:
            found.append(float(text))
        except ValueError:
            raise ValueError(f"{text.strip()[:30]!r} is not a number") from None
        if not abs(found[-1]) < 1e9:
            raise ValueError(f"{text.strip()[:30]!r} is no coordinate")
    return found


def slanted_word(corners: Sequence[float], value: str, width: int, height: int) -> Word:
    """A word by its corners x1, y1, x2, y2, …, clockwise from the upper left; upright rectangles become plain boxes.

    Raises:
        ValueError: an odd count, or fewer than three corners.
    """
    if len(corners) < 6 or len(corners) % 2:
        raise ValueError(f"corners should be x1, y1, x2, y2, … of at least three points, got {len(corners)} numbers")
    x, y = corners[::2], corners[1::2]
    box = (min(x), min(y), max(x), max(y))
    points = list(zip(x, y))
    upright = points == [(box[0], box[1]), (box[2], box[1]), (box[2], box[3]), (box[0], box[3])]
    return word(box, value, width, height, None if upright else points)


def words_of(items: Iterable[tuple[Sequence[float], str]], width: int, height: int, notes: Notes, illegible: Sequence[str] = ()) -> tuple[Word, ...]:
    """Words by (corners, text); those that nobody could read, which a set may mark with a text of its own, are counted in the notes.

    Raises:
        ValueError: wrong corners, with the place of the word in the list.
    """
    words = []
    for i, (corners, value) in enumerate(items):
        if not isinstance(value, str):
            raise ValueError(f"word {i}: its text should be text, got {str(value)[:40]}")
        if is_illegible(value) or value in illegible:
            notes.add(ILLEGIBLE)
            continue
        try:
            words.append(slanted_word(corners, value, width, height))
        except ValueError as error:
            raise ValueError(f"word {i}, {value[:30]!r}: {error}") from error
    return tuple(words)
