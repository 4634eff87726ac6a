"""Interrupted training equals uninterrupted training bit for bit: weights, average, optimizer, losses, data."""

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.data.files import encoded, folder, shard
from tests.training import tiny
from tok1d.data.module import DrawnData, PhotoData
from tok1d.errors import ModelError, UsageError
from tok1d.training.card import training_lines
from tok1d.training.export import load_run
from tok1d.training.tasks import ReconstructionTask

SEEN = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "global_step")


def equal(one: tiny.Done, two: tiny.Done) -> None:
    a, b = one.checkpoint(), two.checkpoint()
    assert tiny.differences({k: a[k] for k in SEEN}, {k: b[k] for k in SEEN}) == []
    assert tiny.differences(one.task.state_dict(), two.task.state_dict()) == []
    for key in ("total",):  # every later decision counts from here
        progress = [c["loops"]["fit_loop"]["epoch_loop.batch_progress"][key] for c in (a, b)]
        assert progress[0] == progress[1]


class Kind:
    """One combination of data, model and trainer settings."""

    def __init__(self, tmp: Path, name: str) -> None:
        self.name, self.options, self.window = name, {}, 0
        self.steps, self.crash_at, self.weights = 7, 5, {"l1": 1.0, "l2": 1.0}
        if name == "shard, moving averages, restarts":
            path = shard(tmp / "s.tar", encoded(10))
            self.data = lambda: PhotoData([str(path)], size=16, batch_size=4, workers=0, cache=True, seed=3)
            self.model = tiny.vq_ema
        elif name == "folder, sampled latents, accumulation":
            path = folder(tmp / "f", encoded(6) | {"006.png": b"broken"})
            self.data = lambda: PhotoData([str(path)], size=16, batch_size=2, workers=2, seed=3)
            self.model, self.options, self.crash_at = tiny.kl, {"accumulate_grad_batches": 2}, 11
        else:
            self.data = lambda: DrawnData(images=5, val_images=2, size=32, batch_size=2)
            self.model, self.window, self.weights = tiny.spectral, 16, {"log_l2": 1.0, "codebook": 0.1}

    def setup(self, place: Path, **more) -> tiny.Setup:
        task = ReconstructionTask(self.model(), weights=self.weights, lr=1e-2, warmup_steps=3, window=self.window)
        return tiny.Setup(place, task, self.data(), self.steps, options=dict(self.options), **more)


@pytest.mark.parametrize(
    "name", ["shard, moving averages, restarts", "folder, sampled latents, accumulation", "drawn, windows, codebook loss"]
)
def test_interrupted_equals_uninterrupted(tmp_path, name):
    kind = Kind(tmp_path, name)
    whole = kind.setup(tmp_path / "whole").run()
    assert len(whole.record.losses) > 2 * 10 / 4, "more than two epochs"
    torch.manual_seed(99)  # another process, another global state
    with pytest.raises(RuntimeError, match="power cut"):
        kind.setup(tmp_path / "cut", crash_at=kind.crash_at).run()
    again = kind.setup(tmp_path / "cut").run(tmp_path / "cut/last.ckpt")
    done = len(whole.record.losses) - len(again.record.losses)
    assert 0 < done <= kind.crash_at
    assert again.record.losses == whole.record.losses[done:] and again.record.batches == whole.record.batches[done:]
    equal(whole, again)
    if "restarts" in name:
        vq = whole.task.tokenizer.quantizer
        changed = (vq.codebook != tiny.vq_ema().quantizer.codebook).any(1)
        assert int(vq.steps) == 7 and changed.sum() > 32, "codes are learned and restarted in this run"


class Stop(tiny.lightning.Callback):
    def __init__(self, number: int, batch: int) -> None:
        self.number, self.batch = number, batch

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        if batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_stops(tmp_path, number, capsys):
    """In the middle of an accumulation and between checkpoints: the file continues exactly."""
    kind = Kind(tmp_path, "folder, sampled latents, accumulation")
    whole = kind.setup(tmp_path / "whole", save_every=100).run()
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        kind.setup(tmp_path / "cut", save_every=100, more=[Stop(number, 4)]).run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    said = capsys.readouterr().err
    assert "stopping" in said and "stopped after step 3" in said and "last.ckpt" in said
    again = kind.setup(tmp_path / "cut", save_every=100).run(tmp_path / "cut/last.ckpt")
    assert again.record.losses == whole.record.losses[6:]
    equal(whole, again)


@pytest.mark.parametrize("every", [2, 100])
def test_the_last_step_is_saved_and_can_be_continued(tmp_path, every):
    """Checkpoints at every n-th step miss the fifth; a longer run goes on from there."""

    def run(place: str, steps: int, resume: Path | None = None) -> tiny.Done:
        return tiny.Setup(tmp_path / place, ReconstructionTask(tiny.fsq(), warmup_steps=10), steps=steps, save_every=every).run(resume)

    five = run("a", 5)
    assert five.checkpoint()["global_step"] == 5
    more, whole = run("a", 8, five.last), run("b", 8)
    assert more.record.losses == whole.record.losses[5:]
    equal(whole, more)
    seen = [c["callbacks"]["Throughput"]["images"] for c in (more.checkpoint(), whole.checkpoint())]
    assert seen == [32, 32], "images of the interrupted run are counted once"


def test_a_loss_that_starts_late(tmp_path):
    """Until then the run is that without the loss, to the bit; steps are the optimizer's; a resumed run knows where it is."""

    def run(place: str, weights: dict[str, float], starts: dict[str, int] | None, resume: Path | None = None, **more) -> tiny.Done:
        task = ReconstructionTask(tiny.fsq(), weights=weights, lr=1e-2, warmup_steps=1, starts=starts)
        return tiny.Setup(tmp_path / place, task, steps=5, options={"accumulate_grad_batches": 2}, **more).run(resume)

    both = {"l1": 1.0, "l2": 3.0}
    without, late = run("without", {"l1": 1.0}, None), run("late", both, {"l2": 3})
    assert late.record.losses[:6] == without.record.losses[:6], "6 batches are 3 steps"
    assert late.record.losses[6] > 1.2 * without.record.losses[6], "the same weights, and a loss more"
    with pytest.raises(RuntimeError, match="power cut"):
        run("cut", both, {"l2": 3}, crash_at=5)
    again = run("cut", both, {"l2": 3}, tmp_path / "cut/last.ckpt")
    assert again.record.losses == late.record.losses[4:]
    equal(late, again)
    assert late.checkpoint()["run_settings"]["starts"] == {"l2": 3}
    card = "\n".join(training_lines(load_run(late.last)))
    assert "| Losses | 1 l1 + 3 l2 (from step 3) |" in card
    for starts in ({"l2": -1}, {"lpips_vgg": 3}):
        with pytest.raises(UsageError, match=r"starts: steps, 0 or more, of losses that have a weight \(l1, l2\); got "):
            run("none", both, starts)


def test_another_model_cannot_be_continued(tmp_path):
    first = tiny.Setup(tmp_path / "a", ReconstructionTask(tiny.fsq()), steps=2).run()
    with pytest.raises(ModelError, match=r"checkpoint is of another model: its quantizer has levels"):
        tiny.Setup(tmp_path / "b", ReconstructionTask(tiny.titok(tiny.FSQ([8, 8, 4]))), steps=3).run(first.last)
