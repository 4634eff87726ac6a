"""FlowTask: a tokenizer whose decoder is a rectified flow in the latents of a frozen VAE (FlexTok).

The decoder learns the velocity from noise to latents, told the first tokens; an alignment head on its early states makes few
tokens mean something. Paper: https://arxiv.org/abs/2502.13967, section 3; alignment: REPA, https://arxiv.org/abs/2410.06940.

Shapes: B images, N tokens, n ≤ N kept tokens, P patches, W width of the decoder, C × h × w latents.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import ModelError, UsageError
from tok1d.tokenizers.decoders.flow import RectifiedFlowDecoder
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.losses.base import ImageLoss, LatentLoss
from tok1d.training.tasks.base import TokenizerTask
from tok1d.training.tasks.coding import quantize
from tok1d.training.vae import load_vae


class FlowTask(TokenizerTask):
    """Rectified flow, with an optional alignment of the decoder's early states to a frozen image model.

    Args:
        tokenizer: with a :class:`tok1d.tokenizers.decoders.flow.RectifiedFlowDecoder`; its tokens should be dropped from the end.
        vae: weights of the frozen VAE, in diffusers' layout (AutoencoderKL): a folder, a file, or an id on the hub. None keeps
            those of ``init_from``, and is right without a VAE (``vae_channels: null``).
        init_from, lr, warmup_steps, final_lr, betas, weight_decay, val_tokens, val_steps, compile, compile_backend, seed,
            starts: see :class:`tok1d.training.tasks.base.TokenizerTask`.
        losses: further losses of latents by log name, such as :class:`tok1d.training.losses.alignment.FeatureAlignment` on the
            decoder's second block.
        weights: as there; ``flow`` is 1 unless given.

    Latents are read from the batch (``latents``) where the data has them cached: those of ``LatentEncoder``, scaling factor included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer1D,
        vae: str | None = None,
        init_from: str | None = None,
        losses: dict[str, ImageLoss | LatentLoss] | None = None,
        weights: dict[str, float] | None = None,
        lr: float = 1e-4,
        warmup_steps: int = 1000,
        final_lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-4,
        val_tokens: list[int] | None = None,
        val_steps: int = 10,
        compile: list[str] | None = None,
        compile_backend: str = "inductor",
        seed: int = 0,
        starts: dict[str, int] | None = None,
    ) -> None:
        if not isinstance(tokenizer.decoder, RectifiedFlowDecoder):
            raise UsageError(f"FlowTask trains a RectifiedFlowDecoder, got {type(tokenizer.decoder).__name__}; take ReconstructionTask for pixels")
        super().__init__(
            tokenizer, init_from, losses, weights, lr, warmup_steps, final_lr, betas, weight_decay, val_tokens, val_steps,
            compile, compile_backend, seed, starts,
        )  # fmt: skip
        if vae:
            load_vae(tokenizer, vae)

    def losses_of(self, batch: dict[str, Any], lengths: Tensor, draw: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        clean = self.latents(batch)  # (B, C, h, w)
        coded = quantize(self.tokenizer, self.encode(clean, batch["image"]), lengths)
        flow = self.tokenizer.decoder.training_flow(coded.q, coded.given, batch["image"], draw, clean)
        found = {"flow": F.mse_loss(flow.velocity, flow.target)}
        return {**found, **coded.output.losses, **self.latent_losses(coded.output, batch)}, coded.output.stats

    def latents(self, batch: dict[str, Any]) -> Tensor:
        """Float32 (B, C, h, w) scaled latents of the VAE for exactly these views: cached ones, or made here without gradient.

        Raises:
            ModelError: cached latents of another shape.
        """
        decoder, cached = self.tokenizer.decoder, batch.get("latents")
        if cached is None:
            return decoder.latents(batch["image"])
        if tuple(cached.shape[1:]) != decoder.latent_shape:
            raise ModelError(
                f"cached latents must be (images, {', '.join(map(str, decoder.latent_shape))}), got {tuple(cached.shape)}; cache them with the VAE "
                "of this configuration"
            )
        return cached.float()

    def encode(self, latents: Tensor, images: Tensor) -> Tensor:
        """Float (B, N, D) before the quantizer; of the latents, where the encoder works on the same ones."""
        encoder, decoder = self.tokenizer.encoder, self.tokenizer.decoder
        return encoder.encode_latents(latents) if decoder.vae_source is encoder else encoder(images)
