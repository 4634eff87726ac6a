"""FSQ: contracts, recorded FlexTok and vector-quantize-pytorch numbers, exact ids up to 62 bits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.parts import QuantizerContract
from tests.golden.read import read, sub
from tok1d.errors import ModelError
from tok1d.tokenizers.quantizers.fsq import FSQ

CASES = [name for name in read("quantisers").meta["cases"] if name.startswith("fsq_")]


class TestFSQ(QuantizerContract):
    config = {"class": "tok1d.tokenizers.quantizers.fsq.FSQ", "levels": [8, 5, 3]}


class TestSymmetricFSQ(QuantizerContract):
    config = {"class": "tok1d.tokenizers.quantizers.fsq.FSQ", "levels": [8, 5, 2], "symmetric": True}


@pytest.mark.parametrize("case", CASES)
def test_recorded_numbers(case):
    golden = sub(read("quantisers"), case)
    fsq = FSQ(golden.meta["config"]["levels"], symmetric="symmetric" in case)
    out = fsq(golden.inputs["z"])
    golden.check("indices", out.ids)
    golden.check("quantised", out.q)
    golden.check("back", fsq.ids_to_codes(out.ids))


def test_there_are_twelve_recorded_cases():
    assert len(CASES) == 12


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("levels", [[8, 8, 8, 5, 5, 5], [16, 3, 4], [7, 5, 5, 5, 5]])
def test_vector_quantize_pytorch(levels, symmetric):
    module = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is the oracle of this test")
    theirs = module.FSQ(levels=levels, preserve_symmetry=symmetric)
    ours = FSQ(levels, symmetric)
    torch.manual_seed(0)
    z = (torch.randn(2, 50, len(levels)) * 2).requires_grad_()
    mine = z.detach().clone().requires_grad_()
    q, ids = theirs(z)
    out = ours(mine)
    assert torch.equal(out.ids, ids.long())
    torch.testing.assert_close(out.q, q)
    ramp = torch.arange(q.numel()).view(q.shape).sin()
    (q * ramp).sum().backward()
    (out.q * ramp).sum().backward()
    torch.testing.assert_close(mine.grad, z.grad)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(st.integers(2, 64), min_size=1, max_size=10), st.booleans())
def test_every_id_is_its_own_code(data, levels, symmetric):
    fsq = FSQ(levels, symmetric or 2 in levels)
    ids = torch.tensor([[data.draw(st.integers(0, fsq.vocab_size - 1)) for _ in range(3)] + [0, fsq.vocab_size - 1]])
    codes = fsq.ids_to_codes(ids)
    assert codes.shape == (1, 5, len(levels)) and codes.abs().max() <= 1
    assert torch.equal(fsq.codes_to_ids(codes), ids)


def test_ids_are_exact_at_62_bits():
    fsq = FSQ([2] * 62, symmetric=True)
    assert fsq.vocab_size == 2**62 and fsq.bits_per_token == 62
    z = torch.ones(1, 1, 62)
    z[0, 0, 0] = -1
    assert fsq(z).ids.item() == 2**62 - 2
    assert fsq(-z).ids.item() == 1
    with pytest.raises(ModelError, match="at most 2\\^62"):
        FSQ([2] * 63, symmetric=True)


def test_first_channel_is_the_fastest_digit():
    fsq = FSQ([8, 5, 5])
    digits = fsq.ids_to_codes(torch.tensor([[0, 1, 8, 40]])) * torch.tensor([4, 2, 2]) + torch.tensor([4, 2, 2])
    assert digits[0].tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("count", [3, 4, 8, 1000, 4096])
def test_every_level_is_reached_and_none_beyond(count, symmetric):
    fsq = FSQ([count], symmetric)
    out = fsq(torch.linspace(-20, 20, 20 * count).atan().mul(12 / math.pi)[None, :, None])
    assert out.ids.min() == 0 and out.ids.max() == count - 1
    assert (out.ids.diff() >= 0).all() and out.q.abs().max() <= 1
    for extreme in (torch.inf, -torch.inf):
        assert fsq(torch.full((1, 1, 1), extreme)).ids.item() == (count - 1 if extreme > 0 else 0)


def test_levels_are_checked():
    for levels in ([], [1], [8, 0], [8.0], [2**17], [8, 2]):
        with pytest.raises(ModelError):
            FSQ(levels)


def test_no_stats_for_vocabularies_that_cannot_be_counted():
    assert FSQ([4] * 10)(torch.randn(1, 4, 10)).stats == {}
