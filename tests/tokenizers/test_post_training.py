"""PerChannel: contract, tables against known optima, calibration, quantizing a trained tokenizer after the fact."""

import math

import pytest
import torch

from tests.contract.parts import QuantizerContract
from tests.tokenizers.test_titok import tiny
from tok1d.errors import ModelError
from tok1d.tokenizers.quantizers.post_training import PerChannel, quantize_after_training
from tok1d.tokenizers.quantizers.scalar_tables import (
    lloyd_table,
    normal_table,
    quantile_table,
    truncated_normal_table,
)
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.tokens import TokenSequence

CLASS = {"class": "tok1d.tokenizers.quantizers.post_training.PerChannel"}


class TestIds(QuantizerContract):
    config = {**CLASS, "channels": 5, "bits": [4, 3, 3, 2, 1]}


class TestBits(QuantizerContract):
    config = {**CLASS, "channels": 16, "bits": 6, "calibration": "tokenbridge", "posterior": True}


def squared_error(table: torch.Tensor, x: torch.Tensor) -> float:
    return (x[:, None] - table).abs().amin(-1).square().mean().item()


def entropy(table: torch.Tensor, x: torch.Tensor) -> float:
    p = torch.bincount((x[:, None] - table).abs().argmin(-1), minlength=len(table)) / len(x)
    return -torch.special.xlogy(p, p).sum().item() / math.log(2)


# Least squared errors of a standard normal variable: Max, Quantizing for minimum distortion, 1960, table I.
@pytest.mark.parametrize(("size", "error"), [(2, 0.3634), (4, 0.1175), (8, 0.03454), (16, 0.009497), (32, 0.002499)])
def test_normal_table_is_the_published_optimum(size, error):
    x = torch.special.ndtri((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    assert squared_error(normal_table(size), x) == pytest.approx(error, rel=2e-3)


def test_tokenbridge_table():
    """Boundaries PhiInv(j / 64) clipped to ±3, means between them; with its affine map, the error of a unit normal."""
    cuts = torch.distributions.Normal(0.0, 1.0).icdf(torch.arange(65) / 64).double().clamp(-3, 3)
    dense = torch.linspace(-3, 3, 400_001, dtype=torch.float64)
    weight, part = torch.exp(-dense.square() / 2), torch.bucketize(dense, cuts[1:-1])
    total = torch.zeros(2, 64, dtype=torch.float64).index_add_(1, part, torch.stack([weight * dense, weight]))
    torch.testing.assert_close(truncated_normal_table(64), total[0] / total[1], atol=1e-4, rtol=0)
    x = torch.special.ndtri((torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000)
    assert squared_error(5 / 3 * truncated_normal_table(64), x) == pytest.approx(6.6e-4, rel=0.02)
    assert entropy(5 / 3 * truncated_normal_table(64), x) == pytest.approx(5.72, abs=0.01)


def test_measured_tables():
    torch.manual_seed(0)
    laplace = torch.distributions.Laplace(0.0, 0.5**0.5).sample((20_000,)).double()
    lloyd, quantile = lloyd_table(laplace, 32), quantile_table(laplace, 32)
    assert squared_error(lloyd, laplace) < 0.6 * squared_error(normal_table(32), laplace)
    assert squared_error(lloyd, laplace) < 0.3 * squared_error(quantile, laplace)
    assert entropy(quantile, laplace) > 4.97 > entropy(lloyd, laplace)
    nearest = (laplace[:, None] - lloyd).abs().argmin(-1)
    means = torch.stack([laplace[nearest == k].mean() for k in range(32)])
    torch.testing.assert_close(lloyd, means, atol=1e-6, rtol=0, msg="each entry is the mean of what is nearest to it")


@pytest.mark.parametrize("table", [lloyd_table, quantile_table])
def test_repeated_samples_give_entries_that_differ(table):
    for samples in (torch.zeros(100), torch.tensor([1.0, 2.0]).repeat(50), torch.cat([torch.zeros(99), torch.ones(1)])):
        assert (table(samples.double(), 16).diff() > 5e-5).all()


def mixed(count: int = 6000) -> torch.Tensor:
    """Latents with channels of very different size, place and shape; the last never varies."""
    torch.manual_seed(0)
    x = torch.randn(count, 5)
    x[:, 1] = torch.distributions.Laplace(0.0, 1.0).sample((count,))
    x[:, 2] = torch.rand(count)
    scale, place = torch.tensor([0.1, 3.0, 1.0, 20.0, 0.0]), torch.tensor([5.0, 0.0, -1.0, 100.0, 3.0])
    return (x * scale + place).view(40, -1, 5)


def calibrated(calibration: str, x: torch.Tensor, bits=4) -> PerChannel:
    quantizer = PerChannel(x.shape[-1], bits, calibration)
    quantizer.calibrate(x)
    return quantizer


@pytest.mark.parametrize("calibration", ["gaussian", "quantile", "lloyd"])
def test_calibrated_channels_keep_their_codes(calibration):
    x = mixed()
    quantizer = calibrated(calibration, x, bits=[12, 5, 4, 2, 1])
    assert quantizer.order.tolist() == [3, 1, 2, 0, 4]
    variance = x.flatten(0, 1).var(0)
    torch.testing.assert_close(quantizer.explained, (variance / variance.sum())[[3, 1, 2, 0, 4]])
    out = quantizer(x)
    assert torch.equal(quantizer.codes_to_ids(out.q), out.ids) and torch.equal(quantizer.ids_to_codes(out.ids), out.q)
    digits = torch.stack([torch.randint(size, (1, 500)) for size in quantizer.sizes], -1)
    tokens = quantizer.from_channel_ids(digits)
    assert torch.equal(quantizer.codes_to_ids(quantizer.ids_to_codes(tokens)), tokens)
    assert torch.equal(quantizer.channel_ids(tokens), digits)
    residual = (out.q - x).flatten(0, 1).square().mean(0) / variance
    assert residual[3] < 1e-4 and residual[0] < 0.2 and (out.q - x)[..., 4].abs().max() < 0.01


def test_calibrations_do_what_they_are_for():
    x = mixed()[..., :4]
    errors = {c: calibrated(c, x)(x).stats["error"].item() for c in ("gaussian", "quantile", "lloyd")}
    assert errors["lloyd"] < errors["gaussian"] < errors["quantile"]
    digits = calibrated("quantile", x).channel_ids(calibrated("quantile", x)(x).ids)
    share = torch.bincount(digits[..., 1].flatten(), minlength=16) / digits[..., 1].numel()
    torch.testing.assert_close(share, torch.full((16,), 1 / 16), atol=0.02, rtol=0)
    fixed = calibrated("tokenbridge", x)
    assert fixed.order.tolist() == [3, 1, 2, 0] and (fixed.mean == 0).all() and (fixed.scale == 5 / 3).all()
    torch.testing.assert_close(fixed.tables[0], truncated_normal_table(16).float())


def test_posterior_latents_are_coded_by_their_mean():
    x = mixed()
    quantizer = PerChannel(5, 4, posterior=True)
    quantizer.calibrate(torch.cat([x, torch.full_like(x, torch.inf)], -1))
    z = torch.cat([x, torch.randn_like(x)], -1).requires_grad_()
    out, plain = quantizer(z), calibrated("gaussian", x)(x)
    assert torch.equal(out.q, plain.q) and torch.equal(out.ids, plain.ids)
    out.q.sum().backward()
    assert (z.grad[..., :5] == 1).all() and (z.grad[..., 5:] == 0).all()


def test_tables_exist_without_data():
    with torch.device("meta"):
        model = PerChannel(3, [6, 4, 2])
    assert torch.equal(model.tables, PerChannel(3, [6, 4, 2]).tables) and model.tables.device.type == "cpu"
    assert [int(row.isfinite().sum()) for row in model.tables] == [64, 16, 4]


def test_published_size_is_96_bits():
    x = torch.randn(4, 100, 16, generator=torch.Generator().manual_seed(0))
    quantizer = PerChannel(16, 6, "tokenbridge")
    out = quantizer(x)
    assert quantizer.bits_per_token == 96 and out.ids is None and out.bits.shape == (4, 100, 96)
    assert out.stats["error"].item() == pytest.approx(6.6e-4, rel=0.1)
    assert torch.equal(quantizer.codes_to_ids(out.q), out.bits)


# a tokenizer trained without quantization ---------------------------------------------------------------------------


def continuous(lengths: str = "FixedLength") -> Tokenizer1D:
    torch.manual_seed(0)
    config = tiny({"class": "kl.KL", "dim": 32}, {"class": lengths}, dim=32, code_dim=16)
    tokenizer = Tokenizer1D.from_config(config).eval()
    with torch.no_grad():
        tokenizer.encoder.proj.weight.mul_(5)
        tokenizer.encoder.patch_embed.weight.mul_(10)
    return tokenizer


def images(count: int = 80) -> torch.Tensor:
    return torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("bits", "calibration"), [(6, "gaussian"), (6, "lloyd"), (6, "quantile"), ([5] + [3] * 15, "lloyd"), (3, "gaussian")]
)
def test_quantize_after_training(tmp_path, bits, calibration):
    tokenizer, x = continuous("TailDrop"), images()
    before = {k: v.clone() for k, v in tokenizer.state_dict().items()}
    made = quantize_after_training(tokenizer, x, bits, calibration)
    assert not made.training and made.is_discrete and made.name == f"tiny-{calibration}-{made.bits_per_token}"
    latents = quantize_after_training(tokenizer, tokenizer.encode_latents(x).detach(), bits, calibration)
    assert all(torch.equal(v, latents.state_dict()[k]) for k, v in made.state_dict().items())

    seq = made.encode(x[:4])
    assert seq.shape == (4, 4) and seq.vocab_size == 2**made.bits_per_token
    assert (seq.bits is None) == (made.bits_per_token <= 62)
    mean = tokenizer.quantizer(tokenizer.encode_latents(x[:4])).q
    wanted, ours = tokenizer.decode_latents(mean).clamp(0, 1), made.decode(seq)
    blank = tokenizer.decode_latents(torch.zeros_like(mean)).clamp(0, 1)
    assert (ours - wanted).square().mean() < 0.2 * (blank - wanted).square().mean(), "codes stand for their latents"
    assert torch.equal(made.decode(seq[:, :2]), made.decode(made.encode(x[:4], tokens=2)))

    made.save_pretrained(tmp_path / "made")
    again = Tokenizer1D.from_pretrained(tmp_path / "made")
    assert again.model_id == made.model_id and torch.equal(again.encode(x[:4]).data, seq.data)
    seq.save(tmp_path / "a.tok")
    loaded = TokenSequence.load(tmp_path / "a.tok")
    assert torch.equal(loaded.data, seq.data) and torch.equal(again.decode(loaded), ours)

    assert tokenizer.quantizer.vocab_size == 0
    assert all(torch.equal(v, before[k]) for k, v in tokenizer.state_dict().items()), "the tokenizer itself is untouched"
    assert not {p.data_ptr() for p in made.parameters()} & {p.data_ptr() for p in tokenizer.parameters()}


def test_more_bits_come_closer():
    tokenizer, x = continuous(), images()
    mean = tokenizer.quantizer(tokenizer.encode_latents(x)).q
    errors = []
    for bits in (1, 2, 4, 6):
        made = quantize_after_training(tokenizer, x, bits)
        errors.append((made.quantizer(tokenizer.encode_latents(x)).q - mean).square().mean().item())
    assert all(b < 0.5 * a for a, b in zip(errors, errors[1:]))


def test_what_cannot_be_quantized_is_refused():
    tokenizer = continuous()
    made = quantize_after_training(tokenizer, images(4))
    for arguments, message in (
        ((made, images(4)), "discrete already"),
        ((tokenizer, images(4), 6, "lloyd"), "at least 64 latents, got 16"),
        ((tokenizer, torch.zeros(4, 4, 7)), "width 32"),
        ((tokenizer, torch.full((4, 4, 32), torch.nan)), "finite"),
        ((tokenizer, torch.zeros(4, 32)), "images"),
        ((tokenizer, images(4), 6, "other"), "calibration must be"),
        ((tokenizer, images(4), [6] * 15), "16 of them"),
        ((tokenizer, images(4), 13), "1..12"),
        ((tokenizer, images(4), 10, "tokenbridge"), "9 bits"),
    ):
        with pytest.raises(ModelError, match=message):
            quantize_after_training(*arguments)
    with pytest.raises(ModelError, match="together"):
        PerChannel(64, 6)
