"""Halting heads: what they predict is monotone, what is chosen from it is the smallest that is enough, ids never change."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tok1d
from tests.dct_model import HOME, SIZE, TOKENS, make_model, picture
from tok1d import tokfile
from tok1d.cli.main import main
from tok1d.errors import ModelError, TokenError, UsageError
from tok1d.image_io import write
from tok1d.tokenizers.budget import Auto, Budget
from tok1d.tokenizers.folder import HALTING_NAME, WEIGHTS_NAME
from tok1d.tokenizers.halting import CurveHead, HaltingHead
from tok1d.tokenizers.quantizers.growing_scale import GrowingScaleVQ
from tok1d.tokenizers.tokenizer import Tokenizer1D


class Oracle(HaltingHead):
    """The true error of pictures that hold nothing but what 32 tokens say: the energy of the coefficients left out."""

    __module__ = HOME

    def __init__(self, quality: float = 24.0) -> None:
        super().__init__()
        self.tokens, self.dim, self.metric, self.quality = TOKENS, 1, "psnr", quality

    def forward(self, codes: Tensor) -> Tensor:
        power = codes[..., 0].double().square()
        left = power.sum(1, keepdim=True) - power.cumsum(1)
        return (left.clamp(min=1e-12) / (3 * SIZE * SIZE)).log()


@pytest.fixture
def model() -> Tokenizer1D:
    model = make_model()
    model.halting = Oracle()
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Pictures that the model codes without any error."""
    plain = make_model()
    pictures = torch.cat([picture(seed, detail=detail) for seed, detail in enumerate((0.0, 0.3, 0.6, 1.0, 2.0, 0.1))])
    return plain.decode(plain.encode(pictures * 0.5 + 0.25))


def trained_like(**options) -> CurveHead:
    """A head whose last layers are not zero, so that every weight matters."""
    torch.manual_seed(0)
    head = CurveHead(TOKENS, 1, 16, **options)
    torch.nn.init.normal_(head.amount[1].weight)
    torch.nn.init.normal_(head.rest.weight)
    return head.eval().requires_grad_(False)


# the choice --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*miss the target")
@pytest.mark.parametrize("target", [24.0, 28.0, 30.0, 33.0])
def test_a_true_prediction_chooses_what_a_search_finds(model, images, target):
    seq = model.encode(images)
    auto, search = Auto(target).search(model, images, seq), Budget(psnr=target).search(model, images, seq)
    assert auto.tokens == search.tokens and auto.reached == search.reached
    finite = [i for i, value in enumerate(search.psnr) if value < 60]  # the last token leaves no error at all
    assert [auto.psnr[i] for i in finite] == pytest.approx([search.psnr[i] for i in finite], abs=0.01) and len(finite) > 3
    assert len(set(auto.tokens)) > 1
    chosen = model.encode(images, tokens=Auto(target))
    assert chosen.lengths.tolist() == list(search.tokens) and torch.equal(chosen.ids, search.sequence.ids)


def test_nothing_is_decoded(model, images, monkeypatch):
    monkeypatch.setattr(model.decoder, "forward", lambda *a, **k: pytest.fail("decoded"))
    assert model.encode(images, tokens="auto").lengths.tolist() == list(Auto(24.0).search(model, None, model.encode(images)).tokens)


def test_an_image_is_the_same_alone_and_in_a_batch(images):
    model = make_model()
    model.halting = trained_like()
    alone = [Auto(14.5).search(model, None, model.encode(image)) for image in images]
    together = Auto(14.5).search(model, None, model.encode(images))
    assert [r.tokens[0] for r in alone] == list(together.tokens)
    assert [r.psnr[0] for r in alone] == pytest.approx(list(together.psnr), abs=1e-4)


def test_tiles_of_an_image_share_a_length_that_their_mean_error_asks_for(model):
    big = make_model().decode(make_model().encode(picture(3, 32, 48) * 0.5 + 0.25, policy="tile"))
    seq = model.encode(big, policy="tile")
    result = Auto(26.0).search(model, None, seq)
    again = {k: model.decode(model.encode(big, k, policy="tile")) for k in range(1, TOKENS + 1)}
    enough = [k for k, out in again.items() if -10 * (out - big).square().mean().log10() >= 26.0]
    assert result.tokens == (min(enough),) and 1 < min(enough) < TOKENS and len(seq) == 6


def test_bytes_are_never_exceeded(model, images):
    seq = model.encode(images)
    result = Auto(33.0, max_bytes=32 + 4 + 9).search(model, images, seq)
    assert max(result.tokens) == 9
    assert [k < 9 for k in result.tokens] == [k < 9 for k in Auto(33.0).search(model, images, seq).tokens]
    assert all(len(tokfile.pack(result.sequence[i : i + 1, :k])) <= 45 for i, k in enumerate(result.tokens))
    assert result.reached == tuple(p >= 33.0 - 1e-4 for p in result.psnr)


def test_what_is_predicted_to_miss_keeps_everything_and_is_said(model):
    with pytest.warns(UserWarning, match="1 of 1 images by prediction miss"):
        seq = model.encode(picture(0), tokens=Auto(500.0))
    assert seq.lengths.tolist() == [TOKENS]


def test_no_images(model):
    result = Auto().search(model, None, model.encode(picture(0))[:0])
    assert result.tokens == () and len(result.sequence) == 0


def test_lpips_falls_towards_its_target(images):
    model = make_model()
    model.halting = trained_like(metric="lpips", quality=0.3)
    curve = model.halting.quality_of(model.halting(model.codes_of(model.encode(images).ids, torch.full((6,), TOKENS))))
    target = float(curve[:, 10].mean())
    result = Auto(target).search(model, None, model.encode(images))
    for i, k in enumerate(result.tokens):
        assert curve[i, k - 1] <= target * (1 + 1e-5) or k == TOKENS
        assert k == 1 or curve[i, k - 2] > target
    assert result.lpips == pytest.approx([float(curve[i, k - 1]) for i, k in enumerate(result.tokens)]) and result.psnr == (None,) * 6


# the head ----------------------------------------------------------------------------------------------------------------


def test_the_curve_never_rises_whatever_the_codes():
    head = trained_like()
    for scale in (0.0, 1e-6, 1.0, 1e6):
        curve = head(torch.randn(3, TOKENS, 1) * scale)
        assert curve.dtype == torch.float32 and curve.shape == (3, TOKENS)
        assert torch.isfinite(curve).all() and (curve.diff(dim=1) <= 0).all()


def test_untrained_it_starts_at_a_decibel_for_each_doubling():
    head = CurveHead(256, 1)
    curve = head.quality_of(head(torch.ones(1, 256, 1)))[0]  # codes of the usual size
    k = torch.arange(1, 257)
    torch.testing.assert_close(curve, 14 + 3 * (k + 1).log10(), atol=1e-3, rtol=0)


def test_it_is_exact_for_an_orthonormal_transform(images):
    """With nothing learned but two constants: the amounts are the energies of the codes."""
    head, oracle = CurveHead(TOKENS, 1, 8), Oracle()
    with torch.no_grad():
        head.level.fill_(-math.log(3 * SIZE * SIZE) / head.GAIN)
        head.rest.bias.fill_(-40)
    codes = make_model().codes_of(make_model().encode(images).ids, torch.full((len(images),), TOKENS))
    torch.testing.assert_close(head(codes)[:, :24].double(), oracle(codes)[:, :24], atol=0.02, rtol=0)


def test_usual_sizes_are_the_mean_over_the_first_images():
    head, codes = CurveHead(TOKENS, 3, 8), torch.randn(700, TOKENS, 3)
    for part in codes[:600].split(100):
        head.observe(part)
    expected = codes[:600].square().mean((0, 2))
    torch.testing.assert_close(head.power, expected, atol=1e-4, rtol=1e-4)
    head.observe(codes[600:])  # enough were seen
    torch.testing.assert_close(head.power, expected, atol=1e-4, rtol=1e-4)
    assert head.seen == 600 and {"power", "seen"} <= set(head.state_dict())


def test_it_computes_in_float32_under_autocast():
    head, codes = trained_like(), torch.randn(2, TOKENS, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(codes), head(codes.float()))
    assert torch.equal(head(codes), head(codes))


# disk and identity -------------------------------------------------------------------------------------------------------


def test_a_head_changes_neither_ids_nor_the_id_nor_the_weights_file(tmp_path, images):
    plain, with_head = make_model(), make_model()
    with_head.halting = trained_like()
    assert plain.model_id == with_head.model_id
    plain.save_pretrained(tmp_path / "plain")
    with_head.save_pretrained(tmp_path / "head")
    assert (tmp_path / "plain" / WEIGHTS_NAME).read_bytes() == (tmp_path / "head" / WEIGHTS_NAME).read_bytes()
    assert not (tmp_path / "plain" / HALTING_NAME).exists() and "halting" not in plain.to_config()
    a, b = tok1d.load(tmp_path / "plain"), tok1d.load(tmp_path / "head")
    assert a.model_id == b.model_id == plain.model_id and a.halting is None
    seq = a.encode(images)
    assert torch.equal(seq.ids, b.encode(images).ids) and torch.equal(a.decode(seq), b.decode(seq))
    codes = torch.randn(2, TOKENS, 1)
    assert torch.equal(b.halting(codes), with_head.halting(codes)) and b.halting.to_config() == with_head.halting.to_config()


def test_half_precision_keeps_the_head_close(tmp_path):
    model = make_model()
    model.halting = trained_like()
    model.save_pretrained(tmp_path, dtype=torch.float16)
    codes = torch.randn(2, TOKENS, 1)
    torch.testing.assert_close(tok1d.load(tmp_path).halting(codes), model.halting(codes), atol=0.05, rtol=0)


def test_folders_with_a_missing_or_foreign_head_are_refused(tmp_path):
    model = make_model()
    model.halting = trained_like()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong, words in (({"tokens": 31}, "31 tokens"), ({"width": 8}, "do not fit"), ({"class": "os.system"}, "os.system")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "halting": {**config["halting"], **wrong}}))
        with pytest.raises(ModelError, match=words):
            tok1d.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / HALTING_NAME).unlink()
    with pytest.raises(ModelError, match=HALTING_NAME):
        tok1d.load(tmp_path)


def test_only_nested_models_with_a_code_for_each_token_have_one():
    plain = make_model(nested=False)
    with pytest.raises(ModelError, match="nested"):
        Tokenizer1D(plain.encoder, plain.quantizer, plain.decoder, plain.lengths, (SIZE, SIZE), halting=Oracle())
    scales = GrowingScaleVQ(vocab_size=8, dim=1, scales=[1, TOKENS])
    nested = make_model()
    with pytest.raises(ModelError, match="GrowingScaleVQ"):
        Tokenizer1D(nested.encoder, scales, nested.decoder, nested.lengths, (SIZE, SIZE), halting=Oracle())


# what is refused, and the command line -----------------------------------------------------------------------------------


def test_refusals(model, images):
    with pytest.raises(TokenError, match="no halting head.*target-psnr"):
        make_model().encode(images, tokens="auto")
    with pytest.raises(TokenError, match="'automatic'"):
        model.encode(images, tokens="automatic")
    with pytest.raises(TokenError, match="all 32 tokens of an image, got 8"):
        Auto().search(model, None, model.encode(images, 8))
    for wrong in (0.0, -3.0, math.nan):
        with pytest.raises(TokenError, match="quality"):
            Auto(wrong)
    with pytest.raises(UsageError, match="max_bytes"):
        Auto(max_bytes=0)
    with pytest.raises(TokenError, match="metric"):
        CurveHead(4, 1, metric="ssim")
    with pytest.raises(TokenError, match="quality"):
        CurveHead(4, 1, quality=0)


@pytest.fixture
def folder(tmp_path) -> Path:
    model = make_model()
    model.halting = trained_like(quality=18.0)
    model.save_pretrained(tmp_path / "model")
    for i in range(3):
        write(tmp_path / f"{i}.png", picture(i, detail=i))
    return tmp_path


def test_tok_encode_auto(folder, capsys):
    names = [str(folder / f"{i}.png") for i in range(3)]
    assert main(["encode", *names, "--model", str(folder / "model"), "--tokens", "auto", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model = tok1d.load(folder / "model")
    for name, row in zip(names, rows):
        expected = Auto().search(model, None, model.encode(tok1d.read(name)))
        assert row["tokens"] == expected.tokens[0] == tokfile.load(Path(name).with_suffix(".tok")).shape[1]
        assert row["predicted_psnr"] == pytest.approx(expected.psnr[0], abs=1e-3) and "psnr" not in row
    assert main(["encode", *names, "-f", "--model", str(folder / "model"), "--tokens", "auto", "--quality", "25", "--json"]) == 0
    more = [json.loads(line)["tokens"] for line in capsys.readouterr().out.splitlines()]
    before = [r["tokens"] for r in rows]
    assert all(a <= b for a, b in zip(before, more)) and sum(before) < sum(more)
    assert main(["encode", names[0], "-f", "--model", str(folder / "model"), "--tokens", "auto", "--quality", "30", "--max-bytes", "39"]) == 0
    out = capsys.readouterr().out
    assert "3 tokens" in out and "39 bytes" in out and "predicted PSNR" in out


def test_tok_encode_auto_refusals(folder, capsys, tmp_path):
    name = str(folder / "0.png")
    make_model().save_pretrained(tmp_path / "plain")
    assert main(["encode", name, "--model", str(tmp_path / "plain"), "--tokens", "auto"]) == 1
    assert "no halting head" in capsys.readouterr().err
    for more, words in (
        (["--tokens", "auto", "--target-psnr", "20"], "predicts"),
        (["--quality", "20"], "--tokens auto"),
        (["--tokens", "8", "--quality", "20"], "--tokens auto"),
        (["--tokens", "8", "--max-bytes", "60"], "fixes the number"),
    ):
        assert main(["encode", name, "--model", str(folder / "model"), *more]) == 2
        assert words in capsys.readouterr().err
    assert not (folder / "0.tok").exists()


def test_the_shipped_default_with_its_head_is_the_model_that_it_was(tmp_path):
    shipped = Path(tok1d.__file__).parent / "weights/default"
    config = json.loads((shipped / "config.json").read_text())
    assert config.pop("halting")["quality"] > 0 and (shipped / HALTING_NAME).stat().st_size < 300_000
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / WEIGHTS_NAME).symlink_to(shipped / WEIGHTS_NAME)
    plain, model = tok1d.load(tmp_path), tok1d.load("default")
    images = torch.cat([picture(0, 256, 256, 0.0), picture(1, 256, 256, 2.0)])
    tokfile.save(plain.encode(images[:1], 9), tmp_path / "a.tok")
    old = tokfile.load(tmp_path / "a.tok")
    assert plain.model_id == model.model_id == old.model_id
    assert torch.equal(plain.encode(images).ids, model.encode(images).ids) and torch.equal(plain.decode(old), model.decode(old))
    easy, hard = model.encode(images, tokens=Auto(20.0)).lengths.tolist()
    assert easy < hard and model.decode(model.encode(images[:1], tokens="auto")).shape == (1, 3, 256, 256)
