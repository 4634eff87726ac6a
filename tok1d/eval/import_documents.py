"""Annotations as JSON of scene text and documents: TextOCR's one file, CORD, DocVQA and InfographicVQA with a file an image.

Formats: github.com/facebookresearch/TextVQA (TextOCR 0.1), github.com/clovaai/cord, rrc.cvc.uab.es/?ch=17 (DocVQA: lines and words of
Microsoft's OCR; InfographicVQA: blocks of Amazon Textract). The texts of the last two were read by a machine, not written by people.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tok1d.errors import ImageError, TokError
from tok1d.eval.import_tools import (
    Notes,
    check_sizes,
    find_image,
    folder_with,
    image_size,
    read_json,
    words_of,
    wrong_size,
)
from tok1d.eval.manifest import Manifest, Sample
from tok1d.eval.manifest_rows import number, to_sample

BY_MACHINE = "texts were read by an OCR engine; keep those that another one confirms (tok eval annotate refine)"
Words = tuple[tuple[int, int] | None, Iterable[tuple[list[float], str]]]  # annotated (width, height), (corners, text) of each word
MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def textocr(source: Path, images: Path | None) -> Manifest:
    """TextOCR 0.1: one file of ``imgs`` and ``anns`` by id; an annotation has ``image_id``, ``points`` and ``utf8_string``, ``.`` if illegible.

    Missing images stay and become rows with a status. The image's size must be that of the annotation: some photos of OpenImages are turned.
    """
    if source.is_dir():
        files = sorted(source.glob("TextOCR*.json")) or sorted(source.glob("*.json"))
        if len(files) != 1:
            raise TokError(f"{source}: give one file of TextOCR; there are: {', '.join(p.name for p in files) or 'none'}")
        source = files[0]
    held, notes = read_json(source), Notes()
    if not isinstance(held, dict) or not all(isinstance(held.get(k), dict) for k in ("imgs", "anns")):
        raise TokError(f"{source}: should be a JSON object with imgs and anns by their ids")
    of: dict[str, list[tuple[list[float], str]]] = {key: [] for key in held["imgs"]}
    for key, item in held["anns"].items():
        try:
            if item["image_id"] not in of:
                raise ValueError(f"no image {item['image_id']!r} in imgs")
            of[item["image_id"]].append(([number(v, "points") for v in item["points"]], item["utf8_string"]))
        except MALFORMED as error:
            raise TokError(f"{source}: annotation {key}: {_said(error)}") from error
    samples = []
    for key, item in held["imgs"].items():
        try:
            plain = to_sample({"id": str(item["file_name"]), "path": item["file_name"], "width": item["width"], "height": item["height"], "group": "textocr"})
            samples.append(_with(plain, of[key], notes, (".",)))
        except MALFORMED as error:
            raise TokError(f"{source}: image {key}: {_said(error)}") from error
    bases = [images] if images else [source.parent, source.parent / "train_val_images", source.parent.parent, source.parent / "images"]
    base = folder_with(bases, [s.path for s in samples], source)
    return Manifest(source.stem, Path("/"), tuple(check_sizes(samples, base, source, notes)), notes=notes.lines())


def cord(source: Path, images: Path | None) -> Manifest:
    """CORD: ``json/<receipt>.json`` with the words of ``valid_line``, each with a ``quad`` (x1 … y4) and ``text``; images in ``image/``."""

    def words(said: Any) -> Words:
        size = said["meta"]["image_size"]
        corners = [k for i in "1234" for k in (f"x{i}", f"y{i}")]
        items = [([number(w["quad"][k], f"quad.{k}") for k in corners], w["text"]) for line in said["valid_line"] for w in line["words"]]
        return (size["width"], size["height"]), items

    return _json_an_image(source, images, "cord", ("json", "."), ("image", "."), words)


def docvqa(source: Path, images: Path | None) -> Manifest:
    """DocVQA: ``ocr_results/<page>.json`` (``recognitionResults`` → ``lines`` → ``words`` of ``boundingBox`` and ``text``); images in ``documents/``."""

    def words(said: Any) -> Words:
        (page,) = said["recognitionResults"]
        if page.get("unit", "pixel") != "pixel":
            raise ValueError(f"boxes are in units of {page['unit']!r}, pixels are needed")
        items = [([number(v, "boundingBox") for v in w["boundingBox"]], w["text"]) for line in page["lines"] for w in line.get("words", ())]
        return (page["width"], page["height"]), items

    return _json_an_image(source, images, "docvqa", ("ocr_results", "."), ("documents", "."), words, BY_MACHINE)


def infographicvqa(source: Path, images: Path | None) -> Manifest:
    """InfographicVQA: Textract's blocks, by type (``WORD``: [ … ]) or in ``Blocks``; ``Geometry.Polygon`` in parts of the image's size."""

    def words(said: Any) -> Words:
        blocks = said["WORD"] if "WORD" in said else [b for b in said["Blocks"] if b["BlockType"] == "WORD"]
        return None, [([number(p[k], "Polygon") for p in b["Geometry"]["Polygon"] for k in "XY"], b["Text"]) for b in blocks]

    near = ("infographicsvqa_images", "images", ".")
    return _json_an_image(source, images, "infograph", ("infographicsvqa_ocr", "ocr", "."), near, words, BY_MACHINE)


def _json_an_image(
    source: Path, images: Path | None, group: str, places: Sequence[str], near: Sequence[str], parse: Callable[[Any], Words], remark: str = ""
) -> Manifest:
    """A sample a JSON file; ``parse`` gives the annotated size and the words, whose corners are parts of the image where there is no size."""
    folder = source.parent if source.is_file() else next(source / p for p in places if (source / p).is_dir())
    files = [source] if source.is_file() else sorted(folder.glob("*.json"))
    if not files:
        raise TokError(f"{source}: no JSON files there, nor in {', '.join(p for p in places if p != '.')}")
    notes, samples = Notes(), []
    for file in files:
        path = find_image(file.stem, [images] if images else [b / n for b in (folder, folder.parent) for n in near], file)
        try:
            size, items = parse(read_json(file))
            try:
                width, height = image_size(path)
            except ImageError as error:
                if size is None:
                    raise TokError(f"{error}; without its size its words cannot be placed") from error
                notes.add("images damaged, rows with a status later", str(error))
                width, height = size
            if size is None:
                items = [([v * (height if i % 2 else width) for i, v in enumerate(corners)], value) for corners, value in items]
            else:
                plain = to_sample({"id": path.name, "path": str(path), "width": size[0], "height": size[1]})
                wrong = wrong_size(plain, width, height)
                if wrong:
                    raise ValueError(wrong)
            samples.append(_with(Sample(path.name, str(path), width, height, group=group), items, notes))
        except MALFORMED as error:
            raise TokError(f"{file}: {_said(error)}") from error
    lines = notes.lines() if not remark else (*notes.lines(), remark)
    return Manifest(source.stem if source.is_file() else source.name, Path("/"), tuple(samples), notes=lines)


def _with(sample: Sample, items: Iterable[tuple[Sequence[float], str]], notes: Notes, illegible: Sequence[str] = ()) -> Sample:
    return replace(sample, words=words_of(items, sample.width, sample.height, notes, illegible))


def _said(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
