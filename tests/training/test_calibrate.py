"""CalibrationTask: tables measured in a run are those of the latents it saw; no weight moves; what it makes is a model."""

import pytest
import torch

import tok1d
from tests.training import tiny
from tok1d.cli.main import main
from tok1d.data.module import DrawnData
from tok1d.errors import UsageError
from tok1d.tokenizers.decoders.grid import GridDecoder
from tok1d.tokenizers.encoders.titok import TiTokEncoder
from tok1d.tokenizers.quantizers.kl import KL
from tok1d.tokenizers.quantizers.post_training import PerChannel, quantize_after_training
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.tasks import CalibrationTask

VIT = {"width": 32, "depth": 1, "heads": 2, "patch_size": 8, "image_size": 16}


def model(quantizer) -> Tokenizer1D:
    torch.manual_seed(3)
    return Tokenizer1D(TiTokEncoder(4, 8, **VIT), quantizer, GridDecoder(4, 4, **VIT), image_size=(16, 16), name="small")


@pytest.fixture(scope="module")
def continuous(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("continuous")
    model(KL(8)).save_pretrained(folder)
    return str(folder)


def images(data: DrawnData, batches: int) -> torch.Tensor:
    """The first images of a run over ``data``, in its order."""
    from tok1d.data.module import StepSampler

    order = StepSampler(len(data.train_set), data.batch_size, data.seed)
    picks = [index for batch, _ in zip(order, range(batches)) for index, _ in batch]
    return torch.stack([data.train_set[i]["image"] for i in picks]).float() / 255


@pytest.mark.parametrize("calibration", ["gaussian", "lloyd", "tokenbridge"])
def test_a_run_measures_the_latents_it_saw(tmp_path, continuous, calibration):
    torch.manual_seed(9)
    task = CalibrationTask(model(PerChannel(4, 3, calibration, posterior=True)), init_from=continuous)
    data = DrawnData(images=12, val_images=3, size=16, batch_size=4)
    before = {k: v.clone() for k, v in task.tokenizer.state_dict().items() if not k.startswith("quantizer.")}
    options = {"limit_val_batches": 1.0, "val_check_interval": 3, "gradient_clip_val": None}
    done = tiny.Setup(tmp_path, task, data, steps=3, save_every=3, options=options).run()

    plain = tok1d.load(continuous)
    wanted = quantize_after_training(plain, images(data, 3), 3, calibration)
    saved = done.checkpoint()["state_dict"]
    for key, value in wanted.quantizer.state_dict().items():
        torch.testing.assert_close(saved[f"tokenizer.quantizer.{key}"], value, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(saved[f"tokenizer.{k}"], v) for k, v in before.items()) and before
    metrics = done.trainer.callback_metrics
    val = torch.stack([data.val_set[i]["image"] for i in range(3)]).float() / 255
    assert metrics["val/psnr_4"].item() == pytest.approx(psnr(wanted.decode(wanted.encode(val)), val), abs=1e-3)
    assert metrics["val/psnr_continuous"].item() == pytest.approx(psnr(plain.decode_latents(plain.encode_latents(val)[..., :4]).clamp(0, 1), val), abs=1e-3)
    assert metrics["train/latents"] == 3 * 4 * 4 and 0 < metrics["val/error"] < 1 and done.trainer.global_step == 3

    assert main(["export", str(tmp_path / "last.ckpt"), str(tmp_path / "model")]) == 0
    made = tok1d.load(tmp_path / "model")
    assert made.is_discrete and torch.equal(made.encode(val).ids, wanted.encode(val).ids)


def psnr(out: torch.Tensor, target: torch.Tensor) -> float:
    return (-10 * (out - target).square().flatten(1).mean(1).log10()).mean().item()


def test_no_more_latents_are_kept_than_were_asked_for(tmp_path, continuous):
    task = CalibrationTask(model(PerChannel(4, 3, posterior=True)), init_from=continuous, most_latents=12)
    done = tiny.Setup(tmp_path, task, DrawnData(images=12, val_images=3, size=16, batch_size=4), steps=3).run()
    assert done.trainer.callback_metrics["train/latents"] == 12 and not task.kept


def test_what_it_is_not_for(tmp_path, continuous):
    with pytest.raises(UsageError, match="only the tables of a PerChannel quantizer are measured after training, got FSQ"):
        CalibrationTask(tiny.fsq())
    make = lambda: CalibrationTask(model(PerChannel(4, 3, posterior=True)), init_from=continuous)  # noqa: E731
    done = tiny.Setup(tmp_path / "a", make(), steps=2).run()
    with pytest.raises(UsageError, match="a calibration is not continued"):
        tiny.Setup(tmp_path / "b", make(), steps=2).run(resume=done.last)
