"""CalibrationTask: measure a post-training quantizer on data, without a gradient.

A continuous tokenizer becomes a discrete one: its encoder and decoder stay as they are, and the tables of a
:class:`tok1d.tokenizers.quantizers.post_training.PerChannel` between them are measured on latents of training images
(TokenBridge, https://arxiv.org/abs/2503.20430). ``tok export`` makes a model folder of the run.

Shapes: B images, N tokens, D latent width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tok1d.errors import UsageError
from tok1d.tokenizers.quantizers.post_training import PerChannel
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.ranks import gather, world
from tok1d.training.tasks.base import TokenizerTask, psnr, unit_batch


class CalibrationTask(TokenizerTask):
    """Collect latents of ``trainer.max_steps`` batches, then measure the tables once; nothing is trained.

    Args:
        tokenizer: with a :class:`tok1d.tokenizers.quantizers.post_training.PerChannel`.
        init_from: the continuous tokenizer whose encoder and decoder it has: whatever ``tok1d.load`` takes.
        most_latents: how many are kept at most, over all ranks (D floats each): as many of every batch.
        val_tokens, val_steps, seed: see :class:`tok1d.training.tasks.base.TokenizerTask`.

    Validations and checkpoints after the last batch have the tables; a validation also says ``error``, the squared error of a
    channel over its variance, and ``psnr_continuous`` of the pictures without quantization.
    """

    def __init__(
        self,
        tokenizer: Tokenizer1D,
        init_from: str | None = None,
        most_latents: int = 1_000_000,
        val_tokens: list[int] | None = None,
        val_steps: int = 4,
        seed: int = 0,
    ) -> None:
        if not isinstance(tokenizer.quantizer, PerChannel):
            raise UsageError(f"only the tables of a PerChannel quantizer are measured after training, got {type(tokenizer.quantizer).__name__}")
        super().__init__(tokenizer, init_from, val_tokens=val_tokens, val_steps=val_steps, seed=seed)
        self.tokenizer.requires_grad_(False)
        self.most_latents, self.kept = most_latents, []

    def configure_optimizers(self) -> None:
        """There is nothing to optimize; Lightning counts batches all the same."""

    @torch.no_grad()
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        draw, (rank, ranks) = self._seed_step(), world()
        latents = self.tokenizer.eval().encode_latents(unit_batch(batch)["image"]).flatten(0, 1).cpu()  # (B · N, D)
        rows = torch.randperm(len(latents) * ranks, generator=draw)[: max(1, self.most_latents // self.trainer.max_steps)]
        self.kept.append(latents[rows[rows // len(latents) == rank] % len(latents)])
        if self.batch_number + 1 == self.trainer.max_steps:
            self.measure()

    def measure(self) -> None:
        """Make the tables of all that was kept, the same on all ranks."""
        latents = torch.cat([part.to(self.device) for part in gather(torch.cat(self.kept))])
        self.tokenizer.quantizer.calibrate(latents)
        self.kept.clear()
        self.log("train/latents", float(len(latents)))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor | None]:
        found, images = super().validation_step(batch, batch_idx), unit_batch(batch)["image"]
        if len(images):
            quantizer, z = self.tokenizer.quantizer, self.tokenizer.encode_latents(images)
            plain = self.pictures(z[..., : quantizer.channels], {**batch, "image": images}).float().clamp(0, 1)
            self.tally({"psnr_continuous": psnr(plain, images), **quantizer(z).stats}, len(images))
        return found

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        raise UsageError("a calibration is not continued: latents are not kept in checkpoints. Run it again, it trains nothing")

    def _check_weights(self) -> None:
        """There are no losses."""
