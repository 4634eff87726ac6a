"""Annotations of data sets as manifests: TokBench (and back), the sets it is made of, tar shards with a JSON file an image, plain folders.

Nothing is left out silently: what cannot be scored (illegible words, faces without landmarks) is counted in the manifest's notes, and
what is wrong is an error that names file and line. Sizes are compared with the images themselves, as an image shows after its
orientation: TokBench's ic13, for one, was published with width and height swapped.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tok1d.errors import ImageError, TokError, UsageError
from tok1d.eval.import_documents import cord, docvqa, infographicvqa, textocr
from tok1d.eval.import_lists import icdar, sroie, totaltext, wflw
from tok1d.eval.import_tools import (
    ILLEGIBLE,
    Notes,
    check_sizes,
    folder_with,
    image_size,
    is_illegible,
    read_json,
    slanted_word,
    wrong_size,
)
from tok1d.eval.manifest import Manifest, Sample, of_images
from tok1d.eval.manifest_rows import number, to_sample


def import_manifest(kind: str, source: Path, images: Path | None = None) -> Manifest:
    """Read the annotations of a data set.

    Args:
        kind: a key of :data:`KINDS`: ``tokbench`` (a folder of ``text_<set>.json`` and ``face_meta.json``, or one such file), the sets as
            their authors publish them (``icdar``, ``totaltext``, ``textocr``, ``cord``, ``sroie``, ``docvqa``, ``infographicvqa``, ``wflw``),
            ``shards`` (tar files or a folder of them, a JSON file beside each image) or ``folder`` (images without annotations).
        source: file or folder.
        images: folder of the images; looked for beside the annotations if None.

    Returns:
        A manifest; what was left out is in its notes.

    Raises:
        UsageError: unknown kind, or images where there can be none.
        TokError: missing or wrong annotations or images, by file and line.
    """
    if kind not in KINDS:
        raise UsageError(f"annotations of kind {kind!r} are not known; there are {', '.join(KINDS)}")
    if images is not None and kind in ("shards", "folder"):
        raise UsageError(f"--images: {kind} hold their images themselves")
    if not source.exists():
        raise TokError(f"{source}: no such file or folder of annotations")
    if images is not None and not images.is_dir():
        raise TokError(f"{images}: no such folder of images")
    return KINDS[kind](source.resolve(), None if images is None else images.resolve())


def folder(source: Path) -> Manifest:
    """Images without annotations, with their sizes."""
    notes, samples = Notes(), []
    for sample in of_images([source], source.name).samples:
        try:
            width, height = image_size(Path(sample.path), sample.offset, sample.size)
            sample = replace(sample, width=width, height=height)
        except ImageError as error:
            notes.add("images damaged, rows with a status later", str(error))
        samples.append(sample)
    return Manifest(source.name, Path("/"), tuple(samples), notes=notes.lines())


# TokBench --------------------------------------------------------------------------------------------------------


def tokbench(source: Path, images: Path | None) -> Manifest:
    """TokBench's annotations: upright boxes, and the sizes of characters and faces as they are given.

    Images are looked for in ``<set>/``, ``images/<set>/`` and beside the annotations; faces belong to the set ``wflw``.
    """
    if source.is_dir() and (source / "annotations").is_dir():
        source = source / "annotations"
    files = [source] if source.is_file() else sorted([*source.glob("text_*.json"), *source.glob("face_meta.json")])
    if not files:
        raise TokError(f"{source}: neither text_<set>.json nor face_meta.json is there; give TokBench's folder of annotations")
    here = source.parent if source.is_file() else source
    bases = [images] if images else [here.parent, here.parent / "images", here]
    notes, samples = Notes(), []
    for file in files:
        is_faces = file.name == "face_meta.json"
        group = "wflw" if is_faces else file.stem.removeprefix("text_")
        entries = read_json(file)
        if not isinstance(entries, list):
            raise TokError(f"{file}: should be a list of images, got {str(entries)[:60]}")
        found: dict[str, Sample] = {}
        for i, entry in enumerate(entries):
            try:
                sample = _tokbench_faces(entry, group) if is_faces else _tokbench_words(entry, group, notes)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                what = f"{error} is missing" if isinstance(error, KeyError) else error
                raise TokError(f"{file}: image {i}: {what}") from error
            if sample.id in found:
                raise TokError(f"{file}: image {i}: {sample.path!r} appears twice")
            found[sample.id] = sample
        base = folder_with([b / d for b in bases for d in (group, ".")], [s.path for s in found.values()], file)
        samples += check_sizes(list(found.values()), base, file, notes)
    return Manifest("tokbench", Path("/"), tuple(samples), notes=notes.lines())


def _tokbench_words(entry: Mapping[str, Any], group: str, notes: Notes) -> Sample:
    words = []
    for item in entry["annotations"]:
        if not isinstance(item["rec"], str):
            raise ValueError(f"rec should be text, got {str(item['rec'])[:40]}")
        if is_illegible(item["rec"]):
            notes.add(ILLEGIBLE)
        else:
            words.append({"box": item["bbox"], "value": item["rec"], **_scale(item)})
    row = {"path": entry["file_name"], "width": entry["width"], "height": entry["height"], "words": words}
    return to_sample({"id": f"{group}/{entry['file_name']}", "group": group, **row})


def _tokbench_faces(entry: Mapping[str, Any], group: str) -> Sample:
    faces = [{"kps": item["kps"], "box": item.get("box"), **_scale(item)} for item in entry["faces"]]
    row = {"path": entry["image_name"], "width": entry["img_width"], "height": entry["img_height"], "faces": faces}
    return to_sample({"id": f"{group}/{entry['image_name']}", "group": group, **row})


def _scale(item: Mapping[str, Any]) -> dict[str, Any]:
    return {} if item.get("ratio") is None else {"scale": item["ratio"]}


def export_tokbench(manifest: Manifest, out: Path, *, images: bool = False) -> list[Path]:
    """Write a manifest in TokBench's layout: ``annotations/text_<set>.json`` a group with words, and ``annotations/face_meta.json``.

    Slanted words are written as their upright boxes, which is what TokBench judges.

    Args:
        manifest: sizes of all images must be known (``tok eval import folder`` adds them).
        out: folder.
        images: also copy the images, as they are, to ``<set>/``; those with faces to ``wflw/``.

    Returns:
        The annotation files.

    Raises:
        TokError: a size is not known, two images get one name, or a file cannot be read or written.
    """
    from tok1d.disk import atomic_write

    files: dict[str, list[dict[str, Any]]] = {}
    names: set[tuple[str, str]] = set()
    for sample in manifest.samples:
        if not sample.width:
            raise TokError(f"{sample.id}: its size is not in the manifest, but TokBench's files hold it; add width and height")
        name = _name(manifest, sample)
        group = sample.group.replace("/", "_").strip(".") or "images"
        words = [{"rec": w.value, "bbox": list(map(float, w.box)), "ratio": w.scale} for w in sample.words]
        faces = [{"kps": [list(map(float, p)) for p in f.kps], "ratio": f.scale, **({"box": list(map(float, f.box))} if f.box else {})} for f in sample.faces]
        parts = []
        if words or not faces:
            parts.append((group, f"text_{group}", {"file_name": name, "height": sample.height, "width": sample.width, "annotations": words}))
        if faces:
            parts.append(("wflw", "face_meta", {"image_name": name, "img_height": sample.height, "img_width": sample.width, "faces": faces}))
        for place, file, entry in parts:
            if (file, name) in names:
                raise TokError(f"{sample.id}: another image is called {name} in {file}.json; give them groups or names of their own")
            names.add((file, name))
            files.setdefault(file, []).append(entry)
            if images:
                (out / place / name).parent.mkdir(parents=True, exist_ok=True)
                atomic_write(out / place / name, manifest.encoded(sample))
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    paths = []
    for file, entries in sorted(files.items()):
        paths.append(out / "annotations" / f"{file}.json")
        atomic_write(paths[-1], (json.dumps(entries, indent=1, ensure_ascii=False) + "\n").encode())
    return paths


def _name(manifest: Manifest, sample: Sample) -> str:
    """Name of an image in its group, with the suffix of its file."""
    from PIL import Image

    name = sample.id.removeprefix(f"{sample.group}/")
    if sample.size:  # in a tar
        with Image.open(io.BytesIO(manifest.encoded(sample))) as image:
            suffix = f".{(image.format or 'png').lower()}"
    else:
        suffix = Path(sample.path).suffix
    name = name if Path(name).suffix.lower() == suffix.lower() else name + suffix
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise TokError(f"{sample.id}: an id that leads out of the folder cannot be a file's name")
    return name


# shards ----------------------------------------------------------------------------------------------------------


def shards(source: Path) -> Manifest:
    """WebDataset tars: beside an image KEY.webp a KEY.json with ``width``, ``height`` and what it holds.

    ``words``: list of ``text``, ``quad`` (x1, y1, … x4, y4 clockwise) and ``legible`` (true if absent); ``kps``: five landmarks, with
    ``face_box`` (x, y, width, height). A face box alone is noted: ``tok eval annotate faces`` finds landmarks. ``source`` is the group.
    """
    tars = [source] if source.is_file() else sorted(source.rglob("*.tar"))
    if not tars:
        raise TokError(f"{source}: no .tar shards there")
    notes, samples = Notes(), []
    for tar in tars:
        found = of_images([tar], tar.name).samples
        with tarfile.open(tar, "r:") as archive:  # that it is sound was seen just now
            beside = {m.name.removesuffix(".json"): m for m in archive if m.isfile() and m.name.endswith(".json")}
            for sample in found:
                try:
                    member = beside.get(sample.id)
                    if member is None:
                        notes.add("images without a JSON file, kept without annotations", sample.id)
                        samples.append(sample)
                        continue
                    said = json.loads(archive.extractfile(member).read())  # type: ignore[union-attr]
                    if not isinstance(said, dict):
                        raise ValueError(f"should be a JSON object, got {str(said)[:60]}")
                    samples.append(_shard_sample(sample, said, notes))
                except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
                    what = f"{error} is missing" if isinstance(error, KeyError) else error
                    raise TokError(f"{tar}: {sample.id}.json: {what}") from error
    return Manifest(source.stem, Path("/"), tuple(samples), notes=notes.lines())


def _shard_sample(sample: Sample, said: Mapping[str, Any], notes: Notes) -> Sample:
    try:
        width, height = image_size(Path(sample.path), sample.offset, sample.size)
    except ImageError as error:
        notes.add("images damaged, rows with a status later", f"{sample.id}, {error}")
        width, height = int(said["width"]), int(said["height"])
    wrong = wrong_size(replace(sample, width=said.get("width", 0), height=said.get("height", 0)), width, height)
    if wrong:
        raise ValueError(wrong)
    row: dict[str, Any] = {"id": sample.id, "path": sample.path}
    words = []
    for item in said.get("words") or ():
        if not item.get("legible", True) or is_illegible(item["text"]):
            notes.add(ILLEGIBLE)
            continue
        if len(item["quad"]) != 8:
            raise ValueError(f"quad should be x1, y1, … x4, y4, got {str(item['quad'])[:60]}")
        words.append(slanted_word([number(v, "quad") for v in item["quad"]], item["text"], width, height))
    if said.get("kps"):
        x, y, w, h = (number(v, "face_box") for v in said["face_box"])
        row["faces"] = [{"kps": said["kps"], "box": [x, y, x + w, y + h]}]
    elif said.get("face_box"):
        notes.add("faces with a box but without landmarks, left out (tok eval annotate faces finds landmarks)")
    faces = to_sample({**row, "width": width, "height": height}).faces
    group = said["source"] if isinstance(said.get("source"), str) else sample.group
    return replace(sample, width=width, height=height, words=tuple(words), faces=faces, group=group)


KINDS: dict[str, Callable[[Path, Path | None], Manifest]] = {
    "tokbench": tokbench, "icdar": icdar, "totaltext": totaltext, "textocr": textocr, "cord": cord, "sroie": sroie, "docvqa": docvqa,
    "infographicvqa": infographicvqa, "wflw": wflw, "shards": lambda source, _: shards(source), "folder": lambda source, _: folder(source),
}  # fmt: skip
