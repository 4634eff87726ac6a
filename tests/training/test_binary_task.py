"""BinaryTask: the temperature follows from the step, bits grow certain, and a resumed run is the uninterrupted one."""

import pytest
import torch
from torch import nn

from tests.training import tiny
from tok1d.errors import UsageError
from tok1d.tokenizers.quantizers.bernoulli import BernoulliBits
from tok1d.training.losses.adversarial import Adversary
from tok1d.training.tasks import BinaryTask

WEIGHTS = {"smooth_l1": 1.0, "gan": 0.01, "bit_variance": 0.1}


def task(**settings) -> BinaryTask:
    torch.manual_seed(0)
    tokenizer = tiny.titok(BernoulliBits(8, 8))
    settings = {"temperature_start": 2.0, "temperature_end": 0.5, "weights": WEIGHTS, "warmup_steps": 1, **settings}
    return BinaryTask(tokenizer, adversary=Adversary(nn.Conv2d(3, 1, 4, 4)), **settings)


class Temperatures(tiny.lightning.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.seen.append(task.tokenizer.quantizer.temperature)


@pytest.mark.parametrize(("annealed", "wanted"), [(0, [2.0, 2**0.5, 1.0, 0.5**0.5]), (2, [2.0, 1.0, 0.5, 0.5])])
def test_the_temperature_falls_geometrically(tmp_path, annealed, wanted):
    record = Temperatures()
    done = tiny.Setup(tmp_path, task(temperature_steps=annealed), steps=4, more=[record]).run()
    assert record.seen == pytest.approx(wanted) and done.trainer.callback_metrics["train/temperature"].item() == pytest.approx(wanted[-1])
    assert done.checkpoint()["run_settings"]["temperature_end"] == 0.5


def test_accumulated_batches_share_a_temperature(tmp_path):
    record = Temperatures()
    tiny.Setup(tmp_path, task(), steps=2, more=[record], options={"accumulate_grad_batches": 2}).run()
    assert record.seen == pytest.approx([2.0, 2.0, 1.0, 1.0])


def test_bits_grow_certain(tmp_path):
    done = tiny.Setup(tmp_path, task(weights={**WEIGHTS, "bit_variance": 10.0}, lr=1e-2), steps=25, save_every=25).run()
    tokenizer = done.task.tokenizer.eval()
    images = torch.stack([tiny.DrawnData(images=4, size=16).train_set[i]["image"] for i in range(4)]).float() / 255
    start = task().tokenizer.eval()
    with torch.no_grad():
        variance = [m.quantizer(m.encode_latents(images)).losses["bit_variance"].item() for m in (start, tokenizer)]
    assert variance[1] < 0.7 * variance[0], variance


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = tiny.Setup(tmp_path / "whole", task(), steps=4).run()
    with pytest.raises(RuntimeError, match="power cut"):
        tiny.Setup(tmp_path / "first", task(), steps=4, crash_at=3).run()
    rest = tiny.Setup(tmp_path / "rest", task(), steps=4).run(resume=tmp_path / "first/last.ckpt")
    assert rest.record.losses == whole.record.losses[-len(rest.record.losses) :] and rest.record.losses
    assert not tiny.differences(whole.checkpoint()["state_dict"], rest.checkpoint()["state_dict"])


def test_what_it_is_not_for():
    with pytest.raises(UsageError, match="anneals the coin flips of BernoulliBits, got FSQ"):
        BinaryTask(tiny.fsq(), adversary=Adversary(nn.Conv2d(3, 1, 4, 4)))
    with pytest.raises(UsageError, match="temperatures fall"):
        task(temperature_end=3.0)
