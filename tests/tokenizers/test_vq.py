"""VQ: contracts, recorded TiTok and EMA numbers, vector-quantize-pytorch, dead codes, several ranks."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.contract.parts import QuantizerContract
from tests.golden.read import read, sub, tokens_last
from tok1d.errors import ModelError
from tok1d.tokenizers.quantizers import vq_search
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


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("l2", [False, True])
def test_dead_codes_are_restarted_from_live_latents(ema, l2):
    torch.manual_seed(0)
    vq = VQ(16, 4, l2=l2, ema=ema, ema_decay=0.9, dead_code_threshold=0.2)
    z = F.normalize(torch.randn(64, 4), dim=-1)
    with torch.no_grad():
        vq.codebook[:] = z[0] + 1e-3 * torch.randn(16, 4)  # collapsed
        vq.codebook[8:] = -100 * z[0] if not l2 else vq.codebook[8:]
    before = vq.codebook.detach().clone()
    usage = [vq(z.view(4, 16, 4).requires_grad_()).stats["usage"].item() for _ in range(60)]
    assert usage[-1] >= 0.9 > usage[0]
    assert not torch.equal(vq.codebook, before)
    if not ema:  # without an average, a restarted code is a latent to the last bit
        moved = vq.codebook[(vq.codebook != before).any(-1)]
        assert len(moved) and (torch.cdist(moved, z) < 1e-3).any(-1).all()


def test_restart_depends_on_the_seed_only():
    def run(seed: int, noise: int) -> torch.Tensor:
        torch.manual_seed(0)
        vq = VQ(16, 4, dead_code_threshold=0.9, ema_decay=0.5, seed=seed)
        for i in range(5):
            torch.manual_seed(noise)
            vq((torch.arange(320).float() + i).sin().view(4, 20, 4).requires_grad_())
        return vq.codebook.detach()

    assert torch.equal(run(0, 1), run(0, 2)) and not torch.equal(run(0, 1), run(1, 1))


def test_exported_weights_start_the_averages_anew():
    vq = VQ(8, 3, ema=True, dead_code_threshold=0.1)
    vq(torch.randn(2, 5, 3))
    exported = {k: v for k, v in vq.state_dict().items() if k not in vq.training_only}
    assert exported.keys() == {"codebook"}
    again = VQ(8, 3, ema=True, dead_code_threshold=0.1)
    again.load_state_dict(exported)
    assert torch.equal(again.ema_sum, vq.codebook) and (again.ema_count == 1).all() and again.steps == 0
    again(torch.randn(2, 5, 3))
    assert torch.equal(exported["codebook"], vq.codebook), "training must not reach back into loaded tensors"


def test_arguments_are_checked():
    for arguments in ({"vocab_size": 1}, {"vocab_size": 10**12}, {"dim": 0}, {"ema_decay": 1.0}, {"dead_code_threshold": -1}):
        with pytest.raises(ModelError):
            VQ(**{"vocab_size": 8, "dim": 3, **arguments})


def _train(z: torch.Tensor, mask: torch.Tensor, restart: float) -> tuple[VQ, torch.Tensor]:
    torch.manual_seed(0)
    vq = VQ(16, 4, ema=True, ema_decay=0.5, dead_code_threshold=restart).train()
    for step in range(4):
        part = (z + step).sin().requires_grad_()
        losses = vq(part, mask).losses["commitment"]
    losses.backward()
    return vq, part.grad


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    z, mask = _batch()
    for restart in (0.0, 0.9):
        mine = None if rank == 1 and restart else mask[rank::2]  # masked on one rank only
        vq, grad = _train(z[rank::2], mine, restart)
        save_file({**vq.state_dict(), "grad": grad}, f"{folder}/{restart}-{rank}.safetensors")
    dist.destroy_process_group()


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.arange(4 * 10 * 4).float().view(4, 10, 4) * 1.7
    return z, torch.arange(10) < torch.tensor([10, 1, 7, 2])[:, None]


def test_two_ranks_are_one_batch(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    results = {key: load_file(tmp_path / f"{key}.safetensors") for key in ("0.0-0", "0.0-1", "0.9-0", "0.9-1")}
    vq, grad = _train(*_batch(), restart=0.0)
    for rank in (0, 1):
        mean_of_ranks = results[f"0.0-{rank}"].pop("grad") / 2  # what data parallelism does with parameters' gradients
        torch.testing.assert_close(mean_of_ranks, grad[rank::2], atol=1e-7, rtol=1e-4)
        for key, value in results[f"0.0-{rank}"].items():
            torch.testing.assert_close(value, vq.state_dict()[key], atol=1e-6, rtol=1e-5)
    one, other = results["0.9-0"], results["0.9-1"]
    assert all(torch.equal(one[k], other[k]) for k in vq.state_dict()), "restarts must be the same on all ranks"
    assert not torch.allclose(one["codebook"], results["0.0-0"]["codebook"])
