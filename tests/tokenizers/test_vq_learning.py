"""How a VQ codebook learns besides the gradient: restarts, k-means, clustering, and what exported weights leave out."""

import pytest
import torch
import torch.nn.functional as F

from tests.golden.read import read, sub, tokens_last
from tests.tokenizers.test_vq import filled
from tok1d.tokenizers.quantizers.vq import VQ

# restart --------------------------------------------------------------------------------------------------------------


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


# k-means -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_kmeans_finds_the_clusters(l2, ema):
    torch.manual_seed(0)
    corners = F.normalize(torch.randn(6, 8), dim=-1)
    z = (corners.repeat_interleave(40, 0) + 0.01 * torch.randn(240, 8)).view(4, 60, 8)
    vq = VQ(24, 8, l2=l2, ema=ema, kmeans_iterations=10)
    before = vq.eval()(z).losses["commitment"]
    after = vq.train()(z.requires_grad_()).losses["commitment"]
    assert after < 2e-4 < 0.01 < before
    assert bool(vq.fitted)
    if ema:
        assert vq.ema_count.min() > 0 and torch.equal(vq.ema_count.isfinite(), torch.ones(24, dtype=torch.bool))
    book = vq.codebook.detach().clone()
    vq.ema_decay = 1 - 1e-9
    vq(torch.randn(2, 5, 8).requires_grad_())
    torch.testing.assert_close(vq.codebook.detach(), book, atol=1e-4, rtol=1e-3)


def test_kmeans_is_lloyd():
    """Against rounds written out from the same start."""
    torch.manual_seed(0)
    z = torch.randn(3, 30, 4)
    vq = VQ(7, 4, kmeans_iterations=4, seed=3)
    vq.train()(z.requires_grad_())
    rows = z.detach().flatten(0, 1)
    centres = rows[torch.randperm(90, generator=torch.Generator().manual_seed(3))[:7]]
    for _ in range(4):
        ids = torch.cdist(rows, centres).argmin(-1)
        centres = torch.stack([rows[ids == k].mean(0) for k in range(7)])
    torch.testing.assert_close(vq.codebook.detach(), centres)


def test_kmeans_with_fewer_latents_than_codes_and_none():
    torch.manual_seed(0)
    vq = VQ(40, 4, kmeans_iterations=2)
    fresh = vq.codebook.detach().clone()
    vq.train()(torch.randn(1, 8, 4).requires_grad_(), torch.zeros(1, 8, dtype=torch.bool))
    assert torch.equal(vq.codebook, fresh) and not vq.fitted, "nothing to fit: the next step will do"
    z = torch.randn(1, 8, 4)
    out = vq(z.requires_grad_())
    assert vq.fitted and len(vq.codebook.unique(dim=0)) == 40
    assert out.losses["commitment"] < 1e-3 and len(out.ids.unique()) == 8


def test_exported_weights_are_not_fitted_again():
    torch.manual_seed(0)
    vq = VQ(8, 4, kmeans_iterations=2)
    vq.train()(torch.randn(2, 30, 4).requires_grad_())
    again = VQ(8, 4, kmeans_iterations=2).train()
    again.load_state_dict({"codebook": vq.codebook.detach().clone()})
    again(torch.randn(2, 30, 4).requires_grad_())
    assert torch.equal(again.codebook, vq.codebook)


# clustering ----------------------------------------------------------------------------------------------------------


def test_recorded_clustering_step():
    golden = sub(read("quantisers"), "titok_clustering_step")
    vq = filled(golden.inputs["codebook"], clustering=True, ema_decay=golden.meta["config"]["decay"])
    vq.embed_prob.copy_(golden.inputs["embed_prob"])
    out = vq.train()(tokens_last(golden.inputs["z"]))
    golden.check("indices", out.ids[:, None])
    golden.check("quantised", out.q.transpose(1, 2)[:, :, None])
    golden.check("commitment_loss", 0.25 * out.losses["commitment"][None])
    golden.check("codebook_loss", out.losses["codebook"][None])
    golden.check("embed_prob_after", vq.embed_prob)
    golden.check("codebook_after", vq.codebook.detach())
    assert not torch.equal(vq.codebook, golden.inputs["codebook"])


@pytest.mark.parametrize("l2", [False, True])
def test_clustering_pulls_dead_codes_to_the_latents(l2):
    """One code is the nearest to everything; the others are far away, each in its own direction."""
    torch.manual_seed(0)
    vq = VQ(16, 4, l2=l2, clustering=True, ema_decay=0.9)
    z = F.normalize(torch.randn(64, 4).abs(), dim=-1)
    with torch.no_grad():
        vq.codebook.copy_(-10 * torch.rand(16, 4))
        vq.codebook[0] = 1.0
    first = vq(z.view(4, 16, 4).requires_grad_())
    assert first.stats["usage"] == 1 / 16
    distance = torch.cdist(vq.codebook.detach(), z).amin(-1)
    assert distance[0] > 0.1 > distance[1:].max(), "what is used stays, what is not becomes a latent (but for e^-0.001)"
    usage = [vq(z.view(4, 16, 4).requires_grad_()).stats["usage"].item() for _ in range(20)]
    assert usage[-1] > 0.3


def test_clustering_ignores_masked_latents():
    torch.manual_seed(0)
    vq = VQ(8, 3, clustering=True)
    z = torch.randn(1, 6, 3)
    z[0, 2:] = 0.0  # the place of the codes: masked, or they would all go there
    vq.train()(z, torch.arange(6)[None] < 2)
    assert (torch.cdist(vq.codebook.detach(), z[0, :2]).amin(-1) < 5e-3).sum() >= 6
    before = vq.codebook.detach().clone()
    vq(z, torch.zeros(1, 6, dtype=torch.bool))
    assert torch.equal(vq.codebook, before)


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
