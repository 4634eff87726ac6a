"""GenerativeDecoder: codes and noise to pixels (the generative decoder of WeTok, https://arxiv.org/abs/2508.05599).

At high compression many pictures fit the same codes, and a decoder without noise can only paint their mean. Here a grid of
mask tokens reads the codes, noise of the grid's shape joins its features, and convolutions paint the picture, every one
of their group norms scaled by the spread and shifted by the mean of the code features. Noise enters through weights that
start at zero: it trains like any pixel decoder, and an adversarial loss later finds a use for the noise.

WeTok's features come from a convolutional tokenizer's grid of codes; the mask grid makes them from any 1D codes, of any length.

Shapes: B images, n ≤ N given tokens, D code width, F feature channels, Z noise channels, h × w grid, C channels of a level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.blocks import check_range, init_weights
from tok1d.tokenizers.convolutions import EPS, Upsample, norm_silu
from tok1d.tokenizers.decoders.grid import MaskGrid
from tok1d.tokenizers.part import Decoder
from tok1d.tokenizers.quantizers.common import rank_rows


class GenerativeDecoder(MaskGrid, Decoder):
    """Codes and noise to pixels.

    Args:
        tokens, dim, width, depth, heads, mlp_ratio: of the mask grid, as :class:`tok1d.tokenizers.decoders.grid.GridDecoder`.
        patch_size: pixels of a cell of the grid, a power of two: the convolutions double the size log2(patch_size) times.
        image_size: an int, or (height, width).
        channels: C at the grid (F) and after each doubling, multiples of 4; log2(patch_size) + 1 of them.
        blocks: residual blocks at each resolution.
        noise_channels: Z.
        noise: standard deviation of the noise outside training. 0 paints the mean picture, whatever the seeds; the
            attribute of this name may be changed at any time (``tokenizer.decoder.noise = 0.0``).

    Training steps (training mode with gradients) draw fresh noise from the global generator. Everywhere else the noise of
    an image follows from its seed alone, and the seed is 0 if none is given: pictures are always reproducible.

    Example:
        >>> decoder = GenerativeDecoder(8, 12, width=64, depth=1, patch_size=4, image_size=32, channels=(32, 16, 8)).eval()
        >>> decoder(torch.rand(2, 3, 12), seeds=torch.tensor([5, 7])).shape
        torch.Size([2, 3, 32, 32])
    """

    options = ("seeds",)
    painter = "conv_out"

    def __init__(
        self,
        tokens: int,
        dim: int,
        width: int = 512,
        depth: int = 8,
        heads: int | None = None,
        patch_size: int = 16,
        image_size: int | Sequence[int] = 256,
        mlp_ratio: float = 4,
        channels: Sequence[int] = (512, 256, 256, 128, 64),
        blocks: int = 2,
        noise_channels: int = 32,
        noise: float = 1.0,
    ) -> None:
        _check_levels(patch_size, channels)
        check_range("blocks", blocks, 1, 64)
        check_range("noise_channels", noise_channels, 1, 8192)
        if not isinstance(noise, int | float) or not 0 <= noise < math.inf:
            raise ModelError(f"noise is a standard deviation, 0 or more, got {noise!r:.100}")
        super().__init__(tokens, dim, width, depth, heads, patch_size, image_size, mlp_ratio)
        self.noise, self.noise_channels = float(noise), noise_channels
        features = channels[0]
        self.to_features = nn.Linear(width, features)
        self.conv_in = nn.Conv2d(features + noise_channels, features, 3, padding=1)
        before = [features, *channels[:-1]]
        self.levels = nn.ModuleList(Level(a, b, features, blocks) for a, b in zip(before, channels))
        self.upsamples = nn.ModuleList(Upsample(c) for c in channels[:-1])
        self.norm_out = nn.GroupNorm(_groups(channels[-1]), channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)
        self.apply(init_weights)
        self.add_tables()
        for norm in self.modules():
            if isinstance(norm, AdaptiveNorm):
                norm.start_plain()
        with torch.no_grad():
            self.conv_in.weight[:, features:] = 0
            # Start near plain grey, as GridDecoder: a loud random picture is unlearned by muting the codes.
            self.conv_out.weight.mul_(0.1)
            self.conv_out.bias.fill_(0.5)

    def forward(self, q: Tensor, mask: Tensor | None = None, seeds: Tensor | None = None) -> Tensor:
        """Codes to pixels.

        Args:
            q: float (B, n, D).
            mask: bool (B, n), True = given.
            seeds: int64 (B,) of the noise; see the class for None.

        Returns:
            Float (B, 3, H, W), about [0, 1], not clamped.
        """
        batch = len(q)
        x = self.to_features(self.patch_features(q, mask))  # (B, h · w, F)
        style = Style.of(x)
        grid = x.view(batch, *self.grid, -1).permute(0, 3, 1, 2)  # channels-last as it stands
        x = self.conv_in(torch.cat([grid, self._noise(batch, grid, seeds)], 1).contiguous(memory_format=torch.channels_last))
        for i, level in enumerate(self.levels):
            x = level(self.upsamples[i - 1](x) if i else x, style)
        return self.conv_out(norm_silu(self.norm_out, x)).contiguous()

    def _noise(self, batch: int, like: Tensor, seeds: Tensor | None) -> Tensor:
        """Float (B, Z, h, w) of the dtype and on the device of ``like``."""
        shape = self.noise_channels, *self.grid
        if seeds is None and self.training and torch.is_grad_enabled():
            return rank_rows(batch, lambda rows: torch.randn(rows, *shape, dtype=like.dtype, device=like.device))
        if self.noise == 0 or batch == 0:
            return like.new_zeros(batch, *shape)
        wanted = [0] * batch if seeds is None else seeds.tolist()
        if len(wanted) != batch:
            raise TokenError(f"seeds must be int64 ({batch},), one an image, got {tuple(seeds.shape)}")
        # One CPU generator a seed: the noise of an image depends on no other image and on no device.
        drawn = {seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in set(wanted)}
        return self.noise * torch.stack([drawn[seed] for seed in wanted]).to(like)


@dataclass
class Style:
    """What adaptive norms read of the code features.

    Attributes:
        mean, spread: float (B, F), mean and standard deviation over the grid.
    """

    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Style:
        """Float (B, h · w, F) → Style."""
        variance, mean = torch.var_mean(features.float(), 1, correction=0)
        return cls(mean.to(features.dtype), (variance + EPS).sqrt().to(features.dtype))


class AdaptiveNorm(nn.Module):
    """Group norm whose scale follows from the spread of the code features and whose shift from their mean.

    Args:
        channels: C.
        features: F.
    """

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.groups = _groups(channels)
        self.to_scale, self.to_shift = nn.Linear(features, channels), nn.Linear(features, channels)

    def start_plain(self) -> None:
        """Begin as the plain norm: scale 1, shift 0."""
        for linear in (self.to_scale, self.to_shift):
            nn.init.zeros_(linear.weight)

    def forward(self, x: Tensor, style: Style) -> Tensor:
        """Float (B, C, H, W) → the same shape."""
        x = F.group_norm(x, self.groups, eps=EPS)
        scale, shift = self.to_scale(style.spread), self.to_shift(style.mean)
        return torch.addcmul(shift[:, :, None, None], x, 1 + scale[:, :, None, None])


class ResidualBlock(nn.Module):
    """Adaptive norm, SiLU, 3×3 convolution, twice, added to the input.

    Args:
        before, after: C of input and output; a 1×1 convolution joins them where they differ.
        features: F.
    """

    def __init__(self, before: int, after: int, features: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = AdaptiveNorm(before, features), AdaptiveNorm(after, features)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, style: Style) -> Tensor:
        """Float (B, before, H, W) → float (B, after, H, W)."""
        y = self.conv1(F.silu(self.norm1(x, style)))
        y = self.conv2(F.silu(self.norm2(y, style)))
        return self.shortcut(x) + y


class Level(nn.Module):
    """Residual blocks at one resolution; arguments as :class:`ResidualBlock`, and how many."""

    def __init__(self, before: int, after: int, features: int, blocks: int) -> None:
        super().__init__()
        widths = [before, *[after] * blocks]
        self.blocks = nn.ModuleList(ResidualBlock(a, b, features) for a, b in zip(widths, widths[1:]))

    def forward(self, x: Tensor, style: Style) -> Tensor:
        for block in self.blocks:
            x = block(x, style)
        return x


def _groups(channels: int) -> int:
    """Groups of a norm: up to 32, of at least four channels each (groups of one forget what the codes say of it)."""
    return math.gcd(32, channels // 4)


def _check_levels(patch_size: int, channels: Sequence[int]) -> None:
    check_range("patch_size", patch_size, 1, 1024)
    if patch_size & (patch_size - 1):
        raise ModelError(f"patch_size must be a power of two, the convolutions double the size at each level; got {patch_size}")
    levels = patch_size.bit_length()
    if not isinstance(channels, Sequence) or len(channels) != levels:
        raise ModelError(f"patch_size {patch_size} needs {levels} channels, at the grid and after each doubling, got {channels!r:.100}")
    for count in channels:
        check_range("every entry of channels", count, 4, 8192)
        if count % 4:
            raise ModelError(f"every entry of channels must be a multiple of 4 (of the norms' groups), got {list(channels)!r:.100}")
