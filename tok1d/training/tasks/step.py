"""TrainingTask: what tasks of tokenizers and generators share — seeds, optimizer and schedule, a stop at nan, settings of the run.

Everything random in a step follows from (seed, number of the batch) and is drawn for the batches of all ranks together, of
which each takes its rows: a resumed run continues as the uninterrupted one would have, and several processes do what one
would do with their batches put together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tok1d.errors import ModelError, UsageError
from tok1d.extras import require
from tok1d.training.divergence import Watch
from tok1d.training.ranks import gather

lightning = require("lightning", "train")


class TrainingTask(lightning.LightningModule):
    """AdamW with warm-up and cosine on a weighted sum of losses; subclasses say of what.

    Args:
        lr: peak learning rate.
        warmup_steps: linear warm-up.
        final_lr: share of ``lr`` left at ``max_steps`` (cosine).
        betas, weight_decay: of AdamW; biases, norms, codebooks and embeddings are not decayed.
        compile: names of submodules to compile, such as ``tokenizer.encoder``.
        compile_backend: of ``torch.compile``.
        seed: of every random choice of a step.
        starts: optimizer steps before a loss counts, by log name; it is computed and logged from the first one. What is not named
            counts from there.
    """

    def __init__(
        self,
        lr: float,
        warmup_steps: int,
        final_lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        compile: list[str] | None,
        compile_backend: str,
        seed: int,
        starts: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.lr, self.warmup_steps, self.final_lr = lr, warmup_steps, final_lr
        self.betas, self.weight_decay, self.seed = betas, weight_decay, seed
        self.compiled, self.compile_backend = list(compile or []), compile_backend
        self.weights: dict[str, float] = {}
        self.starts = dict(starts or {})
        self.watch = Watch()
        self._scores: dict[str, list[float]] = {}

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer.max_steps < 1:
            raise UsageError("set trainer.max_steps: the data never ends, and the learning rate needs to know the last step")
        while stage == "fit" and self.compiled:  # in place: names in checkpoints stay what they are
            self.get_submodule(self.compiled.pop()).compile(backend=self.compile_backend)

    # the step ----------------------------------------------------------------------------------------------------

    @property
    def batch_number(self) -> int:
        """Of this batch in the run: 0, 1, …, accumulated ones too."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def _seed_step(self) -> torch.Generator:
        """Seed the global generator for this batch, and return one for choices that are the same on all devices, on the CPU."""
        state = np.random.SeedSequence((self.seed, 0, self.batch_number)).generate_state(2, np.uint64)
        torch.manual_seed(int(state[0]))
        return torch.Generator().manual_seed(int(state[1]))

    def weight_of(self, name: str) -> float:
        """The weight of a loss in this step: 0 before its start, so that all of its parameters have a gradient on all ranks."""
        return self.weights[name] if self.global_step >= self.starts.get(name, 0) else 0.0

    def weighted(self, keys: list[str], parts: dict[str, Tensor], stats: dict[str, Tensor]) -> Tensor:
        """The sum of a batch's losses that is learned from; all of them are logged.

        Args:
            keys: names of the samples.
            parts: scalar losses by log name.
            stats: further scalars to log.

        Raises:
            ModelError: a weight names a loss that is not there.
        """
        unknown = set(self.weights) - set(parts)
        if unknown:
            raise ModelError(f"weights name losses that do not exist here: {sorted(unknown)}; there are {sorted(parts)}")
        loss = sum(self.weight_of(name) * parts[name] for name in self.weights)
        self.watch.note(self.batch_number, keys, loss, parts)
        self.log_dict({f"train/{k}": v.detach() for k, v in {**parts, **stats}.items()})
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])
        return loss

    # validation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._scores = defaultdict(lambda: [0.0, 0.0])

    def tally(self, scores: dict[str, Tensor], rows: int) -> None:
        """Count means over so many images into the means of this validation, logged as ``val/NAME``."""
        for name, value in scores.items():
            total = self._scores[f"val/{name}"]
            total[0], total[1] = total[0] + value.item() * rows, total[1] + rows

    def on_validation_epoch_end(self) -> None:
        """Means over the images of all ranks, however they are spread."""
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for found in gather(dict(self._scores)):
            for name, (value, count) in found.items():
                totals[name] = [totals[name][0] + value, totals[name][1] + count]
        self.log_dict({name: value / count for name, (value, count) in totals.items()})

    # optimizer ---------------------------------------------------------------------------------------------------

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies to a parameter, by its name without that of the model."""
        return parameter.ndim > 1 and not any(word in name for word in ("norm", "embed", "codebook", "position", "token"))

    def configure_optimizers(self) -> dict[str, Any]:
        decayed, plain = [], []
        for name, p in self.named_parameters():
            (decayed if self.decays(name.removeprefix("tokenizer.").removeprefix("generator."), p) else plain).append(p)
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        groups = [g for g in groups if g["params"]]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As Lightning's, and stop before gradients that are not finite reach the weights."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        by_value = gradient_clip_algorithm == "value"
        norm = torch.nn.utils.clip_grad_norm_(params, math.inf if by_value or not gradient_clip_val else gradient_clip_val)
        if by_value:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            self.watch.check(norm, self._log_folder(), self.global_step)
        else:  # a scaler skips steps whose gradients overflow; losses that are none would stay so
            self.watch.check(self.watch.nan_losses(), self._log_folder(), self.global_step)
        self.log("train/grad_norm", norm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.after_step()

    def after_step(self) -> None:
        """Called once an optimizer step, after it."""
        self.watch.forget()

    def _lr_factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        total = self.trainer.max_steps
        if total <= self.warmup_steps:
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / (total - self.warmup_steps))
        return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * done)) / 2

    # checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["run_settings"] = self.run_settings()

    def run_settings(self) -> dict[str, Any]:
        """What a model card says of the training, plain data."""
        trainer, data = self.trainer, getattr(self.trainer, "datamodule", None)
        return {
            "task": type(self).__name__, "weights": self.weights, "starts": self.starts, "lr": self.lr, "warmup_steps": self.warmup_steps,
            "final_lr": self.final_lr, "betas": list(self.betas), "weight_decay": self.weight_decay, "seed": self.seed,
            "max_steps": trainer.max_steps, "precision": str(trainer.precision), "gradient_clip_val": trainer.gradient_clip_val,
            "hardware": _hardware(self.device), "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "devices": trainer.world_size, "data": data.describe() if hasattr(data, "describe") else {},
        }  # fmt: skip

    def _check_compiled(self) -> None:
        known = dict(self.named_modules())
        for name in self.compiled:
            if name not in known:
                parts = [part for part in known if part.count(".") == 1][:3]
                raise UsageError(f"compile: there is no module {name!r}; give names such as {', '.join(parts)}")

    def _log_folder(self) -> Path | None:
        folder = None if self.trainer.fast_dev_run else self.trainer.log_dir
        return None if folder is None else Path(folder)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads"
