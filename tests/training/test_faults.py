"""Faults injected into a run, and what must not depend on settings: accumulation, compiled modules, heads of losses, starts."""

import errno
import json
import math
import os

import pytest
import torch
from torch import nn

import tok1d
from tests.published import publish
from tests.tokenizers import mix
from tests.training import tiny
from tok1d.errors import ModelError, TokError, UsageError
from tok1d.tokenizers.part import Quantizer, build_part
from tok1d.training import callbacks
from tok1d.training.divergence import Watch
from tok1d.training.export import load_run
from tok1d.training.frozen import Frozen
from tok1d.training.losses.base import ImageLoss, LatentLoss
from tok1d.training.tasks import ReconstructionTask

# numbers that are none ------------------------------------------------------------------------------------------


class Faulty(ReconstructionTask):
    """Divides by zero in the second batch of the third step: in the loss, or in its gradient alone."""

    where = "loss"

    def pixel_losses(self, images, target, batch):
        found = super().pixel_losses(images, target, batch)
        if self.batch_number == 5:
            found["l1"] = found["l1"] * torch.nan if self.where == "loss" else found["l1"] + (images - images).square().sum().sqrt()
        return found


@pytest.mark.parametrize(("where", "said"), [("loss", r"loss became nan \(l1 nan\)"), ("gradient", "norm of the gradient became nan")])
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_divergence_names_the_images_and_leaves_the_last_checkpoint(tmp_path, where, said, clip):
    """With accumulated batches: all that the step was to be made of are named."""
    task = Faulty(tiny.fsq())
    task.where = where
    keys = []

    class Keys(tiny.lightning.Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            keys.append(batch["key"])

    options = {"accumulate_grad_batches": 2, "gradient_clip_algorithm": clip}
    with pytest.raises(ModelError, match=rf"{said} after step 2\. .*diverged\.json names the images.*lower learning rate"):
        tiny.Setup(tmp_path, task, more=[Keys()], options=options).run()
    content = json.loads((tmp_path / "diverged.json").read_text())
    assert content["step"] == 2 and [b["batch"] for b in content["batches"]] == [4, 5]
    assert [b["keys"] for b in content["batches"]] == keys[4:6] and len({k for b in keys for k in b}) == 10
    assert [b["loss"] for b in content["batches"]][1:] == (["nan"] if where == "loss" else [content["batches"][1]["losses"]["l1"]])
    assert all(p.isfinite().all() for p in task.parameters())
    run = load_run(tmp_path / "last.ckpt")
    assert run.step == 2 and all(v.isfinite().all() for v in run.tokenizer.state_dict().values())


def test_a_full_disk_does_not_hide_divergence(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    task = Faulty(tiny.fsq())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelError, match=r"loss became nan.*could not be written \(.*No space left"):
        tiny.Setup(tmp_path, task, save_every=100).run()


def test_losses_that_a_scaler_would_skip_for_ever(tmp_path):
    """Float16 gradients that overflow are the scaler's business; a loss that is no number is ours."""
    watch = Watch()
    assert watch.nan_losses() == 0
    watch.note(0, ["a"], torch.tensor(math.inf), {})
    watch.check(watch.nan_losses(), None, 1)
    watch.note(1, ["b"], torch.tensor(math.nan), {"l1": torch.tensor(math.nan)})
    with pytest.raises(ModelError, match=r"the loss became inf|the loss became nan"):
        watch.check(watch.nan_losses(), tmp_path, 1)
    assert [b["keys"] for b in json.loads((tmp_path / "diverged.json").read_text())["batches"]] == [["a"], ["b"]]


# what is in checkpoints -----------------------------------------------------------------------------------------


class Teacher(ImageLoss):
    """Compares what a frozen network sees."""

    def __init__(self):
        super().__init__()
        self.frozen = Frozen(net=nn.Conv2d(3, 4, 3))

    def forward(self, reconstruction, target, batch):
        net = self.frozen.on(reconstruction.device)["net"]
        assert len(batch["key"]) == len(target)
        return (net(reconstruction) - net(target)).square().mean()


class Head(LatentLoss):
    """Says the mean colour from the kept codes, by a trained layer."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, z, q, mask, images, batch):
        kept = torch.ones(q.shape[:2]) if mask is None else mask.float()
        assert z.shape == q.shape and (q[kept == 0] == 0).all()
        return (self.head(q.sum(1) / kept.sum(1, keepdim=True)) - images.mean((2, 3))).square().mean()


def test_teachers_and_heads_of_losses(tmp_path):
    """Teachers are trained, saved and copied by nobody; heads are trained and saved, not averaged and not exported."""
    task = ReconstructionTask(tiny.fsq(), losses={"teacher": Teacher(), "head": Head()}, weights={"l1": 1, "teacher": 1, "head": 1}, lr=1e-2)
    before = task.losses["teacher"].frozen["net"].weight.clone(), task.losses["head"].head.weight.clone()
    done = tiny.Setup(tmp_path, task, steps=4).run()
    assert torch.equal(task.losses["teacher"].frozen["net"].weight, before[0]) and not task.losses["teacher"].frozen["net"].training
    assert not torch.equal(task.losses["head"].head.weight, before[1])
    saved = done.checkpoint()
    names = {f"tokenizer.{k}" for k in task.tokenizer.state_dict()} | {"losses.head.head.weight", "losses.head.head.bias"}
    assert set(saved["state_dict"]) == names and not any("losses" in k for k in done.ema.means)
    assert torch.equal(saved["state_dict"]["losses.head.head.weight"], saved["current_model_state"]["losses.head.head.weight"])
    assert sum(len(g["params"]) for g in saved["optimizer_states"][0]["param_groups"]) == len(list(task.parameters()))
    assert {"train/teacher", "train/head"} <= done.trainer.callback_metrics.keys()
    assert load_run(done.last).tokenizer.max_tokens == 4


def test_losses_without_weight_or_on_windows():
    with pytest.raises(UsageError, match="head has no weight"):
        ReconstructionTask(tiny.fsq(), losses={"head": Head()})

    class Places(Teacher):
        whole_images = True

    with pytest.raises(UsageError, match="words looks at places in whole images; set window: 0"):
        ReconstructionTask(tiny.spectral(), losses={"words": Places()}, weights={"words": 1.0}, window=16)


def test_compiled_modules_keep_their_names_and_numbers(tmp_path):
    make = lambda names: ReconstructionTask(tiny.fsq(), lr=1e-2, compile=names, compile_backend="eager")  # noqa: E731
    plain = tiny.Setup(tmp_path / "plain", make(None), steps=2).run()
    torch._dynamo.reset()
    done = tiny.Setup(tmp_path / "compiled", make(["tokenizer.encoder"]), steps=2).run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert done.task.tokenizer.encoder._compiled_call_impl is not None and plain.task.tokenizer.encoder._compiled_call_impl is None
    assert tiny.differences(plain.checkpoint()["state_dict"].keys(), done.checkpoint()["state_dict"].keys()) == []
    assert done.record.losses == pytest.approx(plain.record.losses, rel=1e-5)
    again = tiny.Setup(tmp_path / "compiled", make(None), steps=3).run(done.last)
    assert len(again.record.losses) == 1
    with pytest.raises(UsageError, match="there is no module 'encoder'.*tokenizer.encoder"):
        make(["encoder"])


# which parameters learn ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", mix.QUANTIZERS)
def test_quantizers_say_whether_pictures_teach_them(name):
    torch.manual_seed(0)
    quantizer = build_part(mix._row(Quantizer, name), Quantizer).train()
    q = quantizer(torch.randn(2, mix.LATENTS, quantizer.dim, requires_grad=True)).q
    q.square().sum().backward()
    learned = [p.grad is not None and bool((p.grad != 0).any()) for p in quantizer.parameters()]
    assert (bool(learned) and all(learned)) == quantizer.picture_gradient and (quantizer.picture_gradient or not any(learned))


@pytest.mark.parametrize("name", ["IBQ", "BernoulliBits", "VQ"])
def test_quantizers_without_losses_learn_from_pictures_if_they_can(tmp_path, name):
    quantizer = build_part(mix._row(Quantizer, name), Quantizer)
    task = ReconstructionTask(tiny.titok(quantizer), weights={"l1": 1.0, **dict.fromkeys(quantizer.loss_weights, 0.0)}, lr=1e-2)
    before = {k: p.clone() for k, p in quantizer.named_parameters()}
    tiny.Setup(tmp_path, task, steps=2).run()
    moved = {k: not torch.equal(p, before[k]) for k, p in quantizer.named_parameters()}
    assert moved and set(moved.values()) == {name != "VQ"}, moved


def test_encoding_with_a_kl_bottleneck_in_training_mode_draws_nothing():
    quantizer, z = tiny.KL(8).train(), torch.randn(1, 2, 8)
    with torch.no_grad():
        assert torch.equal(quantizer(z).q, quantizer.eval()(z).q)
    assert not torch.equal(quantizer.train()(z).q, quantizer.eval()(z).q)


# starts ----------------------------------------------------------------------------------------------------------


def test_start_from_the_shipped_model_and_from_published_weights(tmp_path, caplog):
    shipped = tok1d.load("default")
    fresh = type(shipped).from_config(shipped.to_config())
    assert tiny.differences(ReconstructionTask(fresh, init_from="default").tokenizer.state_dict(), shipped.state_dict()) == []
    golden = publish("titok_vq", tmp_path / "titok", config=None)
    published = tok1d.load(tmp_path / "titok")
    fresh = type(published).from_config(published.to_config())
    task = ReconstructionTask(fresh, init_from=str(tmp_path / "titok"))
    assert golden.state and tiny.differences(task.tokenizer.state_dict(), published.state_dict()) == [] and not caplog.records
    with pytest.raises(ModelError, match=r"init_from titok-x: cannot be loaded: .*titok"):
        ReconstructionTask(tiny.fsq(), init_from="titok-x")
    with pytest.raises(TokError, match=r"init_from default: the weights do not fit this tokenizer: its encoder has tokens 256 \(here 8\)"):
        ReconstructionTask(tiny.spectral(), init_from="default")


def test_settings_that_do_not_show_in_shapes_are_said(tmp_path, caplog):
    tiny.titok(tiny.VQ(64, 6, l2=True)).save_pretrained(tmp_path / "unit")
    ReconstructionTask(tiny.titok(tiny.VQ(64, 6)), init_from=str(tmp_path / "unit"))
    assert "its quantizer has l2 True (here False)" in caplog.text


# throughput ------------------------------------------------------------------------------------------------------


def test_loader_and_model_throughput(tmp_path, monkeypatch, capsys):
    """A clock that only loader and model move: 4 images in 0.1 s and in 0.3 s."""
    clock = [0.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: clock[0])

    class Timed:
        num_workers = 2

        def __init__(self, loader):
            self.loader = loader

        def __iter__(self):
            for batch in self.loader:
                clock[0] += 0.1
                yield batch

    class Slow(tiny.DrawnData):
        def train_dataloader(self):
            return Timed(super().train_dataloader())

    class Model(ReconstructionTask):
        def losses_of(self, *args):
            clock[0] += 0.3
            return super().losses_of(*args)

    data = Slow(images=8, val_images=2, size=16, batch_size=4)
    assert callbacks.loader_rate(iter([]), 3) is None
    done = tiny.Setup(tmp_path, Model(tiny.fsq()), data, steps=3).run()
    values = {k: v.item() for k, v in done.trainer.callback_metrics.items()}
    assert values["loader_images_per_second"] == pytest.approx(40) and values["model_images_per_second"] == pytest.approx(4 / 0.3)
    assert values["data_wait"] == pytest.approx(0.25) and values["images_per_second"] == pytest.approx(10)
    assert "model 13.3 images/s, loader 40.0 images/s, 25% waiting for data" in capsys.readouterr().err

