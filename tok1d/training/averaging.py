"""EMA of a tokenizer's weights: what is validated, shown and exported. Heads of losses and discriminators have no part in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tok1d.extras import require

lightning = require("lightning", "train")


class EMA(lightning.Callback):
    """Exponential moving average whose decay grows from 0.1: min(decay, (1 + n) / (10 + n)) at the n-th update.

    Without the warm-up a short run averages mostly its untrained start: at decay 0.998 that still weighs 30 % after 600 steps.
    Trained parameters are averaged, in float32, once an optimizer step; buffers (codebooks that are averages already, counters)
    are as they are. Validations see the averages, and so does the task when training has ended. In checkpoints ``state_dict``
    holds the averages and ``current_model_state`` the weights that training goes on from.

    Args:
        decay: final decay.
        module: which part of the task is averaged.
    """

    def __init__(self, decay: float = 0.999, module: str = "tokenizer") -> None:
        self.decay, self.module = decay, module
        self.updates = 0
        self.means: dict[str, Tensor] = {}
        self._step = 0  # optimizer steps at the last update
        self._live: list[Tensor] = []

    def parameters(self, task: nn.Module) -> dict[str, nn.Parameter]:
        """Those that are trained, by their name in the state dict of the task; shared ones under every name they have."""
        found = task.get_submodule(self.module).named_parameters(self.module, remove_duplicate=False)
        return {name: p for name, p in found if p.requires_grad}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step, params = trainer.global_step, self.parameters(task)
        if not self.updates:
            self.means = {name: p.detach().float().clone() for name, p in params.items()}
        elif params:  # a calibration trains none
            share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
            self.means = {name: self.means[name].to(p.device) for name, p in params.items()}
            torch._foreach_lerp_(list(self.means.values()), [p.detach().float() for p in params.values()], share)
        self.updates += 1

    @torch.no_grad()
    def on_validation_epoch_start(self, trainer: Any, task: Any) -> None:
        self._live = [p.detach().clone() for p in self.parameters(task).values()]
        self._show(task)

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Any, task: Any) -> None:
        for p, live in zip(self.parameters(task).values(), self._live):
            p.copy_(live)
        self._live = []

    @torch.no_grad()
    def on_train_end(self, trainer: Any, task: Any) -> None:
        self._show(task)

    def _show(self, task: nn.Module) -> None:
        """Put the averages in the place of the weights; nothing before the first update."""
        for name, p in self.parameters(task).items() if self.updates else ():
            p.copy_(self.means[name])

    def on_save_checkpoint(self, trainer: Any, task: Any, checkpoint: dict[str, Any]) -> None:
        if self.updates:
            live = checkpoint["state_dict"]
            checkpoint["current_model_state"] = live
            checkpoint["state_dict"] = {name: self.means.get(name, value) for name, value in live.items()}
            checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self.updates)}

    def on_load_checkpoint(self, trainer: Any, task: Any, checkpoint: dict[str, Any]) -> None:
        """Lightning has loaded the averages into the task by now: keep them, and load what training goes on from."""
        if "current_model_state" in checkpoint:
            self.updates = int(checkpoint["averaging_state"]["n_averaged"])
            self.means = {name: checkpoint["state_dict"][name].detach().float().clone() for name in self.parameters(task)}
            task.load_state_dict(checkpoint["current_model_state"])

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._step, "decay": self.decay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["latest_update_step"]
