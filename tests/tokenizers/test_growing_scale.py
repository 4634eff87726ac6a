"""GrowingScaleVQ: contracts, the recursion written out, prefixes that end inside a level, what teaches what."""

import pytest
import torch
import torch.nn.functional as F

from tests.contract.parts import WholeQuantizerContract
from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.quantizers.growing_scale import GrowingScaleVQ

CLASS = {
    "class": "tok1d.tokenizers.quantizers.growing_scale.GrowingScaleVQ",
    "vocab_size": 24,
    "dim": 5,
    "scales": [1, 2, 4, 6],
}


class TestGrowingScaleVQ(WholeQuantizerContract):
    config = CLASS
    scale = 1 / 10


class TestOwnCodebooks(WholeQuantizerContract):
    config = {**CLASS, "shared": False, "phi": 0.5, "phi_convs": 2, "kmeans_iterations": 2, "dead_code_threshold": 0.5}
    scale = 1 / 10


class TestMovingAverages(WholeQuantizerContract):
    config = {**CLASS, "ema": True, "ema_decay": 0.5, "dead_code_threshold": 0.5, "kmeans_iterations": 2}
    scale = 1 / 10


def made(scales: list[int], **arguments) -> GrowingScaleVQ:
    torch.manual_seed(0)
    vq = GrowingScaleVQ(16, 4, scales, **arguments)
    with torch.no_grad():
        for book in vq.books:
            book.codebook.normal_()
    return vq


@pytest.mark.parametrize("shared", [True, False])
def test_the_recursion(shared):
    """r ← r - up(Q(down r)), with explicit matrices for both interpolations; losses of the sums so far."""
    vq = made([1, 3, 4, 8], shared=shared)
    z = torch.randn(2, 8, 4)
    out = vq(z)
    left, total, start, commitment = z, torch.zeros_like(z), 0, []
    for level, n in enumerate([1, 3, 4, 8]):
        down = torch.zeros(n, 8)
        for i in range(n):
            low, high = i * 8 // n, -(-(i + 1) * 8 // n)
            down[i, low:high] = 1 / (high - low)
        place = ((torch.arange(8) + 0.5) * n / 8 - 0.5).clamp(0, n - 1)
        up = (1 - (place[:, None] - torch.arange(n)).abs()).clamp(min=0)
        book = vq.books[0 if shared else level].codebook
        ids = torch.cdist(down @ left, book).argmin(-1)
        assert torch.equal(out.ids[:, start : start + n], ids)
        left, total, start = left - up @ book[ids], total + up @ book[ids], start + n
        commitment.append((z - total).square().mean())
    torch.testing.assert_close(out.q, total, atol=1e-5, rtol=1e-4)
    for name in ("commitment", "codebook"):
        torch.testing.assert_close(out.losses[name], torch.stack(commitment).mean())


def test_a_prefix_inside_a_level():
    """Its missing tokens are codes of zero: full share at the tokens given, none beyond the first that is missing."""
    vq = made([4, 8]).eval()
    ids = torch.randint(16, (1, 12))
    coarse, some, fine = vq.ids_to_codes(ids[:, :4]), vq.ids_to_codes(ids[:, :7]), vq.ids_to_codes(ids)
    torch.testing.assert_close(some[:, :3], fine[:, :3])
    assert torch.equal(some[:, 3:], coarse[:, 3:])
    half = vq.ids_to_codes(ids[:, :2])  # two of four: latents 0..7 lie at -0.25, 0.25 … 3.25 of the tokens
    code = vq.books[0].ids_to_codes(ids[:, 1])
    assert (half[:, 5:] == 0).all()
    torch.testing.assert_close(half[:, 3:5], torch.stack([0.75 * code, 0.25 * code], 1))
    assert (vq.ids_to_codes(ids[:, :0]) == 0).all()
    with pytest.raises(TokenError, match="12 tokens, got 13"):
        vq.ids_to_codes(torch.zeros(1, 13, dtype=torch.int64))


def test_more_tokens_code_better():
    torch.manual_seed(0)
    vq, z = GrowingScaleVQ(64, 4, [1, 2, 4, 8, 16], kmeans_iterations=5, shared=False), torch.randn(32, 16, 4).cumsum(1)
    vq.train()(z.requires_grad_())
    ids = vq.eval()(z).ids
    errors = [(vq.ids_to_codes(ids[:, :n]) - z).square().mean().item() for n in (1, 3, 7, 15, 31)]
    assert all(after < 0.9 * before for before, after in zip(errors, errors[1:])), errors


def test_gradients():
    vq = made([2, 4], phi=0.5)
    z, weight = torch.randn(2, 4, 4, requires_grad=True), torch.randn(2, 4, 4)
    out = vq(z)
    assert torch.equal(torch.autograd.grad((out.q * weight).sum(), z, retain_graph=True)[0], weight)
    assert torch.autograd.grad(out.losses["codebook"], z, retain_graph=True, allow_unused=True)[0] is None
    out.losses["codebook"].backward()
    assert all((p.grad != 0).any() for p in vq.parameters())
    # with moving averages the convolutions still learn, by that loss alone
    vq = GrowingScaleVQ(16, 4, [2, 4], phi=0.5, ema=True)
    assert "codebook" in vq.loss_weights
    vq(z).losses["codebook"].backward()
    assert [name for name, p in vq.named_parameters() if (p.grad != 0).any()] == ["convs.0.weight", "convs.0.bias"]
    assert GrowingScaleVQ(16, 4, [2, 4], ema=True).loss_weights == {"commitment": 0.25}


def test_averages_see_every_level():
    """One shared codebook: a step's counts are those of all kept tokens of all levels."""
    vq = made([1, 2, 4], ema=True, ema_decay=0.0)
    z = torch.randn(3, 4, 4)
    mask = torch.arange(7) < torch.tensor([7, 0, 2])[:, None]
    ids = vq.train()(z, mask).ids
    expected = F.one_hot(ids[mask], 16).sum(0).float()
    assert torch.equal(vq.books[0].ema_count, expected) and expected.sum() == 9


def test_arguments_are_checked():
    for arguments in ({"scales": []}, {"scales": [4, 2]}, {"scales": [0, 2]}, {"phi": 2.0}, {"phi_convs": 3}, {"scales": [2**17]}):
        with pytest.raises(ModelError):
            GrowingScaleVQ(**{"vocab_size": 8, "dim": 3, "scales": [1, 2], **arguments})
    vq = GrowingScaleVQ(8, 3, [1, 2, 2])
    assert vq.tokens_made(2) == 5
    with pytest.raises(ModelError, match="must be the number of latents, which is 3"):
        vq(torch.zeros(1, 3, 3))
