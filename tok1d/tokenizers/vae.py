"""The two halves of a KL autoencoder (diffusers AutoencoderKL) in whose latents flow decoders work, or none at all.

A tokenizer's encoder part holds the encoder half and its decoder part the decoder half, so the parts share no weights.
Both halves are frozen and stay in float32, outside autocast and whatever the rest of the model is cast to, as in FlexTok
(https://arxiv.org/abs/2502.13967). Without a VAE (``channels=None``) the "latents" are the pixels themselves.

Shapes: B images, H × W pixels, f = 2 ** (levels - 1) reduction, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.extras import require
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.convolutions import Upsample
from tok1d.tokenizers.quantizers.common import rank_rows

PUBLISHED_CHANNELS = (128, 256, 512, 512)


def reduction(channels: Sequence[int] | None) -> int:
    """Pixels per latent position along a side, after checking the widths.

    Raises:
        ModelError: widths that no such VAE has.

    Example:
        >>> reduction([128, 256, 512, 512]), reduction(None)
        (8, 1)
    """
    if channels is None:
        return 1
    if not isinstance(channels, list | tuple) or not 1 <= len(channels) <= 8:
        raise ModelError(f"vae_channels must be null or 1 to 8 widths, got {channels!r:.100}")
    for width in channels:
        check_range("every entry of vae_channels", width, 32, 4096)
        if width % 32:
            raise ModelError(f"every entry of vae_channels must be a multiple of 32 (its norms have 32 groups), got {width}")
    return 2 ** (len(channels) - 1)


def check_vae(
    channels: Sequence[int] | None, layers: int, latent_channels: int, scaling_factor: float, patch_size: int
) -> int:
    """Pixels a latent stands for along a side, once all sizes are known to fit.

    Raises:
        ModelError: sizes that contradict each other.
    """
    factor = reduction(channels)
    check_range("vae_layers", layers, 1, 8)
    check_range("latent_channels", latent_channels, 1, 1024)
    check_range("patch_size", patch_size, 1, 1024)
    if channels is None and latent_channels != 3:
        raise ModelError(f"without a VAE (vae_channels null) latents are the 3 colours, got latent_channels={latent_channels}")
    if patch_size % factor:
        raise ModelError(f"patch_size {patch_size} is not a multiple of the {factor} pixels a latent of this VAE stands for")
    if not isinstance(scaling_factor, int | float) or not math.isfinite(scaling_factor) or scaling_factor <= 0:
        raise ModelError(f"scaling_factor must be a positive number, got {scaling_factor!r:.100}")
    return factor


class _Float32(nn.Module):
    """A frozen module that keeps its dtype when the model around it is cast; training that frees the rest leaves it frozen."""

    frozen = True

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        def keep(value: Tensor) -> Tensor:
            new = fn(value)
            return value.to(new.device) if new.dtype != value.dtype else new

        return super()._apply(keep, recurse)

    def freeze(self) -> None:
        self.requires_grad_(False)


class LatentEncoder(_Float32):
    """Images to latents: the encoder half and ``quant_conv``.

    Args:
        channels: widths of the levels, published (128, 256, 512, 512); None for pixels as latents.
        layers: residual blocks a level.
        latent_channels: C.
        scaling_factor: latents are multiplied by it.
        posterior: ``mean`` (deterministic), or ``sample`` (what the published tokenizer does by default).
    """

    def __init__(
        self,
        channels: Sequence[int] | None,
        layers: int = 2,
        latent_channels: int = 16,
        scaling_factor: float = 1.0,
        posterior: str = "mean",
    ) -> None:
        super().__init__()
        if posterior not in ("mean", "sample"):
            raise ModelError(f"posterior must be mean or sample, got {posterior!r:.100}")
        self.scaling_factor, self.posterior = scaling_factor, posterior
        self.identity = channels is None
        if channels is not None:
            vae = require("diffusers.models.autoencoders.vae", "flow")
            self.encoder = vae.Encoder(
                out_channels=latent_channels,
                down_block_types=("DownEncoderBlock2D",) * len(channels),
                block_out_channels=tuple(channels),
                layers_per_block=layers,
            )
            self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.freeze()

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Float (B, 3, H, W) in [0, 1] → float32 (B, C, H/f, W/f).

        Args:
            images: as above.
            generator: of ``posterior="sample"``, a CPU generator; None draws from the global one.
        """
        with torch.autocast(images.device.type, enabled=False):
            x = images.float() * 2 - 1
            if self.identity:
                return x * self.scaling_factor
            mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
            if self.posterior == "sample":
                noise = rank_rows(len(mean), lambda rows: torch.randn(rows, *mean.shape[1:], generator=generator)).to(mean.device)
                mean = mean + (logvar.clamp(-30, 20) / 2).exp() * noise
            return mean * self.scaling_factor


class LatentDecoder(_Float32):
    """Latents to images: ``post_quant_conv`` and the decoder half.

    Args:
        channels, layers, latent_channels, scaling_factor: as :class:`LatentEncoder`.
    """

    def __init__(
        self,
        channels: Sequence[int] | None,
        layers: int = 2,
        latent_channels: int = 16,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.scaling_factor, self.identity = scaling_factor, channels is None
        if channels is not None:
            vae = require("diffusers.models.autoencoders.vae", "flow")
            self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
            self.decoder = vae.Decoder(
                in_channels=latent_channels,
                up_block_types=("UpDecoderBlock2D",) * len(channels),
                block_out_channels=tuple(channels),
                layers_per_block=layers,
            )
            for block, width in zip(self.decoder.up_blocks[:-1], channels[:0:-1]):
                block.upsamplers[0] = _Enlarge(width)
        self.freeze()

    def forward(self, latents: Tensor) -> Tensor:
        """Float (B, C, h, w) → float32 (B, 3, h · f, w · f), about [0, 1], not clamped."""
        with torch.autocast(latents.device.type, enabled=False):
            x = latents.float() / self.scaling_factor
            if not self.identity:
                x = self.decoder(self.post_quant_conv(x))
            return (x + 1) / 2


class _Enlarge(nn.Module):
    """The doubling of a decoder level under diffusers' names, without its redundant products."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Upsample(width)

    def forward(self, x: Tensor, output_size: int | None = None) -> Tensor:
        return self.conv(x)


def vae_names(channels: Sequence[int], layers: int, half: str) -> list[str]:
    """Names of the tensors of one half, ``encoder`` or ``decoder``, which are those of diffusers' AutoencoderKL."""
    with torch.device("meta"):
        module = (LatentEncoder if half == "encoder" else LatentDecoder)(channels, layers, 1)
    return list(module.state_dict())
