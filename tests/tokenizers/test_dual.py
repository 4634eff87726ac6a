"""DualVQ: contract, the shared id against both distance tables, branches and their gradients."""

import pytest
import torch
import torch.nn.functional as F

from tests.contract.parts import QuantizerContract
from tok1d.errors import ModelError
from tok1d.tokenizers.quantizers.dual import DualVQ

CLASS = {"class": "tok1d.tokenizers.quantizers.dual.DualVQ", "vocab_size": 24, "semantic_dim": 4, "pixel_dim": 3}


class TestDualVQ(QuantizerContract):
    config = CLASS


class TestPlainDualVQ(QuantizerContract):
    config = {**CLASS, "l2": False, "pixel_weight": 0.25}
    scale = 1 / 24


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.3, 4.0])
def test_the_id_minimises_the_sum_of_both_distances(l2, weight):
    torch.manual_seed(0)
    vq = DualVQ(40, 5, 2, pixel_weight=weight, l2=l2)
    with torch.no_grad():
        vq.semantic_codebook.normal_(), vq.pixel_codebook.normal_()
    z = torch.randn(4, 30, 7)
    out = vq.eval()(z)
    unit = (lambda x: F.normalize(x, dim=-1)) if l2 else (lambda x: x)
    semantic, pixel = (unit(x) for x in vq.split(z))
    codes = [unit(vq.semantic_codebook), unit(vq.pixel_codebook)]
    distance = torch.cdist(semantic, codes[0]).square() + weight * torch.cdist(pixel, codes[1]).square()
    assert torch.equal(out.ids, distance.argmin(-1))
    torch.testing.assert_close(vq.split(out.q)[0], codes[0][out.ids])
    torch.testing.assert_close(vq.split(out.q)[1], codes[1][out.ids])
    expected = F.mse_loss(semantic, codes[0][out.ids]) + F.mse_loss(pixel, codes[1][out.ids])
    torch.testing.assert_close(out.losses["commitment"], expected)
    torch.testing.assert_close(out.losses["codebook"], expected)


def test_gradients():
    torch.manual_seed(0)
    vq, z = DualVQ(12, 3, 2, l2=False), torch.randn(1, 5, 5, requires_grad=True)
    out, weight = vq(z), torch.randn(1, 5, 5)
    assert torch.equal(torch.autograd.grad((out.q * weight).sum(), z, retain_graph=True)[0], weight)
    (to_z,) = torch.autograd.grad(out.losses["commitment"], z, retain_graph=True)
    error = (z - out.q).detach()
    torch.testing.assert_close(to_z, torch.cat([2 * error[..., :3] / 15, 2 * error[..., 3:] / 10], -1))
    out.losses["codebook"].backward()
    used = torch.zeros(12, dtype=torch.bool).index_fill(0, out.ids.flatten(), True)
    for book in (vq.semantic_codebook, vq.pixel_codebook):
        assert (book.grad[used] != 0).any(-1).all() and (book.grad[~used] == 0).all()


def test_arguments_are_checked():
    for arguments in ({"semantic_dim": 0}, {"pixel_dim": 0}, {"pixel_weight": 0.0}, {"vocab_size": 2**40}):
        with pytest.raises(ModelError):
            DualVQ(**{"vocab_size": 8, "semantic_dim": 3, "pixel_dim": 3, **arguments})
