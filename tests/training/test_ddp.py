"""Two processes on half a batch each are one process on the whole; nothing waits for a rank that has gone or has nothing."""

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch.utils.data import DataLoader

from tests.training import tiny
from tests.training.test_adversarial import adversary
from tests.training.test_own_losses import flow
from tok1d.data.module import DrawnData
from tok1d.errors import ModelError
from tok1d.training.callbacks import CodebookUsage
from tok1d.training.tasks import AdversarialTask, HaltingTask, ReconstructionTask

STEPS, BATCH = 4, 4


def reconstruct() -> ReconstructionTask:
    """Token counts, sampled latents, errors of images."""
    return ReconstructionTask(tiny.kl(), weights={"l1": 1.0, "log_l2": 0.1, "kl": 1e-3}, lr=1e-3, warmup_steps=2)


def play() -> AdversarialTask:
    """Learned codes that are restarted, everything a discriminator has, a weight that follows gradients."""
    judge = adversary(start=1, r1=0.1, r1_every=2, lr=1e-3)
    return AdversarialTask(tiny.vq_ema(), adversary=judge, adaptive=True, weights={"l1": 1.0, "gan": 0.5}, lr=1e-3, warmup_steps=2)


def sample() -> ReconstructionTask:
    """Times and noise of a flow."""
    return ReconstructionTask(flow(), lr=1e-3, warmup_steps=2)


def halt(ranks: int) -> HaltingTask:
    """Measurements that every rank remembers."""
    return HaltingTask(tiny.fsq(), prefixes=2, memory=10, fitted=8 // ranks, lr=1e-3, warmup_steps=2)


class Sick(ReconstructionTask):
    """Divides by zero at the third step, on rank 1 alone."""

    def pixel_losses(self, images: Any, target: Any, batch: Any) -> dict[str, Any]:
        found = super().pixel_losses(images, target, batch)
        return {"l1": found["l1"] * (torch.nan if self.global_step == 2 and self.global_rank == 1 else 1)}


class Uneven(DrawnData):
    """Validation: rank 0 has three images in two batches, rank 1 an empty one; without ranks the three are in one."""

    def val_dataloader(self) -> DataLoader:
        samples = [self.val_set[i] for i in range(3)]
        images, keys = torch.stack([s["image"] for s in samples]), [s["key"] for s in samples]
        parts = {1: [[slice(0, 3)]], 2: [[slice(0, 2), slice(2, 3)], [slice(0, 0)]]}[self.trainer.world_size]
        return DataLoader([{"image": images[s], "key": keys[s]} for s in parts[self.trainer.global_rank]], batch_size=None)


class Signal(tiny.lightning.Callback):
    """The operator stops one of the processes."""

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def setup(name: str, folder: Path, ranks: int) -> tiny.Setup:
    options: dict[str, Any] = {"accumulate_grad_batches": 2 if name == "reconstruct" else 1, "limit_val_batches": 1.0, "val_check_interval": STEPS}
    if ranks > 1:
        options |= {"devices": ranks, "strategy": "ddp"}
    task = {"reconstruct": reconstruct, "play": play, "sample": sample, "halt": lambda: halt(ranks)}.get(name)
    data = Uneven(images=16, val_images=3, size=16, batch_size=BATCH // ranks)
    made = Sick(tiny.fsq()) if name == "sick" else task() if task else ReconstructionTask(tiny.fsq())
    more = [CodebookUsage(), *([Signal()] if name == "signal" else [])]
    return tiny.Setup(folder / name, made, data, STEPS, save_every=2 if name == "sick" else 100, more=more, options=options)


def result(done: tiny.Done) -> dict[str, Any]:
    """What must not depend on the number of processes."""
    saved = done.checkpoint()
    for name in ("state_dict", "current_model_state"):
        for key, value in saved[name].items():
            if key.endswith("qkv.bias"):  # a softmax does not feel the bias of keys: its gradient is rounding, which AdamW makes as large as any
                value.chunk(3)[1].zero_()
    values = {k: v.item() for k, v in done.trainer.callback_metrics.items() if k.startswith("val/") and "flow" not in k}  # noise by batch
    return {"losses": done.record.losses, "values": values, **{k: saved[k] for k in ("state_dict", "current_model_state", "adversary", "halting_memory") if k in saved}}


def work(rank: int, port: int, folder: Path) -> None:
    """A process of two, as a launcher starts it."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    for name in ("reconstruct", "play", "sample", "halt"):
        torch.manual_seed(rank)  # nothing may hang on it
        torch.save(result(setup(name, folder, 2).run()), folder / f"{name}-{rank}.pt")
    try:
        setup("sick", folder, 2).run()
    except ModelError as error:
        (folder / f"sick-{rank}.txt").write_text(str(error))
    try:
        setup("signal", folder, 2).run()
    except SystemExit:
        (folder / f"signal-{rank}.txt").write_text("stopped")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """The files of two processes that did everything above."""
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = mp.start_processes(work, (port, folder), nprocs=2, join=False, start_method="fork")  # imports would take longer than all else
    try:
        deadline = time.monotonic() + 240
        while not running.join(timeout=5):
            assert time.monotonic() < deadline, f"a rank waits for the other; done: {sorted(p.name for p in folder.iterdir())}"
    finally:
        for process in running.processes:
            process.kill()
    return folder


def near(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            near(one[key], two[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, two, strict=True):
            near(a, b)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    else:
        assert one == (pytest.approx(two, rel=1e-5, abs=1e-5) if isinstance(two, float) else two)


@pytest.mark.parametrize("name", ["reconstruct", "play", "sample", "halt"])
def test_two_processes_are_one_with_the_whole_batch(pair, tmp_path, name):
    """Losses, weights, averages, the discriminator with its optimizer, and what a validation says of uneven shares."""
    alone = result(setup(name, tmp_path, 1).run())
    ranks = [torch.load(pair / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
    losses = [sum(pair) / 2 for pair in zip(*(r.pop("losses") for r in ranks))]
    assert losses == pytest.approx(alone.pop("losses"), rel=1e-5, abs=1e-5)
    for rank in ranks:
        near(rank, alone)
    names = {"val/psnr_4", "val/psnr_1"} | ({"val/usage", "val/perplexity"} if name == "play" else set())
    assert names <= alone["values"].keys()


def test_one_rank_that_diverges_stops_both(pair):
    said = [(pair / f"sick-{rank}.txt").read_text() for rank in range(2)]
    assert said[0] == said[1] and "the loss became nan (l1 nan)" in said[0] and "after step 2" in said[0]
    rows = json.loads((pair / "sick/diverged.json").read_text())["batches"]
    assert [r["rank"] for r in rows] == [0, 1] and rows[1]["loss"] == "nan" and rows[0]["loss"] != "nan"
    assert all(len(r["keys"]) == BATCH // 2 for r in rows) and rows[0]["keys"] != rows[1]["keys"]
    assert torch.load(pair / "sick/last.ckpt", weights_only=True)["global_step"] == 2


def test_a_signal_to_one_rank_saves_and_stops_both(pair):
    assert [(pair / f"signal-{rank}.txt").read_text() for rank in range(2)] == ["stopped", "stopped"]
    assert torch.load(pair / "signal/last.ckpt", weights_only=True)["global_step"] == 3
