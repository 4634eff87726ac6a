"""Adaptive length: the prefix returned was measured and meets the target, the one below does not, bytes are real bytes."""

import math
import sys
import types

import pytest
import torch
from torch import Tensor

from tests.dct_model import SIZE, TOKENS, make_model, picture
from tok1d import tokfile
from tok1d.errors import MissingExtraError, TokenError, UsageError
from tok1d.image_io import fit
from tok1d.tokenizers import budget as budget_module
from tok1d.tokenizers.budget import Budget, image_of
from tok1d.tokens import TokenSequence


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.cat([picture(seed, detail=detail) for seed, detail in enumerate((0.0, 0.3, 0.6, 1.0, 2.0))])


def psnr_at(model, image: Tensor, k: int) -> float:
    mse = (model.decode(model.encode(image[None], k)) - image).square().mean().item()
    return -10 * math.log10(mse)


def fake_lpips(monkeypatch) -> list[int]:
    """A distance that falls with the number of right pixels; returns a list that counts the rows it measured."""
    rows: list[int] = []

    class Perceptual:
        def __init__(self, net: str) -> None:
            assert net == "vgg"

        def to(self, device):
            return self

        def __call__(self, a: Tensor, b: Tensor) -> Tensor:
            rows.append(len(a))
            return (a - b).abs().mean((1, 2, 3))

    module = types.ModuleType("tok1d.eval.perceptual")
    module.Perceptual = Perceptual
    monkeypatch.setitem(sys.modules, "tok1d.eval.perceptual", module)
    budget_module.lpips_on.cache_clear()
    return rows


@pytest.fixture(autouse=True)
def fresh_lpips():
    yield
    budget_module.lpips_on.cache_clear()


@pytest.mark.parametrize("target", [18.0, 22.0, 26.0, 30.0])
def test_psnr_keeps_the_smallest_prefix_that_reaches_it(model, images, target):
    result = Budget(psnr=target).search(model, images, model.encode(images))
    for i, (k, reached, psnr) in enumerate(zip(result.tokens, result.reached, result.psnr)):
        assert math.isclose(psnr_at(model, images[i], k), psnr, abs_tol=1e-3)
        assert reached == (psnr >= target)
        if reached and k > 1:
            assert psnr_at(model, images[i], k - 1) < target
        if not reached:
            assert k == TOKENS
    assert result.sequence.lengths.tolist() == list(result.tokens)
    assert len(set(result.tokens)) > 1 or target == 30


@pytest.mark.filterwarnings("ignore:1 of")
def test_encode_with_a_budget_gives_per_image_lengths(model, images):
    seq = model.encode(images, Budget(psnr=24.0))
    full = model.encode(images)
    assert isinstance(seq, TokenSequence) and seq.shape[1] == int(seq.lengths.max())
    for row, k, whole in zip(seq.ids, seq.lengths.tolist(), full.ids):
        assert torch.equal(row[:k], whole[:k]) and not row[k:].any()
    assert model.decode(seq).shape == images.shape
    alone = [model.encode(image[None], Budget(psnr=24.0)).lengths.item() for image in images]
    assert alone == seq.lengths.tolist()


def test_uint8_images_and_size_policies_work(model):
    image = picture(3, 40, 23).mul(255).round().byte()
    seq = model.encode(image, Budget(psnr=20.0), policy="resize")
    assert 1 <= seq.lengths.item() <= TOKENS and model.decode(seq).shape == image.shape


def test_a_target_out_of_reach_keeps_all_tokens_and_warns(model, images):
    with pytest.warns(UserWarning, match="5 of 5 images miss the target"):
        seq = model.encode(images, Budget(psnr=90.0))
    assert seq.lengths.tolist() == [TOKENS] * 5


def test_max_bytes_is_the_size_of_the_real_record(model, images):
    seq = model.encode(images)
    for limit in (37, 44, 50, 68, 500):
        result = Budget(max_bytes=limit).search(model, images, seq)
        for i, k in enumerate(result.tokens):
            one = image_of(result.sequence, i)[:, :k]
            assert len(tokfile.pack(one)) <= limit
            assert k == TOKENS or len(tokfile.pack(image_of(seq, i)[:, : k + 1])) > limit
        assert all(result.reached) and result.psnr == (None,) * 5
    metas = [{"name": "x" * 10 * i} for i in range(5)]
    kept = Budget(max_bytes=120).search(model, images, seq, metas)
    for i, k in enumerate(kept.tokens):
        assert len(tokfile.pack(image_of(kept.sequence, i)[:, :k], metas[i])) <= 120
    assert kept.tokens[4] < kept.tokens[3] <= kept.tokens[0]


def test_bytes_cap_a_quality_target(model, images):
    free = Budget(psnr=24.0).search(model, images, model.encode(images))
    capped = Budget(psnr=24.0, max_bytes=36 + 9).search(model, images, model.encode(images))
    for a, b, reached in zip(free.tokens, capped.tokens, capped.reached):
        assert b == min(a, 9) and reached == (a <= 9)


def test_too_few_bytes_for_one_token_say_how_many_are_needed(model, images):
    with pytest.raises(TokenError, match=r"takes at least 37 bytes .* got max_bytes=36"):
        model.encode(images, Budget(max_bytes=36))


def test_tiles_of_an_image_share_their_length(model):
    image = picture(7, 2 * SIZE, 3 * SIZE)
    tiles, geometry = fit(image, (SIZE, SIZE), "tile")
    other, alone = fit(picture(8), (SIZE, SIZE), "resize")
    seq = model.encode(torch.cat([tiles, other]))
    seq = TokenSequence(seq.ids, seq.vocab_size, model_id=seq.model_id, geometry=(*geometry, *alone))
    result = Budget(psnr=25.0).search(model, torch.cat([tiles, other]), seq)
    k = result.tokens[0]
    assert result.sequence.lengths.tolist() == [k] * 6 + [result.tokens[1]]
    decoded = model.decode(image_of(result.sequence, 0)[:, :k])
    assert math.isclose(-10 * math.log10((decoded - image).square().mean().item()), result.psnr[0], abs_tol=1e-3)
    assert model.decode(result.sequence)[0].shape == (3, 2 * SIZE, 3 * SIZE)


def test_lpips_target(model, images, monkeypatch):
    rows = fake_lpips(monkeypatch)
    result = Budget(lpips=0.05).search(model, images, model.encode(images))
    for i, (k, reached, lpips) in enumerate(zip(result.tokens, result.reached, result.lpips)):
        error = lambda n, i=i: (model.decode(model.encode(images[i : i + 1], n)) - images[i]).abs().mean().item()  # noqa: E731
        assert math.isclose(error(k), lpips, abs_tol=1e-5) and reached == (lpips <= 0.05)
        assert k == 1 or not reached or error(k - 1) > 0.05
    assert result.psnr == (None,) * 5
    both = Budget(psnr=24.0, lpips=0.05).search(model, images, model.encode(images))
    assert all(b >= a for a, b in zip(result.tokens, both.tokens)) and None not in both.psnr
    assert max(rows) == 5, "the whole batch is measured at once"


def test_lpips_without_its_extra_says_which(model, images, monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise MissingExtraError("lpips could not be imported. pip install 'tok1d[eval]'")

    monkeypatch.setitem(sys.modules, "tok1d.eval.perceptual", Broken("tok1d.eval.perceptual"))
    with pytest.raises(MissingExtraError, match=r"tok1d\[eval\]"):
        model.encode(images, Budget(lpips=0.3))


def test_the_search_is_batched_and_short(model, images, monkeypatch):
    calls: list[int] = []
    decode = model.decode_latents
    monkeypatch.setattr(model, "decode_latents", lambda q, n: (calls.append(len(q)), decode(q, n))[1], raising=False)
    Budget(psnr=24.0).search(model, images, model.encode(images))
    assert len(calls) == 1 + 5 and calls[0] == 5, "all 32 tokens, then bisection"
    calls.clear()
    Budget(psnr=90.0).search(model, images, model.encode(images))
    assert calls == [5], "what all tokens miss needs no search"


def test_a_dip_in_quality_is_survived(model, images, monkeypatch):
    """Quality that is not monotone: what comes back must still be verified."""
    decode = model.decode_latents

    def dipped(q: Tensor, lengths: Tensor) -> Tensor:
        bad = (lengths >= 13) & (lengths <= 20)
        return torch.where(bad[:, None, None, None], torch.zeros(()), decode(q, lengths))

    monkeypatch.setattr(model, "decode_latents", dipped, raising=False)
    result = Budget(psnr=24.0).search(model, images, model.encode(images))
    assert all(psnr >= 24 for psnr, reached in zip(result.psnr, result.reached) if reached)
    assert not any(13 <= k <= 20 for k in result.tokens)


def test_only_nested_models(images):
    fixed = make_model(nested=False)
    with pytest.raises(TokenError, match=r"makes exactly 32 tokens.*--filter nested"):
        fixed.encode(images, Budget(psnr=20.0))


def test_a_budget_needs_sensible_targets():
    for bad in ({}, {"psnr": 0.0}, {"psnr": math.nan}, {"lpips": -1.0}, {"max_bytes": 0}):
        with pytest.raises(UsageError):
            Budget(**bad)


def test_nothing_to_encode(model):
    assert Budget(psnr=20.0).search(model, torch.zeros(0, 3, SIZE, SIZE), model.encode(torch.zeros(0, 3, SIZE, SIZE))).tokens == ()
