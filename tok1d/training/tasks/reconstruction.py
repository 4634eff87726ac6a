"""ReconstructionTask: pixel, perceptual and quantizer losses; the base of the recipes that compare pictures.

Shapes: B images of H × W pixels, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tok1d.errors import UsageError
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.frozen import Frozen
from tok1d.training.losses.base import ImageLoss, LatentLoss
from tok1d.training.losses.pixels import PIXEL_LOSSES
from tok1d.training.tasks.base import TokenizerTask


class ReconstructionTask(TokenizerTask):
    """Train a tokenizer to reconstruct: pixel, perceptual and quantizer losses; AdamW, warm-up, cosine.

    Args:
        tokenizer, init_from, losses, lr, warmup_steps, final_lr, betas, weight_decay, val_tokens, val_steps, compile,
            compile_backend, seed, starts: see :class:`tok1d.training.tasks.base.TokenizerTask`.
        weights: weight of each loss by log name: ``l1``, ``l2``, ``smooth_l1``, ``log_l2``, ``lpips_vgg``, ``lpips_alex``, those in
            ``losses``, and whatever the quantizer returns (``commitment``, ``codebook``, ``kl`` …) or the decoder (``flow``), which
            have the ``loss_weights`` of these parts unless given here. What is missing or 0 is not computed. A decoder with
            losses of its own paints no picture in training, so pictures are not compared then. None: ``l1`` of pictures.
        window: train the decoder on a random square of so many pixels (decoders that take ``window``), 0 for whole images.
    """

    def __init__(
        self,
        tokenizer: Tokenizer1D,
        init_from: str | None = None,
        losses: dict[str, ImageLoss | LatentLoss] | None = None,
        weights: dict[str, float] | None = None,
        lr: float = 1e-4,
        warmup_steps: int = 100,
        final_lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-4,
        val_tokens: list[int] | None = None,
        val_steps: int = 4,
        window: int = 0,
        compile: list[str] | None = None,
        compile_backend: str = "inductor",
        seed: int = 0,
        starts: dict[str, int] | None = None,
    ) -> None:
        given = ({} if tokenizer.decoder.objective == "own" else {"l1": 1.0}) if weights is None else weights
        super().__init__(
            tokenizer, init_from, losses, given, lr, warmup_steps, final_lr, betas, weight_decay, val_tokens, val_steps,
            compile, compile_backend, seed, starts,
        )  # fmt: skip
        self.window = window
        self.perceptual = Frozen()
        self._check_window()

    def setup(self, stage: str) -> None:
        from tok1d.eval.perceptual import Perceptual

        super().setup(stage)
        for name in self.weights:
            if name.startswith("lpips_") and name not in self.perceptual and name not in self.losses:
                self.perceptual[name] = Perceptual(name.removeprefix("lpips_"))

    def losses_of(self, batch: dict[str, Any], lengths: Tensor, draw: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        images = batch["image"]
        window = self._window(images, draw)
        output = self.tokenizer(images, lengths, window=window, generator=draw, **self.conditions(batch))
        found = {**output.losses, **self.latent_losses(output, batch)}
        if output.reconstruction is not None:
            target = images if window is None else _cut(images, window)
            found = {**self.pixel_losses(output.reconstruction.float(), target, batch), **found}
        return found, output.stats

    def pixel_losses(self, images: Tensor, target: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Unweighted losses of a reconstruction by log name; override to add your own.

        Args:
            images: float32 (B, 3, H, W), not clamped.
            target: float32 (B, 3, H, W) in [0, 1].
            batch: what else is known of these images.
        """
        found = {name: loss(images, target) for name, loss in PIXEL_LOSSES.items() if name in self.weights and name not in self.losses}
        for name, distance in self.perceptual.on(self.device).items():
            found[name] = distance(images, target).mean()
        for name, loss in self.losses.items():
            if name in self.weights and not isinstance(loss, LatentLoss):
                found[name] = loss(images, target, batch)
        return found

    def scores(self, out: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The perceptual distances trained on."""
        return {name: distance(out, batch["image"]).mean() for name, distance in self.perceptual.on(self.device).items()}

    def run_settings(self) -> dict[str, Any]:
        return {**super().run_settings(), "window": self.window}

    def _window(self, images: Tensor, draw: torch.Generator) -> tuple[int, int, int] | None:
        if not self.window:
            return None
        room = [(s - self.window) // 8 + 1 for s in images.shape[-2:]]
        top, left = (int(torch.randint(r, (), generator=draw)) * 8 for r in room)
        return top, left, self.window

    def _check_window(self) -> None:
        tokenizer, most = self.tokenizer, min(self.tokenizer.image_size)
        if self.window and "window" not in tokenizer.decoder.options:
            raise UsageError(f"window: {type(tokenizer.decoder).__name__} renders whole images only; set window: 0")
        if self.window % 8 or not 0 <= self.window <= most:
            raise UsageError(f"window must be a multiple of 8 up to {most} pixels, or 0; got {self.window}")
        whole = [name for name, loss in self.losses.items() if self.window and getattr(loss, "whole_images", False)]
        if whole:
            raise UsageError(f"window: {', '.join(whole)} looks at places in whole images; set window: 0, or leave it out")


def _cut(images: Tensor, window: tuple[int, int, int]) -> Tensor:
    top, left, size = window
    return images[:, :, top : top + size, left : left + size]
