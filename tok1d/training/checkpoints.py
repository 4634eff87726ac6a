"""Checkpoints that survive: written atomically, read without running code, and made when a run is told to stop."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from tok1d.disk import atomic_write
from tok1d.errors import TokError
from tok1d.extras import require
from tok1d.training.export import load_plain

lightning = require("lightning", "train")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins.io import TorchCheckpointIO  # noqa: E402


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, with two holes closed.

    Lightning writes to the system's temporary folder and moves from there; across file systems that is a copy, and a disk
    that fills up leaves half a checkpoint in the place of the last good one. Here the temporary file is a neighbour that
    is synced and renamed. And loading never unpickles more than tensors and plain data.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, buffer.getbuffer())
        except (TokError, OSError) as error:
            raise TokError(f"checkpoint not written, earlier ones are intact: {error}. Make room, then continue with --ckpt_path last") from error

    def load_checkpoint(self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: Any = None) -> dict[str, Any]:
        return load_plain(path, map_location) if "://" not in str(path) else super().load_checkpoint(path, map_location, True)


class SaveOnStop(lightning.Callback):
    """Ctrl-C or SIGTERM: finish the optimizer step, save ``last.ckpt``, stop. A second signal stops at once.

    Also saves after the last step, which checkpoints at every n-th step miss when n does not divide ``max_steps``.
    The file continues exactly where the run stopped.

    Attributes:
        stopped_by: the signal, or None.
    """

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Any, task: Any) -> None:
        self.stopped_by = None
        if threading.current_thread() is threading.main_thread():  # Python takes handlers nowhere else
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: Any) -> None:
        if self.stopped_by is not None:
            raise KeyboardInterrupt
        self.stopped_by = number
        print("stopping: the step is finished and saved first (again to stop at once)", file=sys.stderr, flush=True)

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        stop = self.stopped_by is not None
        if trainer.world_size > 1:  # all ranks stop at the same step
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        at_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if at_step and (stop or trainer.global_step == trainer.max_steps):
            path = save_last(trainer)
            if stop:
                _say_where(trainer, path)
                raise KeyboardInterrupt

    def on_train_end(self, trainer: Any, task: Any) -> None:
        # A ModelCheckpoint that has saved nothing yet would save now: after trial runs too, and over the checkpoint of the
        # last step, with the averaged weights in the place of the live ones.
        for keeper in _keepers(trainer):
            keeper._last_checkpoint_saved = keeper._last_checkpoint_saved or keeper.last_model_path or "nothing"

    def teardown(self, trainer: Any, task: Any, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: Any, task: Any, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def save_last(trainer: Any) -> Path | None:
    """Write the checkpoint that ``--ckpt_path last`` finds, where the run keeps its checkpoints; None if it keeps none."""
    keepers = _keepers(trainer)
    if not keepers or trainer.fast_dev_run:
        return None
    keeper = keepers[0]
    if not keeper.last_model_path:
        keeper.last_model_path = _free(Path(keeper.dirpath))
    trainer.save_checkpoint(keeper.last_model_path, weights_only=False)
    return Path(keeper.last_model_path)


def _keepers(trainer: Any) -> list[ModelCheckpoint]:
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]


def _free(folder: Path) -> str:
    """last.ckpt, or last-v1.ckpt … beside those of earlier runs, as Lightning numbers them."""
    names = ["last.ckpt", *(f"last-v{i}.ckpt" for i in range(1, 1000))]
    return os.path.join(folder, next(n for n in names if not (folder / n).exists()))


def _say_where(trainer: Any, path: Path | None) -> None:
    if trainer.is_global_zero:
        where = f"saved {path}; continue with --ckpt_path {path}" if path else "nothing saved (the run keeps no checkpoints)"
        print(f"stopped after step {trainer.global_step}: {where}", file=sys.stderr, flush=True)
