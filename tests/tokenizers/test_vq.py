"""VQ: contracts, recorded TiTok and EMA numbers, vector-quantize-pytorch, ways to choose codes and to teach them."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.contract.parts import QuantizerContract
from tests.golden.read import read, sub, tokens_last
from tok1d.errors import ModelError
from tok1d.tokenizers.quantizers import vq_search
from tok1d.tokenizers.quantizers.common import rotated
from tok1d.tokenizers.quantizers.vq import VQ

CLASS = {"class": "tok1d.tokenizers.quantizers.vq.VQ", "vocab_size": 24, "dim": 5}


class TestGradientVQ(QuantizerContract):
    config = CLASS
    scale = 1 / 24


class TestCosineVQ(QuantizerContract):
    config = {**CLASS, "l2": True}


class TestRestartingVQ(QuantizerContract):
    config = {**CLASS, "dead_code_threshold": 0.99, "ema_decay": 0.5}
    scale = 1 / 24


class TestMovingAverageVQ(QuantizerContract):
    config = {**CLASS, "ema": True, "dead_code_threshold": 0.99, "ema_decay": 0.5}
    scale = 1 / 24


class TestCosineMovingAverageVQ(QuantizerContract):
    config = {**CLASS, "ema": True, "l2": True, "ema_decay": 0.5}


class TestDrawingVQ(QuantizerContract):
    config = {**CLASS, "l2": True, "temperature": 0.1}


class TestFittedVQ(QuantizerContract):
    config = {**CLASS, "kmeans_iterations": 3, "ema": True, "ema_decay": 0.5, "temperature": 0.5, "rotation": True}
    scale = 1 / 24


class TestClusteringVQ(QuantizerContract):
    config = {**CLASS, "clustering": True, "l2": True, "kmeans_iterations": 2, "ema_decay": 0.5}


def filled(codebook: torch.Tensor, **arguments) -> VQ:
    vq = VQ(*codebook.shape, **arguments)
    with torch.no_grad():
        vq.codebook.copy_(codebook)
    if vq.ema:
        vq.ema_sum.copy_(codebook)
    return vq


@pytest.mark.parametrize(("case", "l2"), [("titok_vq_plain", False), ("titok_vq_l2", True)])
def test_recorded_titok_quantizer(case, l2):
    golden = sub(read("quantisers"), case)
    vq = filled(golden.inputs["codebook"], l2=l2)
    z = golden.inputs["z"].requires_grad_()
    out = vq(tokens_last(z))
    golden.check("indices", out.ids[:, None])
    q = out.q.transpose(1, 2)[:, :, None]
    golden.check("quantised", q)
    weighted = {k: v[None] * vq.loss_weights[k] for k, v in out.losses.items()}
    golden.check("commitment_loss", weighted["commitment"])
    golden.check("codebook_loss", weighted["codebook"])
    ramp = torch.arange(q.numel()).float().sin().view(q.shape)
    (grad,) = torch.autograd.grad((q * ramp).sum(), z, retain_graph=True)
    golden.check("grad_z_of_weighted_sum", grad)
    grad, grad_codebook = torch.autograd.grad(sum(weighted.values()).sum(), [z, vq.codebook])
    golden.check("grad_z_of_loss", grad)
    golden.check("grad_codebook_of_loss", grad_codebook)


@pytest.mark.parametrize("case", ["vq_euclid", "vq_cosine"])
def test_recorded_moving_average(case):
    golden = sub(read("quantisers"), case)
    config = golden.meta["config"]
    vq = filled(golden.inputs["codebook"], l2=config["cosine"], ema=True, ema_decay=config["decay"])
    out = vq.eval()(golden.inputs["z"])
    golden.check("indices", out.ids)
    golden.check("quantised", out.q)
    out = vq.train()(golden.inputs["z"])
    assert out.losses.keys() == {"commitment"}
    golden.check("commit_loss", out.losses["commitment"][None])
    golden.check("ema_cluster_size", vq.ema_count)
    golden.check("ema_embed_avg", vq.ema_sum)
    golden.check("ema_codebook", vq.codebook)


@pytest.mark.parametrize("l2", [False, True])
def test_vector_quantize_pytorch(l2):
    """Three training steps of its EMA codebook, without and with cosine similarity."""
    module = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is the oracle of this test")
    torch.manual_seed(0)
    theirs = module.VectorQuantize(
        dim=4, codebook_size=16, decay=0.8, use_cosine_sim=l2, commitment_weight=1.0, rotation_trick=False
    )
    ours = filled(theirs.codebook.detach().clone(), l2=l2, ema=True, ema_decay=0.8)
    for _ in range(3):
        z = torch.randn(3, 20, 4)
        q, ids, loss = theirs(z)
        out = ours(z)
        assert torch.equal(out.ids, ids)
        torch.testing.assert_close(out.q, q, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(out.losses["commitment"], loss.squeeze(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.codebook, theirs.codebook, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("codes", [50, 37, 256])
def test_nearest_code_in_chunks(l2, codes, monkeypatch):
    torch.manual_seed(0)
    vq, z = filled(torch.randn(codes, 3), l2=l2), torch.randn(4, 33, 3)
    distance = torch.cdist(F.normalize(z, dim=-1), F.normalize(vq.codebook, dim=-1)) if l2 else torch.cdist(z, vq.codebook)
    for pairs in (2**22, codes * 7, 1):  # all at once, 7 tokens at a time, one
        monkeypatch.setattr(vq_search, "PAIRS_CPU", pairs)
        assert torch.equal(vq.codes_to_ids(z), distance.argmin(-1))


def test_of_equal_codes_the_first_is_named():
    vq = filled(torch.ones(300, 2))
    assert (vq.codes_to_ids(torch.randn(1, 5, 2)) == 0).all()


def test_usage_and_perplexity():
    vq = filled(torch.eye(4)).eval()
    z = torch.eye(4)[torch.tensor([[0, 0, 1, 1]])]
    stats = vq(z).stats
    assert stats["usage"] == 0.5 and stats["perplexity"].item() == pytest.approx(2)
    assert vq(z, torch.tensor([[True, True, False, False]])).stats["perplexity"].item() == pytest.approx(1)
    assert math.isfinite(vq(z, torch.zeros(1, 4, dtype=torch.bool)).losses["commitment"])


# rotation trick ------------------------------------------------------------------------------------------------------


def test_rotation_is_the_explicit_matrix():
    """Gradient of a latent = |q| / |z| Rᵀ g, with R built as a matrix: it turns z into q and keeps lengths and angles."""
    torch.manual_seed(0)
    z, codes, weight = torch.randn(2, 9, 6, requires_grad=True), torch.randn(2, 9, 6), torch.randn(2, 9, 6)
    q = rotated(z, codes)
    assert torch.equal(q, codes)
    (grad,) = torch.autograd.grad((q * weight).sum(), z)
    for z_i, q_i, weight_i, grad_i in zip(*(x.flatten(0, 1).double() for x in (z.detach(), codes, weight, grad))):
        u, v = z_i / z_i.norm(), q_i / q_i.norm()
        w = (u + v) / (u + v).norm()
        matrix = torch.eye(6).double() - 2 * torch.outer(w, w) + 2 * torch.outer(v, u)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(6).double())
        stretch = q_i.norm() / z_i.norm()
        torch.testing.assert_close(stretch * matrix @ z_i, q_i)
        torch.testing.assert_close(grad_i, stretch * matrix.T @ weight_i, atol=1e-5, rtol=1e-4)
        angle, expected = grad_i @ z_i / grad_i.norm() / z_i.norm(), weight_i @ q_i / weight_i.norm() / q_i.norm()
        torch.testing.assert_close(angle, expected, atol=1e-5, rtol=1e-4)


def test_rotation_without_a_direction():
    """A latent of zero passes gradients straight through; one opposite to its code, and a code of zero, stay finite."""
    z = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]]], requires_grad=True)
    q = rotated(z, torch.tensor([[[3.0, 4.0], [-1.0, 0.0], [0.0, 0.0]]]))
    (grad,) = torch.autograd.grad((q * torch.tensor([5.0, 7.0])).sum(), z)
    assert grad[0, 0].tolist() == [5, 7] and grad.isfinite().all() and (grad[0, 2] == 0).all()
    assert grad[0, 1, 0] == -5  # the direction of z is turned round


@pytest.mark.parametrize("l2", [False, True])
def test_rotation_equals_vector_quantize_pytorch(l2):
    module = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is the oracle of this test")
    torch.manual_seed(0)
    theirs = module.VectorQuantize(dim=4, codebook_size=16, use_cosine_sim=l2, rotation_trick=True)
    ours = filled(theirs.codebook.detach().clone(), l2=l2, rotation=True)
    z, weight = torch.randn(3, 20, 4), torch.randn(3, 20, 4)
    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    q, ids, _ = theirs(x, freeze_codebook=True)
    out = ours(y)
    assert torch.equal(out.ids, ids)
    expected = torch.autograd.grad((q * weight).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad((out.q * weight).sum(), y)[0], expected, atol=1e-5, rtol=1e-4)


# drawn codes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l2", [False, True])
def test_codes_are_drawn_by_softmax(l2):
    """Frequencies of 40,000 draws for one latent, and for another in the same batch."""
    torch.manual_seed(0)
    vq = filled(torch.randn(5, 3), l2=l2, temperature=0.7)
    pair = torch.randn(2, 3)
    if l2:
        p = (F.normalize(pair, dim=-1) @ F.normalize(vq.codebook, dim=-1).T / 0.7).softmax(-1)
    else:
        p = (-torch.cdist(pair, vq.codebook).square() / 0.7).softmax(-1)
    z = pair.view(2, 1, 3).expand(2, 40_000, 3)
    ids = vq.train()(z).ids
    share = F.one_hot(ids, 5).float().mean(1)
    assert (share - p).abs().max() < 4 * 0.5 / 40_000**0.5
    assert not torch.equal(vq(z).ids, ids)
    nearest = vq.codes_to_ids(z)
    assert torch.equal(vq.eval()(z).ids, nearest) and (nearest == nearest[:, :1]).all()
    with torch.no_grad():
        assert torch.equal(vq.train()(z).ids, nearest)


def test_low_temperatures_take_the_nearest():
    torch.manual_seed(0)
    vq, z = filled(torch.randn(50, 3), l2=True, temperature=1e-6), torch.randn(4, 33, 3)
    out = vq.train()(z.requires_grad_())
    assert torch.equal(out.ids, vq.codes_to_ids(z)) and out.q.isfinite().all()


def test_arguments_are_checked():
    for arguments in (
        {"vocab_size": 1}, {"vocab_size": 10**12}, {"dim": 0}, {"ema_decay": 1.0}, {"dead_code_threshold": -1},
        {"temperature": -1.0}, {"kmeans_iterations": -1}, {"clustering": True, "ema": True},
    ):
        with pytest.raises(ModelError):
            VQ(**{"vocab_size": 8, "dim": 3, **arguments})
