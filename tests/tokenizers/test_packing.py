"""Packing: ids round-trip to 62 bits, bit planes to 128, exactly as Python's integers say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.quantizers.packing import (
    bits_to_digits,
    bits_to_tokens,
    digit_bits,
    digits_to_bits,
    digits_to_tokens,
    fits_id,
    pack_bits,
    pack_digits,
    tokens_to_bits,
    tokens_to_digits,
    unpack_bits,
    unpack_digits,
)

WIDTHS = st.sampled_from([*range(1, 65), 96, 128])


@st.composite
def numbers(draw: st.DrawFn, limit: int) -> tuple[list[int], list[int]]:
    """Sizes with a product of at most ``limit`` and a digit for each; corners are drawn often."""
    sizes, left = [], limit
    for _ in range(draw(st.integers(1, 24))):
        most = min(left, 2**62)
        size = draw(st.integers(1, most) | st.sampled_from([s for s in (2, 3, 5, 8, 64, most) if s <= most]))
        sizes.append(size)
        left //= size
    return sizes, [draw(st.integers(0, size - 1) | st.sampled_from([0, size - 1])) for size in sizes]


@settings(max_examples=80, deadline=None)
@given(numbers(2**62))
def test_digits_round_trip_through_ids(case):
    sizes, digits = case
    ids = pack_digits(torch.tensor([[digits]]), sizes)
    assert ids.dtype == torch.int64 and ids.shape == (1, 1)
    assert ids.item() == sum(digit * math.prod(sizes[:g]) for g, digit in enumerate(digits))
    assert unpack_digits(ids, sizes).tolist() == [[digits]]


@settings(max_examples=80, deadline=None)
@given(numbers(2**128))
def test_digits_round_trip_through_bits(case):
    sizes, digits = case
    bits = digits_to_bits(torch.tensor([[digits]]), sizes)
    assert bits.dtype == torch.uint8 and bits.shape == (1, 1, sum(digit_bits(sizes)))
    written = "".join(format(digit, f"0{width}b") for digit, width in zip(digits, digit_bits(sizes)) if width)
    assert "".join(map(str, bits.flatten().tolist())) == written
    assert bits_to_digits(bits, sizes).tolist() == [[digits]]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_bits_round_trip(data):
    width = data.draw(WIDTHS)
    value = data.draw(st.integers(0, 2**width - 1) | st.sampled_from([0, 2**width - 1, 2 ** (width - 1)]))
    bits = torch.tensor([int(c) for c in format(value, f"0{width}b")], dtype=torch.uint8)
    if width > 62:
        with pytest.raises(TokenError, match="do not fit an id"):
            pack_bits(bits)
        sizes = [2**32] * (width // 32) + [2 ** (width % 32)]
        digits = bits_to_digits(bits, sizes)
        assert torch.equal(digits_to_bits(digits, sizes), bits)
    else:
        assert pack_bits(bits).item() == value
        assert torch.equal(unpack_bits(pack_bits(bits), width), bits)


def test_every_id_of_a_small_vocabulary():
    sizes = [4, 3, 1, 5]
    ids = torch.arange(60).view(3, 20)
    digits = unpack_digits(ids, sizes)
    assert len(digits.flatten(0, 1).unique(dim=0)) == 60 and torch.equal(pack_digits(digits, sizes), ids)
    assert digits[0, :5, 0].tolist() == [0, 1, 2, 3, 0], "the first digit is the fastest"
    assert torch.equal(bits_to_digits(digits_to_bits(digits, sizes), sizes), digits)


@pytest.mark.parametrize("width", [1, 62, 63, 64, 96, 128])
def test_tokens_are_ids_up_to_62_bits(width):
    bits = torch.randint(2, (2, 3, width), generator=torch.Generator().manual_seed(width), dtype=torch.uint8)
    tokens = bits_to_tokens(bits.bool())
    assert (tokens.shape, tokens.dtype) == ((2, 3), torch.int64) if width <= 62 else ((2, 3, width), torch.uint8)
    assert torch.equal(tokens_to_bits(tokens, width), bits)
    sizes = [2] * width
    assert torch.equal(tokens_to_digits(digits_to_tokens(bits.long(), sizes), sizes), bits.long())


def test_what_does_not_fit_is_refused():
    assert fits_id([2**31, 2**31]) and not fits_id([2**31, 2**32])
    with pytest.raises(TokenError, match="digits_to_bits"):
        pack_digits(torch.zeros(2, dtype=torch.int64), [2**31, 2**32])
    with pytest.raises(TokenError, match="below 5"):
        bits_to_digits(torch.tensor([[0, 1, 1, 0, 1]]), [4, 5])
    with pytest.raises(TokenError, match="3 here"):
        pack_digits(torch.zeros(2, dtype=torch.int64), [2, 2, 2])
    for sizes in ([], [0], [2**63], [2.0]):
        with pytest.raises(ModelError):
            digit_bits(sizes)
