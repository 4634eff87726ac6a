"""AdversarialTask: one batch is one step of everything, resumed runs, the loop against plain code, adaptive weight, faults."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from tests.tokenizers import mix
from tests.training import tiny
from tok1d.data.module import DrawnData
from tok1d.errors import ModelError, UsageError
from tok1d.tokenizers.part import Decoder, build_part
from tok1d.training.callbacks import CodebookUsage
from tok1d.training.export import load_run
from tok1d.training.losses.adversarial import Adversary
from tok1d.training.losses.discriminators import PatchDiscriminator
from tok1d.training.tasks import AdversarialTask, ReconstructionTask


def adversary(**settings) -> Adversary:
    return Adversary(PatchDiscriminator(width=8, layers=1, seed=3), **{"lr": 1e-2, "start": 2, "lecam": 0.01, **settings})


def task(tokenizer=None, kind=AdversarialTask, **settings) -> AdversarialTask:
    made = settings.pop("adversary", None) or adversary()
    weights = settings.pop("weights", {"l1": 1.0, "gan": 0.5})
    return kind(tokenizer or tiny.vq_ema(), adversary=made, weights=weights, lr=1e-2, warmup_steps=3, **settings)


class Steps(tiny.lightning.Callback):
    """What counts steps, after every batch."""

    def __init__(self):
        self.rows, self.rates, self.judges, self.images = [], [], [], []

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.images.append(batch["image"].float() / 255)
        self.rates.append(task.optimizers().param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        ema = next(c for c in trainer.callbacks if isinstance(c, tiny.EMA))
        taken = [int(s["step"]) for s in task.adversary.optimizer.state.values()]
        self.rows.append((trainer.global_step, task.adversary.steps, ema.updates, max(taken, default=0)))
        self.judges.append({k: v.clone() for k, v in task.adversary.discriminator.state_dict().items()})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_batch_is_one_step_of_whatever_counts_them(tmp_path, accumulate):
    """Steps, averages, schedules, checkpoints and the start of the discriminator, with two optimizers."""
    steps = Steps()
    options = {"accumulate_grad_batches": accumulate}
    done = tiny.Setup(tmp_path, task(), steps=5, save_every=2, more=[steps], options=options).run()
    ends = steps.rows[accumulate - 1 :: accumulate]
    assert ends == [(n, n, n, max(0, n - 2)) for n in range(1, 6)]
    assert [r[0] for r in steps.rows] == [n // accumulate for n in range(1, 5 * accumulate + 1)]
    names = sorted(p.name for p in tmp_path.glob("epoch*.ckpt"))
    assert names and done.checkpoint()["global_step"] == 5
    assert all(torch.load(tmp_path / n, weights_only=True)["global_step"] % 2 == 0 for n in names)
    assert steps.rates[:: accumulate][:4] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01]), "one warm-up step a step"
    before, start = PatchDiscriminator(width=8, layers=1, seed=3).state_dict(), 2 * accumulate
    same = [tiny.differences(judge, before) == [] for judge in steps.judges]
    assert same == [True] * (start + accumulate - 1) + [False] * (len(same) - start - accumulate + 1)
    names = done.trainer.callback_metrics
    assert names["train/gan"] != 0 and names["train/discriminator"] > 0 and names["train/lecam"] >= 0


def interrupted(place, save_every=2, crash_at=None, resume=None) -> tiny.Done:
    made = task(tiny.fsq(), adaptive=True, adversary=adversary(r1=0.1, r1_every=2, warmup_steps=2))
    options = {"accumulate_grad_batches": 2}
    return tiny.Setup(place, made, steps=6, save_every=save_every, crash_at=crash_at, options=options).run(resume)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tiny.Done:
    return interrupted(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(("crash_at", "done"), [(5, 2), (9, 4)])
def test_interrupted_equals_uninterrupted(whole, tmp_path, crash_at, done):
    """Continued where the discriminator starts and later; both in the middle of an accumulation."""
    with pytest.raises(RuntimeError, match="power cut"):
        interrupted(tmp_path, crash_at=crash_at)
    again = interrupted(tmp_path, resume=tmp_path / "last.ckpt")
    assert again.record.losses == whole.record.losses[2 * done :]
    a, b = whole.checkpoint(), again.checkpoint()
    keys = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "adversary", "global_step")
    assert tiny.differences({k: a[k] for k in keys}, {k: b[k] for k in keys}) == []
    assert a["adversary"]["steps"] == 6 and a["adversary"]["averages"].abs().sum() > 0


def test_the_discriminator_is_nowhere_else(tmp_path):
    done = tiny.Setup(tmp_path, task(adversary=adversary(start=0)), steps=2).run()
    saved, tokenizer = done.checkpoint(), tiny.vq_ema()
    names = {f"tokenizer.{k}" for k in tokenizer.state_dict()}
    assert set(saved["state_dict"]) == set(saved["current_model_state"]) == names
    assert set(done.ema.means) == {f"tokenizer.{k}" for k, p in tokenizer.named_parameters()}
    assert len(saved["optimizer_states"]) == 1
    assert sum(len(g["params"]) for g in saved["optimizer_states"][0]["param_groups"]) == len(list(tokenizer.parameters()))
    assert load_run(done.last).step == 2 and load_run(done.last).settings["task"] == "AdversarialTask"
    assert not [m for m in done.task.modules() if isinstance(m, PatchDiscriminator)]


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_loop_is_that_of_two_optimizers(tmp_path, adaptive):
    """Beside plain code: both players see the pictures from before the tokenizer's step."""
    seen = Steps()
    made = task(tiny.titok(tiny.FSQ([8, 8, 8])), adaptive=adaptive, adversary=adversary(lecam=0.0, gradient_clip=0.0, final_lr=1.0, start=1))
    done = tiny.Setup(tmp_path, made, steps=3, options={"gradient_clip_val": None}, more=[seen]).run()
    model, judge = tiny.titok(tiny.FSQ([8, 8, 8])), PatchDiscriminator(width=8, layers=1, seed=3)
    twin = ReconstructionTask(model, lr=1e-2)  # for the groups of its optimizer alone
    twin.trainer = done.trainer
    one = twin.configure_optimizers()["optimizer"]
    plain = [p for p in judge.parameters() if p.ndim < 2]
    groups = [{"params": [p for p in judge.parameters() if p.ndim > 1]}, {"params": plain, "weight_decay": 0.0}]
    two = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), weight_decay=1e-4)
    for number, images in enumerate(seen.images):
        seed = np.random.SeedSequence((0, 0, number)).generate_state(2, np.uint64)[1]
        lengths = model.lengths.sample(4, 4, torch.Generator().manual_seed(int(seed)))
        out = model.train()(images, lengths).reconstruction
        rec, gan = (out - images).abs().mean(), -judge(out).mean()
        if number < 1:
            gan = gan * 0
        elif adaptive:
            last = model.decoder.smooth.weight
            norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (rec, gan)]
            gan = gan * (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4)
        one.param_groups[0]["lr"] = one.param_groups[1]["lr"] = seen.rates[number]
        one.zero_grad()
        (rec + 0.5 * gan).backward()
        one.step()
        if number >= 1:
            two.zero_grad()
            ((1 - judge(images)).relu().mean() / 2 + (1 + judge(out.detach())).relu().mean() / 2).backward()
            two.step()
    live = done.checkpoint()["current_model_state"]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(live[f"tokenizer.{key}"], value, atol=1e-6, rtol=1e-5, msg=key)
    for key, value in judge.state_dict().items():
        torch.testing.assert_close(done.task.adversary.discriminator.state_dict()[key], value, atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", mix.DECODERS)
def test_every_decoder_names_its_last_layer(name):
    """All that the picture has from other trained layers comes through it, or adds to what it paints."""
    decoder = build_part({**mix._row(Decoder, name), "dim": 6}, Decoder)
    if decoder.objective == "own":
        with pytest.raises(ModelError, match="does not say which of its layers"):
            decoder.last_layer  # noqa: B018
        return
    last = decoder.last_layer
    owner = decoder.get_submodule(decoder.painter)
    assert any(last is p for p in decoder.parameters()) and isinstance(owner, nn.Linear | nn.Conv2d)
    extra = {"text": torch.rand(1, decoder.text_positions.shape[0], decoder.text_embed.in_features)} if "text" in decoder.options else {}
    seen = []
    owner.register_forward_hook(lambda module, given, out: seen.append(out))
    picture = decoder(torch.randn(1, min(2, decoder.tokens), decoder.dim), **extra)
    (gradient,) = torch.autograd.grad(picture.square().sum(), last)
    assert len(seen) == 1 and seen[0].numel() == picture.numel() and gradient.abs().sum() > 0


class Sick(nn.Module):
    """Divides by zero from its ninth look on: at the images of the third step (one look for the tokenizer, two for itself)."""

    def __init__(self):
        super().__init__()
        self.conv, self.looks = nn.Conv2d(3, 1, 3), 0

    def forward(self, images):
        self.looks += 1
        return self.conv(images) / (1 if self.looks < 9 else 0)


def test_a_discriminator_that_diverges_stops_the_run(tmp_path):
    made = task(adversary=Adversary(Sick()))
    with pytest.raises(ModelError, match=r"discriminator's gradient became nan.*diverged\.json names the images"):
        tiny.Setup(tmp_path, made, steps=6, save_every=1).run()
    assert load_run(tmp_path / "last.ckpt").step == 2
    keys = json.loads((tmp_path / "diverged.json").read_text())["batches"][0]["keys"]
    assert len(keys) == 4 and all(len(k) == 6 for k in keys)


def test_impossible_settings(tmp_path):
    with pytest.raises(UsageError, match="give one, such as gan: 0.1"):
        task(weights={"l1": 1.0})
    from tests.training.test_own_losses import flow

    with pytest.raises(UsageError, match="paints no picture"):
        task(flow(), weights={"gan": 1.0})
    frozen = tiny.vq_ema()
    frozen.decoder.frozen = True
    with pytest.raises(UsageError, match="last layer is not trained"):
        task(frozen, adaptive=True)
    assert AdversarialTask(tiny.fsq(), adversary=adversary()).weights == {"l1": 1.0, "gan": 0.1}
    plain = tiny.Setup(tmp_path, ReconstructionTask(tiny.vq_ema()), steps=2).run()
    with pytest.raises(ModelError, match="of a run without an adversary"):
        tiny.Setup(tmp_path, task(), steps=3).run(plain.last)


def test_windows_codebook_statistics_and_mixed_precision(tmp_path):
    """A discriminator of windows; everything together in bfloat16."""
    made = task(tiny.spectral(), weights={"l1": 1.0, "gan": 0.1, "codebook": 0.1}, window=16, adversary=adversary(start=0))
    data = DrawnData(images=4, val_images=2, size=32, batch_size=2)
    options = {"precision": "bf16-mixed", "limit_val_batches": 1, "val_check_interval": 2}
    sizes = []
    made.adversary.discriminator.register_forward_hook(lambda module, given, out: sizes.append(tuple(given[0].shape[2:])))
    done = tiny.Setup(tmp_path, made, data, steps=2, more=[CodebookUsage()], options=options).run()
    assert set(sizes) == {(16, 16)} and done.trainer.callback_metrics["val/usage"] > 0
    weights = [*done.task.parameters(), *done.task.adversary.discriminator.parameters()]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in weights)
