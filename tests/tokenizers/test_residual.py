"""ResidualVQ: contracts, recorded numbers, vector-quantize-pytorch, stages dropped, sums taken apart, bits beyond 62."""

import pytest
import torch
import torch.nn.functional as F

from tests.contract.parts import QuantizerContract
from tests.golden.read import read, sub
from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.quantizers.packing import tokens_to_digits
from tok1d.tokenizers.quantizers.residual import ResidualVQ

CLASS = {"class": "tok1d.tokenizers.quantizers.residual.ResidualVQ", "codes": 6, "dim": 5, "stages": 3}


class TestResidualVQ(QuantizerContract):
    config = CLASS
    scale = 1 / 4


class TestSharedResidualVQ(QuantizerContract):
    """Sums of one codebook do not tell the order of stages: see test_sums_of_a_shared_codebook."""

    config = {**CLASS, "shared": True, "stage_dropout": 0.5, "ema": True, "ema_decay": 0.5, "dead_code_threshold": 0.9}
    scale = 1 / 4
    test_ids_and_codes_are_inverse = None


class TestFittedResidualVQ(QuantizerContract):
    config = {**CLASS, "kmeans_iterations": 3, "ema": True, "ema_decay": 0.5, "stage_dropout": 0.5, "rotation": True}
    scale = 1 / 4


class TestWideResidualVQ(QuantizerContract):
    """70 bits a token."""

    config = {**CLASS, "codes": 128, "stages": 10}
    test_ids_and_codes_are_inverse = None  # 128^9 sums: see test_bits_beyond_62

    def latents(self, batch: int = 3, seed: int = 1) -> torch.Tensor:
        return super().latents(batch, seed) / 64


def filled(codebooks: torch.Tensor, **arguments) -> ResidualVQ:
    """codebooks float (S, K, D)."""
    rvq = ResidualVQ(codebooks.shape[1], codebooks.shape[2], codebooks.shape[0], **arguments)
    with torch.no_grad():
        for book, codes in zip(rvq.books, codebooks):
            book.codebook.copy_(codes)
            if book.ema:
                book.ema_sum.copy_(codes)
    return rvq


def test_recorded_numbers():
    golden = sub(read("quantisers"), "residual_vq")
    rvq = filled(golden.inputs["codebooks"]).eval()
    out = rvq(golden.inputs["z"])
    golden.check("indices", tokens_to_digits(out.ids, rvq.sizes))
    golden.check("quantised", out.q)
    golden.check("quantised", rvq.ids_to_codes(out.ids))
    assert torch.equal(out.ids, (tokens_to_digits(out.ids, rvq.sizes) * torch.tensor([1, 48, 48**2])).sum(-1))


def test_vector_quantize_pytorch():
    """Three training steps of three moving averages."""
    module = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is the oracle of this test")
    torch.manual_seed(0)
    theirs = module.ResidualVQ(
        dim=4, codebook_size=8, num_quantizers=3, decay=0.8, commitment_weight=1.0, rotation_trick=False
    )
    ours = filled(theirs.codebooks.detach().clone(), ema=True, ema_decay=0.8)
    for _ in range(3):
        z = torch.randn(3, 20, 4)
        q, ids, losses = theirs(z)
        out = ours(z)
        assert torch.equal(tokens_to_digits(out.ids, ours.sizes), ids)
        torch.testing.assert_close(out.q, q, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(out.losses["commitment"], losses.mean(), atol=1e-5, rtol=1e-4)
        for book, codes in zip(ours.books, theirs.codebooks):
            torch.testing.assert_close(book.codebook, codes, atol=1e-5, rtol=1e-4)


def test_losses_and_gradients_by_hand():
    torch.manual_seed(0)
    rvq, z, weight = filled(torch.randn(3, 7, 4)), torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4)
    out = rvq(z)
    digits, left, commitment, codebook = tokens_to_digits(out.ids, rvq.sizes), z, 0, 0
    for stage, book in enumerate(rvq.books):
        codes = book.codebook[digits[..., stage]]
        commitment = commitment + F.mse_loss(left, codes.detach()) / 3
        codebook = codebook + F.mse_loss(codes, left.detach()) / 3
        left = left - codes.detach()
    torch.testing.assert_close(out.losses["commitment"], commitment)
    torch.testing.assert_close(out.losses["codebook"], codebook)
    for ours, theirs in ((out.losses["commitment"], commitment), (out.losses["codebook"], codebook)):
        x = z if ours is out.losses["commitment"] else [book.codebook for book in rvq.books]
        for one, other in zip(torch.autograd.grad(ours, x, retain_graph=True), torch.autograd.grad(theirs, x)):
            torch.testing.assert_close(one, other)
    assert torch.equal(torch.autograd.grad((out.q * weight).sum(), z)[0], weight), "once, not once a stage"


def test_stage_dropout():
    """In training every image has a number of stages of its own; q, ids, losses and averages know only those."""
    torch.manual_seed(0)
    codebooks = torch.randn(3, 7, 4)
    rvq = filled(codebooks, stage_dropout=1.0, ema=True, ema_decay=0.5)
    whole = filled(codebooks)
    z = torch.randn(60, 5, 4)
    with torch.no_grad():
        digits = tokens_to_digits(whole(z).ids, whole.sizes)
    out = rvq(z)
    dropped = tokens_to_digits(out.ids, rvq.sizes)
    seen = [0, 0, 0]
    for image in range(60):
        fits = [n for n in (1, 2, 3) if torch.equal(out.q[image], whole.digits_to_codes(digits[image, :, :n]))]
        assert len(fits) == 1
        seen[fits[0] - 1] += 1
        assert torch.equal(dropped[image, :, : fits[0]], digits[image, :, : fits[0]]) and (dropped[image, :, fits[0] :] == 0).all()
    assert min(seen) > 8, "1, 2 or 3 stages, equally likely"
    counts = [7 + 5 * 60, 7 + 5 * (60 - seen[0]), 7 + 5 * seen[2]]  # averages begin with one use of each code
    assert [float(2 * book.ema_count.sum()) for book in rvq.books] == counts
    assert torch.equal(rvq.eval()(z[:1]).ids, rvq.eval()(z[:1]).ids)


def test_no_stage_dropout_by_probability():
    torch.manual_seed(0)
    rvq = ResidualVQ(8, 4, 4, stage_dropout=0.25)
    z = torch.randn(400, 1, 4)
    full = [all(stage[i].all() for stage in rvq._active(z, None, True)) for i in range(400)]
    assert sum(full) / 400 == pytest.approx(0.75 + 0.25 / 4, abs=0.06)


def test_sums_of_a_shared_codebook():
    """What is found sums to the given codes to the last bit of one order of addition, whichever digits those were."""
    torch.manual_seed(0)
    rvq = ResidualVQ(6, 5, 3, shared=True)
    assert len(list(rvq.parameters())) == 1
    ids = torch.arange(6**3)[None]
    codes = rvq.ids_to_codes(ids)
    again = rvq.codes_to_ids(codes)
    torch.testing.assert_close(rvq.ids_to_codes(again), codes, atol=1e-6, rtol=0)
    assert torch.equal(tokens_to_digits(again, rvq.sizes).sort(-1).values, tokens_to_digits(ids, rvq.sizes).sort(-1).values)


def test_fitted_stages_leave_less_and_less():
    torch.manual_seed(0)
    rvq = ResidualVQ(16, 4, 4, kmeans_iterations=5)
    z = torch.randn(8, 32, 4)
    rvq.train()(z.requires_grad_())
    rest = [(z - rvq.digits_to_codes(tokens_to_digits(rvq(z).ids, rvq.sizes)[..., :n])).square().mean() for n in (1, 2, 3, 4)]
    assert rest[0] > 2 * rest[1] > 4 * rest[2] > 8 * rest[3]


def test_bits_beyond_62():
    torch.manual_seed(0)
    scale = 0.2 ** torch.arange(9)[:, None, None]  # stages far apart: the greedy choice is the right one
    rvq = filled(F.normalize(torch.randn(9, 256, 6), dim=-1) * scale).eval()
    assert rvq.vocab_size == 2**72 and rvq.bits_per_token == 72
    bits = torch.randint(2, (2, 9, 72), dtype=torch.uint8)
    digits = tokens_to_digits(bits, rvq.sizes)
    codes = rvq.ids_to_codes(bits)
    torch.testing.assert_close(codes, sum(book.codebook[digits[..., s]] for s, book in enumerate(rvq.books)))
    again = tokens_to_digits(rvq.codes_to_ids(codes), rvq.sizes)
    assert (again[..., :4] == digits[..., :4]).float().mean() > 0.9
    out = rvq(codes)
    assert out.ids is None and out.bits.shape == (2, 9, 72) and torch.equal(rvq.ids_to_codes(out.bits), out.q)
    with pytest.raises(TokenError):
        rvq.ids_to_codes(bits[..., :64])


def test_arguments_are_checked():
    for arguments in ({"codes": 1}, {"stages": 0}, {"stages": 65}, {"stage_dropout": 1.5}, {"codes": 1000, "stages": 7}):
        with pytest.raises(ModelError):
            ResidualVQ(**{"codes": 8, "dim": 3, "stages": 2, **arguments})
    with pytest.raises(ModelError, match="Use 512 or 1024"):
        ResidualVQ(1000, 3, 8)
    with pytest.raises(ModelError, match="shared"):
        ResidualVQ(8, 3, 2, shared=True, kmeans_iterations=3)
    assert ResidualVQ(1000, 3, 6).vocab_size == 1000**6
