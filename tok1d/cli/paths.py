"""Inputs and outputs of the command line: files, folders, globs and ``-`` in; a planned, checked output for each."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tok1d.errors import TokError, UsageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".ppm", ".pgm", ".pbm", ".tga")
TOKEN_FORMATS = {".tok": "tok", ".jsonl": "jsonl", ".npz": "npz", ".safetensors": "safetensors"}


@dataclass(frozen=True)
class Item:
    """One input.

    Attributes:
        path: the file, or None for standard input.
        name: where it stands below the folder or glob it was found by; its file name otherwise.
        tree: whether it was found in a folder or by a glob.
    """

    path: Path | None
    name: str
    tree: bool = False

    @property
    def label(self) -> str:
        """How messages call it."""
        return "standard input" if self.path is None else str(self.path)


@dataclass(frozen=True)
class Job:
    """An input and the file its result goes to (None: standard output)."""

    item: Item
    target: Path | None

    @property
    def label(self) -> str:
        """How messages call the input."""
        return self.item.label


def expand(inputs: Iterable[str], suffixes: Iterable[str], what: str) -> list[Item]:
    """Files, folders (searched below, sorted), globs and ``-`` → items, each file once.

    Args:
        inputs: as given on the command line.
        suffixes: which files of a folder count, lower case; files named outright always count.
        what: ``images`` or ``token files``, for messages.

    Raises:
        TokError: a folder or glob without any.
    """
    wanted = tuple(suffixes)
    found: dict[str, Item] = {}
    for given in inputs:
        for item in _expand_one(given, wanted, what):
            key = "-" if item.path is None else os.path.abspath(item.path)
            found.setdefault(key, item)
    return list(found.values())


def _expand_one(given: str, suffixes: tuple[str, ...], what: str) -> Iterator[Item]:
    path = Path(given)
    if given == "-":
        yield Item(None, "stdin")
    elif path.is_dir():
        files = sorted(p for p in _walk(path) if p.suffix.lower() in suffixes)
        if not files:
            raise TokError(f"{given}: no {what} in this folder ({' '.join(suffixes)})")
        yield from (Item(p, str(p.relative_to(path)), tree=True) for p in files)
    elif not path.exists() and glob.has_magic(given):
        base = Path(*_fixed_parts(path))
        files = sorted(Path(p) for p in glob.glob(given, recursive=True) if os.path.isfile(p))
        if not files:
            raise TokError(f"{given}: nothing matches")
        yield from (Item(p, str(p.relative_to(base)), tree=True) for p in files)
    else:
        yield Item(path, path.name)


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder; hidden ones (``.git``, ``._photo.jpg`` of macOS, our temporary files) are left out."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        yield from (Path(parent, f) for f in files if not f.startswith("."))


def _fixed_parts(pattern: Path) -> list[str]:
    """Leading folders of a glob that hold no wildcard."""
    parts: list[str] = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts


def is_folder(output: str) -> bool:
    """Whether ``-o`` names a folder: it exists as one, ends in a slash, or has no suffix."""
    return output.endswith(("/", os.sep)) or os.path.isdir(output) or not Path(output).suffix


def plan(items: list[Item], output: str | None, suffix: str) -> list[Job]:
    """Give each item its own output: beside itself, in the folder ``-o`` (tree re-created), or the file or ``-`` of ``-o``.

    Raises:
        UsageError: several inputs for one file.
    """
    if output is None:
        return [Job(i, None if i.path is None else i.path.with_suffix(suffix)) for i in items]
    if output != "-" and is_folder(output):
        return [Job(i, Path(output, i.name).with_suffix(suffix)) for i in items]
    if len(items) > 1:
        raise UsageError(f"{len(items)} inputs cannot share the output {output}: give a folder, -o {Path(output).stem or 'out'}/")
    return [Job(i, None if output == "-" else Path(output)) for i in items]


def check_targets(targets: Iterable[tuple[str, Path | None]], sources: Iterable[Path | None], *, may_exist: bool) -> None:
    """Refuse, before any work, outputs that collide with each other, with an input, or with existing files.

    Args:
        targets: (label of the input, output).
        sources: every input.
        may_exist: ``-f`` or ``--skip-existing`` was given.

    Raises:
        UsageError: a collision.
        TokError: outputs exist.
    """
    owners: dict[str, str] = {}
    inputs = {os.path.realpath(s) for s in sources if s is not None}
    existing = []
    for label, target in targets:
        if target is None:
            continue
        real = os.path.realpath(target)
        if real in owners:
            raise UsageError(f"{owners[real]} and {label} would both be written to {target}: rename one, or run them apart with another -o")
        if real in inputs:
            raise UsageError(f"the output {target} would replace an input; choose another with -o")
        owners[real] = label
        if os.path.isdir(target):
            raise UsageError(f"the output {target} is a folder")
        if os.path.isfile(target):
            existing.append(str(target))
    if existing and not may_exist:
        more = f" and {len(existing) - 3} more" if len(existing) > 3 else ""
        plural = "exist" if len(existing) > 1 else "exists"
        raise TokError(f"{', '.join(existing[:3])}{more} {plural} already; -f overwrites, --skip-existing keeps, -o writes elsewhere")


def safe_name(name: object) -> str | None:
    """A name stored in a token file, if it is a plain relative path: files must not choose where we write."""
    if not isinstance(name, str) or not 0 < len(name) < 1024 or re.search(r"[\x00-\x1f\\:]", name):
        return None
    parts = Path(name).parts
    if name.startswith(("/", "~")) or not parts or any(p.startswith(".") for p in parts):
        return None
    return str(Path(*parts))
