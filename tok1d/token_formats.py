"""Token sequences as .jsonl, .npz and .safetensors, beside .tok: the same tokens for other people's tools.

.jsonl        one object per original image: ids (or bits), lengths, vocab_size, model_id, geometry, nested, meta
.npz          arrays ids (B, N) or bits (B, N, d), lengths (B,), vocab_size, model_id, nested; geometry (G, 5) and names (G,)
              where there are any
.safetensors  tensors ids or bits, lengths, geometry; metadata vocab_size, model_id, nested, names

Files are checked as strictly as .tok files: shapes, dtypes, ranges, and sizes before anything is allocated. No pickle.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tok1d import tokfile
from tok1d.disk import cause, store
from tok1d.errors import TokenError, TokFileError, UsageError
from tok1d.token_arrays import (
    WRITE_AGAIN,
    check_geometry,
    check_keys,
    check_model_id,
    check_vocab,
    npz_bytes,
    read_npz,
    read_safetensors,
    safetensors_bytes,
    to_arrays,
)
from tok1d.tokens import POLICIES, Geometry, TokenSequence, bits_for_vocab
from tok1d.tokrecord import MAX_TOKENS, dump_meta, parse_object

SUFFIXES = (".tok", ".jsonl", ".npz", ".safetensors")
MAX_LINE = 64 << 20  # bytes of one jsonl object: millions of tokens
_KEYS = {"ids", "bits", "lengths", "vocab_size", "model_id", "geometry", "nested", "meta"}


def write_tokens(
    seq: TokenSequence, path: str | Path, names: Sequence[str] | None = None, *, overwrite: bool = True
) -> int:
    """Write tokens in the format its suffix names (``-``: .tok on standard output); returns the size in bytes.

    Args:
        seq: tokens of at least one image.
        path: ends in .tok, .jsonl, .npz or .safetensors.
        names: one per original image; kept as ``{"name": …}`` in the JSON block (.tok), in ``meta`` (.jsonl), or as ``names``.
        overwrite: replace an existing file.

    Raises:
        UsageError: another suffix.
        TokenError: the tokens do not fit the format.
        TokError: the file cannot be written.
    """
    writer = {".tok": _tok_bytes, ".jsonl": _jsonl_bytes, ".npz": npz_bytes, ".safetensors": safetensors_bytes}[_suffix(path)]
    images = len(seq) if seq.geometry is None else len(seq.geometry)
    if names is not None and len(names) != images:
        raise TokenError(f"names needs one entry per image: got {len(names)} for {images}")
    if not images:
        raise TokenError("there is nothing to store: the sequence holds no image")
    return store(path, writer(seq, list(names) if names is not None else None), overwrite=overwrite)


def read_tokens(path: str | Path) -> TokenSequence:
    """Read tokens from a .tok, .jsonl, .npz or .safetensors file (``-``: .tok on standard input).

    Raises:
        UsageError: another suffix.
        TokFileError: not a whole, valid file of that format.
    """
    reader = {".tok": tokfile.load, ".jsonl": _read_jsonl, ".npz": read_npz, ".safetensors": read_safetensors}[_suffix(path)]
    try:
        return reader(path)
    except (OSError, MemoryError) as error:
        raise TokFileError(f"{path} cannot be read: {cause(error)}") from error


def _suffix(path: str | Path) -> str:
    suffix = ".tok" if str(path) == "-" else Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{path}: tokens are stored as {', '.join(SUFFIXES)}; got the suffix {suffix or '(none)'}")
    return suffix


def _tok_bytes(seq: TokenSequence, names: list[str] | None) -> bytes:
    return tokfile.pack(seq, None if names is None else [{"name": name} for name in names])


# .jsonl --------------------------------------------------------------------------------------------------------------


def _jsonl_bytes(seq: TokenSequence, names: list[str] | None) -> bytes:
    arrays = to_arrays(seq)
    data, lengths = arrays.get("ids", arrays.get("bits")), arrays["lengths"].tolist()
    assert data is not None
    lines, start = [], 0
    for i in range(len(seq) if seq.geometry is None else len(seq.geometry)):
        g = None if seq.geometry is None else seq.geometry[i]
        rows = range(start, start + (g.tiles if g else 1))
        start = rows.stop
        tokens = [data[r, : lengths[r]] for r in rows]
        entry = {
            "ids" if seq.bits is None else "bits": [t.tolist() if seq.bits is None else _bit_strings(t) for t in tokens],
            "lengths": [lengths[r] for r in rows],
            "vocab_size": seq.vocab_size,
            "model_id": f"{seq.model_id:016x}",
            "geometry": None if g is None else {"height": g.height, "width": g.width, "policy": g.policy, "rows": g.rows, "cols": g.cols},
            "nested": seq.nested,
            "meta": {} if names is None else {"name": names[i]},
        }  # fmt: skip
        dump_meta(entry["meta"])  # type: ignore[arg-type]
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        if len(line) > MAX_LINE:
            raise TokenError(f"one image takes {len(line)} bytes as JSON (allowed: {MAX_LINE}). Store it as .tok or .npz")
        lines.append(line)
    return b"".join(lines)


def _bit_strings(bits: NDArray[np.uint8]) -> list[str]:
    """uint8 (n, d) → n strings of d characters 0 and 1."""
    return [(row + ord("0")).tobytes().decode("ascii") for row in bits]


def _read_jsonl(path: str | Path) -> TokenSequence:
    rows: list[NDArray[Any]] = []
    shapes: list[Geometry | None] = []
    nested, common, number = True, None, 0
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE + 1):
            number += 1
            where = f"{path}: line {number}"
            if len(line) > MAX_LINE:
                raise TokFileError(f"{where} is longer than {MAX_LINE} bytes. Store so many tokens as .tok or .npz")
            if not line.strip():
                continue
            found, geometry, kind, still_nested = _jsonl_entry(parse_object(line, where), where)
            if common not in (None, kind):
                raise TokFileError(f"{where} comes from another model than the lines before it. Keep one model per file")
            common, nested = kind, nested and still_nested
            rows += found
            shapes.append(geometry)
    if common is None:
        raise TokFileError(f"{path} is empty. {WRITE_AGAIN}")
    if len({g is None for g in shapes}) > 1:
        raise TokFileError(f"{path}: geometry is given for some images only. Give it for all, or null for all")
    geometries = tuple(g for g in shapes if g is not None) or None
    return tokfile.stack_rows(rows, vocab_size=common[1], model_id=common[2], geometry=geometries, nested=nested)


def _jsonl_entry(entry: dict[str, Any], where: str) -> tuple[list[NDArray[Any]], Geometry | None, tuple[str, int, int], bool]:
    """One object → its rows, its geometry, (ids|bits, vocab_size, model_id) and whether it is nested."""
    name = "ids" if "ids" in entry else "bits"
    check_keys(entry, {name, "lengths", "vocab_size", "model_id", "geometry"}, _KEYS - {"ids", "bits"} | {name}, where)
    vocab, model_id = check_vocab(entry["vocab_size"], name, where), check_model_id(entry["model_id"], where)
    tiles, lengths = entry[name], entry["lengths"]
    if not (isinstance(tiles, list) and tiles and all(isinstance(t, list) and t for t in tiles)):
        raise TokFileError(f"{where}: {name} must be a list of rows, each a list of at least one token. {WRITE_AGAIN}")
    if lengths != [len(t) for t in tiles] or not all(type(n) is int for n in lengths):
        raise TokFileError(f"{where}: lengths must be those of the rows of {name}. {WRITE_AGAIN}")
    if sum(lengths) > MAX_TOKENS:
        raise TokFileError(f"{where}: {sum(lengths)} tokens in one image (allowed: {MAX_TOKENS}). {WRITE_AGAIN}")
    width = bits_for_vocab(vocab)
    rows: list[NDArray[Any]] = []
    for tile in tiles:
        if name == "ids":
            if set(map(type, tile)) != {int} or not 0 <= min(tile) <= max(tile) < vocab:
                raise TokFileError(f"{where}: ids must be integers in [0, {vocab}). {WRITE_AGAIN}")
            rows.append(np.array(tile, np.int64))
        else:
            if set(map(type, tile)) != {str} or set(map(len, tile)) != {width} or not set("".join(tile)) <= {"0", "1"}:
                raise TokFileError(f"{where}: bits must be strings of {width} characters 0 and 1. {WRITE_AGAIN}")
            rows.append(np.frombuffer("".join(tile).encode(), np.uint8).reshape(len(tile), width) - ord("0"))
    g, geometry = entry["geometry"], None
    if g is not None:
        if not isinstance(g, dict) or set(g) != {"height", "width", "policy", "rows", "cols"} or g["policy"] not in list(POLICIES):
            raise TokFileError(f"{where}: geometry must be null or have height, width, policy, rows and cols. {WRITE_AGAIN}")
        geometry = check_geometry([g["height"], g["width"], POLICIES.index(g["policy"]), g["rows"], g["cols"]], where)
    if (geometry.tiles if geometry else 1) != len(tiles):
        raise TokFileError(f"{where}: {len(tiles)} rows where the geometry says {geometry.tiles if geometry else 1}. {WRITE_AGAIN}")
    if type(entry.get("nested", True)) is not bool or not isinstance(entry.get("meta", {}), dict):
        raise TokFileError(f"{where}: nested must be true or false, and meta an object. {WRITE_AGAIN}")
    return rows, geometry, (name, vocab, model_id), entry.get("nested", True)
