"""Callbacks: throughput, reconstruction grids and codebook usage."""

from __future__ import annotations

import time
from typing import Any

import lightning
import torch
from torch import Tensor


class Throughput(lightning.Callback):
    """Log ``images_per_second`` (over the last ``every`` steps, whole step including data) and show it in the progress bar."""

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self._start, self._images = time.perf_counter(), 0

    def on_train_start(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self._start, self._images = time.perf_counter(), 0

    def on_train_batch_end(self, trainer: lightning.Trainer, task: Any, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self._images += len(batch) * trainer.world_size
        if (batch_idx + 1) % self.every == 0:
            now = time.perf_counter()
            task.log("images_per_second", self._images / (now - self._start), prog_bar=True)
            self._start, self._images = now, 0

    def on_validation_end(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self._start, self._images = time.perf_counter(), 0


class ReconstructionGrid(lightning.Callback):
    """Write a PNG of originals and reconstructions at several token counts at every validation (and to TensorBoard).

    Args:
        images: how many validation images.
        tokens: counts for nested tokenizers; those above the maximum are left out.
    """

    def __init__(self, images: int = 6, tokens: tuple[int, ...] = (1, 8, 32, 128, 256)) -> None:
        self.images, self.tokens = images, tokens
        self._batch: Tensor | None = None

    def on_validation_batch_start(self, trainer: Any, task: Any, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self._batch is None:
            self._batch = batch[: self.images]

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: lightning.Trainer, task: Any) -> None:
        if not trainer.is_global_zero or self._batch is None or trainer.sanity_checking or trainer.log_dir is None:
            return
        from pathlib import Path

        from tok1d.image_io import write

        tokenizer = task.tokenizer
        images = self._batch.to(task.device).float() / 255
        counts = [k for k in self.tokens if k <= tokenizer.max_tokens] if tokenizer.is_nested else [tokenizer.max_tokens]
        rows = [images]
        for k in counts:
            rows.append(tokenizer(images, torch.full((len(images),), k)).reconstruction.clamp(0, 1))
        grid = torch.cat([torch.cat(list(row), 2) for row in rows], 1).cpu()
        folder = Path(trainer.log_dir) / "grids"
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"step-{trainer.global_step:07d}.png", grid)
        for logger in trainer.loggers:
            if isinstance(logger, lightning.pytorch.loggers.TensorBoardLogger):
                logger.experiment.add_image("reconstructions", grid, trainer.global_step)


class CodebookUsage(lightning.Callback):
    """Log the share of ids ever used and their perplexity over each validation run, over all positions and per position.

    ``val/usage`` (share of the vocabulary seen), ``val/perplexity`` (2 to the entropy of the pooled histogram) and
    ``val/position_entropy`` (mean over positions of the entropy in bits; at most log2 of the images seen).
    """

    def __init__(self) -> None:
        self._ids: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: Any, task: Any) -> None:
        self._ids = []

    @torch.no_grad()
    def on_validation_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        tokenizer = task.tokenizer
        images = batch.float() / 255 if batch.dtype == torch.uint8 else batch
        ids = tokenizer.quantizer(tokenizer.encode_latents(images)).ids
        if ids is not None:
            self._ids.append(ids.cpu())

    def on_validation_epoch_end(self, trainer: lightning.Trainer, task: Any) -> None:
        if not self._ids:
            return
        ids = torch.cat(self._ids)
        _, pooled = ids.unique(return_counts=True)
        positions = torch.stack([entropy_bits(ids[:, t].unique(return_counts=True)[1]) for t in range(ids.shape[1])])
        task.log("val/usage", len(pooled) / task.tokenizer.vocab_size, sync_dist=True)
        task.log("val/perplexity", 2 ** entropy_bits(pooled), sync_dist=True)
        task.log("val/position_entropy", positions.mean(), sync_dist=True)


def entropy_bits(counts: Tensor) -> Tensor:
    """Entropy in bits of a histogram of counts.

    Example:
        >>> entropy_bits(torch.tensor([2, 2, 4])).item()
        1.5
    """
    p = counts[counts > 0].double() / counts.sum()
    return -(p * p.log2()).sum()
