"""Generative decoder: the contracts, what noise may and may not do, sizes that are refused."""

import pytest
import torch
from torch import Tensor

from tests.contract.parts import DecoderContract, build
from tests.contract.tokenizer import TokenizerContract
from tests.tokenizers.test_titok import tiny
from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.decoders.generative import AdaptiveNorm, GenerativeDecoder
from tok1d.tokenizers.part import Decoder
from tok1d.tokenizers.tokenizer import Tokenizer1D

CONFIG = {
    "class": "tok1d.tokenizers.decoders.generative.GenerativeDecoder",
    "tokens": 4, "dim": 6, "width": 32, "depth": 1, "heads": 2, "patch_size": 8, "image_size": [16, 24],
    "channels": [16, 16, 8, 8], "blocks": 1, "noise_channels": 4,
}  # fmt: skip


def noisy(noise: float = 1.0) -> GenerativeDecoder:
    """As training with an adversarial loss leaves it: noise matters, norms follow the codes."""
    decoder = build({**CONFIG, "noise": noise}, Decoder)
    with torch.no_grad():
        decoder.conv_in.weight[:, 16:].normal_(std=0.2)
        decoder.conv_out.weight.mul_(10)
        for module in decoder.modules():
            if isinstance(module, AdaptiveNorm):
                module.to_scale.weight.normal_(std=0.2)
                module.to_shift.weight.normal_(std=0.2)
    return decoder


def codes(batch: int = 3) -> Tensor:
    return torch.randn(batch, 4, 6, generator=torch.Generator().manual_seed(1))


class TestDecoder(DecoderContract):
    config = CONFIG
    image_size = (16, 24)

    def test_too_many_tokens(self):
        with pytest.raises(TokenError, match="up to 4 tokens, got 5"):
            build(CONFIG, Decoder)(torch.zeros(1, 5, 6))


class TestTokenizer(TokenizerContract):
    config = {
        **tiny({"class": "vq.VQ", "vocab_size": 40, "dim": 6, "l2": True}, {"class": "TailDrop"}),
        "decoder": CONFIG,
    }

    def make(self) -> Tokenizer1D:
        tokenizer = super().make()
        for weight in (tokenizer.encoder.proj.weight, tokenizer.encoder.patch_embed.weight, tokenizer.decoder.embed.weight):
            weight.mul_(10)
        tokenizer.decoder.load_state_dict(noisy().state_dict())
        return tokenizer


# noise -----------------------------------------------------------------------------------------------------------


def test_same_seed_same_picture_other_seed_other_picture():
    decoder, q = noisy(), codes(1).expand(4, -1, -1)
    one, two, three, four = decoder(q, seeds=torch.tensor([5, 6, 5, 2**62]))
    assert torch.equal(one, three) and not torch.equal(one, two) and not torch.equal(one, four)
    assert (one - two).abs().mean() > 0.01


def test_no_seed_is_seed_zero():
    decoder, q = noisy(), codes()
    assert torch.equal(decoder(q), decoder(q, seeds=torch.zeros(3, dtype=torch.int64)))


def test_an_image_is_the_same_alone_and_in_any_batch():
    decoder, q, seeds = noisy(), codes(), torch.tensor([3, 8, 0])
    together = decoder(q, seeds=seeds)
    for i in range(3):
        torch.testing.assert_close(decoder(q[i : i + 1], seeds=seeds[i : i + 1]), together[i : i + 1], atol=1e-5, rtol=1e-4)
    turned = decoder(q.flip(0), seeds=seeds.flip(0)).flip(0)
    torch.testing.assert_close(turned, together, atol=1e-5, rtol=1e-4)


def test_noise_reaches_every_cell():
    decoder, q = noisy(), codes(1)
    change = (decoder(q, seeds=torch.tensor([1])) - decoder(q, seeds=torch.tensor([2]))).abs()
    cells = change.sum(1).unfold(1, 8, 8).unfold(2, 8, 8)  # (1, 2, 3, 8, 8)
    assert (cells.flatten(3).amin(-1) > 0).all(), "every pixel of every cell"


def test_noise_is_drawn_from_a_normal_distribution():
    like = torch.zeros(64, 1)
    noise = noisy(2.0)._noise(64, like, torch.arange(64))
    assert noise.shape == (64, 4, 2, 3) and abs(noise.mean()) < 0.2 and abs(noise.std() - 2) < 0.2


def test_without_noise_seeds_change_nothing():
    """The picture is that of the noise's mean, and noise can be muted after loading."""
    decoder, muted, q = noisy(), noisy(0.0), codes()
    decoder.noise = 0.0
    plain = decoder(q)
    for picture in (decoder(q, seeds=torch.tensor([1, 2, 3])), muted(q), muted(q, seeds=torch.tensor([4, 5, 6]))):
        assert torch.equal(picture, plain)
    assert not torch.equal(plain, noisy()(q)) and muted.config["noise"] == 0


def test_noise_starts_without_a_say():
    decoder, q = build(CONFIG, Decoder), codes()
    assert torch.equal(decoder(q, seeds=torch.tensor([1, 2, 3])), decoder(q))
    decoder.train()(q).square().sum().backward()
    assert (decoder.conv_in.weight.grad[:, 16:] != 0).any(), "and can learn one"


def test_training_steps_draw_fresh_noise():
    decoder, q = noisy().train(), codes()
    torch.manual_seed(0)
    one, two = decoder(q), decoder(q)
    torch.manual_seed(0)
    assert torch.equal(decoder(q), one) and not torch.equal(one, two)
    with torch.no_grad():
        assert torch.equal(decoder(q), noisy()(q)), "decoding does not depend on the mode"
    assert torch.equal(decoder(q, seeds=torch.tensor([1, 2, 3])), noisy()(q, seeds=torch.tensor([1, 2, 3])))


def test_seeds_through_the_tokenizer():
    tokenizer = TestTokenizer().make()
    seq = tokenizer.encode(torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1)))
    assert tokenizer.decoder.stochastic
    together = tokenizer.decode(seq, seeds=[1, 2, 3])
    torch.testing.assert_close(tokenizer.decode(seq[1:2], seeds=2)[0], together[1], atol=1e-5, rtol=1e-4)
    assert torch.equal(tokenizer.decode(seq), tokenizer.decode(seq, seeds=0))
    assert not torch.equal(tokenizer.decode(seq, seeds=1), tokenizer.decode(seq, seeds=0))
    with pytest.raises(TokenError, match="no option 'guidance'"):
        tokenizer.decode(seq, guidance=2.0)


# norms and sizes -------------------------------------------------------------------------------------------------


def test_every_norm_follows_the_codes():
    decoder = noisy()
    norms = [m for m in decoder.modules() if isinstance(m, AdaptiveNorm)]
    assert len(norms) == 8, "two in every block"
    decoder(codes()).square().sum().backward()
    assert all((n.to_scale.weight.grad != 0).any() and (n.to_shift.weight.grad != 0).any() for n in norms)


def test_adaptive_norm_of_still_codes_is_a_group_norm():
    norm, x = AdaptiveNorm(16, 8), torch.randn(2, 16, 4, 4)
    norm.start_plain()
    for linear in (norm.to_scale, norm.to_shift):
        torch.nn.init.zeros_(linear.bias)
    from tok1d.tokenizers.decoders.generative import Style

    torch.testing.assert_close(norm(x, Style.of(torch.randn(2, 6, 8))), torch.nn.GroupNorm(4, 16, eps=1e-6, affine=False)(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 12, "channels": [16] * 4}, "patch_size must be a power of two.*got 12"),
        ({"channels": [16, 8]}, "patch_size 8 needs 4 channels"),
        ({"channels": 16}, "patch_size 8 needs 4 channels"),
        ({"channels": [16, 16, 8, 6]}, "multiple of 4"),
        ({"channels": [10**9, 16, 8, 8]}, "every entry of channels must be an integer in 4..8192"),
        ({"blocks": 0}, "blocks must be an integer in 1..64"),
        ({"noise_channels": 10**9}, "noise_channels must be an integer"),
        ({"noise": -1}, "noise is a standard deviation"),
        ({"noise": "loud"}, "noise is a standard deviation"),
        ({"image_size": [16, 20]}, "not a multiple of patch_size 8"),
    ],
)
def test_sizes_that_are_refused(arguments, message):
    with pytest.raises(ModelError, match=message):
        build({**CONFIG, **arguments}, Decoder)


def test_learns_to_tell_two_pictures_apart():
    torch.manual_seed(0)
    decoder, q = build(CONFIG, Decoder).train(), codes(2)
    target = torch.rand(2, 3, 2, 3).repeat_interleave(8, 2).repeat_interleave(8, 3)
    optimizer = torch.optim.AdamW(decoder.parameters(), 3e-3)
    for _ in range(60):
        loss = (decoder(q) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.25 * target.mean(0).sub(target).square().mean(), "the mean of both is what deaf norms would paint"
