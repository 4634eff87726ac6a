"""One record of a .tok file, version 1: an original image with all its tiles (docs/tok-format.md is the normative text).

    header (32 bytes) · [vocabulary u64] · [JSON length u32 · JSON] · payload · CRC32 u32 of all that precedes it

    offset  type  header field, little-endian
    0       4s    magic "TOK1"
    4       u8    version, 1
    5       u8    flags: 1 JSON block, 2 nested (any prefix decodes), 4 bit codes, 8 vocabulary u64 follows the header
    6       u8    bits per token: 1..62 for ids, 1..255 for bit codes
    7       u8    size policy: 0 none, 1 resize, 2 crop, 3 pad, 4 tile
    8       u32   tokens in the record = tiles × tokens per tile
    12      u32   vocabulary; 0 if it is exactly 2**bits or follows as u64
    16      u16   original height, 0 if not recorded
    18      u16   original width, 0 if not recorded
    20      u16   frames, 1 for images
    22      u8    rows of tiles
    23      u8    columns of tiles
    24      u64   id of model and weights, 0 if unknown

Tokens are stored token-major — token 0 of every tile, then token 1 of every tile — so the first k tokens are a prefix of
the payload. Nothing a header claims is allocated before the bytes are there, and every damaged input is a TokFileError.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tok1d.bitpack import MAX_BITS, pack_ids, packed_size, unpack_ids
from tok1d.errors import TokenError, TokFileError
from tok1d.tokens import POLICIES, Geometry, bits_for_vocab

MAGIC, VERSION = b"TOK1", 1
JSON_BLOCK, NESTED, BIT_CODES, WIDE_VOCAB = 1, 2, 4, 8
MAX_TOKENS = 1 << 24  # of one record: 255 × 255 tiles of 256 tokens
MAX_PAYLOAD_BITS = 1 << 30
MAX_JSON = 1 << 20
HEADER_SIZE = 32
AGAIN = "It is damaged or cut off: copy it again, or encode the image again"
_LAYOUT = struct.Struct("<4sBBBBIIHHHBBQ")
_CHUNK = 1 << 20


class Header(NamedTuple):
    """The fields of the 32 bytes, in their order."""

    magic: bytes
    version: int
    flags: int
    bits: int
    policy: int
    tokens: int
    vocab: int
    height: int
    width: int
    frames: int
    rows: int
    cols: int
    model_id: int


@dataclass(eq=False)
class Record:
    """One original image as a .tok file holds it.

    Attributes:
        ids: int64 (tiles, n) in [0, vocab_size), or None for bit codes.
        bits: uint8 (tiles, n, d) of 0/1, or None for ids.
        vocab_size: number of distinct tokens (2**d for bit codes).
        model_id: 64-bit id of model and weights, 0 if unknown.
        geometry: original size and size policy, or None if not recorded.
        frames: 1 for images.
        meta: the JSON block, {} if there is none.
        nbytes: bytes of the whole record in the file it was read from.
        nested: whether any prefix of the tokens decodes.
    """

    ids: NDArray[np.int64] | None
    bits: NDArray[np.uint8] | None
    vocab_size: int
    model_id: int = 0
    geometry: Geometry | None = None
    frames: int = 1
    meta: dict[str, Any] = field(default_factory=dict)
    nbytes: int = 0
    nested: bool = True

    @property
    def data(self) -> NDArray[Any]:
        """The ids (tiles, n) or the bits (tiles, n, d), whichever is there."""
        found = self.ids if self.ids is not None else self.bits
        assert found is not None
        return found

    @property
    def tiles(self) -> int:
        """Tiles of the image, 1 unless the size policy is ``tile``."""
        return int(self.data.shape[0])

    @property
    def tokens(self) -> int:
        """Tokens of each tile."""
        return int(self.data.shape[1])

    @property
    def bits_per_token(self) -> int:
        """Stored bits of one token."""
        return bits_for_vocab(self.vocab_size) if self.bits is None else int(self.bits.shape[2])

    @property
    def payload_bits(self) -> int:
        """Bits the tokens cost, without header, JSON block and checksum."""
        return self.tiles * self.tokens * self.bits_per_token

    def to_bytes(self) -> bytes:
        """The record as it stands in a file.

        Raises:
            TokenError: something in it does not fit the format.
        """
        g = self.geometry or Geometry(0, 0)
        exact = self.vocab_size == 1 << self.bits_per_token
        wide = not exact and self.vocab_size > 0xFFFFFFFF
        header = Header(
            magic=MAGIC,
            version=VERSION,
            flags=JSON_BLOCK * bool(self.meta)
            | NESTED * bool(self.nested)
            | BIT_CODES * (self.bits is not None)
            | WIDE_VOCAB * wide,
            bits=self.bits_per_token,
            policy=POLICIES.index(g.policy) if g.policy in POLICIES else -1,
            tokens=self.tiles * self.tokens,
            vocab=0 if exact or wide else self.vocab_size,
            height=g.height,
            width=g.width,
            frames=self.frames,
            rows=g.rows,
            cols=g.cols,
            model_id=self.model_id,
        )
        if wrong := self._problem() or header_problem(header):
            raise TokenError(f"these tokens cannot be stored as .tok: {wrong}")
        body = [_LAYOUT.pack(*header)]
        if wide:
            body.append(struct.pack("<Q", self.vocab_size))
        if self.meta:
            block = dump_meta(self.meta)
            body += [struct.pack("<I", len(block)), block]
        by_token = np.ascontiguousarray(self.data.swapaxes(0, 1)).reshape(-1)
        body.append(np.packbits(by_token).tobytes() if self.ids is None else pack_ids(by_token, header.bits))
        record = b"".join(body)
        return record + struct.pack("<I", zlib.crc32(record))

    def _problem(self) -> str | None:
        """What the header alone cannot tell, before writing."""
        g, vocab = self.geometry, self.vocab_size
        if g is not None and not (g.height and g.width):
            return f"an original size of {g.height} × {g.width} pixels"
        if (g.tiles if g else 1) != self.tiles:
            return f"{self.tiles} tiles where the geometry says {g.tiles if g else 1}"
        if self.bits is not None and vocab != 1 << self.bits_per_token:
            return f"a vocabulary of {vocab} for codes of {self.bits_per_token} bits (it must be 2**{self.bits_per_token})"
        if vocab < 1:
            return f"a vocabulary of {vocab}"
        top = vocab if self.bits is None else 2
        if self.data.size and not 0 <= int(self.data.min()) <= int(self.data.max()) < top:
            return f"ids outside [0, {vocab})" if self.bits is None else "bits other than 0 and 1"
        return None


def header_problem(h: Header) -> str | None:
    """The first thing in a header that version 1 does not allow, or None."""
    code, tiles = bool(h.flags & BIT_CODES), h.rows * h.cols
    top = 255 if code else MAX_BITS
    policy = POLICIES[h.policy] if 0 <= h.policy < len(POLICIES) else None
    size = f"an original size of {h.height} × {h.width} pixels (allowed: up to 65535 × 65535)"
    checks = (
        (h.flags & ~15, f"unknown flags {h.flags:#04x}"),
        (not 1 <= h.bits <= top, f"{h.bits} bits per token (allowed: 1 to {top}; bit codes go to 255)"),
        (policy is None, f"an unknown size policy (known: {', '.join(POLICIES)})"),
        (not (1 <= h.rows <= 255 and 1 <= h.cols <= 255), f"{h.rows} × {h.cols} tiles (allowed: 1 to 255 each)"),
        (tiles > 1 and policy != "tile", f"{tiles} tiles under the size policy {policy!r}"),
        (not 1 <= h.tokens <= MAX_TOKENS, f"{h.tokens} tokens (allowed: 1 to {MAX_TOKENS})"),
        (tiles and h.tokens % tiles, f"{h.tokens} tokens, which {tiles} tiles cannot share"),
        (h.tokens * h.bits > MAX_PAYLOAD_BITS, f"{h.tokens * h.bits} payload bits (allowed: up to {MAX_PAYLOAD_BITS})"),
        (not (0 <= h.height <= 65535 and 0 <= h.width <= 65535), size),
        (bool(h.height) != bool(h.width), size),
        (not h.height and (h.policy or tiles != 1), "a size policy without an original size"),
        (not 1 <= h.frames <= 65535, f"{h.frames} frames (allowed: 1 to 65535)"),
        (h.flags & WIDE_VOCAB and (code or h.vocab), "two vocabularies"),
        (code and h.vocab, "a vocabulary for bit codes"),
        (h.vocab and not _fits(h.vocab, h.bits), f"a vocabulary of {h.vocab} in ids of {h.bits} bits"),
        (not 0 <= h.model_id < 1 << 64, f"model id {h.model_id} (allowed: 64 bits, unsigned)"),
    )
    return next((text for wrong, text in checks if wrong), None)


def _fits(vocab: int, bits: int) -> bool:
    """Whether a vocabulary that is written out needs exactly ``bits`` bits; powers of two are not written out."""
    return bits_for_vocab(vocab) == bits and vocab != 1 << bits


def read_record(stream: BinaryIO, head: bytes, where: str) -> Record:
    """Read what follows the first 32 bytes of a record.

    Args:
        stream: stands behind ``head``.
        head: the first 32 bytes or, where the stream ended earlier, what there was; it begins like the magic.
        where: shown in messages.

    Raises:
        TokFileError: truncated, damaged, or not version 1.
    """
    if len(head) > 4 and head[4] != VERSION:
        raise TokFileError(
            f"{where}: version {head[4]} of the .tok format, this tok1d reads version {VERSION}. "
            "Upgrade (pip install -U tok1d), or copy the file again if it is damaged"
        )
    if len(head) < HEADER_SIZE:
        raise TokFileError(f"{where} ends inside its header. {AGAIN}")
    header = Header(*_LAYOUT.unpack(head))
    if wrong := header_problem(header):
        raise TokFileError(f"{where} claims {wrong}. {AGAIN}")
    read = bytearray(head)

    def more(size: int, part: str) -> bytes:
        data = take(stream, size, where)
        if len(data) < size:
            raise TokFileError(f"{where} ends inside its {part}: {size} bytes expected, {len(data)} there. {AGAIN}")
        read.extend(data)
        return data

    code = bool(header.flags & BIT_CODES)
    vocab = header.vocab or 1 << header.bits
    if header.flags & WIDE_VOCAB:
        vocab = int.from_bytes(more(8, "vocabulary"), "little")
        if vocab <= 0xFFFFFFFF or not _fits(vocab, header.bits):
            raise TokFileError(f"{where} claims a vocabulary of {vocab} in ids of {header.bits} bits. {AGAIN}")
    block = None
    if header.flags & JSON_BLOCK:
        size = int.from_bytes(more(4, "JSON block"), "little")
        if size > MAX_JSON:
            raise TokFileError(f"{where} claims a JSON block of {size} bytes (allowed: up to {MAX_JSON}). {AGAIN}")
        block = more(size, "JSON block")
    payload = more(packed_size(header.tokens, header.bits), "tokens")
    crc = zlib.crc32(read)
    if int.from_bytes(more(4, "checksum"), "little") != crc:
        raise TokFileError(f"{where}: the checksum does not match. {AGAIN}")

    # From here on the bytes are as they were written; what is wrong now was written wrong.
    meta = {} if block is None else parse_object(block, f"{where}: the JSON block")
    spare = -header.tokens * header.bits % 8
    if spare and payload[-1] & ((1 << spare) - 1):
        raise TokFileError(f"{where}: the unused bits after the last token are not zero. Encode the image again")
    tiles = header.rows * header.cols
    shape = (header.tokens // tiles, tiles)
    ids = bits = None
    if code:
        planes = np.unpackbits(np.frombuffer(payload, np.uint8), count=header.tokens * header.bits)
        bits = np.ascontiguousarray(planes.reshape(*shape, header.bits).swapaxes(0, 1))
    else:
        ids = np.ascontiguousarray(unpack_ids(payload, header.tokens, header.bits).reshape(shape).T)
        if int(ids.max()) >= vocab:
            raise TokFileError(f"{where}: id {int(ids.max())} is outside the vocabulary [0, {vocab}). Encode the image again")
    geometry = None
    if header.height:
        geometry = Geometry(header.height, header.width, POLICIES[header.policy], header.rows, header.cols)
    nested = bool(header.flags & NESTED)
    return Record(ids, bits, vocab, header.model_id, geometry, header.frames, meta, len(read), nested)


def take(stream: BinaryIO, size: int, where: str) -> bytes:
    """Up to ``size`` bytes, fewer only at the end of the stream; grows with what arrives, not with what was asked for."""
    data = bytearray()
    while len(data) < size:
        try:
            piece = stream.read(min(size - len(data), _CHUNK))
        except (OSError, ValueError) as error:
            raise TokFileError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if piece is None:
            raise TokFileError(f"{where} cannot be read: nothing has arrived on a non-blocking stream. Use a blocking one")
        if not piece:
            break
        data += piece
    return bytes(data)


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object of finite numbers.

    Raises:
        TokFileError: anything else.
    """

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"{number:.20} is not a finite number")
        return value

    try:
        value = json.loads(text.decode("utf-8"), parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise TokFileError(f"{where} is not valid JSON ({error}). Write it again with tok1d") from error
    if not isinstance(value, dict):
        raise TokFileError(f"{where} must be a JSON object, got {type(value).__name__}. Write it again with tok1d")
    return value


def dump_meta(meta: dict[str, Any]) -> bytes:
    """``meta`` as compact ASCII JSON.

    Raises:
        TokenError: not JSON-able, or larger than 1 MiB.
    """
    try:
        block = json.dumps(meta, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise TokenError(f"meta must be a dict of JSON-able values: {error}") from error
    if not isinstance(meta, dict) or len(block) > MAX_JSON:
        raise TokenError(f"meta must be a dict of at most {MAX_JSON} bytes as JSON, got a {type(meta).__name__} of {len(block)}")
    return block
