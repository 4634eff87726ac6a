"""Lightning tasks. A task is a straight-line training step; models and losses work without it.

Everything random in a step follows from (seed, rank, number of the batch), so a resumed run continues as the
uninterrupted one would have. Shapes: B images of H × W pixels, N tokens.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import ModelError, UsageError
from tok1d.extras import require
from tok1d.tokenizers.folder import WEIGHTS_NAME
from tok1d.tokenizers.tokenizer import Tokenizer1D

lightning = require("lightning", "train")
log = logging.getLogger(__name__)


class Frozen(dict[str, Any]):
    """Networks that are used but not trained: out of the state dict and the optimizer, and shared by deep copies."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return self


class ReconstructionTask(lightning.LightningModule):
    """Train a tokenizer to reconstruct: pixel, perceptual and quantizer losses; AdamW, warm-up, cosine.

    Args:
        tokenizer: what to train.
        init_from: model folder whose weights to start from (same parts; tensors it lacks start untrained).
        weights: weight of each loss by log name: ``l1``, ``l2``, ``log_l2``, ``lpips_vgg``, ``lpips_alex``, and whatever the quantizer
            returns (``commitment``, ``codebook``, ``kl`` …) or the decoder (``flow``), which have the ``loss_weights`` of these
            parts unless given here. What is missing or 0 is not computed. A decoder with losses of its own paints no picture
            in training, so pictures are not compared then. None: ``l1`` of pictures.
        lr: peak learning rate.
        warmup_steps: linear warm-up.
        final_lr: share of ``lr`` left at ``max_steps`` (cosine).
        betas, weight_decay: of AdamW; biases, norms, codebooks and embeddings are not decayed.
        val_tokens: token counts validated for nested tokenizers; powers of two if None.
        val_steps: sampling steps of the pictures of a validation (decoders that take ``steps``).
        window: train the decoder on a random square of so many pixels (decoders that take ``window``), 0 for whole images.
        seed: of token counts, windows and sampled latents.
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
        val_steps: int = 4,
        window: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer.requires_grad_(True)
        for module in tokenizer.modules():
            if getattr(module, "frozen", False):
                module.requires_grad_(False)
        if init_from:
            _start_from(self.tokenizer, init_from)
        published = {**tokenizer.quantizer.loss_weights, **tokenizer.decoder.loss_weights}
        given = ({} if tokenizer.decoder.objective == "own" else {"l1": 1.0}) if weights is None else weights
        self.weights = {k: v for k, v in {**published, **given}.items() if v}
        if not any(name in self.weights for name in tokenizer.quantizer.loss_weights):
            tokenizer.quantizer.requires_grad_(False)  # nothing gives it gradients, and data parallelism must know
        self.lr, self.warmup_steps, self.final_lr = lr, warmup_steps, final_lr
        most = tokenizer.max_tokens
        doubling = [2**i for i in range(most.bit_length()) if 2**i <= most] if tokenizer.is_nested else [most]
        self.val_tokens = doubling if val_tokens is None else val_tokens
        self.betas, self.weight_decay, self.window, self.seed = betas, weight_decay, window, seed
        self.val_steps = val_steps
        self.perceptual = Frozen()
        self._check()

    def setup(self, stage: str) -> None:
        from tok1d.eval.perceptual import Perceptual

        if stage == "fit" and self.trainer.max_steps < 1:
            raise UsageError("set trainer.max_steps: the data never ends, and the learning rate needs to know the last step")
        for name in self.weights:
            if name.startswith("lpips_") and name not in self.perceptual:
                self.perceptual[name] = Perceptual(name.removeprefix("lpips_"))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        images, draw = _unit(batch), self._seed_step()
        lengths = self.tokenizer.lengths.sample(len(images), self.tokenizer.max_tokens, draw)
        parts, stats = self.losses(images, lengths, draw)
        unknown = set(self.weights) - set(parts)
        if unknown:
            raise ModelError(f"weights name losses that do not exist here: {sorted(unknown)}; there are {sorted(parts)}")
        loss = sum(weight * parts[name] for name, weight in self.weights.items())
        if not torch.isfinite(loss):
            values = ", ".join(f"{k} {v.item():.4g}" for k, v in parts.items())
            raise ModelError(self._diverged(f"the loss became {loss.item()} ({values})"))
        self.log_dict({f"train/{k}": v.detach() for k, v in {**parts, **stats}.items()})
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])
        return loss

    def losses(self, images: Tensor, lengths: Tensor, draw: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Unweighted losses and statistics of one batch.

        Args:
            images: float (B, 3, H, W) in [0, 1].
            lengths: int64 (B,) tokens kept of each.
            draw: source of every random choice of this step.
        """
        window = self._window(images, draw)
        output = self.tokenizer(images, lengths, window=window, generator=draw)
        if output.reconstruction is None:
            return output.losses, output.stats
        target = images if window is None else _cut(images, window)
        return {**self.pixel_losses(output.reconstruction.float(), target), **output.losses}, output.stats

    def pixel_losses(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Unweighted losses of a reconstruction by log name; override to add your own.

        Args:
            images: float32 (B, 3, H, W), not clamped.
            target: float32 (B, 3, H, W) in [0, 1].
        """
        plain = {"l1": F.l1_loss, "l2": F.mse_loss, "log_l2": log_l2}
        found = {name: loss(images, target) for name, loss in plain.items() if name in self.weights}
        for name, distance in self.perceptual.items():
            found[name] = distance.to(self.device)(images, target).mean()
        return found

    def validation_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor | None]:
        images = _unit(batch)
        wanted = {name: distance.to(self.device).features(images) for name, distance in self.perceptual.items()}
        code = self.tokenizer.quantizer(self.tokenizer.encode_latents(images))
        for k in self.val_tokens:
            q = self.tokenizer.prefix_codes(code, k)
            out = self.tokenizer.decode_latents(q, **self.sampling()).float().clamp(0, 1)
            error = (out - images).square().flatten(1).mean(1).clamp(min=1e-10)
            scores = {"psnr": (-10 * error.log10()).mean()}
            for name, distance in self.perceptual.items():
                scores[name] = distance.compare(distance.features(out), wanted[name]).mean()
            if self.tokenizer.decoder.objective == "own":
                draw = torch.Generator().manual_seed(batch_idx)  # the same times and noise at every validation
                scores |= self.tokenizer.decoder.own_losses(q.to(self.tokenizer.dtype), None, images, draw)
            self.log_dict({f"val/{n}_{k}": v for n, v in scores.items()}, batch_size=len(images), sync_dist=True)
        return {"ids": code.ids}

    def sampling(self) -> dict[str, Any]:
        """Options of the decoder for the pictures of a validation."""
        return {"steps": self.val_steps} if "steps" in self.tokenizer.decoder.options else {}

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

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As Lightning's, and stop before gradients that are not finite reach the weights."""
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        params = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(params, gradient_clip_val or math.inf)
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # which skips such steps by itself
        if not scaled and not torch.isfinite(norm):
            raise ModelError(self._diverged(f"the norm of the gradient became {norm.item()}"))
        self.log("train/grad_norm", norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainer, data = self.trainer, getattr(self.trainer, "datamodule", None)
        checkpoint["tokenizer_config"] = self.tokenizer.to_config()
        checkpoint["run_settings"] = {
            "weights": self.weights, "lr": self.lr, "warmup_steps": self.warmup_steps, "final_lr": self.final_lr,
            "betas": list(self.betas), "weight_decay": self.weight_decay, "window": self.window, "seed": self.seed,
            "max_steps": trainer.max_steps, "precision": str(trainer.precision), "gradient_clip_val": trainer.gradient_clip_val,
            "hardware": _hardware(self.device), "accumulate_grad_batches": trainer.accumulate_grad_batches, "devices": trainer.world_size,
            "data": data.describe() if hasattr(data, "describe") else {},
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, here = checkpoint.get("tokenizer_config"), self.tokenizer.to_config()
        if not isinstance(saved, dict):
            raise ModelError("this checkpoint was not written by 'tok fit' (no tokenizer_config in it)")
        for part in ("encoder", "quantizer", "decoder"):
            for name, value in saved.get(part, {}).items():
                if here[part].get(name) != value:
                    raise ModelError(
                        f"the checkpoint is of another model: its {part} has {name}: {value}, the configuration says "
                        f"{here[part].get(name)}. Continue with the configuration of that run (config.yaml beside its logs)"
                    )

    def _check(self) -> None:
        tokenizer, (height, width) = self.tokenizer, self.tokenizer.image_size
        if not self.weights:
            raise UsageError("weights: no loss has a weight, so nothing would be learned; give one, such as weights: {l1: 1.0}")
        for k in self.val_tokens:
            if k not in tokenizer.token_lengths:
                raise UsageError(f"val_tokens: {tokenizer.name} has no {k} tokens, only {_span(tokenizer.token_lengths)}")
        if self.window and "window" not in tokenizer.decoder.options:
            raise UsageError(f"window: {type(tokenizer.decoder).__name__} renders whole images only; set window: 0")
        if self.window % 8 or not 0 <= self.window <= min(height, width):
            raise UsageError(f"window must be a multiple of 8 up to {min(height, width)} pixels, or 0; got {self.window}")

    def _seed_step(self) -> torch.Generator:
        """Seed the global generator for this batch, and return one for token counts and windows, on the CPU."""
        number = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # of batches, accumulated ones too
        state = np.random.SeedSequence((self.seed, self.global_rank, number)).generate_state(2, np.uint64)
        torch.manual_seed(int(state[0]))
        return torch.Generator().manual_seed(int(state[1]))

    def _lr_factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        total = self.trainer.max_steps
        if total <= self.warmup_steps:
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / (total - self.warmup_steps))
        return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * done)) / 2

    def _window(self, images: Tensor, draw: torch.Generator) -> tuple[int, int, int] | None:
        if not self.window:
            return None
        room = [(s - self.window) // 8 + 1 for s in images.shape[-2:]]
        top, left = (int(torch.randint(r, (), generator=draw)) * 8 for r in room)
        return top, left, self.window

    def _diverged(self, what: str) -> str:
        return (
            f"{what} after step {self.global_step}. Checkpoints are from before; continue from one with a lower "
            "learning rate, a longer warm-up, or trainer.precision 32-true"
        )


def log_l2(out: Tensor, target: Tensor) -> Tensor:
    """Mean over images of the natural logarithm of their mean squared error: minus 4.34 of it is the mean PSNR in dB.

    Every image counts alike, however few tokens it was given.

    Example:
        >>> round(log_l2(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.1)).item(), 3)
        -4.605
    """
    return (out - target).square().flatten(1).mean(1).clamp(min=1e-6).log().mean()


def _start_from(tokenizer: Tokenizer1D, folder: str) -> None:
    """Copy the weights of a model folder; parameters it lacks keep their initial values, anything else is an error."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        missing, unexpected = tokenizer.load_state_dict(load_file(Path(folder) / WEIGHTS_NAME), strict=False)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"init_from {folder}: cannot be loaded ({error}); it must be a model folder with {WEIGHTS_NAME}") from error
    except RuntimeError as error:
        raise ModelError(f"init_from {folder}: the weights do not fit this tokenizer: {' '.join(str(error).split())[:300]}") from error
    if unexpected:
        raise ModelError(f"init_from {folder} holds tensors this tokenizer lacks: {', '.join(unexpected[:3])} …")
    if missing:
        log.warning("init_from %s lacks %d tensors, which start untrained: %s …", folder, len(missing), ", ".join(missing[:3]))


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads"


def _unit(batch: Tensor) -> Tensor:
    return batch.float() / 255 if batch.dtype == torch.uint8 else batch


def _cut(images: Tensor, window: tuple[int, int, int]) -> Tensor:
    top, left, size = window
    return images[:, :, top : top + size, left : left + size]


def _span(lengths: list[int]) -> str:
    return str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
