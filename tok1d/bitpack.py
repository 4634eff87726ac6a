"""Integers of 1..62 bits to bytes and back, most significant bit first, with no gap between them.

Works on blocks of 65,536 integers, so scratch memory stays at a few MB whatever the count.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_BITS = 62
_BLOCK = 1 << 16  # a multiple of 8: every block but the last ends on a byte


def packed_size(count: int, bits: int) -> int:
    """Bytes that hold ``count`` integers of ``bits`` bits."""
    return (count * bits + 7) // 8


def pack_ids(ids: NDArray[np.int64], bits: int) -> bytes:
    """Write integers back to back; the unused low bits of the last byte are zero.

    Args:
        ids: int64 (n,) in [0, 2**bits), not checked.
        bits: 1..62.

    Example:
        >>> pack_ids(np.array([0xABC, 0x123]), 12).hex()
        'abc123'
    """
    blocks = []
    for start in range(0, len(ids), _BLOCK):
        octets = ids[start : start + _BLOCK].astype(">u8").view(np.uint8).reshape(-1, 8)
        blocks.append(np.packbits(np.unpackbits(octets, axis=1)[:, 64 - bits :]).tobytes())
    return b"".join(blocks)


def unpack_ids(data: bytes, count: int, bits: int) -> NDArray[np.int64]:
    """Read ``count`` integers of ``bits`` bits; ``data`` holds at least ``packed_size(count, bits)`` bytes.

    Example:
        >>> [hex(i) for i in unpack_ids(bytes.fromhex("abc123"), 2, 12)]
        ['0xabc', '0x123']
    """
    ids = np.empty(count, np.int64)
    for start in range(0, count, _BLOCK):
        n = min(_BLOCK, count - start)
        octets = np.frombuffer(data, np.uint8, count=packed_size(n, bits), offset=start * bits // 8)
        planes = np.zeros((n, 64), np.uint8)
        planes[:, 64 - bits :] = np.unpackbits(octets, count=n * bits).reshape(n, bits)
        ids[start : start + n] = np.packbits(planes, axis=1).view(">u8")[:, 0]
    return ids
