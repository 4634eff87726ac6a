"""FlexTok's parts: contracts, prefixes, collapsed tokens, seeds, training losses."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tests.contract import parts
from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.decoders.flow import RectifiedFlowDecoder
from tok1d.tokenizers.decoders.flow_blocks import TimeEmbedding
from tok1d.tokenizers.decoders.flow_sampler import seeded_noise
from tok1d.tokenizers.encoders.flextok import FlexTokEncoder
from tok1d.tokenizers.encoders.titok import TiTokEncoder
from tok1d.tokenizers.flextok_blocks import patches_of, sine_table
from tok1d.tokenizers.lengths import TailDrop
from tok1d.tokenizers.official.layout import module_path
from tok1d.tokenizers.quantizers.fsq import FSQ
from tok1d.tokenizers.tokenizer import Tokenizer1D

SMALL = {"tokens": 16, "dim": 6, "width": 32, "heads": 2, "depth": 3, "patch_size": 8, "image_size": [32, 32]}
plain_build = parts.build


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that start at zero, and small vectors, become random: a fresh model ignores its input by design."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.std() < 0.1 or parameter.numel() < 2:
                parameter.normal_(std=0.3, generator=generator)
    return module


def encoder(**changes) -> FlexTokEncoder:
    torch.manual_seed(0)
    return randomised(FlexTokEncoder(**{**SMALL, **changes}).eval())


def decoder(**changes) -> RectifiedFlowDecoder:
    torch.manual_seed(0)
    return randomised(RectifiedFlowDecoder(**{**SMALL, "steps": 3, "guidance": 3.0, **changes}).eval())


def codes(batch: int, n: int = 16) -> Tensor:
    return torch.rand(batch, n, 6, generator=torch.Generator().manual_seed(5)) * 2 - 1


def pictures(batch: int) -> Tensor:
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(6))


@pytest.fixture
def random_weights(monkeypatch):
    monkeypatch.setattr(parts, "build", lambda config, kind: randomised(plain_build(config, kind)))


@pytest.mark.usefixtures("random_weights")
class TestEncoder(parts.EncoderContract):
    config = {"class": module_path(FlexTokEncoder), **SMALL}


@pytest.mark.usefixtures("random_weights")
class TestDecoder(parts.DecoderContract):
    config = {"class": module_path(RectifiedFlowDecoder), **SMALL, "tokens": 4, "steps": 2, "guidance": 2.0}


@pytest.mark.usefixtures("random_weights")
class TestDecoderWithoutGuidance(parts.DecoderContract):
    config = {"class": module_path(RectifiedFlowDecoder), **SMALL, "tokens": 4, "steps": 2, "guidance": 1, "solver": "heun"}


# encoder ---------------------------------------------------------------------------------------------------------


def test_a_prefix_is_computed_exactly_without_the_rest():
    enc, images = encoder(), pictures(2)
    whole = enc(images)
    for n in (1, 2, 7, 16):
        torch.testing.assert_close(enc(images, tokens=n), whole[:, :n], atol=1e-5, rtol=0)
    for n in (0, 17):
        with pytest.raises(TokenError, match="1 to 16"):
            enc(images, tokens=n)


def test_registers_are_causal_and_patches_do_not_see_them():
    """Against a plain transformer with the dense mask of the paper; a changed register changes only later ones."""
    enc, images = encoder(), pictures(1)
    changed = copy.deepcopy(enc)
    with torch.no_grad():
        changed.registers[5] += 1
    differs = (enc(images) - changed(images)).abs().sum(-1)[0] > 1e-6
    assert differs.tolist() == [False] * 5 + [True] * 11

    x = enc.patch_embed(patches_of(enc.latents(images), 8)) + enc.positions.flatten(1).T
    x = torch.cat([x, enc.registers[None]], dim=1)
    allowed = torch.ones(32, 32).tril().bool()
    allowed[:16], allowed[:, :16], allowed[:16, 16:] = True, True, False
    for block in enc.blocks:
        y = torch.nn.functional.layer_norm(x, (32,))
        q, k, v = block.attn.heads_of(block.attn.qkv(y))
        weights = (q @ k.transpose(-1, -2) * 8 / 16).masked_fill(~allowed, -torch.inf).softmax(-1)
        x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(torch.nn.functional.layer_norm(x, (32,)))
    expected = enc.head(torch.nn.functional.layer_norm(x[:, 16:], (32,)))
    torch.testing.assert_close(enc(images), expected, atol=1e-5, rtol=1e-4)


def test_sine_table_and_time_code():
    table = sine_table(32, 4, 4)
    a, b = 3, 2
    first = [table[i, a, b].item() for i in (0, 8, 16, 24)]
    assert first == pytest.approx([math.sin(a), math.cos(a), math.sin(b), math.cos(b)], abs=1e-6)
    for unit in (1.0, 1000.0):
        frequency = TimeEmbedding(8, unit).frequency
        assert frequency[0].item() == pytest.approx(1000 / unit)
        assert (frequency[127] / frequency[0]).item() == pytest.approx(256 ** (-127 / 128), rel=1e-4)


# the short cuts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 3, 8, 15, 16])
def test_collapsed_tokens_change_nothing(kept):
    dec, q = decoder().double(), codes(2, kept)  # in float64 it is exact; the velocity comes out in float32
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    given = dec.net.fast_field(q, None, [0.7], None)(x, 0)
    torch.testing.assert_close(given, dec.velocity(x, torch.tensor([0.7, 0.7]), q), atol=1e-6, rtol=1e-6)
    seen = []
    dec.net.fast_field(q, None, [0.7], lambda given, without: seen.append(without) or given)(x, 0)
    nothing = dec.velocity(x, torch.tensor([0.7, 0.7]), q, null=torch.tensor([True, True]))
    torch.testing.assert_close(seen[0], nothing, atol=1e-6, rtol=1e-6)
    assert (given - nothing).abs().max() > 1e-3


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint"])
@pytest.mark.parametrize("guidance", [1, 4.0])
def test_fast_pictures_are_the_naive_ones(solver, guidance):
    """Ragged lengths, a mask that is no prefix, nan where nothing is given."""
    dec, q = decoder(), codes(4, 12)
    mask = torch.arange(12) < torch.tensor([1, 12, 5, 5])[:, None]
    mask[3] = ~mask[3]
    q = q.masked_fill(~mask[..., None], torch.nan)
    options = {"steps": 4, "guidance": guidance, "solver": solver, "seeds": torch.arange(4)}
    fast = dec(q, mask, **options)
    dec.fast = False
    assert fast.isfinite().all()
    assert (fast - dec(q, mask, **options)).abs().max() < 1e-4


def test_an_image_is_the_same_alone_and_in_any_batch():
    dec, q, seeds = decoder(), codes(3), torch.tensor([11, 7, 11])
    together = dec(q, seeds=seeds)
    for row in (0, 2):
        torch.testing.assert_close(dec(q[row : row + 1], seeds=seeds[row : row + 1]), together[row : row + 1], atol=1e-5, rtol=0)
    assert (dec(q[:1], seeds=torch.tensor([12])) - together[:1]).abs().max() > 1e-3
    assert torch.equal(dec(q), dec(q, seeds=torch.zeros(3, dtype=torch.int64)))
    assert dec(q[:0]).shape == (0, 3, 32, 32)
    with pytest.raises(TokenError, match="one integer an image"):
        dec(q, seeds=seeds[:2])


def test_more_steps_than_modulations_kept_at_once(monkeypatch):
    dec, q = decoder(), codes(1)
    whole = dec(q, steps=5)
    monkeypatch.setattr("tok1d.tokenizers.decoders.flow_network.TIMES_AT_ONCE", 2)
    torch.testing.assert_close(dec(q, steps=5), whole, atol=1e-5, rtol=0)


# training --------------------------------------------------------------------------------------------------------


def tokenizer(**changes) -> Tokenizer1D:
    built = Tokenizer1D(encoder(), FSQ([8, 8, 8, 5, 5, 5]), decoder(**changes), TailDrop("powers_of_two"), image_size=(32, 32))
    return built.train()


def test_losses_reach_the_encoder_and_follow_the_generator():
    tok = tokenizer(null_prob=0.0)
    runs = [tok(pictures(4), torch.tensor([1, 16, 4, 8]), generator=torch.Generator().manual_seed(s)).losses["flow"] for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    runs[0].backward()
    for parameter in (tok.encoder.registers, tok.encoder.patch_embed.weight, tok.decoder.net.dropped, tok.decoder.net.token_positions):
        assert parameter.grad is not None and parameter.grad.isfinite().all() and (parameter.grad != 0).any()
    assert tok.decoder.net.null.grad.abs().sum() == 0, "no image was without tokens"


def test_masked_codes_touch_no_gradient():
    dec = decoder(null_prob=0.0)
    grads = []
    for filler in (0.0, torch.nan):
        q = codes(2)
        q[0, 3:] = filler
        q.requires_grad_()
        dec.zero_grad()
        dec.own_losses(q, torch.arange(16) < torch.tensor([[3], [16]]), pictures(2), torch.Generator().manual_seed(0))["flow"].backward()
        grads.append((q.grad, dec.net.embed.weight.grad.clone()))
    for one, other in zip(*grads):
        assert torch.equal(one, other) and one.isfinite().all()
    assert (grads[0][0][0, 3:] == 0).all() and (grads[0][0][0, :3] != 0).any()


def test_the_loss_is_that_of_the_velocity():
    dec, images, q = decoder(null_prob=1.0), pictures(2), codes(2)
    flow = dec.training_flow(q, None, images, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    t = dec.draw_times(2, generator)
    noise = seeded_noise(torch.randint(2**62, (2,), generator=generator).tolist(), (3, 32, 32))
    clean = images * 2 - 1
    assert torch.equal(flow.target, noise - clean)
    x = t[:, None, None, None] * noise + (1 - t[:, None, None, None]) * clean
    null = torch.ones(2, dtype=torch.bool)
    torch.testing.assert_close(flow.velocity, dec.velocity(x, t, q, null=null))
    assert flow.activation.shape == (2, 32, 32)
    loss = dec.own_losses(q, None, images, torch.Generator().manual_seed(3))["flow"]
    torch.testing.assert_close(loss, (flow.velocity - flow.target).square().mean())


def test_training_times():
    generator = torch.Generator().manual_seed(0)
    draw = {noise: decoder(noise=noise).draw_times(20_000, generator) for noise in ("uniform", "logit_normal", "mode")}
    for t in draw.values():
        assert t.min() >= 0 and t.max() <= 1 and abs(t.mean() - 0.5) < 0.01
    assert draw["uniform"].std().item() == pytest.approx(12**-0.5, abs=0.005)
    assert draw["logit_normal"].logit().std().item() == pytest.approx(1, abs=0.02)
    assert draw["mode"].std() < draw["uniform"].std() - 0.01  # s = 0.25 favours the middle
    spread = decoder(stratified=True).draw_times(10, generator)
    assert (spread * 10).long().tolist() == list(range(10))


def test_where_the_latents_of_training_come_from():
    tok = tokenizer()
    assert tok.decoder.vae_encoder is not None and "_latents_of" not in dict(tok.decoder.named_modules())
    clone = copy.deepcopy(tok)
    assert clone.decoder._latents_of is clone.encoder
    lone = decoder()
    lone.vae_encoder = None
    lone.attach(TiTokEncoder(16, 6, 64, 1, image_size=64))
    with pytest.raises(ModelError, match="vae_encoder=True"):
        lone.latents(pictures(1))
    lone.attach(tok.encoder)
    assert torch.equal(lone.latents(pictures(1)), pictures(1) * 2 - 1)


def test_lengths_rounded_up_to_powers_of_two():
    drawn = TailDrop("uniform_powers_of_two").sample(4000, 12, torch.Generator().manual_seed(0))
    values, counts = drawn.unique(return_counts=True)
    assert values.tolist() == [1, 2, 4, 8, 12]
    assert (counts / 4000).tolist() == pytest.approx([1 / 12, 1 / 12, 2 / 12, 4 / 12, 4 / 12], abs=0.03)


# what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 34}, "multiple of 4"),
        ({"heads": 3}, "3 heads"),
        ({"vae_channels": [33]}, "multiple of 32"),
        ({"vae_channels": "big"}, "vae_channels"),
        ({"vae_channels": [32] * 5, "latent_channels": 4}, "not a multiple of the 16 pixels"),
        ({"latent_channels": 4}, "3 colours"),
        ({"scaling_factor": 0}, "positive"),
        ({"scaling_factor": math.nan}, "positive"),
        ({"depth": 10**9}, "depth"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    for part in (FlexTokEncoder, RectifiedFlowDecoder):
        with pytest.raises(ModelError, match=message):
            part(**{**SMALL, **changes})


def test_sampling_that_is_refused():
    dec, q = decoder(), codes(1)
    for options in ({"steps": 0}, {"steps": 2.5}, {"steps": 10**6}, {"guidance": math.inf}, {"solver": "dpm"}):
        with pytest.raises(TokenError, match=next(iter(options))):
            dec(q, **options)
    with pytest.raises(TokenError, match="up to 16 tokens, got 17"):
        dec(codes(1, 17))
    for changes in ({"noise": "pink"}, {"max_timestep": 0}, {"null_prob": 2}):
        with pytest.raises(ModelError, match=next(iter(changes))):
            decoder(**changes)
