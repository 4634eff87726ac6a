"""TiTok encoder and grid decoder: the contracts, blocks against torch's own layers, sizes that are refused."""

import pytest
import torch
from torch import nn

from tests.contract.parts import DecoderContract, EncoderContract
from tests.contract.tokenizer import TokenizerContract
from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.blocks import Block, Transformer, patchify, unpatchify
from tok1d.tokenizers.decoders.grid import GridDecoder, TextGridDecoder
from tok1d.tokenizers.encoders.titok import TiTokEncoder
from tok1d.tokenizers.official.titok_legacy import LegacyTiTokEncoder, ProxyCodeDecoder, scramble
from tok1d.tokenizers.tokenizer import Tokenizer1D

ENCODER = {"class": "tok1d.tokenizers.encoders.titok.TiTokEncoder", "tokens": 4, "dim": 6}
DECODER = {"class": "tok1d.tokenizers.decoders.grid.GridDecoder", "tokens": 4, "dim": 6}
TINY = {"width": 32, "depth": 2, "heads": 2, "patch_size": 8, "image_size": [16, 24]}


def tiny(quantizer: dict, lengths: dict, dim: int = 6, code_dim: int | None = None) -> dict:
    """A tokenizer of 4 tokens for 16 × 24 pixels."""
    return {
        "_class_name": "Tokenizer1D",
        "name": "tiny",
        "image_size": [16, 24],
        "encoder": {**ENCODER, **TINY, "dim": dim},
        "quantizer": {"class": f"tok1d.tokenizers.quantizers.{quantizer.pop('class')}", **quantizer},
        "decoder": {**DECODER, **TINY, "dim": code_dim or dim},
        "lengths": {"class": f"tok1d.tokenizers.lengths.{lengths.pop('class')}", **lengths},
    }


class Spread(TokenizerContract):
    """Weights large enough for latents to meet many codes and codes to change the picture."""

    def make(self) -> Tokenizer1D:
        tokenizer = super().make()
        for weight in (tokenizer.encoder.proj.weight, tokenizer.encoder.patch_embed.weight):
            weight.mul_(10)
        for weight in (tokenizer.decoder.embed.weight, tokenizer.decoder.to_pixels.weight, tokenizer.decoder.smooth.weight):
            weight.mul_(10)
        if hasattr(tokenizer.quantizer, "codebook"):
            tokenizer.quantizer.codebook.mul_(1 / tokenizer.quantizer.codebook.std())
        return tokenizer


class TestVQFixed(Spread):
    config = tiny({"class": "vq.VQ", "vocab_size": 40, "dim": 6}, {"class": "FixedLength"})


class TestCosineMovingAverageVQTailDrop(Spread):
    config = tiny(
        {"class": "vq.VQ", "vocab_size": 40, "dim": 6, "l2": True, "ema": True, "dead_code_threshold": 0.5},
        {"class": "TailDrop", "distribution": "uniform"},
    )


class TestFSQPowersOfTwo(Spread):
    config = tiny(
        {"class": "fsq.FSQ", "levels": [5, 4, 3]}, {"class": "TailDrop", "distribution": "powers_of_two"}, dim=3
    )


class TestEncoder(EncoderContract):
    config = {**ENCODER, **TINY}
    image_size = (16, 24)


class TestDecoder(DecoderContract):
    config = {**DECODER, **TINY}
    image_size = (16, 24)

    def test_too_many_tokens(self):
        with pytest.raises(TokenError, match="up to 4 tokens, got 5"):
            GridDecoder(4, 6, width=32, depth=1, heads=1, image_size=16)(torch.zeros(1, 5, 6))


class TestTextDecoder(DecoderContract):
    config = {**DECODER, **TINY, "class": "tok1d.tokenizers.decoders.grid.TextGridDecoder", "text_tokens": 3, "text_dim": 5}
    image_size = (16, 24)
    text = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(2))

    @pytest.fixture(autouse=True)
    def given_text(self, monkeypatch):
        """The contract calls decoders without options: every image gets the same text."""
        forward = TextGridDecoder.forward
        with_text = lambda decoder, q, mask=None: forward(decoder, q, mask, self.text.expand(len(q), -1, -1))  # noqa: E731
        monkeypatch.setattr(TextGridDecoder, "forward", with_text)


def test_text_guides_the_picture():
    torch.manual_seed(0)
    decoder = TextGridDecoder(4, 6, text_tokens=3, text_dim=5, **TINY).eval()
    assert decoder.options == ("text",)
    q, text = torch.randn(2, 4, 6), torch.randn(2, 3, 5)
    pictures = decoder(q, text=text)
    assert not torch.allclose(pictures, decoder(q, text=text.flip(1))), "the order of the text counts"
    torch.testing.assert_close(pictures[1:], decoder(q[1:], text=text[1:]))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    torch.testing.assert_close(decoder(q, mask, text)[:1], decoder(q[:1, :2], text=text[:1]), atol=1e-5, rtol=1e-4)
    for wrong in (None, text[:1], text[:, :2], text[..., :4]):
        with pytest.raises(TokenError, match=r"encoded text of each image, float \(2, 3, 5\).*Pass text=text_features"):
            decoder(q, text=wrong)


class TestLegacyEncoder(EncoderContract):
    config = {**ENCODER, **TINY, "class": "tok1d.tokenizers.official.titok_legacy.LegacyTiTokEncoder"}
    image_size = (16, 24)


class TestProxyCodeDecoder(DecoderContract):
    config = {
        **DECODER, **TINY, "class": "tok1d.tokenizers.official.titok_legacy.ProxyCodeDecoder", "proxy_codes": 20,
        "proxy_dim": 5, "pixel_width": 8, "pixel_multipliers": [1, 1, 1, 2], "pixel_depth": 1, "pixel_groups": 4,
    }  # fmt: skip
    image_size = (16, 24)

    def test_logits_and_pictures(self):
        decoder = ProxyCodeDecoder(**{k: v for k, v in self.config.items() if k != "class"}).eval()
        q = self.codes()
        logits = decoder.logits(q)
        assert logits.shape == (2, 6, 20)
        torch.testing.assert_close(decoder(q), decoder.pixels(logits.softmax(-1) @ decoder.proxy_codebook))

    def test_grids_must_agree(self):
        with pytest.raises(ModelError, match="patches of 8 pixels make a grid of .2, 3., 2 pixel_multipliers one of .8, 12."):
            ProxyCodeDecoder(4, 6, **TINY, pixel_multipliers=[1, 1])


def test_legacy_reshape():
    """Element (w, l) of the published map is number w · L + l in a row: channel f % W of latent f // W."""
    tokens, width = 4, 8
    x = torch.arange(tokens * width).view(1, tokens, width)
    y = scramble(x)[0]
    for w in range(width):
        for i in range(tokens):
            flat = w * tokens + i
            assert y[i, w] == x[0, flat // width, flat % width] == flat
    assert torch.equal(y.T, x.reshape(width, tokens)), "not a transposition"
    # every latent of the encoder depends on every query's output; in the one-stage encoder each on its own
    for kind, others in ((LegacyTiTokEncoder, True), (TiTokEncoder, False)):
        torch.manual_seed(0)
        encoder = kind(4, 6, **TINY)
        features = torch.randn(1, 4, 32, requires_grad=True)
        encoder.features = lambda images, features=features: features
        (grad,) = torch.autograd.grad(encoder(torch.zeros(1, 3, 16, 24))[0, 1].sum(), features)
        assert bool((grad[0, [0, 2, 3]] != 0).any()) == others and grad[0, 1].any()


def test_block_equals_torch_encoder_layer():
    torch.manual_seed(0)
    ours = Block(32, 4).eval()
    theirs = nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    names = {
        "self_attn.in_proj_weight": "attn.qkv.weight",
        "self_attn.in_proj_bias": "attn.qkv.bias",
        "self_attn.out_proj": "attn.proj",
        "linear1": "mlp.fc1",
        "linear2": "mlp.fc2",
    }
    state = ours.state_dict()
    renamed = {}
    for key in theirs.state_dict():
        mine = next((key.replace(a, b) for a, b in names.items() if key.startswith(a)), key)
        renamed[key] = state[mine]
    theirs.load_state_dict(renamed)
    x, mask = torch.randn(2, 7, 32), torch.arange(7) < torch.tensor([[7], [4]])
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
    masked = ours(x, mask[:, None, None])
    torch.testing.assert_close(masked[1, :4], theirs(x, src_key_padding_mask=~mask)[1, :4], atol=1e-5, rtol=1e-4)
    for wanted in (slice(-3, None), slice(1, 5)):
        torch.testing.assert_close(ours(x, mask[:, None, None], wanted), masked[:, wanted], atol=1e-6, rtol=1e-5)


def test_transformer_returns_what_is_wanted():
    torch.manual_seed(0)
    transformer = Transformer(32, 3, 2).eval()
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(transformer(x, slice(-4, None)), transformer(x, slice(None))[:, -4:], atol=1e-6, rtol=1e-5)


def test_patches():
    x = torch.arange(2 * 3 * 8 * 12).float().view(2, 3, 8, 12)
    patches = patchify(x, 4)
    assert torch.equal(patches[1, 4].view(3, 4, 4), x[1, :, 4:, 4:8])
    channels_last = patches.view(2, 6, 3, 16).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(channels_last, (2, 3), 4), x)


def test_published_parameter_order_is_cls_patches_latents():
    encoder = TiTokEncoder(4, 6, width=32, depth=1, heads=1, image_size=32)
    assert encoder.positions.shape == (5, 32) and encoder.latents.shape == encoder.latent_positions.shape == (4, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 250}, "not a multiple of patch_size 16"),
        ({"image_size": [256]}, "int or \\[height, width\\]"),
        ({"width": 100, "heads": 3}, "cannot be split into 3 heads"),
        ({"width": 32}, "into 0 heads"),
        ({"depth": 10**9}, "depth must be an integer in 1..256"),
        ({"tokens": 10**12}, "tokens must be an integer"),
        ({"width": 10**9}, "width must be an integer"),
        ({"image_size": 65535, "patch_size": 1}, "patches of image_size"),
    ],
)
def test_sizes_that_are_refused(arguments, message):
    for part in (TiTokEncoder, GridDecoder):
        with pytest.raises(ModelError, match=message):
            part(**{"tokens": 4, "dim": 6, "width": 64, "depth": 1, **arguments})


def test_parts_must_fit_each_other():
    vq = {"class": "vq.VQ", "vocab_size": 8, "dim": 6}
    with pytest.raises(ModelError, match="latents of width 5, the quantizer takes 6"):
        Tokenizer1D.from_config(tiny({**vq}, {"class": "FixedLength"}, dim=5, code_dim=6))
    with pytest.raises(ModelError, match="codes of width 6, the decoder takes 5"):
        Tokenizer1D.from_config(tiny({**vq}, {"class": "FixedLength"}, dim=6, code_dim=5))


def test_continuous_tokenizer():
    config = tiny({"class": "kl.KL", "dim": 12}, {"class": "FixedLength"}, dim=12, code_dim=6)
    tokenizer = Tokenizer1D.from_config(config).eval()
    images = torch.rand(2, 3, 16, 24)
    with pytest.raises(TokenError, match="continuous"):
        tokenizer.encode(images)
    out = tokenizer(images)
    assert out.ids is None and out.reconstruction.shape == images.shape
    codes = tokenizer.quantizer(tokenizer.encode_latents(images)).q
    torch.testing.assert_close(tokenizer.decode_latents(codes), out.reconstruction)


def test_compiles_without_graph_breaks():
    encoder, decoder = TiTokEncoder(4, 6, width=32, depth=1, heads=1, image_size=32), GridDecoder(4, 6, 32, 1, 1, 16, 32)
    step = torch.compile(lambda x, m: decoder(encoder(x), m), fullgraph=True, backend="eager")
    images, mask = torch.rand(2, 3, 32, 32), torch.arange(4) < torch.tensor([[4], [2]])
    torch.testing.assert_close(step(images, mask), decoder(encoder(images), mask))
