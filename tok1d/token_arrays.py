"""Token sequences as .npz and .safetensors: plain integer arrays, checked before they become a TokenSequence.

Sizes are weighed before anything is unpacked, object arrays (pickle) are never read, and every file that is not whole and
valid is a TokFileError.

Shapes: B rows (tiles included), N tokens, d bits of a token, G original images.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tok1d.errors import TokenError, TokFileError
from tok1d.tokens import POLICIES, Geometry, TokenSequence, bits_for_vocab

Arrays = dict[str, NDArray[Any]]
MAX_RATIO, SMALL = 64, 16 << 20  # an npz member may unpack to this many times its size, or to 16 MB
FORMAT = "tok1d.tokens/1"
WRITE_AGAIN = "Write it again with tok1d.token_formats.write_tokens"
_MEMBERS = {"ids", "bits", "lengths", "vocab_size", "model_id", "nested", "geometry", "names"}


# .npz ----------------------------------------------------------------------------------------------------------------


def npz_bytes(seq: TokenSequence, names: list[str] | None) -> bytes:
    """An .npz file of the sequence, not compressed; ``names`` one per original image."""
    arrays = to_arrays(seq)
    arrays["model_id"] = np.uint64(seq.model_id)  # type: ignore[assignment]
    arrays["nested"] = np.uint8(seq.nested)  # type: ignore[assignment]
    if seq.bits is None:
        arrays["vocab_size"] = np.int64(seq.vocab_size)  # type: ignore[assignment]
    if names is not None:
        arrays["names"] = np.array(names)
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def read_npz(path: str | Path) -> TokenSequence:
    """Read an .npz file."""
    where = str(path)
    with open(path, "rb") as file:
        found = _guarded(lambda: _npz_members(file, where), where, "npz file")
    name = "ids" if "ids" in found else "bits"
    wanted = {name, "lengths", "model_id"} | ({"vocab_size"} if name == "ids" else set())
    check_keys(found, wanted, wanted | {"geometry", "nested"}, where)
    for key in ("vocab_size", "model_id", "nested"):
        if key in found and found[key].shape != ():
            raise TokFileError(f"{where}: {key} must be a single integer, got shape {found[key].shape}. {WRITE_AGAIN}")
    vocab = int(found["vocab_size"]) if name == "ids" else 1 << _width(found["bits"], where)
    nested = int(found.get("nested", np.uint8(1)))
    if nested not in (0, 1):
        raise TokFileError(f"{where}: nested must be 0 or 1, got {nested}. {WRITE_AGAIN}")
    return _from_arrays(found, name, vocab, check_model_id(int(found["model_id"]), where), bool(nested), where)


def _npz_members(file: Any, where: str) -> Arrays:
    """Integer arrays of an npz file; each member's claimed size is weighed before it is unpacked."""
    arrays: Arrays = {}
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        if len(infos) > len(_MEMBERS) or not all(i.filename.removesuffix(".npy") in _MEMBERS for i in infos):
            raise TokFileError(f"{where} holds other things than tokens (known: {', '.join(sorted(_MEMBERS))}). {WRITE_AGAIN}")
        for info in infos:
            name = info.filename.removesuffix(".npy")
            if name in arrays:
                raise TokFileError(f"{where} holds {name} twice. {WRITE_AGAIN}")
            if info.file_size > max(SMALL, MAX_RATIO * info.compress_size):
                raise TokFileError(
                    f"{where}: {name} claims {info.file_size:,} bytes out of {info.compress_size:,}, as zip bombs do. "
                    "Store it without compression: numpy.savez"
                )
            if name != "names":
                arrays[name] = _npy(archive.read(info), f"{where}: {name}")
    return arrays


def _npy(data: bytes, where: str) -> NDArray[Any]:
    """Parse .npy bytes of an integer array whose size agrees with its header."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran, dtype = read_header(stream)
    if dtype.kind not in "iu" or min(shape, default=0) < 0:
        raise TokFileError(f"{where} must hold integers, got {dtype}. {WRITE_AGAIN}")
    values = np.frombuffer(data, dtype, offset=stream.tell())
    return values.reshape(shape, order="F" if fortran else "C")  # a wrong size is a ValueError


# .safetensors --------------------------------------------------------------------------------------------------------


def safetensors_bytes(seq: TokenSequence, names: list[str] | None) -> bytes:
    """A .safetensors file of the sequence; ``names`` one per original image."""
    from safetensors.numpy import save

    info = {"format": FORMAT, "vocab_size": str(seq.vocab_size), "model_id": f"{seq.model_id:016x}", "nested": str(int(seq.nested))}
    if names is not None:
        info["names"] = json.dumps(names)
    return bytes(save(to_arrays(seq), metadata=info))


def read_safetensors(path: str | Path) -> TokenSequence:
    """Read a .safetensors file."""
    where = str(path)
    with open(path, "rb"):  # a missing file is an OSError, not one of safetensors' many errors
        found, info = _guarded(lambda: _safetensors_content(where), where, "safetensors file")
    name = "ids" if "ids" in found else "bits"
    check_keys(found, {name, "lengths"}, {name, "lengths", "geometry"}, where)
    check_keys(info, {"format", "vocab_size", "model_id"}, {"format", "vocab_size", "model_id", "nested", "names"}, f"{where}: metadata")
    if info["format"] != FORMAT or info.get("nested", "1") not in ("0", "1"):
        raise TokFileError(f"{where}: metadata must have format {FORMAT} and nested 0 or 1, got {info!r:.200}. {WRITE_AGAIN}")
    digits = info["vocab_size"]
    vocab = check_vocab(int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 80 else digits, name, where)
    return _from_arrays(found, name, vocab, check_model_id(info["model_id"], where), info.get("nested", "1") == "1", where)


def _safetensors_content(path: str) -> tuple[Arrays, dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        keys = list(file.keys())
        for key in keys:
            kind = file.get_slice(key).get_dtype()
            if kind.lstrip("UI") not in ("8", "16", "32", "64"):
                raise TokFileError(f"{path}: {key:.40} must hold integers, got {kind}. {WRITE_AGAIN}")
        return {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})


# what the binary formats share ---------------------------------------------------------------------------------------


def to_arrays(seq: TokenSequence) -> Arrays:
    """ids in the smallest signed type that holds the vocabulary (torch knows those), or bits; lengths; geometry."""
    data, lengths = seq.data.detach().cpu().numpy(), seq.lengths.cpu().numpy()  # type: ignore[union-attr]
    name, top = ("ids", seq.vocab_size) if seq.bits is None else ("bits", 2)
    arrays: Arrays = {name: data, "lengths": lengths}
    if seq.geometry is not None:
        fields = [(g.height, g.width, POLICIES.index(g.policy) if g.policy in POLICIES else -1, g.rows, g.cols) for g in seq.geometry]
        arrays["geometry"] = np.array(fields, np.int64)
    try:
        check_vocab(seq.vocab_size, name, "tokens")
        _from_arrays(arrays, name, seq.vocab_size, check_model_id(seq.model_id, "tokens"), seq.nested, "tokens")
    except TokFileError as error:
        raise TokenError(f"these tokens cannot be stored: {str(error).removesuffix(WRITE_AGAIN).strip()}") from error
    if name == "ids":
        dtype = next(t for t in (np.uint8, np.int16, np.int32, np.int64) if top - 1 <= np.iinfo(t).max)
        arrays[name] = np.ascontiguousarray(data, dtype)
    return arrays


def _from_arrays(arrays: Arrays, name: str, vocab: int, model_id: int, nested: bool, where: str) -> TokenSequence:
    """Check every promise of a TokenSequence and build it."""
    import torch

    data, lengths = arrays[name], arrays["lengths"]
    vocab = check_vocab(vocab, name, where)
    wanted = 2 if name == "ids" else 3
    if data.ndim != wanted or 0 in data.shape or lengths.shape != data.shape[:1]:
        raise TokFileError(
            f"{where}: {name} must be {'(B, N)' if wanted == 2 else '(B, N, d)'} and lengths (B,), none empty, "
            f"got {data.shape} and {lengths.shape}. {WRITE_AGAIN}"
        )
    if name == "bits" and data.shape[2] != bits_for_vocab(vocab):
        raise TokFileError(f"{where}: codes of {data.shape[2]} bits for a vocabulary of {vocab}. {WRITE_AGAIN}")
    if not 1 <= int(lengths.min()) <= int(lengths.max()) <= data.shape[1]:
        raise TokFileError(f"{where}: lengths must be in 1..{data.shape[1]}, got {lengths.min()}..{lengths.max()}. {WRITE_AGAIN}")
    top = vocab if name == "ids" else 2
    if not 0 <= int(data.min()) <= int(data.max()) < top:
        raise TokFileError(f"{where}: {name} must be in [0, {top}), got {data.min()}..{data.max()}. {WRITE_AGAIN}")
    if data[np.arange(data.shape[1]) >= lengths[:, None]].any():
        raise TokFileError(f"{where}: {name} beyond lengths must be zero. {WRITE_AGAIN}")
    geometry = None
    if (table := arrays.get("geometry")) is not None:
        if table.ndim != 2 or table.shape[1] != 5:
            raise TokFileError(f"{where}: geometry must be (G, 5), got {table.shape}. {WRITE_AGAIN}")
        geometry = tuple(check_geometry(row, where) for row in table.tolist())
        if sum(g.tiles for g in geometry) != len(data):
            raise TokFileError(f"{where}: geometry describes {sum(g.tiles for g in geometry)} rows, there are {len(data)}. {WRITE_AGAIN}")
    tokens = torch.from_numpy(np.array(data, np.int64 if name == "ids" else np.uint8))
    return TokenSequence(
        ids=tokens if name == "ids" else None,
        bits=tokens if name == "bits" else None,
        lengths=torch.from_numpy(np.array(lengths, np.int64)),
        vocab_size=vocab,
        model_id=model_id,
        geometry=geometry,
        nested=nested,
    )


def _guarded(read: Callable[[], Any], where: str, what: str) -> Any:
    """Run a parser of somebody else's; whatever it throws at a damaged file becomes one kind of error."""
    try:
        return read()
    except TokFileError:
        raise
    except Exception as error:
        raise TokFileError(f"{where} is not a whole {what} of tokens ({type(error).__name__}: {error!s:.120}). {WRITE_AGAIN}") from error


def check_keys(found: Any, needed: set[str], allowed: set[str], where: str) -> None:
    """Everything needed is there and nothing unknown."""
    if missing := sorted(needed - set(found)):
        raise TokFileError(f"{where}: {', '.join(missing)} missing. {WRITE_AGAIN}")
    if extra := sorted(set(found) - allowed):
        raise TokFileError(f"{where}: unknown {', '.join(extra)!s:.80} (known: {', '.join(sorted(allowed))}). {WRITE_AGAIN}")


def check_vocab(vocab: Any, name: str, where: str) -> int:
    """A vocabulary size that ids (up to 2**62) or bit codes (a power of two) can have."""
    good = type(vocab) is int and vocab >= 1 and vocab.bit_length() <= 256
    if good and name == "ids":
        good = vocab <= 1 << 62
    elif good:
        good = vocab.bit_count() == 1 and 2 <= vocab <= 1 << 255
    if not good:
        allowed = "1 to 2**62" if name == "ids" else "2**d for codes of d = 1 to 255 bits"
        raise TokFileError(f"{where}: vocab_size must be {allowed}, got {vocab!r:.40}. {WRITE_AGAIN}")
    return int(vocab)


def _width(bits: NDArray[Any], where: str) -> int:
    if bits.ndim != 3 or not 1 <= bits.shape[2] <= 255:
        raise TokFileError(f"{where}: bits must be (B, N, d) with d = 1 to 255, got {bits.shape}. {WRITE_AGAIN}")
    return int(bits.shape[2])


def check_model_id(value: Any, where: str) -> int:
    """An unsigned 64-bit integer, or 16 hexadecimal digits of one."""
    if isinstance(value, str) and len(value) == 16 and set(value) <= set("0123456789abcdef"):
        return int(value, 16)
    if type(value) is int and 0 <= value < 1 << 64:
        return value
    raise TokFileError(f"{where}: model_id must be 16 hexadecimal digits, got {value!r:.40}. {WRITE_AGAIN}")


def check_geometry(row: Sequence[Any], where: str) -> Geometry:
    """(height, width, policy index, rows, cols) → Geometry."""
    limits = (65535, 65535, len(POLICIES) - 1, 255, 255)
    lows = (1, 1, 0, 1, 1)
    if not all(type(v) is int and low <= v <= high for v, low, high in zip(row, lows, limits)):
        raise TokFileError(f"{where}: geometry {list(row)!r:.80} is out of range (sizes 1 to 65535, tiles 1 to 255). {WRITE_AGAIN}")
    height, width, policy, rows, cols = row
    if rows * cols > 1 and POLICIES[policy] != "tile":
        raise TokFileError(f"{where}: {rows * cols} tiles under the size policy {POLICIES[policy]!r}. {WRITE_AGAIN}")
    return Geometry(height, width, POLICIES[policy], rows, cols)
