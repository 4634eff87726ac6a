"""Where images lie: folders (also Hugging Face's imagefolder), WebDataset tar shards, manifests and single files.

A shard's headers are read, not its data; images are fetched later by seeking. What belongs to an image (label, captions, boxes)
is either known from the index (class folders, metadata.jsonl, manifests) or lies beside it in the shard and is read with it:
:mod:`tok1d.data.facts`.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tok1d.data.facts import Facts, of_manifest, read_metadata
from tok1d.errors import ImageError

SUFFIXES = (".webp", ".png", ".jpg", ".jpeg")
NOTES = (".json", ".txt", ".cls")  # members beside an image in a shard
MANIFESTS = (".jsonl", ".parquet")
BLOCK = 512  # of a tar file


class Sample(NamedTuple):
    """One image and where it lies.

    Attributes:
        key: unique in its index.
        file, offset, size: where its encoded bytes are.
        notes: suffix, offset and size of the members beside it in its shard.
        facts: what is known of it without reading those.
    """

    key: str
    file: str
    offset: int
    size: int
    notes: tuple[tuple[str, int, int], ...] = ()
    facts: Facts | None = None


def index_images(paths: Sequence[str | Path]) -> list[Sample]:
    """List the images of folders (recursively), .tar shards, manifests and single files, sorted by key within each path.

    Hidden files and folders (a leading dot) are left out. A key that appears again gets the name of its file in front, then ``#2``, ``#3`` … behind.

    Raises:
        ImageError: a path does not exist, a shard is damaged, or nothing was found.
        TokError: a manifest or metadata file is not one.
    """
    samples: list[Sample] = []
    for path in map(Path, paths):
        if path.is_dir():
            samples += _index_folder(path)
        elif path.suffix == ".tar" and path.is_file():
            samples += index_shard(path)
        elif path.suffix.lower() in SUFFIXES and path.is_file():
            samples.append(_alone(path.name, path))
        elif path.suffix in MANIFESTS and path.is_file():
            samples += [Sample(*place, facts=facts) for place, facts in of_manifest(path)]
        elif path.exists():
            raise ImageError(f"{path} is neither a folder, a .tar shard, a manifest ({', '.join(MANIFESTS)}) nor an image ({', '.join(SUFFIXES)})")
        else:
            raise ImageError(f"{path}: no such file or folder; give photos with --data.train \"[FOLDER_OR_SHARD, …]\"")
    if not samples:
        raise ImageError(f"no images found under {', '.join(map(str, paths))}; looked for {', '.join(SUFFIXES)} and .tar")
    return _unique(samples)


def _unique(samples: list[Sample]) -> list[Sample]:
    seen: set[str] = set()
    for i, sample in enumerate(samples):
        key, count = sample.key, 1
        while key in seen:
            key, count = f"{Path(sample.file).name}/{sample.key}" + (f"#{count}" if count > 1 else ""), count + 1
        seen.add(key)
        samples[i] = sample._replace(key=key)
    return samples


def _alone(key: str, path: Path, facts: Facts | None = None) -> Sample:
    return Sample(key, str(path), 0, path.stat().st_size, (), facts)


def _index_folder(folder: Path) -> list[Sample]:
    found = sorted(p for p in folder.rglob("*") if not any(n.startswith(".") for n in p.relative_to(folder).parts))
    samples = [s for p in found if p.suffix == ".tar" and p.is_file() for s in index_shard(p)]
    files = [p for p in found if p.suffix.lower() in SUFFIXES and p.is_file()]
    metadata = {file: facts for p in found if p.name in ("metadata.jsonl", "metadata.csv") for file, facts in read_metadata(p).items()}
    names = [] if metadata else _class_folders(folder, files)
    for i, path in enumerate(files):
        samples.append(_alone(str(path.relative_to(folder)), path, Facts(name=names[i]) if names else metadata.get(path)))
    return samples


def _class_folders(folder: Path, files: list[Path]) -> list[str]:
    """The class of every file, if the folder is one of class folders: all images exactly one level deep, in two folders or more."""
    parts = [p.relative_to(folder).parts for p in files]
    names = [p[0] for p in parts]
    return names if all(len(p) == 2 for p in parts) and len(set(names)) > 1 else []


def index_shard(path: Path) -> list[Sample]:
    """The images of a shard, sorted by key.

    Raises:
        ImageError: the shard is damaged anywhere.
    """
    samples, damage = scan_shard(path)
    if damage:
        raise ImageError(damage)
    return sorted(samples, key=lambda s: (s.key, s.offset))


def scan_shard(path: Path) -> tuple[list[Sample], str | None]:
    """The images of a shard in the order they lie there, up to the first damage, and what is damaged, if anything is.

    The key of a member is its name up to the last dot. Only headers are read.
    """
    members: list[tarfile.TarInfo] = []
    damage, end = None, 0
    try:
        length = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.offset_data + member.size > length:
                    damage = f"{path} is damaged: it ends within its member {len(members) + 1} ({member.name})"
                    break
                members.append(member)
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
        if damage is None:
            # Python's reader takes a damaged header for the end of the archive; the end proper is a block of zeros.
            with open(path, "rb") as file:
                file.seek(end)
                if (mark := file.read(BLOCK)).strip(b"\0") or not mark:  # nothing at all: cut off between two members
                    damage = f"{path} is damaged after its member {len(members)} (byte {end})"
    except (tarfile.TarError, OSError, ValueError) as error:
        damage = f"{path} is damaged after its member {len(members)}: {error}" if members else f"{path} is not a readable uncompressed tar shard: {error}"
    return _group(path, members), f"{damage}; copy or make the shard again" if damage else None


def _group(path: Path, members: list[tarfile.TarInfo]) -> list[Sample]:
    images: list[tuple[str, tarfile.TarInfo]] = []
    notes: dict[str, list[tuple[str, int, int]]] = {}
    for member in members:
        stem, _, suffix = member.name.rpartition(".")
        if not member.isfile() or stem.rpartition("/")[2] == "" or member.name.rpartition("/")[2].startswith("."):
            continue
        if f".{suffix.lower()}" in SUFFIXES:
            images.append((stem, member))
        elif f".{suffix}" in NOTES:
            notes.setdefault(stem, []).append((f".{suffix}", member.offset_data, member.size))
    return [Sample(stem, str(path), m.offset_data, m.size, tuple(notes.get(stem, ()))) for stem, m in images]


def read_sample(sample: Sample) -> bytes:
    """The encoded bytes of one indexed image."""
    _, file, offset, size, *_ = sample
    with open(file, "rb") as f:
        f.seek(offset)
        return f.read(size)


def fingerprint(samples: Sequence[Sample]) -> str:
    """16 hex digits over keys and sizes of the images, in their order: whether two lists are of the same data."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.key}\0{sample.size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]
