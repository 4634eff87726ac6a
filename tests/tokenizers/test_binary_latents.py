"""Binary latents: contracts, merging and splitting, rotary positions, any image size, files."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

from tests.contract.parts import DecoderContract, EncoderContract
from tests.contract.tokenizer import TokenizerContract
from tok1d.errors import ImageError, ModelError, TokenError
from tok1d.tokenizers.decoders.binary import BinaryDecoder
from tok1d.tokenizers.encoders.binary import BinaryEncoder
from tok1d.tokenizers.rotary import centred_turns, rotary_axes, rotary_table, rotate
from tok1d.tokenizers.rotary_blocks import Merge, RotaryBlock, Split
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.tokens import TokenSequence

CPU = torch.device("cpu")
SMALL = {"width": 32, "depth": 3, "heads": 2, "patch_size": 8, "size_limit": 96}
ENCODER = {"class": "tok1d.tokenizers.encoders.binary.BinaryEncoder", "tokens": 4, "dim": 16, "merge_after": [2], **SMALL}
DECODER = {
    "class": "tok1d.tokenizers.decoders.binary.BinaryDecoder", "tokens": 4, "dim": 16, "split_after": [1], "image_size": [16, 32], **SMALL
}  # fmt: skip


def config(bits: int, lengths: str = "FixedLength") -> dict:
    return {
        "_class_name": "Tokenizer1D",
        "name": "tiny",
        "image_size": [16, 32],
        "encoder": ENCODER,
        "quantizer": {"class": "tok1d.tokenizers.quantizers.bernoulli.BernoulliBits", "bits": bits, "dim": 16, "code_dim": max(16, bits)},
        "decoder": {**DECODER, "dim": max(16, bits)},
        "lengths": {"class": f"tok1d.tokenizers.lengths.{lengths}"},
    }


class TestEncoder(EncoderContract):
    config = ENCODER
    image_size = (48, 32)


class TestDecoder(DecoderContract):
    config = DECODER
    image_size = (16, 32)


class TestNestedIds(TokenizerContract):
    config = config(12, "TailDrop")


# merging and splitting -------------------------------------------------------------------------------------------


def patches(rows: int, cols: int, width: int = 8) -> torch.Tensor:
    return torch.randn(2, rows * cols, width, generator=torch.Generator().manual_seed(0))


def as_picture(x: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    return x.view(2, rows, cols, -1).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def test_merge_is_a_convolution_beside_the_mean():
    torch.manual_seed(0)
    merge, x = Merge(8), patches(4, 6)
    picture = as_picture(x, 4, 6)
    both = as_picture(merge(x, (4, 6)), 2, 3)
    merge.conv.weight.zero_()
    merge.conv.bias.zero_()
    shortcut = as_picture(merge(x, (4, 6)), 2, 3)
    groups = F.pixel_unshuffle(picture, 2).view(2, 8, 4, 2, 3)  # as published: four neighbours become channels, which are averaged
    torch.testing.assert_close(shortcut, groups.mean(2), atol=1e-6, rtol=1e-5)
    mean = sum(picture[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    torch.testing.assert_close(shortcut, mean, atol=1e-6, rtol=1e-5)
    torch.manual_seed(0)
    conv = Merge(8).conv
    torch.testing.assert_close(both - shortcut, conv(picture), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_split_is_a_convolution_beside_copies():
    torch.manual_seed(0)
    split, x = Split(8), patches(2, 3)
    picture = as_picture(x, 2, 3)
    both = as_picture(split(x, (2, 3)), 4, 6)
    wide = split.conv(picture).view(2, 8, 2, 2, 2, 3)  # channels are (8, row in the patch, column in the patch)
    split.conv.weight.zero_()
    split.conv.bias.zero_()
    shortcut = as_picture(split(x, (2, 3)), 4, 6)
    assert torch.equal(shortcut, F.interpolate(picture, scale_factor=2, mode="nearest"))
    repeated = F.pixel_shuffle(picture.repeat_interleave(4, dim=1), 2)  # as published
    assert torch.equal(shortcut, repeated)
    torch.testing.assert_close(both - shortcut, wide.permute(0, 1, 4, 2, 5, 3).reshape(2, 8, 4, 6), atol=1e-5, rtol=1e-4)


# positions -------------------------------------------------------------------------------------------------------


def test_channels_of_a_head():
    for width in (6, 8, 16, 32, 64, 128):
        axes = rotary_axes(width)
        assert sum(axes) == width and all(n >= 2 and n % 2 == 0 for n in axes) and axes[1] == axes[2]
    assert rotary_axes(64) == (8, 28, 28)


def test_angles_of_a_small_grid():
    """One latent and 1 × 2 patches, heads of 8 channels: axes of 4, 2 and 2, so pairs of frequency 1, 0.01 | 1 | 1."""
    turn = centred_turns(2, (1, 2), (4, 2, 2), 4, CPU)
    pairs = [[0, 0, 0, 0], [1, 0.01, 0, 0], [0, 0, 1.5, 0.5], [0, 0, 1.5, 2.5]]
    torch.testing.assert_close(turn, torch.tensor([row + row for row in pairs], dtype=torch.float64))


def test_new_models_rotate():
    """Lengths stay, and the product of two rotated vectors depends on how far apart they are only."""
    rng = torch.Generator().manual_seed(0)
    axes, side = (4, 6, 6), 8
    table = rotary_table(centred_turns, 3, (side, side), axes, side, device=CPU)
    q, k = (torch.randn(1, 1, 2, 16, generator=rng).expand(1, 3 + side * side, 2, 16) for _ in range(2))
    rotated = [rotate(x, table)[0] for x in (q, k)]
    for x, y in zip((q[0], k[0]), rotated):
        torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), atol=1e-5, rtol=1e-5)
    grid = [y[3:].view(side, side, 2, 16) for y in rotated]
    for dy, dx in ((0, 0), (1, 0), (0, 2), (3, 2)):
        products = (grid[0][: side - dy, : side - dx] * grid[1][dy:, dx:]).sum(-1)
        torch.testing.assert_close(products, products[:1, :1].expand_as(products), atol=1e-4, rtol=1e-4)
    far, near = (grid[0][0, 0] * grid[1][5, 5]).sum(-1), (grid[0][0, 0] * grid[1][0, 0]).sum(-1)
    assert (far - near).abs().min() > 0.1


def test_a_merged_patch_is_in_the_middle_and_pictures_span_the_same():
    def rows(n: int) -> torch.Tensor:
        return centred_turns(0, (n, 1), (2, 2, 2), 64, CPU)[:, 1]  # frequency 1: the angle is the position

    assert torch.equal(rows(64), torch.arange(64.0, dtype=torch.float64))
    for n in (2, 16, 32, 64):
        torch.testing.assert_close(rows(n // 2), rows(n).view(-1, 2).mean(1))
        assert rows(n)[0] + rows(n)[-1] == 63


# sizes -----------------------------------------------------------------------------------------------------------


def test_any_size():
    torch.manual_seed(0)
    encoder = BinaryEncoder(8, 6, merge_after=[1], **SMALL)
    decoder = BinaryDecoder(8, 6, split_after=[2], image_size=32, **SMALL)
    q = torch.randn(1, 8, 6)
    assert encoder.size_step == decoder.size_step == 16 and encoder.size_limit == 96
    for size in ((16, 16), (32, 32), (96, 96), (16, 80), (64, 32)):
        assert encoder(torch.rand(1, 3, *size)).shape == (1, 8, 6)
        picture = decoder(q, size=size)
        assert picture.shape == (1, 3, *size) and picture.isfinite().all()
    assert torch.equal(decoder(q), decoder(q, size=(32, 32)))
    for size in ((8, 8), (16, 24), (112, 16), (0, 16)):
        with pytest.raises(ImageError, match=rf"multiples of 16 up to 96 pixels a side, got {size[0]} × {size[1]}"):
            encoder(torch.rand(1, 3, *size))
        with pytest.raises(ImageError, match="multiples of 16"):
            decoder(q, size=size)
    with pytest.raises(TokenError, match="up to 8 tokens, got 9"):
        decoder(torch.zeros(1, 9, 6))


@pytest.mark.parametrize("after", [[], [1], [1, 2]])
def test_any_number_of_merges(after):
    torch.manual_seed(0)
    encoder = BinaryEncoder(4, 6, merge_after=after, **SMALL)
    decoder = BinaryDecoder(4, 6, split_after=after, image_size=32, **SMALL)
    assert encoder.size_step == 8 * 2 ** len(after)
    images = torch.rand(1, 3, 32, 64, requires_grad=True)
    picture = decoder(encoder(images), size=(32, 64))
    assert picture.shape == images.shape
    picture.square().sum().backward()
    assert (images.grad != 0).float().mean() > 0.99
    for part in (encoder, decoder):
        assert all(p.grad is not None for p in part.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"merge_after": [3]}, "every entry of merge_after \\(with depth 3\\) must be an integer in 1..2"),
        ({"merge_after": [2, 1]}, "ascending"),
        ({"merge_after": [1, 1]}, "ascending"),
        ({"size_limit": 100}, "not a multiple of patch_size 8"),
        ({"size_limit": 24}, "size_limit 24 is not a multiple of 16"),
        ({"heads": 3}, "cannot be split into 3 heads"),
        ({"heads": 8}, "cannot be split into 8 heads"),
        ({"depth": 10**9}, "depth must be an integer"),
        ({"mlp_ratio": 1e9}, "mlp_ratio"),
        ({"width": 10**9}, "width must be an integer"),
        ({"tokens": 0}, "tokens must be an integer"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    given = {"tokens": 4, "dim": 6, "merge_after": [1], **SMALL, **arguments}
    with pytest.raises(ModelError, match=message):
        BinaryEncoder(**given)
    given["split_after"] = given.pop("merge_after")
    with pytest.raises(ModelError, match=message.replace("merge_after", "split_after")):
        BinaryDecoder(**given, image_size=16)


def test_the_size_of_a_decoder_must_be_one_it_draws():
    for size, message in (([16, 24], "not a multiple of patch_size 16"), (112, "longer side of image_size must be an integer in 1..96")):
        with pytest.raises(ModelError, match=message):
            BinaryDecoder(4, 6, split_after=[1], image_size=size, **SMALL)


# arithmetic ------------------------------------------------------------------------------------------------------


def test_a_block_computes_what_is_wanted():
    torch.manual_seed(0)
    block, x = RotaryBlock(32, 2, 48), torch.randn(2, 7, 32)
    table = rotary_table(centred_turns, 3, (2, 2), rotary_axes(16), 4, device=CPU)
    mask = (torch.arange(7) < torch.tensor([[7], [4]]))[:, None, None]
    for wanted in (slice(0, 3), slice(3, None)):
        torch.testing.assert_close(block(x, table, mask, wanted), block(x, table, mask)[:, wanted], atol=1e-6, rtol=1e-5)


def test_tables_are_made_once_and_can_be_trained_with():
    torch.manual_seed(0)
    encoder = BinaryEncoder(4, 6, merge_after=[1], **{**SMALL, "size_limit": 80})
    with torch.inference_mode():
        encoder(torch.rand(1, 3, 64, 80))
        assert encoder.table((8, 10), 0) is encoder.table((8, 10), 0)
    encoder(torch.rand(1, 3, 64, 80)).sum().backward()
    assert not any("table" in key for key in encoder.state_dict())


def test_compiles_without_graph_breaks_or_warnings():
    torch.manual_seed(0)
    encoder = BinaryEncoder(4, 6, merge_after=[1], **{**SMALL, "depth": 2})
    decoder = BinaryDecoder(4, 6, split_after=[1], image_size=16, **{**SMALL, "depth": 2})
    images, mask = torch.rand(2, 3, 16, 32), torch.arange(4) < torch.tensor([[4], [2]])
    step = torch.compile(lambda x, m: decoder(encoder(x), m, size=(16, 32)), fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache.*")
        compiled = step(images, mask)
    torch.testing.assert_close(compiled, decoder(encoder(images), mask, size=(16, 32)), atol=1e-5, rtol=1e-4)


def test_autocast_keeps_norms_in_the_precision_of_their_input():
    torch.manual_seed(0)
    encoder = BinaryEncoder(4, 6, merge_after=[1], **SMALL)
    images = torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        z = encoder(images)
    torch.testing.assert_close(z.float(), encoder(images), atol=0.05, rtol=0.05)


# through a file --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer1D:
    torch.manual_seed(0)
    return Tokenizer1D.from_config(copy.deepcopy(config(64))).eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(64, 96), (16, 32), (96, 16)])
def test_a_file_remembers_the_size(tokenizer, tmp_path, size):
    assert tokenizer.any_size
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    seq = tokenizer.encode(image)
    assert seq.bits.shape == (1, 4, 64) and seq.bits_per_image == [256]
    seq.save(tmp_path / "image.tok")
    again = TokenSequence.load(tmp_path / "image.tok")
    assert torch.equal(again.bits, seq.bits)
    picture = tokenizer.decode(again)
    assert picture.shape == image.shape and torch.equal(picture, tokenizer.decode(seq))
    out = tokenizer(image)
    torch.testing.assert_close(picture, out.reconstruction.clamp(0, 1), atol=1e-5, rtol=1e-4)


def test_the_same_tokens_at_three_sizes(tokenizer):
    bits = torch.randint(2, (1, 4, 64), dtype=torch.uint8)
    shapes = [tuple(tokenizer.decode(bits, size=size).shape[-2:]) for size in ((32, 32), (64, 64), (96, 96))]
    assert shapes == [(32, 32), (64, 64), (96, 96)]
    assert tokenizer.decode(bits).shape[-2:] == (16, 32)


def test_other_sizes_are_resized_or_refused(tokenizer):
    image = torch.rand(1, 3, 40, 50)
    with pytest.raises(ImageError, match="multiples of 16 up to 96"):
        tokenizer.encode(image)
    assert tokenizer.decode(tokenizer.encode(image, policy="resize")).shape == image.shape
