"""TokenizerTask: what every task of a tokenizer has beside :class:`tok1d.training.tasks.step.TrainingTask`.

Which losses there are, pictures at several numbers of tokens for validation, the tokenizer's configuration in the checkpoint.
Shapes: B images of H × W pixels, N tokens, D latent width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from tok1d.errors import ModelError, UsageError
from tok1d.tokenizers.quantizers.common import rank_rows
from tok1d.tokenizers.tokenizer import Tokenizer1D, TokenizerOutput
from tok1d.training.losses.base import ImageLoss, LatentLoss
from tok1d.training.start import start_from
from tok1d.training.tasks.step import TrainingTask


class TokenizerTask(TrainingTask):
    """Train a tokenizer: a weighted sum of losses, AdamW, warm-up, cosine. Subclasses say what the losses are.

    Args:
        tokenizer: what to train.
        init_from: model whose weights to start from: whatever ``tok1d.load`` takes (a shipped name, a folder, an id on the
            hub, published weights), of the same parts.
        losses: further losses by log name.
        weights: weight of each loss by log name: those in ``losses``, those the task knows, and whatever the quantizer returns
            (``commitment``, ``codebook``, ``kl`` …) or the decoder (``flow``), which have the ``loss_weights`` of these parts
            unless given here. What is missing or 0 is not computed.
        lr, warmup_steps, final_lr, betas, weight_decay, compile, compile_backend: see
            :class:`tok1d.training.tasks.step.TrainingTask`.
        val_tokens: token counts validated for nested tokenizers; powers of two if None.
        val_steps: sampling steps of the pictures of a validation (decoders that take ``steps``).
        seed: of token counts, windows and sampled latents.
        starts: optimizer steps before a loss counts, by log name, such as ``{gan: 20000}``; 0 for those that are not named.
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
        starts: dict[str, int] | None = None,
    ) -> None:
        super().__init__(lr, warmup_steps, final_lr, betas, weight_decay, compile, compile_backend, seed, starts)
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
        self.val_steps = val_steps
        most = tokenizer.max_tokens
        doubling = [2**i for i in range(most.bit_length()) if 2**i <= most] if tokenizer.is_nested else [most]
        self.val_tokens = doubling if val_tokens is None else val_tokens
        self._check()

    # training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        batch, draw = unit_batch(batch), self._seed_step()
        parts, stats = self.losses_of(batch, self.draw_lengths(len(batch["image"]), draw), draw)
        return self.weighted(batch["key"], parts, stats)

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
        return rank_rows(rows, lambda all_rows: self.tokenizer.lengths.sample(all_rows, self.tokenizer.max_tokens, draw))

    # validation --------------------------------------------------------------------------------------------------

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

    def sampling(self) -> dict[str, Any]:
        """Options of the decoder for the pictures of a validation."""
        return {"steps": self.val_steps} if "steps" in self.tokenizer.decoder.options else {}

    # checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["tokenizer_config"] = self.tokenizer.to_config()

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
        for name, step in self.starts.items():
            if name not in self.weights or step < 0:
                raise UsageError(f"starts: steps, 0 or more, of losses that have a weight ({', '.join(self.weights)}); got {name}: {step}")
        self._check_compiled()

    def _check_weights(self) -> None:
        if not self.weights:
            raise UsageError("weights: no loss has a weight, so nothing would be learned; give one, such as weights: {l1: 1.0}")


def psnr(out: Tensor, target: Tensor) -> Tensor:
    """Mean over images of their PSNR in dB, at most 100: float (B, 3, H, W) in [0, 1] twice → scalar."""
    error = (out - target).square().flatten(1).mean(1).clamp(min=1e-10)
    return (-10 * error.log10()).mean()


def unit_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with float images in [0, 1]."""
    images = batch["image"]
    return {**batch, "image": images.float() / 255 if images.dtype == torch.uint8 else images}


def _span(lengths: list[int]) -> str:
    return str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
