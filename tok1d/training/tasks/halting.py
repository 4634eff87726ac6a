"""HaltingTask: teach a frozen tokenizer to say how many tokens an image needs.

Every step encodes a batch, decodes it at a few random lengths and measures the error; the head of
:mod:`tok1d.tokenizers.halting` is fitted to such measurements. Decoding is what costs, so they are remembered, and a step fits
many more images than it decodes. Shapes: B images of a step, F fitted, P prefixes of each, N tokens, D width of a code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import UsageError
from tok1d.tokenizers.halting import CurveHead, HaltingHead, check_head
from tok1d.tokenizers.lengths import TailDrop
from tok1d.tokenizers.quantizers.common import rank_rows
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.frozen import Frozen
from tok1d.training.ranks import gather
from tok1d.training.start import load_named
from tok1d.training.tasks.base import TokenizerTask, unit_batch

KEPT = ("data", "lengths", "errors")  # of the memory
DRAWN = TailDrop("log_uniform")


class HaltingTask(TokenizerTask):
    """Regress the log error after every number of tokens; nothing but the head is trained.

    Args:
        tokenizer: a nested model with one code a token: a name, folder or hub id for :func:`tok1d.load`, or a tokenizer.
        keep: train on the head that it has; else it gets a new :class:`CurveHead` of ``width``, ``metric`` and ``quality``.
        width, metric, quality: of the new head.
        prefixes: P lengths (log-uniform) at which each image is decoded.
        memory: how many images, the last ones of all ranks together, are remembered.
        fitted: F of them, drawn with replacement, are fitted at every step (of each rank).
        lr, warmup_steps, final_lr, betas, weight_decay, val_tokens, val_steps, seed: as :class:`TokenizerTask`; ``val_steps`` also
            of the pictures of training.
    """

    def __init__(
        self,
        tokenizer: Tokenizer1D | str,
        keep: bool = False,
        width: int = 32,
        metric: str = "psnr",
        quality: float = 22.0,
        prefixes: int = 1,
        memory: int = 4096,
        fitted: int = 64,
        lr: float = 3e-3,
        warmup_steps: int = 20,
        final_lr: float = 0.02,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-2,
        val_tokens: list[int] | None = None,
        val_steps: int = 4,
        seed: int = 0,
    ) -> None:
        model = load_named("tokenizer", tokenizer) if isinstance(tokenizer, str) else tokenizer
        if keep and model.halting is None:
            raise UsageError(f"keep: {model.name} has no halting head; leave keep out to make one")
        if not keep:
            model.halting = CurveHead(model.max_tokens, model.quantizer.code_dim, width, metric, quality)
            check_head(model)
        if min(prefixes, memory, fitted) < 1:
            raise UsageError(f"prefixes, memory and fitted must be at least 1, got {prefixes}, {memory} and {fitted}")
        super().__init__(
            model, None, None, {"curve": 1.0}, lr, warmup_steps, final_lr, betas, weight_decay, val_tokens, val_steps, seed=seed
        )
        self.weights = {"curve": 1.0}  # the losses of the quantizer have no part in this
        self.tokenizer.requires_grad_(False)
        self.head.requires_grad_(True)
        self.prefixes, self.memory, self.fitted = prefixes, memory, fitted
        self.perceptual = Frozen()
        self._kept: dict[str, Tensor] = {}
        self.train()

    @property
    def head(self) -> HaltingHead:
        assert self.tokenizer.halting is not None
        return self.tokenizer.halting

    def train(self, mode: bool = True) -> HaltingTask:
        """The tokenizer stays as it is used; codebooks that follow their data would drift otherwise."""
        super().train(mode)
        self.tokenizer.eval()
        self.head.train(mode)
        return self

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.head.metric == "lpips" and not self.perceptual:
            from tok1d.eval.perceptual import Perceptual

            self.perceptual["lpips"] = Perceptual("vgg")

    def draw_lengths(self, rows: int, draw: torch.Generator) -> Tensor:
        """int64 (rows, P)."""
        most = self.tokenizer.max_tokens
        return rank_rows(rows, lambda n: DRAWN.sample(n * self.prefixes, most, draw).view(n, self.prefixes))

    def losses_of(
        self, batch: dict[str, Any], lengths: Tensor, draw: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Smooth L1 between predicted and measured log errors of some of the images that are remembered."""
        data, codes = self.encode(batch["image"])
        self.head.observe(codes)
        self._remember(data, lengths, torch.stack([self.measure(batch, codes, k) for k in lengths.unbind(1)], 1))
        chosen = rank_rows(self.fitted, lambda n: torch.randint(len(self._kept["data"]), (n,), generator=draw))
        data, lengths, errors = (self._kept[name][chosen].to(self.device) for name in KEPT)
        predicted = self.head(self._codes(data)).gather(1, lengths - 1)  # (F, P)
        loss = F.smooth_l1_loss(predicted, errors, beta=0.1)
        off = (self.head.quality_of(predicted.detach()) - self.head.quality_of(errors)).abs().mean()
        return {"curve": loss}, {f"{self.head.metric}_off": off}

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Float (B, 3, H, W) in [0, 1] → ids (B, N) or bits (B, N, d), and their codes float32 (B, N, D)."""
        output = self.tokenizer.quantizer(self.tokenizer.encode_latents(images))
        data = output.ids if output.bits is None else output.bits
        return data, self._codes(data)

    def _codes(self, data: Tensor) -> Tensor:
        return self.tokenizer.codes_of(data, torch.full((len(data),), data.shape[1], device=data.device))

    @torch.no_grad()
    def measure(self, batch: dict[str, Any], codes: Tensor, lengths: Tensor) -> Tensor:
        """Batch of images, codes (B, N, D) of all tokens, int64 (B,) lengths → float32 (B,) log error of what is decoded."""
        images, longest = batch["image"], int(lengths.max())
        options = {**self.sampling(), **self.conditions(batch), **({"size": tuple(images.shape[-2:])} if self.tokenizer.any_size else {})}
        out = self.tokenizer.decode_latents(codes[:, :longest], lengths.to(codes.device), **options).float().clamp(0, 1)
        if self.head.metric == "lpips":
            error = self.perceptual.on(self.device)["lpips"](out, images)
        else:
            error = (out - images).square().flatten(1).mean(1)
        return error.clamp(min=1e-10).log()

    def _remember(self, *new: Tensor) -> None:
        """Add what all ranks measured, drop the oldest; every rank holds the same, so that it draws as one process would."""
        found = [torch.cat(parts) for parts in zip(*gather([value.cpu() for value in new]))]
        kept = self._kept
        self._kept = {n: torch.cat([kept[n], value] if kept else [value])[-self.memory :] for n, value in zip(KEPT, found)}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor | None]:
        """How far the prediction is off, on average and at every number of tokens validated, in dB or LPIPS."""
        batch = unit_batch(batch)
        rows, metric = len(batch["image"]), self.head.metric
        if not rows:  # of a rank that has no image to validate
            return {"ids": None}
        data, codes = self.encode(batch["image"])
        predicted = self.head.quality_of(self.head(codes))
        for k in self.val_tokens:
            found = self.head.quality_of(self.measure(batch, codes, torch.full((rows,), k)))
            off = (predicted[:, k - 1] - found).abs().mean()
            self.tally({f"{metric}_{k}": found.mean(), f"{metric}_off_{k}": off, f"{metric}_off": off}, rows)
        return {"ids": None if data.dtype == torch.uint8 else data}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["halting_memory"] = self._kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._kept = dict(checkpoint.get("halting_memory", {}))

    def run_settings(self) -> dict[str, Any]:
        more = {"prefixes": self.prefixes, "memory": self.memory, "fitted": self.fitted, "metric": self.head.metric}
        return {**super().run_settings(), **more}
