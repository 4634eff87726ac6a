"""Lightning tasks. A task is a straight-line training step; models and losses work without it.

Shapes: B images of H × W pixels, N tokens.
"""

from __future__ import annotations

import math
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import ModelError
from tok1d.tokenizers.tokenizer import Tokenizer1D


class ReconstructionTask(lightning.LightningModule):
    """Train a tokenizer to reconstruct: pixel, perceptual and quantizer losses; AdamW, warm-up, cosine.

    Args:
        tokenizer: what to train.
        init_from: model folder whose weights to start from (same parts; extra or differently shaped tensors are an error).
        weights: weight of each loss by log name. ``l1``, ``l2``, ``lpips_vgg``, ``lpips_alex``, and whatever the quantizer
            returns (``commitment``, ``codebook``, ``kl`` …); what is missing or 0 is not computed.
        lr: peak learning rate.
        warmup_steps: linear warm-up.
        final_lr: share of ``lr`` left at ``max_steps`` (cosine).
        betas, weight_decay: of AdamW; biases, norms, codebooks and embeddings are not decayed.
        val_tokens: token counts validated for nested tokenizers; powers of two if None.
        window: train the decoder on a random square of so many pixels (decoders that take ``window``), 0 for whole images.
        seed: of token counts and windows; with the step number it decides both.
    """

    def __init__(
        self,
        tokenizer: Tokenizer1D,
        init_from: str | None = None,
        weights: dict[str, float] | None = None,
        lr: float = 1e-4,
        warmup_steps: int = 100,
        final_lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-4,
        val_tokens: list[int] | None = None,
        window: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer.requires_grad_(True)
        if init_from:
            self.tokenizer.load_state_dict(Tokenizer1D.from_pretrained(init_from).state_dict())
        self.weights = {"l1": 1.0} if weights is None else {k: v for k, v in weights.items() if v}
        self.lr, self.warmup_steps, self.final_lr = lr, warmup_steps, final_lr
        most = self.tokenizer.max_tokens
        doubling = [2**i for i in range(most.bit_length()) if 2**i <= most] if self.tokenizer.is_nested else [most]
        self.val_tokens = doubling if val_tokens is None else val_tokens
        self.betas, self.weight_decay, self.window, self.seed = betas, weight_decay, window, seed
        # a plain dict: frozen networks never enter the state dict, the optimizer or the average
        self.perceptual: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        from tok1d.eval.perceptual import Perceptual

        for name in self.weights:
            if name.startswith("lpips_") and name not in self.perceptual:
                self.perceptual[name] = Perceptual(name.removeprefix("lpips_"))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        images = _unit(batch)
        draw = torch.Generator().manual_seed(hash((self.seed, self.global_rank, self.trainer.fit_loop.total_batch_idx)))
        lengths = self.tokenizer.lengths.sample(len(images), self.tokenizer.max_tokens, draw)
        window = self._window(images, draw)
        output = self.tokenizer(images, lengths, window=window)
        target = images if window is None else _cut(images, window)
        parts = {**self._pixel_losses(output.reconstruction, target), **output.losses}
        unknown = set(self.weights) - set(parts)
        if unknown:
            raise ModelError(f"weights name losses that do not exist here: {sorted(unknown)}; there are {sorted(parts)}")
        loss = sum(weight * parts[name] for name, weight in self.weights.items())
        if not torch.isfinite(loss):
            raise ModelError(f"the loss became {loss.item()} at step {self.global_step}: {_describe(parts)}")
        self.log_dict({f"train/{k}": v.detach() for k, v in {**parts, **output.stats}.items()})
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        images = _unit(batch)
        wanted = {name: distance.to(self.device).features(images) for name, distance in self.perceptual.items()}
        for k in self.val_tokens:
            out = self.tokenizer(images, torch.full((len(images),), k)).reconstruction.clamp(0, 1)
            error = (out - images).square().flatten(1).mean(1).clamp(min=1e-10)
            scores = {"psnr": (-10 * error.log10()).mean()}
            for name, distance in self.perceptual.items():
                scores[name] = distance.compare(distance.features(out), wanted[name]).mean()
            self.log_dict({f"val/{n}_{k}": v for n, v in scores.items()}, batch_size=len(images), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokenizer_config"] = self.tokenizer.to_config()
        checkpoint["run_settings"] = {
            "weights": self.weights, "lr": self.lr, "warmup_steps": self.warmup_steps, "final_lr": self.final_lr,
            "betas": list(self.betas), "weight_decay": self.weight_decay, "window": self.window, "seed": self.seed,
            "max_steps": self.trainer.max_steps, "precision": str(self.trainer.precision),
        }  # fmt: skip

    def configure_optimizers(self) -> dict[str, Any]:
        decayed, plain = [], []
        for name, p in self.tokenizer.named_parameters():
            frozen_out = p.ndim < 2 or any(word in name for word in ("norm", "embed", "codebook", "position", "token"))
            (plain if frozen_out else decayed).append(p)
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        groups = [g for g in groups if g["params"]]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        total = self.trainer.max_steps
        if total <= self.warmup_steps:
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / (total - self.warmup_steps))
        return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * done)) / 2

    def _pixel_losses(self, out: Tensor, target: Tensor) -> dict[str, Tensor]:
        losses = {}
        if "l1" in self.weights:
            losses["l1"] = F.l1_loss(out, target)
        if "l2" in self.weights:
            losses["l2"] = F.mse_loss(out, target)
        for name, distance in self.perceptual.items():
            losses[name] = distance.to(self.device)(out, target).mean()
        return losses

    def _window(self, images: Tensor, draw: torch.Generator) -> tuple[int, int, int] | None:
        if not self.window:
            return None
        room = [(s - self.window) // 8 + 1 for s in images.shape[-2:]]
        top, left = (int(torch.randint(r, (), generator=draw)) * 8 for r in room)
        return top, left, self.window


def _unit(batch: Tensor) -> Tensor:
    return batch.float() / 255 if batch.dtype == torch.uint8 else batch


def _cut(images: Tensor, window: tuple[int, int, int]) -> Tensor:
    top, left, size = window
    return images[:, :, top : top + size, left : left + size]


def _describe(parts: dict[str, Tensor]) -> str:
    return ", ".join(f"{k} {v.item():.4g}" for k, v in parts.items())
