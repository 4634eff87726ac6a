"""BinaryTask: binary latents (Instella-T2I's tokenizer): smooth L1, perceptual, adversarial, and certain bits.

Bits are coin flips in training whose temperature is annealed towards certainty, and a regulariser pushes their probabilities to 0
or 1. Paper: https://arxiv.org/abs/2506.21022; its training code, loss weights and schedule were not released.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tok1d.errors import UsageError
from tok1d.tokenizers.quantizers.bernoulli import BernoulliBits
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.tasks.adversarial import AdversarialTask


class BinaryTask(AdversarialTask):
    """Adversarial training of a tokenizer whose quantizer flips coins.

    Args:
        tokenizer: with a :class:`tok1d.tokenizers.quantizers.bernoulli.BernoulliBits`.
        weights: as :class:`tok1d.training.tasks.adversarial.AdversarialTask`; None: ``smooth_l1`` 1, ``lpips_vgg`` 1, ``gan`` 0.1.
            ``bit_variance``, of the quantizer, has its published weight unless given.
        temperature_start, temperature_end: T of the coin flips in the first step and after the last annealed one.
        temperature_steps: optimizer steps of the annealing, a straight line in log T; 0 for all of them.
        settings: everything else of :class:`tok1d.training.tasks.adversarial.AdversarialTask`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer1D,
        weights: dict[str, float] | None = None,
        temperature_start: float = 1.0,
        temperature_end: float = 0.1,
        temperature_steps: int = 0,
        **settings: Any,
    ) -> None:
        if not isinstance(tokenizer.quantizer, BernoulliBits):
            raise UsageError(f"BinaryTask anneals the coin flips of BernoulliBits, got {type(tokenizer.quantizer).__name__}; take AdversarialTask")
        if not 0 < temperature_end <= temperature_start < math.inf:
            raise UsageError(f"temperatures fall from temperature_start to temperature_end above 0, got {temperature_start} and {temperature_end}")
        super().__init__(tokenizer, weights={"smooth_l1": 1.0, "lpips_vgg": 1.0, "gan": 0.1} if weights is None else weights, **settings)
        self.temperature_start, self.temperature_end, self.temperature_steps = temperature_start, temperature_end, temperature_steps

    def losses_of(self, batch: dict[str, Any], lengths: Tensor, draw: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        temperature = self.temperature(self.global_step)
        self.tokenizer.quantizer.temperature = temperature  # of the step alone, so that a resumed run continues exactly
        losses, stats = super().losses_of(batch, lengths, draw)
        return losses, {**stats, "temperature": torch.tensor(temperature)}

    def temperature(self, step: int) -> float:
        """T of an optimizer step: geometric from start to end."""
        done = min(1.0, step / max(1, self.temperature_steps or self.trainer.max_steps))
        return self.temperature_start * (self.temperature_end / self.temperature_start) ** done

    def run_settings(self) -> dict[str, Any]:
        annealing = {name: getattr(self, name) for name in ("temperature_start", "temperature_end", "temperature_steps")}
        return {**super().run_settings(), **annealing}
