"""What every task has: seeds, optimizer and schedule, a stop at nan, settings in the checkpoint, validation.

Everything random in a step follows from (seed, number of the batch) and is drawn for the batches of all ranks together, of
which each takes its rows: a resumed run continues as the uninterrupted one would have, and several processes do what one
would do with their batches put together. Shapes: B images of H × W pixels, N tokens, D latent width.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tok1d.errors import ModelError, UsageError
from tok1d.extras import require
from tok1d.tokenizers.tokenizer import Tokenizer1D, TokenizerOutput
from tok1d.training.divergence import Watch
from tok1d.training.losses.base import ImageLoss, LatentLoss
from tok1d.training.ranks import gather, world
from tok1d.training.start import start_from

lightning = require("lightning", "train")


class TokenizerTask(lightning.LightningModule):
    """Train a tokenizer: a weighted sum of losses, AdamW, warm-up, cosine. Subclasses say what the losses are.

    Args:
        tokenizer: what to train.
        init_from: model whose weights to start from: whatever ``tok1d.load`` takes (a shipped name, a folder, an id on the
            hub, published weights), of the same parts.
        losses: further losses by log name.
        weights: weight of each loss by log name: those in ``losses``, those the task knows, and whatever the quantizer returns
            (``commitment``, ``codebook``, ``kl`` …) or the decoder (``flow``), which have the ``loss_weights`` of these parts
            unless given here. What is missing or 0 is not computed.
        lr: peak learning rate.
        warmup_steps: linear warm-up.
        final_lr: share of ``lr`` left at ``max_steps`` (cosine).
        betas, weight_decay: of AdamW; biases, norms, codebooks and embeddings are not decayed.
        val_tokens: token counts validated for nested tokenizers; powers of two if None.
        val_steps: sampling steps of the pictures of a validation (decoders that take ``steps``).
        compile: names of submodules to compile, such as ``tokenizer.encoder``.
        compile_backend: of ``torch.compile``.
        seed: of token counts, windows and sampled latents.
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
        compile: list[str] | None = None,
        compile_backend: str = "inductor",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer.requires_grad_(True)
        for module in tokenizer.modules():
            if getattr(module, "frozen", False):
                module.requires_grad_(False)
        if init_from:
            start_from(self.tokenizer, init_from)
        self.losses = nn.ModuleDict(losses or {})
        for loss in self.losses.values():
            if isinstance(loss, LatentLoss):
                loss.attach(tokenizer)
        published = {**tokenizer.quantizer.loss_weights, **tokenizer.decoder.loss_weights}
        self.weights = {k: v for k, v in {**published, **(weights or {})}.items() if v}
        if not (tokenizer.quantizer.picture_gradient or any(name in self.weights for name in tokenizer.quantizer.loss_weights)):
            tokenizer.quantizer.requires_grad_(False)  # nothing gives it gradients, and data parallelism must know
        self.lr, self.warmup_steps, self.final_lr = lr, warmup_steps, final_lr
        self.betas, self.weight_decay, self.seed, self.val_steps = betas, weight_decay, seed, val_steps
        most = tokenizer.max_tokens
        doubling = [2**i for i in range(most.bit_length()) if 2**i <= most] if tokenizer.is_nested else [most]
        self.val_tokens = doubling if val_tokens is None else val_tokens
        self.compiled, self.compile_backend = list(compile or []), compile_backend
        self.watch = Watch()
        self._scores: dict[str, list[float]] = {}
        self._check()

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer.max_steps < 1:
            raise UsageError("set trainer.max_steps: the data never ends, and the learning rate needs to know the last step")
        while stage == "fit" and self.compiled:  # in place: names in checkpoints stay what they are
            self.get_submodule(self.compiled.pop()).compile(backend=self.compile_backend)

    # training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        batch, draw = unit_batch(batch), self._seed_step()
        parts, stats = self.losses_of(batch, self.draw_lengths(len(batch["image"]), draw), draw)
        unknown = set(self.weights) - set(parts)
        if unknown:
            raise ModelError(f"weights name losses that do not exist here: {sorted(unknown)}; there are {sorted(parts)}")
        loss = sum(weight * parts[name] for name, weight in self.weights.items())
        self.watch.note(self.batch_number, batch["key"], loss, parts)
        self.log_dict({f"train/{k}": v.detach() for k, v in {**parts, **stats}.items()})
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])
        return loss

    @abstractmethod
    def losses_of(self, batch: dict[str, Any], lengths: Tensor, draw: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Unweighted scalar losses and statistics of one batch by log name.

        Args:
            batch: with ``image``, float (B, 3, H, W) in [0, 1].
            lengths: int64 (B,) tokens kept of each.
            draw: source of every random choice of this step, in the same state on all ranks; a CPU generator.
        """

    def latent_losses(self, output: TokenizerOutput, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Those of ``losses`` that look at latents and codes."""
        named = {name: loss for name, loss in self.losses.items() if isinstance(loss, LatentLoss) and name in self.weights}
        return {name: loss(output.z, output.q, output.mask, batch["image"], batch) for name, loss in named.items()}

    def draw_lengths(self, rows: int, draw: torch.Generator) -> Tensor:
        """int64 (rows,) tokens kept of each image of this rank."""
        rank, ranks = world()
        return self.tokenizer.lengths.sample(rows * ranks, self.tokenizer.max_tokens, draw)[rank * rows : (rank + 1) * rows]

    @property
    def batch_number(self) -> int:
        """Of this batch in the run: 0, 1, …, accumulated ones too."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def _seed_step(self) -> torch.Generator:
        """Seed the global generator for this batch, and return one for token counts and windows, on the CPU."""
        state = np.random.SeedSequence((self.seed, 0, self.batch_number)).generate_state(2, np.uint64)
        torch.manual_seed(int(state[0]))
        return torch.Generator().manual_seed(int(state[1]))

    # validation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._scores = defaultdict(lambda: [0.0, 0.0])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor | None]:
        """PSNR and whatever :meth:`scores` adds, at every number of tokens validated."""
        batch = unit_batch(batch)
        images = batch["image"]
        if not len(images):  # of a rank that has no image to validate
            return {"ids": None}
        code = self.tokenizer.quantizer(self.tokenizer.encode_latents(images))
        for k in self.val_tokens:
            q = self.tokenizer.prefix_codes(code, k)
            out = self.pictures(q, batch).float().clamp(0, 1)
            scores = {"psnr": psnr(out, images), **self.scores(out, batch), **self.code_scores(q, batch, batch_idx)}
            self.tally({f"{name}_{k}": value for name, value in scores.items()}, len(images))
        return {"ids": code.ids}

    def tally(self, scores: dict[str, Tensor], rows: int) -> None:
        """Count means over so many images into the means of this validation, logged as ``val/NAME``."""
        for name, value in scores.items():
            total = self._scores[f"val/{name}"]
            total[0], total[1] = total[0] + value.item() * rows, total[1] + rows

    def pictures(self, q: Tensor, batch: dict[str, Any]) -> Tensor:
        """What codes look like.

        Args:
            q: float (B, n, D) codes of the first n tokens.
            batch: of these images; a decoder may read more of it than the codes, such as ``text``.

        Returns:
            Float (B, 3, H, W), not clamped.
        """
        size = {"size": tuple(batch["image"].shape[-2:])} if self.tokenizer.any_size else {}
        return self.tokenizer.decode_latents(q, **self.sampling(), **size, **self.conditions(batch))

    def conditions(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the decoder reads of a batch beside the codes, by its options: ``text`` for decoders that take it."""
        return {}

    def code_scores(self, q: Tensor, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Further means over a batch that are taken of codes (B, n, D) rather than pictures: losses of a decoder that has its own."""
        if self.tokenizer.decoder.objective != "own":
            return {}
        draw = torch.Generator().manual_seed(batch_idx)  # the same times and noise at every validation
        return self.tokenizer.decoder.own_losses(q.to(self.tokenizer.dtype), None, batch["image"], draw)

    def scores(self, out: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Further means over a batch by log name.

        Args:
            out: float32 (B, 3, H, W) in [0, 1], pictures.
            batch: with ``image``, what they should be.
        """
        return {}

    def on_validation_epoch_end(self) -> None:
        """Means over the images of all ranks, however they are spread."""
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for found in gather(dict(self._scores)):
            for name, (value, count) in found.items():
                totals[name] = [totals[name][0] + value, totals[name][1] + count]
        self.log_dict({name: value / count for name, (value, count) in totals.items()})

    def sampling(self) -> dict[str, Any]:
        """Options of the decoder for the pictures of a validation."""
        return {"steps": self.val_steps} if "steps" in self.tokenizer.decoder.options else {}

    # optimizer ---------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:
        decayed, plain = [], []
        for name, p in self.named_parameters():
            name = name.removeprefix("tokenizer.")
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
        checkpoint["tokenizer_config"] = self.tokenizer.to_config()
        checkpoint["run_settings"] = self.run_settings()

    def run_settings(self) -> dict[str, Any]:
        """What a model card says of the training, plain data."""
        trainer, data = self.trainer, getattr(self.trainer, "datamodule", None)
        return {
            "task": type(self).__name__, "weights": self.weights, "lr": self.lr, "warmup_steps": self.warmup_steps,
            "final_lr": self.final_lr, "betas": list(self.betas), "weight_decay": self.weight_decay, "seed": self.seed,
            "max_steps": trainer.max_steps, "precision": str(trainer.precision), "gradient_clip_val": trainer.gradient_clip_val,
            "hardware": _hardware(self.device), "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "devices": trainer.world_size, "data": data.describe() if hasattr(data, "describe") else {},
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

    # checks ------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        tokenizer = self.tokenizer
        self._check_weights()
        for k in self.val_tokens:
            if k not in tokenizer.token_lengths:
                raise UsageError(f"val_tokens: {tokenizer.name} has no {k} tokens, only {_span(tokenizer.token_lengths)}")
        for name in self.losses.keys() - self.weights.keys():
            raise UsageError(f"losses: {name} has no weight; give it one in weights, or leave it out")
        known = dict(self.named_modules())
        for name in self.compiled:
            if name not in known:
                raise UsageError(f"compile: there is no module {name!r}; give names such as tokenizer.encoder or tokenizer.decoder")

    def _check_weights(self) -> None:
        if not self.weights:
            raise UsageError("weights: no loss has a weight, so nothing would be learned; give one, such as weights: {l1: 1.0}")

    def _log_folder(self) -> Path | None:
        folder = None if self.trainer.fast_dev_run else self.trainer.log_dir
        return None if folder is None else Path(folder)


def psnr(out: Tensor, target: Tensor) -> Tensor:
    """Mean over images of their PSNR in dB, at most 100: float (B, 3, H, W) in [0, 1] twice → scalar."""
    error = (out - target).square().flatten(1).mean(1).clamp(min=1e-10)
    return (-10 * error.log10()).mean()


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads"


def unit_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with float images in [0, 1]."""
    images = batch["image"]
    return {**batch, "image": images.float() / 255 if images.dtype == torch.uint8 else images}


def _span(lengths: list[int]) -> str:
    return str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
