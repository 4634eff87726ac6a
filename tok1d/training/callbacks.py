"""Callbacks: throughput, reconstruction grids and codebook usage."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tok1d.extras import require
from tok1d.training.ranks import gather

lightning = require("lightning", "train")


class Throughput(lightning.Callback):
    """Log the rates of training, model and loader; without a progress bar, print a line as well.

    ``images_per_second`` is what the run does, ``model_images_per_second`` what it would do if batches were there at once, and
    ``data_wait`` the share of the time that it waited for them: means over the last ``every`` batches, validation left out, of
    all processes together. ``loader_images_per_second`` is what the loader does alone, measured before training begins: with
    fewer than the model takes it is what limits the run. Time and images of a run survive its interruptions (for the model
    card).

    Args:
        every: batches between two values.
        probe: batches that the loader is measured on, a few more to get it going; 0 not to.
    """

    def __init__(self, every: int = 10, probe: int = 8) -> None:
        self.every, self.probe = every, probe
        self.loader_rate: float | None = None
        self.seconds, self.images = 0.0, 0
        self._start = self._ended = time.perf_counter()
        self._wait, self._count = 0.0, 0

    def _restart(self) -> None:
        self._start = self._ended = time.perf_counter()
        self._wait, self._count = 0.0, 0

    def on_fit_start(self, trainer: Any, task: Any) -> None:
        if self.probe and trainer.datamodule is not None and not trainer.fast_dev_run:
            rate = loader_rate(trainer.datamodule.train_dataloader(), self.probe)
            self.loader_rate = None if rate is None else rate * trainer.world_size

    def on_train_start(self, trainer: Any, task: Any) -> None:
        self._restart()

    def on_validation_end(self, trainer: Any, task: Any) -> None:
        self._restart()
        if trainer.is_global_zero and trainer.progress_bar_callback is None and not trainer.sanity_checking:
            values = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            names = sorted(values, key=lambda name: not name.startswith("val/psnr"))  # what one looks for first
            _say(f"step {trainer.global_step}: " + ", ".join(f"{name} {values[name]:.4g}" for name in names))

    def on_train_batch_start(self, trainer: Any, task: Any, batch: dict[str, Any], batch_idx: int) -> None:
        self._wait += time.perf_counter() - self._ended

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        now = time.perf_counter()
        self.seconds += now - self._ended
        images = len(batch["key"]) * trainer.world_size
        self.images += images
        self._count += images
        self._ended = now
        if (batch_idx + 1) % self.every == 0 and now > self._start:
            spent = now - self._start
            rate, model = self._count / spent, self._count / max(spent - self._wait, 1e-9)
            task.log("images_per_second", rate, prog_bar=True)
            found = {"model_images_per_second": model, "loader_images_per_second": self.loader_rate, "data_wait": self._wait / spent}
            task.log_dict({name: value for name, value in found.items() if value is not None})
            if trainer.is_global_zero and trainer.progress_bar_callback is None:
                loss = trainer.callback_metrics.get("train/loss", torch.nan)
                loader = "" if self.loader_rate is None else f", loader {self.loader_rate:.1f} images/s"
                speed = f"{rate:.1f} images/s (model {model:.1f} images/s{loader}, {self._wait / spent:.0%} waiting for data)"
                _say(f"step {trainer.global_step} of {trainer.max_steps}: loss {loss:.4g}, {speed}")
            self._restart()

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "images": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds, self.images = state["seconds"], state["images"]


def loader_rate(loader: Any, batches: int, most_seconds: float = 20.0) -> float | None:
    """Images a second that a loader makes when nobody keeps it waiting; None if it ends before anything was timed.

    Args:
        loader: of dicts with ``key``; a fresh one, of which the first batches are drawn.
        batches: how many are timed, after the first of each loader process.
        most_seconds: stop after so long.
    """
    images, start, warm = 0, time.perf_counter(), max(1, getattr(loader, "num_workers", 0))
    for number, batch in enumerate(loader, start=1):
        now = time.perf_counter()
        if number > warm:
            images += len(batch["key"])
        if number >= warm + batches or (number > warm and now - start > most_seconds):
            break
        if number == warm:
            start = now
    return images / max(time.perf_counter() - start, 1e-9) if images else None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class ReconstructionGrid(lightning.Callback):
    """Write a PNG of originals and reconstructions at several token counts at every validation (and to TensorBoard).

    The weights are those being validated, the averaged ones where a run averages.

    Args:
        images: how many validation images.
        tokens: counts for nested tokenizers; those above the maximum are left out.
    """

    def __init__(self, images: int = 6, tokens: tuple[int, ...] = (1, 8, 32, 128, 256)) -> None:
        self.images, self.tokens = images, tokens

    # at the batch, not at the end of the validation: averaging callbacks put the other weights back there
    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx or not trainer.is_global_zero or trainer.sanity_checking or trainer.fast_dev_run or trainer.log_dir is None:
            return
        from tok1d.image_io import write

        images = batch["image"][: self.images]
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        few = {name: values[: len(images)] for name, values in batch.items() if len(values) == len(batch["image"])}
        grid = reconstruction_grid(task.tokenizer, images, self.tokens, lambda q: task.pictures(q, {**few, "image": images}))
        folder = Path(trainer.log_dir) / "grids"
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"step-{trainer.global_step:07d}.png", grid)
        for logger in trainer.loggers:
            if isinstance(logger, lightning.pytorch.loggers.TensorBoardLogger):
                logger.experiment.add_image("reconstructions", grid, trainer.global_step)


def reconstruction_grid(
    tokenizer: Any, images: Tensor, tokens: tuple[int, ...], pictures: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Originals above their reconstructions.

    Args:
        tokenizer: a Tokenizer1D.
        images: float (B, 3, H, W) in [0, 1].
        tokens: counts for nested tokenizers; those above the maximum are left out.
        pictures: float (B, n, D) codes → float (B, 3, H, W); the decoder with its defaults if None.

    Returns:
        Float (3, rows · H, B · W): a row of originals and one for each number of tokens.
    """
    counts = [k for k in tokens if k <= tokenizer.max_tokens] if tokenizer.is_nested else [tokenizer.max_tokens]
    code = tokenizer.quantizer(tokenizer.encode_latents(images))
    codes = [tokenizer.prefix_codes(code, k) for k in counts]
    rows = [images, *((pictures or tokenizer.decode_latents)(q).float().clamp(0, 1) for q in codes)]
    return torch.cat([torch.cat(list(row), 2) for row in rows], 1).cpu()


class CodebookUsage(lightning.Callback):
    """Log the share of ids ever used and their perplexity over each validation run, over all positions and per position.

    ``val/usage`` (share of the vocabulary seen), ``val/perplexity`` (2 to the entropy of the pooled histogram) and
    ``val/position_entropy`` (mean over positions of the entropy in bits; at most log2 of the images seen). Ids of
    all ranks count, however they are spread. Bottlenecks without ids log nothing.
    """

    def __init__(self) -> None:
        self._ids: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: Any, task: Any) -> None:
        self._ids = []

    def on_validation_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        ids = outputs.get("ids") if isinstance(outputs, dict) else None
        if ids is not None:
            self._ids.append(ids.cpu())

    def on_validation_epoch_end(self, trainer: Any, task: Any) -> None:
        found = [ids for ids in gather(torch.cat(self._ids) if self._ids else None) if ids is not None]
        if not found:
            return
        ids = torch.cat(found)
        _, pooled = ids.unique(return_counts=True)
        positions = torch.stack([entropy_bits(ids[:, t].unique(return_counts=True)[1]) for t in range(ids.shape[1])])
        values = {
            "usage": len(pooled) / task.tokenizer.vocab_size,
            "perplexity": 2 ** entropy_bits(pooled).item(),
            "position_entropy": positions.mean().item(),
        }
        task.log_dict({f"val/{name}": value for name, value in values.items()})


def entropy_bits(counts: Tensor) -> Tensor:
    """Entropy in bits of a histogram of counts.

    Example:
        >>> entropy_bits(torch.tensor([2, 2, 4])).item()
        1.5
    """
    p = counts[counts > 0].double() / counts.sum()
    return -(p * p.log2()).sum()
