"""The .tok container: tokens in files and streams, one record per original image, one after the other.

The layout of a record is in :mod:`tok1d.tokrecord` and docs/tok-format.md. Reading needs numpy only, not torch.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tok1d.disk import atomic_write, cause, store
from tok1d.errors import TokenError, TokFileError
from tok1d.tokens import Geometry, TokenSequence
from tok1d.tokrecord import AGAIN, HEADER_SIZE, MAGIC, Record, read_record, take

__all__ = [
    "Record", "atomic_write", "iter_file", "iter_records", "load", "pack", "records_of", "save", "stack_rows", "store",
    "to_sequence", "truncate", "unpack",
]  # fmt: skip

MAX_PADDED = 1 << 27  # entries of a stacked batch that is mostly padding
_FOREIGN = (
    (b"\x89PNG", "a PNG image; tok encode makes a .tok file of it"),
    (b"\xff\xd8\xff", "a JPEG image; tok encode makes a .tok file of it"),
    (b"GIF8", "a GIF image; tok encode makes a .tok file of it"),
    (b"RIFF", "a WebP image; tok encode makes a .tok file of it"),
    (b"PK\x03\x04", "a zip archive; if it holds tokens, name it .npz"),
    (b"\x1f\x8b", "compressed with gzip; gunzip it first"),
    (b"{", "JSON text; if it holds tokens, name it .jsonl"),
)


# tokens → bytes ------------------------------------------------------------------------------------------------------


def records_of(seq: TokenSequence, meta: dict[str, Any] | Sequence[dict[str, Any]] | None = None) -> list[Record]:
    """One record per original image; arguments as :func:`pack`."""
    data, lengths = seq.data.detach().cpu().numpy(), seq.lengths.tolist()  # type: ignore[union-attr]
    images: Sequence[Geometry | None] = seq.geometry if seq.geometry is not None else [None] * len(seq)
    metas = [meta or {}] * len(images) if meta is None or isinstance(meta, dict) else list(meta)
    if not images:
        raise TokenError("there is nothing to store: the sequence holds no image")
    if len(metas) != len(images):
        raise TokenError(f"meta needs one entry per image: got {len(metas)} for {len(images)}")
    records, start = [], 0
    for geometry, entry in zip(images, metas):
        rows = slice(start, start + (geometry.tiles if geometry else 1))
        start, kept = rows.stop, set(lengths[rows])
        n = max(kept, default=0)
        if len(kept) > 1:
            raise TokenError(
                f"the tiles of one image must keep the same number of tokens in a .tok file, got {min(kept)} to {n}. "
                "Encode with tokens=N, or store them as .jsonl, .npz or .safetensors"
            )
        if not 1 <= n <= data.shape[1]:
            raise TokenError(f"an image needs at least 1 token to be stored and has at most {data.shape[1]}, got {n}")
        ids, bits = (data[rows, :n], None) if seq.bits is None else (None, data[rows, :n])
        records.append(Record(ids, bits, seq.vocab_size, seq.model_id, geometry, meta=entry, nested=seq.nested))
    return records


def pack(
    seq: TokenSequence,
    meta: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
    *,
    nested: bool | None = None,
    frames: int = 1,
) -> bytes:
    """A sequence as .tok bytes, one record per original image.

    Args:
        seq: at least one image, at least one token in each.
        meta: JSON-able dict stored in every record, or one dict per image; at most 1 MiB each.
        nested: whether any prefix of the tokens decodes; None takes ``seq.nested``.
        frames: 1 for images.

    Raises:
        TokenError: the tokens do not fit the format.

    Example:
        >>> import torch
        >>> len(pack(TokenSequence(torch.zeros(1, 32, dtype=torch.int64), vocab_size=4096)))  # 32 + 48 + 4
        84
    """
    records = [replace(r, frames=frames, nested=r.nested if nested is None else nested) for r in records_of(seq, meta)]
    return b"".join(r.to_bytes() for r in records)


def truncate(record: Record | bytes, tokens: int) -> bytes:
    """Keep the first ``tokens`` tokens of every tile; needs no model.

    Args:
        record: a record, or the bytes of one or more. Those that are shorter already stay as they are.
        tokens: at least 1, at most what the longest record holds.

    Raises:
        TokFileError: the bytes are damaged, or a record comes from a model whose prefixes do not decode.
        TokenError: ``tokens`` is out of range.
    """
    records = [record] if isinstance(record, Record) else unpack(record)
    longest = max(r.tokens for r in records)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= longest:
        raise TokenError(f"cannot keep {tokens!r} of {longest} tokens; ask for 1 to {longest}")
    if not all(r.nested for r in records):
        raise TokFileError(
            "these tokens come from a model of fixed length, their prefixes do not decode. "
            "Encode the image with a nested model: tok models --filter nested"
        )
    kept = []
    for r in records:
        short = replace(r, ids=r.ids[:, :tokens]) if r.ids is not None else replace(r, bits=r.data[:, :tokens])
        kept.append(short.to_bytes())
    return b"".join(kept)


def save(
    seq: TokenSequence,
    path: str | Path,
    *,
    overwrite: bool = True,
    meta: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
    nested: bool | None = None,
) -> int:
    """Write a .tok file (``-``: standard output) and return its size in bytes; arguments as :func:`pack`.

    Raises:
        TokError: the file exists and ``overwrite`` is False, or it cannot be written.
    """
    return store(path, pack(seq, meta, nested=nested), overwrite=overwrite)


# bytes → tokens ------------------------------------------------------------------------------------------------------


def iter_records(stream: BinaryIO, *, name: str = "token stream") -> Iterator[Record]:
    """Read records one at a time, as they arrive; memory is that of one record.

    Args:
        stream: binary, read to its end.
        name: shown in messages.

    Raises:
        TokFileError: at the first byte that is not version 1 of this format, or at an empty stream.
    """
    index = 0
    while head := take(stream, HEADER_SIZE, name):
        if not head.startswith(MAGIC[: len(head)]):
            if index:
                raise TokFileError(f"{name}: something that is not a record follows record {index}. {AGAIN}")
            known = next((text for magic, text in _FOREIGN if head.startswith(magic)), None)
            raise TokFileError(f"{name} is {known}" if known else f"{name} is not a .tok file. Give one made by tok encode")
        index += 1
        yield read_record(stream, head, f"{name}: record {index}")
    if not index:
        raise TokFileError(f"{name} is empty. Give a .tok file made by tok encode")


def unpack(data: bytes) -> list[Record]:
    """Every record of .tok bytes; see :func:`iter_records`.

    Example:
        >>> import torch
        >>> record = unpack(pack(TokenSequence(torch.tensor([[1, 2, 3]]), vocab_size=1000)))[0]
        >>> record.ids.tolist(), record.payload_bits, record.nbytes
        ([[1, 2, 3]], 30, 40)
    """
    return list(iter_records(io.BytesIO(data), name="token data"))


def iter_file(path: str | Path) -> Iterator[Record]:
    """:func:`iter_records` of a file, or of standard input for ``-``."""
    if str(path) == "-":
        yield from iter_records(sys.stdin.buffer, name="standard input")
        return
    try:
        stream = open(path, "rb")  # noqa: SIM115 — closed below, where errors are those of the content
    except (OSError, ValueError) as error:
        raise TokFileError(f"{path} cannot be read: {cause(error)}") from error
    with stream:
        yield from iter_records(stream, name=str(path))


def load(path: str | Path) -> TokenSequence:
    """Read a .tok file (``-``: standard input): all its images, stacked.

    Raises:
        TokFileError: not a whole, undamaged .tok file, or its images come from different models.
    """
    return to_sequence(list(iter_file(path)))


def to_sequence(records: Sequence[Record]) -> TokenSequence:
    """Stack records along the batch, padding short ones with zeros.

    Raises:
        TokFileError: none, records of different models, or lengths so different that padding would fill the memory.
    """
    if not records:
        raise TokFileError("there are no records to stack")
    first = records[0]
    for r in records[1:]:
        if (r.vocab_size, r.model_id, r.bits is None) != (first.vocab_size, first.model_id, first.bits is None):
            raise TokFileError(
                f"the images come from different models ({first.model_id:016x} and {r.model_id:016x}) and cannot share a "
                "batch. Read them one by one: tok1d.tokfile.iter_records"
            )
    geometry = tuple(r.geometry for r in records if r.geometry is not None)
    if geometry and len(geometry) != len(records):
        raise TokFileError(
            "some images record their original size and some do not, they cannot share a batch. "
            "Read them one by one: tok1d.tokfile.iter_records"
        )
    return stack_rows(
        [row for r in records for row in r.data],
        vocab_size=first.vocab_size,
        model_id=first.model_id,
        geometry=geometry or None,
        nested=all(r.nested for r in records),
    )


def stack_rows(
    rows: Sequence[NDArray[Any]], *, vocab_size: int, model_id: int, geometry: tuple[Geometry, ...] | None, nested: bool
) -> TokenSequence:
    """Rows of ids, int64 (n,), or of bit codes, uint8 (n, d), each of its own length n, as one sequence.

    Raises:
        TokFileError: the rows are so different in length that padding would fill the memory.
    """
    import torch

    lengths = [len(row) for row in rows]
    longest, total = max(lengths), sum(lengths)
    width = int(np.prod(rows[0].shape[1:], dtype=np.int64))
    if len(rows) * longest * width > max(MAX_PADDED, 2 * total * width):
        raise TokFileError(
            f"{len(rows)} rows of up to {longest} tokens, {total // len(rows)} on average: as one batch they would be almost "
            "all padding. Read them one by one: tok1d.tokfile.iter_records"
        )
    data = np.zeros((len(rows), longest, *rows[0].shape[1:]), rows[0].dtype)
    for target, row in zip(data, rows):
        target[: len(row)] = row
    tokens = torch.from_numpy(data)
    return TokenSequence(
        ids=tokens if data.ndim == 2 else None,
        bits=tokens if data.ndim == 3 else None,
        lengths=torch.tensor(lengths),
        vocab_size=vocab_size,
        model_id=model_id,
        geometry=geometry,
        nested=nested,
    )
