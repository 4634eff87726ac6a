"""Spectral tokenizer: the contracts, the transform against scipy, nested residual coding, and the fit to data."""

import pytest
import torch

from tests.contract.parts import DecoderContract, EncoderContract, QuantizerContract
from tests.contract.tokenizer import TokenizerContract
from tok1d.data.drawn import DrawnImages
from tok1d.errors import TokenError
from tok1d.tokenizers.decoders.spectral import SpectralDecoder
from tok1d.tokenizers.encoders.spectral import SpectralEncoder
from tok1d.tokenizers.lengths import TailDrop
from tok1d.tokenizers.quantizers.nested_vq import NestedVQ
from tok1d.tokenizers.spectral import analyse, dct_matrix, synthesise, zigzag_support
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.spectral_fit import colour_axes, fit_spectral, kmeans, nearest

SHAPE = {"tokens": 8, "dim": 6, "grid": 8, "image_size": [32, 32]}
ENCODER = {"class": "tok1d.tokenizers.encoders.spectral.SpectralEncoder", **SHAPE}
QUANTIZER = {"class": "tok1d.tokenizers.quantizers.nested_vq.NestedVQ", "tokens": 8, "dim": 6, "vocab_size": 32, "books": 8}
DECODER = {
    "class": "tok1d.tokenizers.decoders.spectral.SpectralDecoder", **SHAPE,
    "widths": [8, 8, 8, 8, 8], "blocks": [1, 1, 1, 1, 1], "condition": 8,
}  # fmt: skip
CONFIG = {
    "_class_name": "Tokenizer1D", "name": "tiny-spectral", "image_size": [32, 32],
    "encoder": ENCODER, "quantizer": QUANTIZER, "decoder": DECODER,
    "lengths": {"class": "tok1d.tokenizers.lengths.TailDrop", "distribution": "log_uniform"},
}  # fmt: skip


def wake(decoder: SpectralDecoder) -> SpectralDecoder:
    """Give the layers that start at zero some weight, so that every part takes part."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return decoder


def overlapping(quantizer: NestedVQ) -> NestedVQ:
    """Supports in which later tokens refine coefficients of earlier ones, and codebooks that are shared."""
    quantizer.support.copy_(torch.arange(48).view(8, 6) % 30)
    quantizer.book.copy_(torch.tensor([0, 1, 1, 2, 3, 4, 4, 7]))
    quantizer.scale.copy_(torch.linspace(1, 0.3, 8)[:, None].expand(8, 6))
    quantizer._levels = None
    return quantizer


class TestEncoder(EncoderContract):
    config = ENCODER


class TestQuantizer(QuantizerContract):
    config = QUANTIZER
    tokens = 8


class TestDecoder(DecoderContract):
    config = DECODER
    tokens = 8


class TestTokenizer(TokenizerContract):
    config = CONFIG

    def make(self) -> Tokenizer1D:
        tokenizer = super().make()
        wake(tokenizer.decoder)
        tokenizer.quantizer.codebooks.mul_(0.2)
        return tokenizer


# the transform ---------------------------------------------------------------------------------------------------


def test_analysis_is_the_orthonormal_dct():
    fft = pytest.importorskip("scipy.fft")
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    spectrum = analyse(images, torch.eye(3), dct_matrix(8, 16), dct_matrix(8, 24)) * (16 * 24) ** 0.5
    wanted = torch.from_numpy(fft.dctn(images.double().numpy(), axes=(2, 3), norm="ortho"))[:, :, :8, :8]
    torch.testing.assert_close(spectrum.double(), wanted, atol=1e-5, rtol=1e-5)


def test_synthesis_inverts_analysis_at_any_size():
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    colour = SpectralEncoder(2, 2, 8, (8, 8)).colour
    axes = torch.linalg.qr(colour.T)[0].T  # exactly orthonormal; the stored ones have three digits
    spectrum = analyse(images, axes, dct_matrix(8, 8), dct_matrix(8, 8))
    torch.testing.assert_close(synthesise(spectrum, axes, dct_matrix(8, 8), dct_matrix(8, 8)), images, atol=1e-5, rtol=1e-5)
    large = synthesise(spectrum, axes, dct_matrix(8, 32), dct_matrix(8, 32))
    again = analyse(large, axes, dct_matrix(8, 32), dct_matrix(8, 32))
    torch.testing.assert_close(again, spectrum, atol=1e-5, rtol=1e-5)


def test_zigzag_takes_low_frequencies_once():
    support = zigzag_support(4, 6, 8)
    assert support.shape == (4, 6) and len(support.unique()) == 24 and support[0, 0] == 0
    with pytest.raises(ValueError, match="larger grid"):
        zigzag_support(100, 100, 8)


def test_untrained_decoder_is_the_linear_picture():
    encoder, decoder = SpectralEncoder(48, 4, 8, (32, 32)), SpectralDecoder(48, 4, 8, (32, 32), widths=(8,) * 5, blocks=(1,) * 5)
    image = DrawnImages(1, 32)[0]["image"][None].float() / 255
    errors = [(decoder(encoder(image)[:, :n]) - image).square().mean().item() for n in (1, 12, 48)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02


def test_window_is_a_piece_of_the_whole():
    """Away from the cut's margin the window shows what the whole image shows; outside it nothing is rendered."""
    decoder = wake(SpectralDecoder(8, 6, 16, (64, 64), widths=(4,) * 5, blocks=(1,) * 5, condition=8))
    q = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1)) * 0.1
    whole = decoder(q)
    for window in ((0, 0, 64), (8, 16, 32), (32, 32, 32)):
        top, left, size = window
        piece = decoder(q, window=window)
        assert piece.shape == (2, 3, size, size)
        torch.testing.assert_close(piece, whole[:, :, top : top + size, left : left + size], atol=5e-3, rtol=0)


def test_autocast_leaves_the_spectrum_in_float32():
    tokenizer = Tokenizer1D.from_config(CONFIG).eval()
    image = DrawnImages(1, 32)[0]["image"][None].float() / 255
    exact = tokenizer.encoder(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encoder(image), exact)
        picture = tokenizer.decode_latents(tokenizer.quantizer(exact).q)
    torch.testing.assert_close(picture.float(), tokenizer.decode_latents(tokenizer.quantizer(exact).q), atol=0.02, rtol=0)


# nested residual quantization ------------------------------------------------------------------------------------


def test_levels_equal_one_token_at_a_time():
    """Batched levels give the ids of the plain algorithm: each token codes what the earlier ones left."""
    torch.manual_seed(0)
    quantizer = overlapping(NestedVQ(8, 6, 32, books=8))
    assert len(quantizer.levels()) < 8 or quantizer.levels()[0] == (0, 1)
    coefficients = torch.randn(5, 30)
    ids = quantizer(coefficients[:, quantizer.support]).ids
    for b in range(5):
        left = coefficients[b].clone()
        for t in range(8):
            codes = quantizer.codebooks[quantizer.book[t]] * quantizer.scale[t]
            best = (left[quantizer.support[t]] - codes).square().sum(-1).argmin()
            assert ids[b, t] == best
            left[quantizer.support[t]] -= codes[best]


def test_residual_coding_of_shared_coefficients_and_masks():
    torch.manual_seed(0)
    quantizer = overlapping(NestedVQ(8, 6, 32, books=8))
    z = torch.randn(3, 30)[:, quantizer.support]
    mask = torch.arange(8) < torch.tensor([8, 1, 5])[:, None]
    out, whole = quantizer(z, mask), quantizer(z)
    assert torch.equal(out.ids[mask], whole.ids[mask]) and not out.ids[~mask].any() and not out.q[~mask].any()
    assert torch.equal(quantizer.ids_to_codes(whole.ids), whole.q.detach())
    with pytest.raises(TokenError, match="8 tokens, got 9"):
        quantizer.ids_to_codes(torch.zeros(1, 9, dtype=torch.int64))


def test_loading_weights_renews_the_levels():
    quantizer, other = NestedVQ(8, 6, 32, books=8), overlapping(NestedVQ(8, 6, 32, books=8))
    assert quantizer.levels() != other.levels()
    quantizer.load_state_dict(other.state_dict())
    assert quantizer.levels() == other.levels()


# the fit ---------------------------------------------------------------------------------------------------------


def spectral(tokens: int = 8, books: int = 8, vocab: int = 16) -> Tokenizer1D:
    torch.manual_seed(0)
    decoder = SpectralDecoder(tokens, 4, 8, (32, 32), widths=(8,) * 5, blocks=(1,) * 5, condition=8)
    encoder = SpectralEncoder(tokens, 4, 8, (32, 32))
    return Tokenizer1D(encoder, NestedVQ(tokens, 4, vocab, books), decoder, TailDrop("log_uniform"), (32, 32), "fit")


def batches(count: int = 96):
    images = DrawnImages(count, 32)
    for start in range(0, count, 32):
        yield torch.stack([images[i]["image"] for i in range(start, start + 32)]).float() / 255


def test_fit_makes_every_prefix_better():
    tokenizer = spectral()
    errors = fit_spectral(tokenizer, batches(), own_books=8, steps=4)
    assert len(errors) == 8 and all(a > b for a, b in zip(errors, errors[1:]))
    images = next(batches())
    held_out = torch.stack([DrawnImages(8, 32, seed=9)[i]["image"] for i in range(8)]).float() / 255
    for batch in (images, held_out):
        left = [(tokenizer(batch, torch.full((len(batch),), k)).reconstruction - batch).square().mean() for k in (1, 2, 4, 8)]
        assert all(a > b for a, b in zip(left, left[1:]))
    # the reported error is what is left of the coded coefficients: never more than that of the picture
    assert errors[-1] <= (tokenizer(images).reconstruction - images).square().mean()
    for part in (tokenizer.quantizer, tokenizer.decoder):
        assert torch.equal(part.support, tokenizer.encoder.support)
    assert torch.equal(tokenizer.decoder.mean, tokenizer.encoder.mean)


def test_fit_is_deterministic_and_survives_the_disk(tmp_path):
    first, second = spectral(books=5), spectral(books=5)
    for tokenizer in (first, second):
        fit_spectral(tokenizer, batches(), own_books=4, refresh=4, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    first.save_pretrained(tmp_path)
    seq = first.eval().encode(next(batches())[:4])
    again = Tokenizer1D.from_pretrained(tmp_path)
    assert torch.equal(again.encode(next(batches())[:4]).ids, seq.ids) and torch.equal(again.decode(seq), first.decode(seq))


def test_fit_refuses_what_it_cannot_fit():
    with pytest.raises(ValueError, match="need books=8"):
        fit_spectral(spectral(books=5), batches(), own_books=8)
    tokenizer = spectral()
    tokenizer.decoder = torch.nn.Identity()
    with pytest.raises(ValueError, match="SpectralDecoder"):
        fit_spectral(tokenizer, batches())


def test_kmeans_lowers_the_error_and_drops_no_cluster():
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (0, 1, 10):
        codes = kmeans(x, 16, steps, torch.Generator().manual_seed(1))
        near = nearest(x, codes)
        assert torch.equal(near, nearest(x, codes, chunk=7)) and torch.equal(near, torch.cdist(x, codes).argmin(1))
        errors.append((x - codes[near]).square().mean().item())
    assert errors[0] > errors[1] > errors[2] and len(near.unique()) == 16


def test_colour_axes_are_principal_and_start_bright():
    brightness = torch.rand(500, 1, generator=torch.Generator().manual_seed(0))
    pixels = brightness + 0.05 * torch.rand(500, 3, generator=torch.Generator().manual_seed(1))
    axes = colour_axes(pixels)
    torch.testing.assert_close(axes @ axes.T, torch.eye(3), atol=1e-5, rtol=0)
    assert (axes[0] > 0.5).all()
