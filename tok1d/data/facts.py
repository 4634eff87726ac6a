"""What belongs to an image: label or class name, captions, words with their quads, landmarks of faces.

Read from what lies beside an image in a WebDataset shard (.json, .txt, .cls), from metadata.jsonl or metadata.csv of a Hugging Face
imagefolder (https://huggingface.co/docs/datasets/image_dataset), from class folders, or from a manifest of :mod:`tok1d.eval.manifest`.

A row (of metadata, or a .json) may hold ``label`` (a number, or a name), ``class_name``, ``text``, ``caption`` or ``captions``, ``words``
(each ``text``, ``quad`` of x1, y1 … x4, y4 clockwise from the upper left corner, ``legible``) and ``face_points`` (five [x, y] a face).
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tok1d.errors import ImageError, TokError, UsageError

if TYPE_CHECKING:
    from tok1d.data.index import Sample

Word = tuple[tuple[float, ...], str]  # x1, y1 … x4, y4 in pixels of the image, and what is written there
Place = tuple[str, str, int, int]  # key, file, offset, size


@dataclass(frozen=True)
class Facts:
    """What is known of one image.

    Attributes:
        label: its class as a number, -1 if unknown.
        name: its class by name where it has no number, "" if unknown.
        texts: captions.
        words: legible ones.
        faces: x, y of eyes, nose and corners of the mouth in pixels of the image, ten numbers a face.
    """

    label: int = -1
    name: str = ""
    texts: tuple[str, ...] = ()
    words: tuple[Word, ...] = ()
    faces: tuple[tuple[float, ...], ...] = ()


NOTHING = Facts()


def read_facts(sample: Sample) -> Facts:
    """What the index knows of a sample and what lies beside it in its shard; the latter wins.

    Raises:
        ImageError: a member beside it is damaged.
    """
    facts = sample.facts or NOTHING
    if not sample.notes:
        return facts
    try:
        with open(sample.file, "rb") as file:
            for suffix, offset, size in sorted(sample.notes):  # .cls, .json, .txt
                file.seek(offset)
                text = file.read(size).decode("utf-8").strip()
                if suffix == ".cls":
                    facts = replace(facts, label=int(text))
                elif suffix == ".json":
                    facts = of_row(json.loads(text), facts)
                elif not facts.texts and text:
                    facts = replace(facts, texts=(text,))
    except (ValueError, TypeError, RecursionError) as error:
        raise ImageError(f"what lies beside {sample.key} in {sample.file} is damaged: {error}") from error
    return facts


def of_row(row: Any, known: Facts = NOTHING) -> Facts:
    """A row of metadata, or the .json beside an image, over what is known.

    Raises:
        ValueError, TypeError: a field of another form.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, got {str(row)[:60]}")
    label, name = row.get("label"), row.get("class_name") or known.name
    if isinstance(label, str) and not _is_number(label):
        label, name = None, label
    number = known.label if label is None or label == "" else int(label)
    name = "" if label not in (None, "") else name
    texts = next((row[k] for k in ("captions", "caption", "text") if row.get(k)), known.texts)
    texts = (texts,) if isinstance(texts, str) else tuple(texts)
    try:
        words = [(tuple(map(float, w["quad"])), w["text"]) for w in row.get("words") or () if w.get("legible", True)]
    except (KeyError, AttributeError) as error:
        raise ValueError(f"a word is an object with text and quad ({error})") from error
    faces = [tuple(float(c) for point in face for c in point) for face in row.get("face_points") or ()]
    if not (isinstance(name, str) and all(isinstance(t, str) for t in (*texts, *(w[1] for w in words)))):
        raise ValueError("class names, captions and words are texts")
    if any(len(q) != 8 for q, _ in words) or any(len(f) != 10 for f in faces):
        raise ValueError("a quad has 4 corners (8 numbers), a face 5 points (10 numbers)")
    return Facts(number, name, texts, tuple(words) or known.words, tuple(faces) or known.faces)


def _is_number(text: str) -> bool:
    return text.strip().removeprefix("-").isdecimal()


def read_metadata(path: Path) -> dict[Path, Facts]:
    """metadata.jsonl or metadata.csv → facts by file; ``file_name`` is relative to it.

    Raises:
        TokError: unreadable, a row without file_name or with wrong fields (its line is named), or a file that is missing.
    """
    rows: dict[Path, Facts] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines: Iterable[Any] = csv.DictReader(file) if path.suffix == ".csv" else (json.loads(line) for line in file if line.strip())
            for at, row in enumerate(lines, 1):
                name = row.get("file_name") if isinstance(row, dict) else None
                if not isinstance(name, str) or not (path.parent / name).is_file():
                    raise TokError(f"{path}: row {at} should name an image of this folder in file_name, got {str(name or row)[:80]}")
                rows[path.parent / name] = of_row(row)
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise TokError(f"{path}: row {len(rows) + 1} cannot be read ({error})") from error
    return rows


def of_manifest(path: Path) -> list[tuple[Place, Facts]]:
    """The samples of a manifest with words and faces.

    Raises:
        TokError: not a manifest.
        ImageError: one of its images is missing.
    """
    from tok1d.eval.manifest import Manifest

    manifest = Manifest.load(path)
    found = []
    for s in manifest.samples:
        file = manifest.base / s.path
        if not file.is_file():
            raise ImageError(f"{path}: {s.id} should be at {file}, where nothing is")
        words = tuple((_quad(w.box, w.poly), w.value) for w in s.words)
        faces = tuple(tuple(float(c) for point in f.kps for c in point) for f in s.faces)
        place = (s.id, str(file), s.offset, s.size or file.stat().st_size)
        found.append((place, Facts(words=words, faces=faces)))
    return found


def _quad(box: Sequence[float], poly: Sequence[Sequence[float]] | None) -> tuple[float, ...]:
    if poly is not None and len(poly) == 4:
        return tuple(float(c) for point in poly for c in point)
    x0, y0, x1, y1 = map(float, box)
    return x0, y0, x1, y0, x1, y1, x0, y1


def class_names(samples: Iterable[Sample]) -> list[str]:
    """Sorted class names that the index knows: labels of samples without numbers are places in this list."""
    return sorted({s.facts.name for s in samples if s.facts is not None and s.facts.label < 0 and s.facts.name})


def label_of(facts: Facts, places: dict[str, int]) -> int:
    """The class of an image as a number; -1 if it has none.

    Args:
        facts: of the image.
        places: number of each class name.

    Raises:
        ImageError: a name that is not among the classes.
    """
    if facts.label >= 0 or not facts.name or not places:
        return max(facts.label, -1)
    if facts.name not in places:
        raise ImageError(f"the class {facts.name!r} is not among {', '.join(list(places)[:5])} …")
    return places[facts.name]


def fields_of(samples: Sequence[Sample], look: int = 64) -> tuple[str, ...]:
    """Which of ``label``, ``text``, ``words``, ``faces`` a set has, by up to ``look`` evenly spaced samples."""
    chosen = samples if len(samples) <= look else [samples[i * len(samples) // look] for i in range(look)]
    found = set()
    for sample in chosen:
        try:
            facts = read_facts(sample)
        except (ImageError, OSError):
            continue  # counted when it is served
        named = {"label": facts.label >= 0 or facts.name, "text": facts.texts, "words": facts.words, "faces": facts.faces}
        found |= {field for field, value in named.items() if value}
    return tuple(sorted(found))


def check_names(samples: Sequence[Sample], classes: Sequence[str]) -> None:
    """Every class name that the index knows has a number; names inside shards are looked at in a few samples.

    Raises:
        UsageError: some has none.
    """
    looked = [s.facts or NOTHING for s in samples]
    for sample in samples[:: max(1, len(samples) // 64)]:
        if sample.notes:
            with contextlib.suppress(ImageError, OSError):  # counted when it is served
                looked.append(read_facts(sample))
    missing = sorted({f.name for f in looked if f.label < 0 and f.name} - set(classes))
    if missing:
        what = f"does not hold {missing[0]!r}" if classes else f"is not given, and the data name classes ({missing[0]!r}) without numbers"
        raise UsageError(f"data.classes {what}; give all names in the order of their numbers, or a JSON file of them")


def read_classes(classes: Sequence[str] | str | None) -> list[str] | None:
    """Class names, given or in a JSON file.

    Raises:
        UsageError: not a list of different names.
    """
    try:
        names = json.loads(Path(classes).read_bytes()) if isinstance(classes, str) else classes
    except (OSError, ValueError) as error:
        raise UsageError(f"data.classes {classes}: not a JSON file of names ({error})") from error
    if names is not None and not (all(isinstance(n, str) for n in names) and len(set(names)) == len(names)):
        raise UsageError("data.classes is a list of different names, in the order of their numbers")
    return None if names is None else list(names)
