"""LFQ: contract for ids and for bits, recorded numbers, bf16."""

import pytest
import torch

from tests.contract.parts import QuantizerContract
from tests.golden.read import read, sub
from tok1d.errors import ModelError
from tok1d.tokenizers.quantizers.lfq import LFQ

CLASS = {"class": "tok1d.tokenizers.quantizers.lfq.LFQ"}


class TestLFQ(QuantizerContract):
    config = {**CLASS, "bits": 7, "entropy_groups": 2, "temperature": 1.0}


class TestLongestIds(QuantizerContract):
    config = {**CLASS, "bits": 62, "temperature": 1.0}


class TestBits(QuantizerContract):
    config = {**CLASS, "bits": 128, "temperature": 1.0}


def test_recorded():
    golden = sub(read("quantisers"), "lfq")
    lfq = LFQ(10, entropy_groups=1).eval()
    out = lfq(golden.inputs["z"])
    golden.check("indices", out.ids)
    golden.check("quantised", out.q)
    golden.check("back", lfq.ids_to_codes(golden.outputs["indices"].long()))
    golden.check("commit", out.losses["commitment"].view(1))
    golden.check("per_sample_entropy", out.stats["sample_entropy"].view(1))
    golden.check("codebook_entropy", out.stats["codebook_entropy"].view(1))
    golden.check("aux_loss", sum(lfq.loss_weights[k] * v for k, v in out.losses.items()).view(1))


@pytest.mark.parametrize("bits", [1, 25, 36, 62, 63, 128])
def test_bf16_loses_no_code(bits):
    lfq, z = LFQ(bits), torch.randn(3, 40, bits, generator=torch.Generator().manual_seed(bits)) * 1e-3
    out, half = lfq(z), lfq(z.bfloat16())
    tokens = half.ids if bits <= 62 else half.bits
    assert torch.equal(tokens, out.ids if bits <= 62 else out.bits) and half.q.dtype == torch.float32
    assert torch.equal(lfq.codes_to_ids(out.q.bfloat16()), tokens)
    assert torch.equal(lfq.ids_to_codes(tokens), torch.where(z > 0, 1.0, -1.0))


def test_straight_through():
    z, weight = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    (LFQ(5)(z).q * weight).sum().backward()
    assert torch.equal(z.grad, weight)


def test_the_entropy_loss_spreads_collapsed_codes():
    torch.manual_seed(0)
    lfq, z = LFQ(6, entropy_groups=1, temperature=1.0), (0.05 * torch.randn(1, 64, 6) + 0.3).requires_grad_()
    optimizer = torch.optim.Adam([z], 0.05)
    before = lfq(z).stats["perplexity"]
    for _ in range(100):
        optimizer.zero_grad()
        lfq(z).losses["entropy"].backward()
        optimizer.step()
    assert before < 2 and lfq(z).stats["perplexity"] > 30


def test_arguments_are_checked():
    for arguments in ({"bits": 0}, {"bits": 129}, {"bits": "8"}, {"bits": 40, "entropy_groups": 1}, {"temperature": 0}):
        with pytest.raises(ModelError):
            LFQ(**arguments)
