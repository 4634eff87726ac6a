"""Digits and bits to ids and back, in integer arithmetic: exact to 62 bits as one id, beyond that as planes of bits.

A float sum of powers is exact to 2^24 only; published quantizers that used one gave wrong ids from 25 bits on.

Shapes: (...) any leading axes (B, N), G digits of a token, d bits of a token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tok1d.errors import ModelError, TokenError

MAX_BITS = 62  # of an id: int64 with room for a sign and for one value past the last


def digit_bits(sizes: Sequence[int]) -> list[int]:
    """Bits that hold each digit: ceil(log2(size)).

    Example:
        >>> digit_bits([2, 5, 8, 9])
        [1, 3, 3, 4]
    """
    _check_sizes(sizes)
    return [(size - 1).bit_length() for size in sizes]


def fits_id(sizes: Sequence[int]) -> bool:
    """Whether digits of these sizes pack into one id (product at most 2^62)."""
    return math.prod(sizes) <= 2**MAX_BITS


def pack_digits(digits: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mixed-radix number of the digits, the first being the fastest.

    Args:
        digits: int64 (..., G), digit g in [0, sizes[g]), not checked.
        sizes: number of values of each digit; their product is at most 2^62.

    Returns:
        int64 (...) in [0, prod(sizes)).

    Example:
        >>> pack_digits(torch.tensor([[3, 1, 0]]), [4, 5, 6]).tolist()
        [7]
    """
    basis = _basis(sizes, digits.device)
    _check_width("digits", digits, len(sizes))
    return (digits.long() * basis).sum(-1)


def unpack_digits(ids: Tensor, sizes: Sequence[int]) -> Tensor:
    """Inverse of :func:`pack_digits`: int64 (...) in [0, prod(sizes)) → int64 (..., G).

    Example:
        >>> unpack_digits(torch.tensor([7]), [4, 5, 6]).tolist()
        [[3, 1, 0]]
    """
    basis = _basis(sizes, ids.device)
    return ids[..., None] // basis % torch.tensor(list(sizes), device=ids.device)


def digits_to_bits(digits: Tensor, sizes: Sequence[int]) -> Tensor:
    """Every digit in binary, ceil(log2(size)) bits each, most significant first, digit after digit; any total width.

    Args:
        digits: int64 (..., G), digit g in [0, sizes[g]), not checked.
        sizes: number of values of each digit, at most 2^62 each.

    Returns:
        uint8 (..., d) of 0 and 1, d = sum(digit_bits(sizes)).

    Example:
        >>> digits_to_bits(torch.tensor([5, 1]), [6, 4]).tolist()
        [1, 0, 1, 0, 1]
    """
    widths = digit_bits(sizes)
    _check_width("digits", digits, len(sizes))
    return torch.cat([unpack_bits(digit, width) for digit, width in zip(digits.unbind(-1), widths)], -1)


def bits_to_digits(bits: Tensor, sizes: Sequence[int]) -> Tensor:
    """Inverse of :func:`digits_to_bits`: uint8 (..., d) → int64 (..., G).

    Raises:
        TokenError: the bits spell a digit that is not below its size (possible unless all sizes are powers of two).

    Example:
        >>> bits_to_digits(torch.tensor([1, 0, 1, 0, 1], dtype=torch.uint8), [6, 4]).tolist()
        [5, 1]
    """
    widths = digit_bits(sizes)
    _check_width("bits", bits, sum(widths))
    digits = torch.stack([pack_bits(part) for part in bits.split(widths, -1)], -1)
    if any(size != 1 << width for size, width in zip(sizes, widths)):
        wrong = digits >= torch.tensor(list(sizes), device=bits.device)
        if bool(wrong.any()):
            place = wrong.nonzero()[0].tolist()
            raise TokenError(
                f"the bits at {place[:-1]} spell digit {int(digits[tuple(place)])} in place {place[-1]}, which must be below "
                f"{sizes[place[-1]]}: these are not tokens of this model"
            )
    return digits


def pack_bits(bits: Tensor) -> Tensor:
    """Bits (..., d) of 0/1 (or bool), d ≤ 62, the first being the most significant → int64 (...).

    Example:
        >>> pack_bits(torch.tensor([[1, 0, 1], [0, 1, 1]])).tolist()
        [5, 3]
    """
    return (bits.long() << _shifts(bits.shape[-1], bits.device)).sum(-1)


def unpack_bits(ids: Tensor, width: int) -> Tensor:
    """Inverse of :func:`pack_bits`: int64 (...) in [0, 2^width) → uint8 (..., width).

    Example:
        >>> unpack_bits(torch.tensor([5, 3]), 3).tolist()
        [[1, 0, 1], [0, 1, 1]]
    """
    return (ids[..., None] >> _shifts(width, ids.device) & 1).to(torch.uint8)


def digits_to_tokens(digits: Tensor, sizes: Sequence[int]) -> Tensor:
    """What a quantizer returns for digits (..., G): int64 ids (...) while they fit, else uint8 bits (..., d)."""
    return pack_digits(digits, sizes) if fits_id(sizes) else digits_to_bits(digits, sizes)


def tokens_to_digits(tokens: Tensor, sizes: Sequence[int]) -> Tensor:
    """Inverse of :func:`digits_to_tokens`."""
    return unpack_digits(tokens, sizes) if fits_id(sizes) else bits_to_digits(tokens, sizes)


def bits_to_tokens(bits: Tensor) -> Tensor:
    """What a quantizer returns for bits (..., d) of 0/1 or bool: int64 ids (...) if d ≤ 62, else the bits as uint8."""
    return pack_bits(bits) if bits.shape[-1] <= MAX_BITS else bits.to(torch.uint8)


def tokens_to_bits(tokens: Tensor, width: int) -> Tensor:
    """Inverse of :func:`bits_to_tokens`: ids (...) or bits (..., width) → uint8 (..., width)."""
    if width <= MAX_BITS:
        return unpack_bits(tokens, width)
    _check_width("bits", tokens, width)
    return tokens


def _shifts(width: int, device: torch.device) -> Tensor:
    if width > MAX_BITS:
        raise TokenError(f"{width} bits do not fit an id: ids hold at most {MAX_BITS}. Keep the bits as they are")
    return torch.arange(width - 1, -1, -1, device=device)


def _basis(sizes: Sequence[int], device: torch.device) -> Tensor:
    """int64 (G,), the value of a one in each place."""
    _check_sizes(sizes)
    if not fits_id(sizes):
        raise TokenError(
            f"digits of sizes {list(sizes)!r:.100} have {math.prod(sizes):.3g} combinations, ids hold at most 2^{MAX_BITS}. "
            "Use digits_to_bits"
        )
    return torch.tensor([1, *itertools.accumulate(sizes, int.__mul__)][: len(sizes)], device=device)


def _check_sizes(sizes: Sequence[int]) -> None:
    if not sizes or not all(isinstance(size, int) and 1 <= size <= 2**MAX_BITS for size in sizes):
        raise ModelError(f"sizes of digits must be integers from 1 to 2^{MAX_BITS}, at least one, got {list(sizes)!r:.200}")


def _check_width(name: str, values: Tensor, width: int) -> None:
    if values.shape[-1] != width:
        raise TokenError(f"{name} of a token are {width} here, got {values.shape[-1]} in shape {tuple(values.shape)}")
