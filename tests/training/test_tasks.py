"""ReconstructionTask and its callbacks: schedule, clipping, averaging, frozen networks, precision, faults."""

import csv
import errno
import math
import os

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from tests.training import tiny
from tok1d.data.module import DrawnData
from tok1d.errors import ModelError, TokError, UsageError
from tok1d.image_io import read_uint8
from tok1d.training.callbacks import CodebookUsage, ReconstructionGrid, reconstruction_grid
from tok1d.training.export import load_run
from tok1d.training.tasks import ReconstructionTask


class Watch(tiny.lightning.Callback):
    """Learning rates, gradient norms and weights of each step."""

    def __init__(self):
        self.rates, self.norms, self.weights = [], [], []

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.rates.append(task.optimizers().param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in task.parameters() if p.grad is not None)))
        self.weights.append({k: v.clone() for k, v in task.state_dict().items()})


def test_warm_up_and_cosine(tmp_path):
    watch = Watch()
    task = ReconstructionTask(tiny.fsq(), lr=0.1, warmup_steps=4, final_lr=0.2)
    tiny.Setup(tmp_path, task, steps=8, more=[watch]).run()
    cosine = [0.02 + 0.08 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert watch.rates == pytest.approx([0.025, 0.05, 0.075, 0.1, *cosine])
    assert cosine[0] == pytest.approx(0.1) and cosine[2] == pytest.approx(0.06)


def test_schedule_counts_optimizer_steps(tmp_path):
    watch = Watch()
    task = ReconstructionTask(tiny.fsq(), lr=0.1, warmup_steps=2, final_lr=0.0)
    done = tiny.Setup(tmp_path, task, steps=3, more=[watch], options={"accumulate_grad_batches": 2}).run()
    assert watch.rates == pytest.approx([0.05, 0.05, 0.1, 0.1, 0.1, 0.1])
    assert len(done.record.losses) == 6 and done.trainer.global_step == 3


def test_gradients_are_clipped(tmp_path):
    watch = Watch()
    done = tiny.Setup(tmp_path, ReconstructionTask(tiny.fsq()), steps=2, more=[watch], options={"gradient_clip_val": 1e-3}).run()
    assert max(watch.norms) < 1.001e-3 and done.trainer.callback_metrics["train/grad_norm"] > 1e-2


def test_average_is_exact_and_buffers_are_copied(tmp_path):
    watch = Watch()
    done = tiny.Setup(tmp_path, ReconstructionTask(tiny.vq_ema(), lr=1e-2), steps=6, more=[watch]).run()
    parameters = {name for name, _ in done.task.named_parameters()}
    mean = dict(watch.weights[0])
    for n, now in enumerate(watch.weights[1:], start=1):
        decay = min(0.9, (1 + n) / (10 + n))
        mean = {k: decay * mean[k] + (1 - decay) * v if k in parameters else v for k, v in now.items()}
    exported = load_run(done.last).tokenizer.state_dict()
    buffers = [k for k in mean if k not in parameters]
    assert any("codebook" in k for k in buffers)
    for key, value in mean.items():
        got = exported[key.removeprefix("tokenizer.")]
        if key in parameters:
            torch.testing.assert_close(got, value, atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(got, watch.weights[-1][key]), key
    live = done.checkpoint()["current_model_state"]
    assert tiny.differences(live, watch.weights[-1]) == []
    assert any(not torch.equal(live[k], mean[k]) for k in parameters)


class Features:
    """In the place of LPIPS: a network that is used and not trained."""

    built = 0

    def __init__(self, net):
        type(self).built += 1
        self.model = nn.Conv2d(3, 4, 3).requires_grad_(False)

    def to(self, device):
        return self

    def features(self, images):
        return self.model(images)

    def compare(self, a, b):
        return (a - b).square().mean((1, 2, 3))

    def __call__(self, a, b):
        return self.compare(self.features(a), self.features(b))


def test_perceptual_networks_are_not_trained_saved_or_copied(tmp_path, monkeypatch):
    from tok1d.eval import perceptual

    monkeypatch.setattr(perceptual, "Perceptual", Features)
    task = ReconstructionTask(tiny.fsq(), weights={"l1": 1.0, "lpips_vgg": 1.0})
    task.setup("validate")
    net = task.perceptual["lpips_vgg"]
    before = net.model.weight.clone()
    done = tiny.Setup(tmp_path, task, steps=2, options={"limit_val_batches": 1, "val_check_interval": 1}).run()
    assert Features.built == 1 and torch.equal(net.model.weight, before)
    assert {k.partition(".")[0] for k in done.ema.means} == {"tokenizer"}
    saved = done.checkpoint()
    assert all(k.startswith("tokenizer.") for k in (*saved["state_dict"], *saved["current_model_state"]))
    count = sum(len(g["params"]) for g in saved["optimizer_states"][0]["param_groups"])
    assert count == len(list(task.tokenizer.parameters()))
    metrics = done.trainer.callback_metrics
    assert metrics["train/lpips_vgg"] > 0 and metrics["val/lpips_vgg_4"] > 0 and metrics["val/lpips_vgg_1"] > 0


def test_losses_of_the_quantizer_have_their_published_weights():
    assert ReconstructionTask(tiny.vq_ema()).weights == {"l1": 1.0, "commitment": 0.25}
    assert ReconstructionTask(tiny.vq_ema(), weights={"l2": 2.0, "commitment": 0.0}).weights == {"l2": 2.0}
    fitted = ReconstructionTask(tiny.spectral(), weights={"l2": 1.0})
    assert fitted.weights == {"l2": 1.0} and not fitted.tokenizer.quantizer.codebooks.requires_grad
    assert ReconstructionTask(tiny.spectral(), weights={"codebook": 1.0}).tokenizer.quantizer.codebooks.requires_grad


def test_mixed_precision(tmp_path):
    for tokenizer, size in ((tiny.fsq(), 16), (tiny.vq_ema(), 16), (tiny.spectral(), 32)):
        task = ReconstructionTask(tokenizer, weights={"l1": 1.0, "log_l2": 0.1})
        data = DrawnData(images=4, val_images=2, size=size, batch_size=2)
        options = {"precision": "bf16-mixed", "limit_val_batches": 1, "val_check_interval": 2}
        done = tiny.Setup(tmp_path / tokenizer.quantizer.__class__.__name__, task, data, steps=2, options=options).run()
        assert all(p.dtype == torch.float32 for p in task.parameters())
        assert all(math.isfinite(loss) for loss in done.record.losses)


def test_logs_grids_and_codebooks(tmp_path):
    """The grid and the codebook statistics are those of the averaged weights."""
    task = ReconstructionTask(tiny.fsq(), lr=1e-2)
    data = DrawnData(images=8, val_images=5, size=16, batch_size=4)
    data.val_batch_size = 3
    options = {"logger": CSVLogger(tmp_path, "csv"), "limit_val_batches": 1.0, "val_check_interval": 2}
    done = tiny.Setup(tmp_path / "c", task, data, steps=4, more=[ReconstructionGrid(2, (1, 4, 99)), CodebookUsage()], options=options).run()
    images = torch.stack([data.val_set[i]["image"] for i in range(5)]).float() / 255
    tokenizer = load_run(done.last).tokenizer
    with torch.no_grad():
        wanted = reconstruction_grid(tokenizer, images[:2], (1, 4, 99))
        ids = tokenizer.quantizer(tokenizer.encode_latents(images)).ids
        error = (tokenizer(images, torch.full((5,), 4)).reconstruction.clamp(0, 1) - images).square().flatten(1).mean(1)
    grids = sorted((tmp_path / "csv").rglob("grids/*.png"))
    assert [g.name for g in grids] == ["step-0000002.png", "step-0000004.png"] and wanted.shape == (3, 48, 32)
    assert (read_uint8(grids[-1])[0].float() / 255 - wanted).abs().max() < 1 / 255
    (file,) = (tmp_path / "csv").rglob("metrics.csv")
    with file.open() as f:
        rows = list(csv.DictReader(f))
    last = next(r for r in reversed(rows) if r["val/usage"])
    assert float(last["val/usage"]) == pytest.approx(len(ids.unique()) / 512)
    assert float(last["val/psnr_4"]) == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)
    assert 1 <= float(last["val/perplexity"]) <= len(ids.unique()) + 1e-6
    assert 0 <= float(last["val/position_entropy"]) <= math.log2(5) + 1e-6
    for name in ("train/l1", "train/loss", "train/lr", "train/grad_norm", "images_per_second", "model_images_per_second", "loader_images_per_second", "data_wait"):
        assert any(r[name] for r in rows), name


# faults ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def full(fd):
        calls.append(fd)
        if len(calls) > 2:  # the files of step 2 are through
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TokError, match=r"checkpoint not written.*No space left.*--ckpt_path last"):
        tiny.Setup(tmp_path, ReconstructionTask(tiny.fsq())).run()
    assert load_run(tmp_path / "last.ckpt").step == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch=0-step=2.ckpt", "last.ckpt"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"window": 8}, "GridDecoder renders whole images only"),
        ({"val_tokens": [1, 5]}, "has no 5 tokens, only 1 to 4"),
        ({"init_from": "nowhere"}, "init_from nowhere: cannot be loaded"),
    ],
)
def test_impossible_settings(settings, said):
    with pytest.raises(TokError, match=said):
        ReconstructionTask(tiny.fsq(), **settings)


def test_windows_must_fit():
    for window in (12, 40, -8):
        with pytest.raises(UsageError, match="multiple of 8 up to 32"):
            ReconstructionTask(tiny.spectral(), window=window)


def test_unknown_loss_and_endless_run(tmp_path):
    with pytest.raises(ModelError, match=r"do not exist here: \['nonsense'\]; there are \['l1'\]"):
        tiny.Setup(tmp_path, ReconstructionTask(tiny.fsq(), weights={"l1": 1.0, "nonsense": 1.0})).run()
    with pytest.raises(UsageError, match=r"set trainer\.max_steps"):
        tiny.Setup(tmp_path, ReconstructionTask(tiny.fsq()), steps=-1).run()


def test_start_from_another_model(tmp_path, caplog):
    source = tiny.fsq()
    with torch.no_grad():
        source.encoder.proj.weight.fill_(0.5)
    source.save_pretrained(tmp_path / "full")
    assert (ReconstructionTask(tiny.fsq(), init_from=str(tmp_path / "full")).tokenizer.encoder.proj.weight == 0.5).all()
    with pytest.raises(ModelError, match=r"do not fit this tokenizer: its encoder has dim 3 \(here 2\); its quantizer has levels"):
        ReconstructionTask(tiny.titok(tiny.FSQ([8, 8])), init_from=str(tmp_path / "full"))
    with pytest.raises(ModelError, match=r"its encoder has class .*TiTokEncoder \(here .*SpectralEncoder\)"):
        ReconstructionTask(tiny.spectral(), init_from=str(tmp_path / "full"))
