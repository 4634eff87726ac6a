"""EMA of the weights with a warm-up, on Lightning's weight averaging (checkpoints, validation and resume are its business)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tok1d.extras import require

require("lightning", "train")
from lightning.pytorch.callbacks import WeightAveraging  # noqa: E402


class EMA(WeightAveraging):
    """Exponential moving average whose decay grows from 0.1: min(decay, (1 + n) / (10 + n)) at the n-th update.

    Without the warm-up a short run averages mostly its untrained start: at decay 0.998 that still weighs 30 % after 600 steps.
    Parameters are averaged; buffers (codebooks that are averages already, counters) are copied.

    Args:
        decay: final decay.
    """

    def __init__(self, decay: float = 0.999) -> None:
        @torch.no_grad()
        def average(means: list[Tensor], now: list[Tensor], updates: Tensor | int) -> None:
            n = float(updates)
            torch._foreach_lerp_(means, now, 1 - min(decay, (1 + n) / (10 + n)))

        super().__init__(use_buffers=False, multi_avg_fn=average)
        self.decay = decay

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "decay": self.decay}
