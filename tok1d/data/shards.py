"""Token shards: what a frozen tokenizer made of a data set, on disk.

    OUT/tokens.json        what was asked for: tokenizer, kind, views, data, shards; written first
    OUT/00012.safetensors  ``windows`` int32 (images, views, 5) and, by kind, one of
                             ``ids``     (images, views, N), the smallest unsigned integers that hold the vocabulary
                             ``bits``    uint8 (images, views, N, ceil(d / 8)), most significant bit first
                             ``latents`` float16 (images, views, …)
                           and ``lengths`` int32 (images, views) where rows are of several lengths: what is beyond is zero
    OUT/00012.json         keys, labels and captions of its images, and those that could not be read; written last

A shard is finished when its JSON is there; both files are written at once or not at all. Arrays are memory-mapped and checked
before that; nothing in these files can run code.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tok1d.errors import TokError
from tok1d.extras import require

HEAD = "tokens.json"
FORMAT = "tok1d.shards/1"
KINDS = ("ids", "bits", "latents", "encoder", "vae")
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Head:
    """What a set of token shards is.

    Attributes:
        kind: ``ids``, ``bits``, ``latents`` (of the tokens), ``encoder`` (the same before quantization) or ``vae`` (of the frozen VAE
            inside the tokenizer's encoder).
        space: of :class:`tok1d.generators.space.TokenSpace`: tokenizer, model_id, vocab_size, lengths …, plain data.
        shape: of what is kept of one view: [N], [N, d], [N, D] or [C, h, w].
        views: names of the views of every image.
        size: (height, width) of the views.
        area: share of the largest window that random views hold.
        seed: of random views.
        dtype: the model ran in.
        classes: names in the order of their numbers.
        fields: of ``label`` and ``text``, what the data have.
        data: hash of keys and sizes of the images.
        images: how many, readable or not.
        per_shard: images of a shard; the last one may have fewer.
        budget: what gave every view its own number of tokens, {} where all have as many: ``rule`` ``auto`` (with the id of the halting
            head that chose, which is no part of ``model_id``) or ``search``, and its targets.
    """

    kind: str
    space: dict[str, Any]
    shape: list[int]
    views: list[str]
    size: list[int]
    area: list[float]
    seed: int
    dtype: str
    classes: list[str]
    fields: list[str]
    data: str
    images: int
    per_shard: int
    budget: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT

    @property
    def array(self) -> str:
        """Name of the array that holds them."""
        return "latents" if self.kind in ("encoder", "vae") else self.kind

    @property
    def shards(self) -> int:
        """How many there are when all are finished."""
        return -(-self.images // self.per_shard)

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def differences(self, other: Head) -> str:
        """What another head says differently, for messages."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return "; ".join(f"{name} {str(a)[:60]} ≠ {str(b)[:60]}" for name, a, b in pairs if a != b)


def read_head(folder: Path) -> Head:
    """The head of a set.

    Raises:
        TokError: not a folder of token shards.
    """
    path = folder / HEAD
    try:
        found = json.loads(path.read_bytes())
        head = Head(**found)
        good = head.format == FORMAT and head.kind in KINDS and min(head.images, head.per_shard, len(head.views)) > 0
        good = good and all(isinstance(n, int) for n in (head.images, head.per_shard, *head.shape, *head.size)) and isinstance(head.space, dict)
        good = good and isinstance(head.budget, dict) and not (head.budget and head.array == "latents")
        good = good and {"tokenizer", "model_id"} <= set(head.space)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise TokError(f"{folder} is not a folder of token shards ({path.name}: {error}); make one with tok tokenize DATA -o {folder}") from error
    if not good:
        raise TokError(f"{path} is not of {FORMAT} or damaged; make the shards again with tok tokenize")
    return head


@dataclass
class Notes:
    """What is written beside the arrays of a shard.

    Attributes:
        keys, labels, texts: of the images in it; labels -1 for none, texts all captions of each.
        broken: key and reason of images that could not be read.
    """

    keys: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    broken: list[list[str]] = field(default_factory=list)


def shard_path(folder: Path, number: int) -> Path:
    """The arrays of a shard; its notes have the suffix .json."""
    return folder / f"{number:05d}.safetensors"


def write_shard(folder: Path, number: int, arrays: Arrays, notes: Notes) -> None:
    """Write arrays, then notes, each at once.

    Raises:
        TokError: the disk is full or the folder cannot be written; the shard then counts as unfinished.
    """
    from safetensors.numpy import save

    from tok1d.disk import atomic_write

    path = shard_path(folder, number)
    # safetensors writes the bytes of an array as they lie, so it must lie in order
    atomic_write(path, save({name: np.ascontiguousarray(a) for name, a in arrays.items()}))
    atomic_write(path.with_suffix(".json"), json.dumps(asdict(notes), ensure_ascii=True).encode())


def read_notes(folder: Path, number: int) -> Notes | None:
    """Keys, labels and captions of a finished shard; None if it is not finished.

    Raises:
        TokError: damaged.
    """
    path = shard_path(folder, number).with_suffix(".json")
    if not path.is_file():
        return None
    try:
        notes = Notes(**json.loads(path.read_bytes()))
        if not len(notes.keys) == len(notes.labels) == len(notes.texts):
            raise ValueError("keys, labels and texts differ in number")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise TokError(f"{path} is damaged ({error}); remove it and run tok tokenize again") from error
    return notes


def map_shard(folder: Path, number: int) -> Arrays:
    """The arrays of a shard, memory-mapped.

    Raises:
        TokError: missing, truncated, or not safetensors.
    """
    safetensors = require("safetensors", "train")
    path = shard_path(folder, number)
    try:
        with safetensors.safe_open(path, framework="numpy") as checked:  # refuses wrong offsets and sizes
            names = list(checked.keys())
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        kinds = {"U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "F16": "<f2", "I32": "<i4"}
        arrays = {}
        for name in names:
            entry = header[name]
            shape, dtype, (start, end) = tuple(entry["shape"]), kinds[entry["dtype"]], entry["data_offsets"]
            arrays[name] = np.memmap(path, dtype, "r", 8 + length + start, shape) if end > start else np.empty(shape, dtype)
        return arrays
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise TokError(f"{path} is missing or damaged ({error}); remove it and its .json, and run tok tokenize again") from error


def id_dtype(vocab_size: int) -> Any:
    """The smallest unsigned integers for ids below ``vocab_size``.

    Example:
        >>> id_dtype(256).__name__, id_dtype(257).__name__, id_dtype(2**62).__name__
        ('uint8', 'uint16', 'uint64')
    """
    return next(t for t in (np.uint8, np.uint16, np.uint32, np.uint64) if vocab_size - 1 <= np.iinfo(t).max)
