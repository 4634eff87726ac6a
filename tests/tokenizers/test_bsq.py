"""BSQ: contract for ids and for bits, recorded numbers in both modes, geometry."""

import pytest
import torch
import torch.nn.functional as F

from tests.contract.parts import QuantizerContract
from tests.golden.read import read, sub
from tok1d.errors import ModelError
from tok1d.tokenizers.quantizers.bsq import BSQ
from tok1d.tokenizers.quantizers.lfq import LFQ

CLASS = {"class": "tok1d.tokenizers.quantizers.bsq.BSQ"}


class TestBSQ(QuantizerContract):
    config = {**CLASS, "bits": 7, "inv_temperature": 1.0}


class TestBits(QuantizerContract):
    config = {**CLASS, "bits": 64, "inv_temperature": 1.0, "entropy_groups": 64}


@pytest.mark.parametrize(("case", "groups"), [("bsq_vit_group", 2), ("bsq_vit_analytical", 18)])
def test_recorded_published_code(case, groups):
    golden = sub(read("quantisers"), case)
    bsq = BSQ(18, entropy_groups=groups, commitment=0.25).eval()
    out = bsq(golden.inputs["z"])
    golden.check("indices", out.ids)
    golden.check("group_indices", torch.stack([out.ids >> 9, out.ids & 511], -1))
    golden.check("quantised", out.q)
    golden.check("codebook_entropy", out.stats["codebook_entropy"].view(1))
    golden.check("loss", sum(bsq.loss_weights[k] * v for k, v in out.losses.items()).view(1))


def test_recorded_spherical_lfq():
    golden = sub(read("quantisers"), "lfq_spherical")
    bsq = BSQ(10, entropy_groups=1).eval()
    out = bsq(golden.inputs["z"])
    golden.check("indices", out.ids)
    golden.check("quantised", out.q)
    golden.check("back", bsq.ids_to_codes(golden.outputs["indices"].long()))
    golden.check("commit", out.losses["commitment"].view(1) / 10)  # recorded as a mean over channels
    golden.check("per_sample_entropy", out.stats["sample_entropy"].view(1))
    golden.check("codebook_entropy", out.stats["codebook_entropy"].view(1))


def test_gradient_passes_the_sphere():
    torch.manual_seed(0)
    z, weight = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    (BSQ(5)(z).q * weight).sum().backward()
    (wanted,) = torch.autograd.grad((F.normalize(z, dim=-1) * weight).sum(), z)
    assert torch.equal(z.grad, wanted)
    assert (z.grad * z).sum(-1).abs().max() < 1e-5, "nothing along the radius"


@pytest.mark.parametrize("bits", [18, 36, 64, 128])
def test_codes_are_unit_vectors_and_signs(bits):
    z = torch.randn(2, 30, bits, generator=torch.Generator().manual_seed(0))
    z[0, 0, 1:] *= 1e-38  # underflows on the sphere
    z[0, 0, 0] = 1e4
    out, signs = BSQ(bits)(z), LFQ(bits)(z)
    assert torch.equal(out.q.sign(), signs.q)
    torch.testing.assert_close(out.q.norm(dim=-1), torch.ones(2, 30))
    nearest = out.q[0, 0].clone()
    nearest[0] *= -1
    assert (nearest @ out.q[0, 0]).item() == pytest.approx(1 - 2 / bits, abs=1e-5)
    half = BSQ(bits)(z[:, 1:].bfloat16())
    assert torch.equal(half.q, out.q[:, 1:]), "bf16 loses no code"
    tokens = out.ids if bits <= 62 else out.bits
    assert torch.equal(BSQ(bits).codes_to_ids(out.q.bfloat16()), tokens)


def test_length_of_a_latent_does_not_matter():
    z = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    a, b = BSQ(6)(z), BSQ(6)(100 * z)
    assert torch.equal(a.q, b.q)
    for key in a.losses:
        torch.testing.assert_close(a.losses[key], b.losses[key])


def test_arguments_are_checked():
    for arguments in ({"bits": 0}, {"bits": 129}, {"entropy_groups": 19}, {"inv_temperature": -1.0}):
        with pytest.raises(ModelError):
            BSQ(**arguments)
