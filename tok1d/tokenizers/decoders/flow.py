"""RectifiedFlowDecoder: samples an image's latents by a flow that is told the first tokens, whatever their number (FlexTok).

Noised patches of latents and the given codes run through one transformer that predicts the velocity; a dropped token is one
learned vector, the absence of all tokens another. Paper: https://arxiv.org/abs/2502.13967, section 3.

Sampling takes exact short cuts (:mod:`tok1d.tokenizers.decoders.flow_network`); ``fast = False`` does without them.

Shapes: B images, n ≤ N given tokens, D code width, C × h × w latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.blocks import check_range, patch_grid
from tok1d.tokenizers.decoders.flow_network import Flow, FlowNetwork
from tok1d.tokenizers.decoders.flow_sampler import (
    Guidance,
    check_sampling,
    evaluation_times,
    integrate,
    seeded_noise,
)
from tok1d.tokenizers.flextok_blocks import check_trunk
from tok1d.tokenizers.part import Decoder, Encoder
from tok1d.tokenizers.quantizers.common import rank_rows
from tok1d.tokenizers.vae import LatentDecoder, LatentEncoder, check_vae

NOISES = ("uniform", "logit_normal", "mode")


class RectifiedFlowDecoder(Decoder):
    """Codes to images, by sampling.

    Args:
        tokens: N, the most tokens it takes.
        dim: D.
        width, depth, heads, patch_size, image_size, vae_channels, vae_layers, latent_channels, scaling_factor: as
            :class:`tok1d.tokenizers.encoders.flextok.FlexTokEncoder`.
        max_timestep: unit of the time code, 1 or 1000 in published files.
        steps, guidance, norm_guidance, solver: how :meth:`forward` samples unless told otherwise. Published: 25 steps of
            Euler with normalised guidance of 15 (d12) or 7.5 (larger ones).
        noise: distribution of training times: ``uniform``, ``logit_normal``, or ``mode`` (https://arxiv.org/abs/2403.03206).
        mode_scale: s of ``mode``.
        stratified: spread the times of a batch evenly over the distribution.
        null_prob: how often training drops all tokens of an image, which guidance needs.
        vae_encoder: hold a VAE encoder of its own for training, for use with encoders that have none.

    Example:
        >>> decoder = RectifiedFlowDecoder(8, 6, width=64, depth=2, image_size=64, steps=2).eval()
        >>> decoder(torch.rand(2, 3, 6), seeds=torch.tensor([1, 2]), guidance=3.0).shape
        torch.Size([2, 3, 64, 64])
    """

    options = ("steps", "guidance", "seeds", "solver", "norm_guidance")
    objective = "own"
    loss_weights = {"flow": 1.0}  # noqa: RUF012

    def __init__(
        self,
        tokens: int,
        dim: int,
        width: int = 768,
        depth: int = 12,
        heads: int | None = None,
        patch_size: int = 16,
        image_size: int | Sequence[int] = 256,
        vae_channels: Sequence[int] | None = None,
        vae_layers: int = 2,
        latent_channels: int = 3,
        scaling_factor: float = 1.0,
        max_timestep: float = 1.0,
        steps: int = 25,
        guidance: float = 7.5,
        norm_guidance: bool = True,
        solver: str = "euler",
        noise: str = "uniform",
        mode_scale: float = 0.25,
        stratified: bool = False,
        null_prob: float = 0.1,
        vae_encoder: bool = False,
    ) -> None:
        super().__init__()
        check_range("tokens", tokens, 1, 65536)
        check_range("dim", dim, 1, 65536)
        heads = check_trunk(width, depth, heads)
        self.grid = patch_grid(image_size, patch_size)
        factor = check_vae(vae_channels, vae_layers, latent_channels, scaling_factor, patch_size)
        if noise not in NOISES:
            raise ModelError(f"noise must be one of {', '.join(NOISES)}, got {noise!r:.100}")
        if not isinstance(max_timestep, int | float) or not 0 < max_timestep <= 1e6:
            raise ModelError(f"max_timestep must be a positive number, 1 or 1000 in published files, got {max_timestep!r:.100}")
        if not 0 <= null_prob <= 1:
            raise ModelError(f"null_prob must be a probability, got {null_prob!r:.100}")
        check_sampling(steps, guidance, solver)
        self.tokens, self.dim, self.patch, self.latent_channels = tokens, dim, patch_size // factor, latent_channels
        self.steps, self.guidance, self.norm_guidance, self.solver = steps, guidance, norm_guidance, solver
        self.noise, self.mode_scale, self.stratified, self.null_prob = noise, mode_scale, stratified, null_prob
        self.fast = True
        self.net = FlowNetwork(tokens, dim, width, depth, heads, self.grid, self.patch, latent_channels, max_timestep)
        vae = (vae_channels, vae_layers, latent_channels, scaling_factor)
        self.vae = LatentDecoder(*vae)
        self.vae_encoder = LatentEncoder(*vae) if vae_encoder or vae_channels is None else None
        object.__setattr__(self, "_latents_of", None)

    # sampling ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        q: Tensor,
        mask: Tensor | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seeds: Tensor | None = None,
        solver: str | None = None,
        norm_guidance: bool | None = None,
    ) -> Tensor:
        """Sample images.

        Args:
            q: float (B, n, D) codes.
            mask: bool (B, n) True = given; None for all.
            steps, guidance, solver, norm_guidance: None takes those of the configuration; a guidance of 1 is none and
                halves the work.
            seeds: int64 (B,) of the noise; 0 for every image if None.

        Returns:
            float32 (B, 3, H, W), about [0, 1], not clamped.
        """
        seeds = torch.zeros(len(q), dtype=torch.int64) if seeds is None else seeds
        if seeds.shape != (len(q),):
            raise TokenError(f"seeds must be one integer an image, ({len(q)},), got {tuple(seeds.shape)}")
        noise = seeded_noise(seeds.tolist(), self.latent_shape, q.device)
        return self.vae(self.sample(noise, q, mask, steps, guidance, solver, norm_guidance))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.latent_channels, self.grid[0] * self.patch, self.grid[1] * self.patch

    def sample(
        self,
        noise: Tensor,
        q: Tensor,
        mask: Tensor | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        solver: str | None = None,
        norm_guidance: bool | None = None,
    ) -> Tensor:
        """Float32 (B, C, h, w) noise, codes and mask as :meth:`forward` → float32 (B, C, h, w) scaled latents."""
        steps = self.steps if steps is None else steps
        scale = self.guidance if guidance is None else guidance
        solver = self.solver if solver is None else solver
        check_sampling(steps, scale, solver)
        self.net.check_codes(q, mask)
        guide = None if scale == 1 else Guidance(scale, self.norm_guidance if norm_guidance is None else norm_guidance)
        if not len(q):
            return noise.float()
        times = evaluation_times(steps, solver)
        make = self.net.fast_field if self.fast else self.net.plain_field
        return integrate(make(q, mask, times, guide), noise.float(), steps, solver)

    def velocity(
        self, x: Tensor, t: Tensor, q: Tensor, mask: Tensor | None = None, null: Tensor | None = None
    ) -> Tensor:
        """Predicted velocity, float32 (B, C, h, w); arguments as :meth:`FlowNetwork.flow`."""
        return self.net.flow(x, t, q, mask, null).velocity

    # training ----------------------------------------------------------------------------------------------------

    def attach(self, encoder: Encoder) -> None:
        """Take the VAE's encoder half from the encoder beside this decoder, if that has the same one, for training."""
        same = ("vae_channels", "vae_layers", "latent_channels", "scaling_factor")
        if all(name in encoder.config and encoder.config[name] == self.config[name] for name in same):
            object.__setattr__(self, "_latents_of", encoder)  # not a submodule: it belongs to the tokenizer

    @property
    def vae_source(self) -> LatentEncoder | Encoder | None:
        """What makes the latents of training: a VAE encoder of its own, else the encoder beside this decoder, if it has the same VAE."""
        return self.vae_encoder if self.vae_encoder is not None else self._latents_of

    def latents(self, images: Tensor) -> Tensor:
        """Float (B, 3, H, W) in [0, 1] → float32 (B, C, h, w) scaled latents, without gradient.

        Raises:
            ModelError: there is no VAE encoder to make them.
        """
        source = self.vae_source
        if source is None:
            raise ModelError(
                "this flow decoder works in latents of a VAE whose encoder half it does not have. Train it beside a "
                "FlexTokEncoder with the same vae_channels, or build it with vae_encoder=True"
            )
        with torch.no_grad():
            return source(images) if source is self.vae_encoder else source.latents(images)

    def training_flow(
        self,
        q: Tensor,
        mask: Tensor | None,
        images: Tensor,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
    ) -> Flow:
        """One evaluation at random times with its target; arguments as :meth:`own_losses`, and the images' latents if they are known."""
        clean = self.latents(images) if latents is None else latents
        rows, shape = len(clean), tuple(clean.shape[1:])
        t = rank_rows(rows, lambda n: self.draw_times(n, generator)).to(clean.device)
        # One seed an image: a rank does not draw the noise of all others, which at a batch of 2048 takes longer than the step.
        seeds = rank_rows(rows, lambda n: torch.randint(2**62, (n,), generator=generator, device="cpu"))
        noise = seeded_noise(seeds.tolist(), shape, clean.device)
        null = (rank_rows(rows, lambda n: torch.rand(n, generator=generator, device="cpu")) < self.null_prob).to(clean.device)
        weight = t[:, None, None, None]
        flow = self.net.flow(weight * noise + (1 - weight) * clean, t, q, mask, null)
        flow.target = noise - clean
        return flow

    def own_losses(
        self, q: Tensor, mask: Tensor | None, images: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """``flow``: mean squared error of the velocity at random times, some images without any token.

        Args:
            q, mask: as :meth:`forward`.
            images: float (B, 3, H, W) in [0, 1].
            generator: of times, noise and dropping; a CPU generator.
        """
        flow = self.training_flow(q, mask, images, generator)
        assert flow.target is not None
        return {"flow": F.mse_loss(flow.velocity, flow.target)}

    def draw_times(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Training times, float32 (batch,) in [0, 1], on the CPU."""
        u = torch.rand(batch, generator=generator, dtype=torch.float64, device="cpu")
        if self.stratified:
            u = (torch.arange(batch, device="cpu") + u) / max(batch, 1)
        if self.noise == "logit_normal":
            u = torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)).sigmoid()
        elif self.noise == "mode":
            u = 1 - u - self.mode_scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)
        return u.float()
