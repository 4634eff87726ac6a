"""Convolutional encoder and decoder: the contracts, residual blocks and upsampling against plain statements, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.contract.parts import DecoderContract, EncoderContract
from tests.contract.tokenizer import TokenizerContract
from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.convolutions import ResidualBlock, Upsample
from tok1d.tokenizers.decoders.vqgan import VQGANDecoder
from tok1d.tokenizers.encoders.vqgan import VQGANEncoder
from tok1d.tokenizers.tokenizer import Tokenizer1D

TINY = {"dim": 5, "width": 8, "multipliers": [1, 2, 3], "depth": 1, "groups": 4, "image_size": [8, 12]}
ENCODER = {"class": "tok1d.tokenizers.encoders.vqgan.VQGANEncoder", **TINY}
DECODER = {"class": "tok1d.tokenizers.decoders.vqgan.VQGANDecoder", **TINY}


class TestEncoder(EncoderContract):
    config = ENCODER
    image_size = (8, 12)


class TestEncoderOfPublishedKind(EncoderContract):
    config = {**ENCODER, "shortcut": "output", "depth": 2}
    image_size = (8, 12)


class TestDecoder(DecoderContract):
    config = DECODER
    image_size = (8, 12)
    tokens = 6

    def test_too_many_tokens(self):
        with pytest.raises(TokenError, match="up to 6 tokens, got 7"):
            VQGANDecoder(**TINY)(torch.zeros(1, 7, 5))


class TestDecoderOfPublishedKind(DecoderContract):
    config = {**DECODER, "shortcut": "output", "depth": 2}
    image_size = (8, 12)
    tokens = 6


class TestTokenizer(TokenizerContract):
    config = {
        "_class_name": "Tokenizer1D",
        "name": "tiny-grid",
        "image_size": [8, 12],
        "encoder": ENCODER,
        "quantizer": {"class": "tok1d.tokenizers.quantizers.vq.VQ", "vocab_size": 40, "dim": 5},
        "decoder": DECODER,
        "lengths": {"class": "tok1d.tokenizers.lengths.TailDrop"},
    }

    def make(self) -> Tokenizer1D:
        tokenizer = super().make()
        tokenizer.quantizer.codebook.mul_(1 / tokenizer.quantizer.codebook.std())
        return tokenizer


def test_rows_of_the_grid_come_first():
    """Latent i is that of cell (i // columns, i % columns), and code i paints there: the gradient is largest around it."""
    torch.manual_seed(0)
    sizes = {**TINY, "image_size": [32, 48]}  # 8 × 12 cells
    encoder, decoder = VQGANEncoder(**sizes).eval(), VQGANDecoder(**sizes).eval()
    images, q = torch.rand(1, 3, 32, 48, requires_grad=True), torch.randn(1, 96, 5, requires_grad=True)
    for row, col in ((0, 0), (0, 11), (7, 0), (7, 11), (3, 8)):
        (seen,) = torch.autograd.grad(encoder(images)[0, 12 * row + col].square().sum(), images)
        square = decoder(q)[..., 4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
        (painted,) = torch.autograd.grad(square.square().sum(), q)
        for where in (F.avg_pool2d(seen.square(), 4).sum((0, 1)).argmax(), painted[0].square().sum(-1).argmax()):
            assert abs(where // 12 - row) <= 1 and abs(where % 12 - col) <= 1


@pytest.mark.parametrize("shortcut", ["input", "output"])
@pytest.mark.parametrize("after", [8, 12])
def test_residual_block_equals_its_formula(shortcut, after):
    torch.manual_seed(0)
    block, x = ResidualBlock(8, after, 4, shortcut), torch.randn(2, 8, 5, 6)
    y = block.conv1(F.silu(block.norm1(x)))
    y = block.conv2(F.silu(block.norm2(y)))
    if after == 8:
        wanted = x + y
    elif shortcut == "input":
        wanted = y + F.conv2d(x, block.nin_shortcut.weight)
    else:  # the published MaskGIT-VQGAN
        wanted = y + F.conv2d(y, block.nin_shortcut.weight)
    kept = x.clone()
    torch.testing.assert_close(block(x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(block(x), wanted)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("size", [(1, 1), (5, 7)])
def test_upsampling_without_gradient_is_upsampling_with_it(size):
    torch.manual_seed(0)
    upsample = Upsample(6).double()
    x = torch.randn(7, 6, *size, dtype=torch.float64)
    plain = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), upsample.weight, upsample.bias, padding=1)
    torch.testing.assert_close(upsample(x), plain)
    assert upsample(x).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(upsample(x), plain)
        torch.testing.assert_close(upsample(x[:1]), plain[:1])


def test_large_batches_go_image_by_image(monkeypatch):
    torch.manual_seed(0)
    decoder, q = VQGANDecoder(**TINY).eval(), torch.randn(3, 6, 5)
    batches = []
    decoder.conv_out.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    with torch.no_grad():
        whole = decoder(q)
        monkeypatch.setattr("tok1d.tokenizers.decoders.vqgan.LARGE", 3 * 16 * 4 * 6)  # what enters the last level
        torch.testing.assert_close(decoder(q), whole, atol=1e-5, rtol=1e-4)
    assert decoder(q).requires_grad and batches == [3, 1, 1, 1, 3]


def test_inside_it_is_channels_last_and_outside_as_usual():
    seen = []
    encoder, decoder = VQGANEncoder(**TINY), VQGANDecoder(**TINY)
    for part in (encoder, decoder):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(
                    lambda _, __, y: seen.append(y.is_contiguous(memory_format=torch.channels_last))
                )
    images = decoder(encoder(torch.rand(2, 3, 8, 12)))
    assert len(seen) > 20 and all(seen) and images.is_contiguous()


def test_gradients_reach_every_weight():
    torch.manual_seed(0)
    encoder, decoder = VQGANEncoder(**TINY), VQGANDecoder(**TINY)
    decoder(encoder(torch.rand(1, 3, 8, 12))).square().sum().backward()
    for part in (encoder, decoder):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 10**9}, "width must be an integer"),
        ({"depth": 0}, "depth must be an integer in 1..64"),
        ({"multipliers": []}, "list of 1 to 10 integers"),
        ({"multipliers": [1, 10**6]}, "a multiplier must be an integer"),
        ({"multipliers": 4}, "list of 1 to 10 integers"),
        ({"groups": 3}, "cannot be split into 3 groups"),
        ({"image_size": 10}, "not a multiple of patch_size 4"),
        ({"shortcut": "none"}, "shortcut must be input"),
    ],
)
def test_sizes_that_are_refused(arguments, message):
    for part in (VQGANEncoder, VQGANDecoder):
        with pytest.raises(ModelError, match=message):
            part(**TINY | arguments)
