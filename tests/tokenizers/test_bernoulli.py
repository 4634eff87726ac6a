"""BernoulliBits: contract, what training draws, its gradient, the inverse of learned codes."""

import pytest
import torch
from torch.nn import functional as F

from tests.contract.parts import QuantizerContract
from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.quantizers.bernoulli import BernoulliBits

CLASS = {"class": "tok1d.tokenizers.quantizers.bernoulli.BernoulliBits"}


class TestBernoulliIds(QuantizerContract):
    config = {**CLASS, "bits": 7, "dim": 5, "code_dim": 9}


class TestBernoulliBits(QuantizerContract):
    config = {**CLASS, "bits": 64, "dim": 12, "code_dim": 64}


def quantizer(bits=6, dim=6, **arguments) -> BernoulliBits:
    torch.manual_seed(0)
    return BernoulliBits(bits, dim, **arguments)


def test_published_names_and_shapes():
    with torch.device("meta"):
        model = BernoulliBits(bits=64, dim=768, code_dim=768)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert shapes == {"embed": (64, 768), "proj.weight": (64, 768), "proj.bias": (64,)}


def test_evaluation_is_the_sign_of_the_logits():
    model = quantizer().eval()
    with torch.no_grad():
        model.proj.weight.copy_(torch.eye(6))
        model.proj.bias.zero_()
    out = model(torch.tensor([[[1.0, -1, 0, 2, -3, 0.1]]]))
    assert out.ids.item() == 0b100101, "a logit of 0 is a bit of 0"
    torch.testing.assert_close(out.q[0, 0], model.embed[0] + model.embed[3] + model.embed[5])
    assert (model.ids_to_codes(torch.zeros(1, 1, dtype=torch.int64)) == 0).all(), "bits of 0 add nothing"


def test_training_flips_coins_at_the_temperature():
    model = quantizer(temperature=0.5).train()
    with torch.no_grad():
        model.proj.weight.copy_(torch.eye(6))
        model.proj.bias.zero_()
    logits = torch.tensor([-2.0, -1, -0.3, 0, 0.3, 1])
    share = _bits(model, model(logits.expand(1, 20000, 6)).ids).mean((0, 1))
    torch.testing.assert_close(share, (logits / 0.5).sigmoid(), atol=0.015, rtol=0)
    model.temperature = 1e-4
    sure = logits[logits != 0].repeat(2)[:6]
    assert torch.equal(_bits(model, model(sure.expand(1, 500, 6)).ids), (sure > 0).float().expand(1, 500, 6))


def test_straight_through_gradient():
    model, z = quantizer(code_dim=8).train(), torch.randn(2, 3, 6, requires_grad=True)
    weight = torch.randn(2, 3, 8)
    out = model(z)
    bits = _bits(model, out.ids)
    (out.q * weight).sum().backward()
    p = model.proj(z).sigmoid()
    wanted = (weight @ model.embed.T * p * (1 - p)) @ model.proj.weight  # without the temperature
    torch.testing.assert_close(z.grad, wanted.detach())
    torch.testing.assert_close(model.embed.grad, torch.einsum("bnd,bnc->dc", bits, weight))


def test_regulariser_is_the_variance_of_a_bit():
    model, z = quantizer().eval(), torch.randn(2, 5, 6)
    p = model.proj(z).sigmoid()
    torch.testing.assert_close(model(z).losses["bit_variance"], (p * (1 - p)).mean())


@pytest.mark.parametrize("bits", [16, 64])
def test_learned_codes_are_inverted(bits):
    model = quantizer(bits, 20, code_dim=bits + 4)
    with torch.no_grad():
        model.embed[1:] += 3 * model.embed[:1]  # nearly parallel rows, of very different lengths
        model.embed *= torch.logspace(-2, 2, bits)[:, None]
    some = torch.randint(2, (3, 50, bits), dtype=torch.uint8)
    tokens = F.pad(some, (0, 0)) if bits > 62 else (some.long() << torch.arange(bits - 1, -1, -1)).sum(-1)
    assert torch.equal(model.codes_to_ids(model.ids_to_codes(tokens)), tokens)
    plain = quantizer(bits, 20, code_dim=2 * bits)
    assert torch.equal(plain.codes_to_ids(plain.ids_to_codes(tokens).bfloat16()), tokens), "bf16 loses no code"


def test_half_precision_modules_keep_their_codes():
    model = quantizer(16, 20).bfloat16().eval()
    out = model(torch.randn(2, 30, 20).bfloat16())
    assert out.q.dtype == torch.float32 and torch.equal(model.codes_to_ids(out.q), out.ids)


def test_arguments_are_checked():
    for arguments in ({"bits": 0}, {"bits": 129}, {"dim": 0}, {"code_dim": 5}, {"temperature": 0.0}):
        with pytest.raises(ModelError):
            BernoulliBits(**{"bits": 6, "dim": 7, **arguments})
    with pytest.raises(TokenError, match="64 here"):
        BernoulliBits(64, 64).ids_to_codes(torch.zeros(1, 2, 63, dtype=torch.uint8))


def _bits(model: BernoulliBits, ids: torch.Tensor) -> torch.Tensor:
    return (ids[..., None] >> torch.arange(model.bits - 1, -1, -1) & 1).float()
