"""SpectralDecoder: linear synthesis of the coded coefficients, shrinkage of their noise, and a net that adds what is missing.

The band-limited picture has the right colours and layout, but quantization noise of whole-image cosines everywhere.
Local shrinkage removes most of it before anything is learned; a small U-shaped net then sees the clean picture and the
number of tokens and adds a residual that starts at zero. Upsampling is nearest-neighbour + convolution (pixel shuffle invites checkerboards under LPIPS).

Shapes: B images, n ≤ N given tokens, D coefficients of a token, G grid, H × W pixels (H = W = 4 G).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.tokenizers.encoders.spectral import OPPONENT
from tok1d.tokenizers.part import Decoder
from tok1d.tokenizers.spectral import analyse, dct_matrix, synthesise, zigzag_support


class ResidualBlock(nn.Module):
    """x + conv(silu(film(conv(silu(x))))), the second convolution starting at zero; no normalisation."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(condition, 2 * width)
        for zero in (self.conv2.weight, self.conv2.bias, self.film.weight, self.film.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.film(c)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(x)) * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


class Stage(nn.Module):
    """Residual blocks at one resolution."""

    def __init__(self, width: int, blocks: int, condition: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(width, condition) for _ in range(blocks))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x


class Shrinkage(nn.Module):
    """Sliding-window transform shrinkage: what quantization adds everywhere is small in every local spectrum, edges are not.

    Analysis by ``window``² local DCT filters of each colour axis, non-negative garrote c · max(0, 1 - (T / c)²), synthesis
    and average over all windows. Filters and thresholds T (per filter, log-linear in the level) are learned from there.
    Breiman 1995 (garrote); Yaroslavsky et al. 2001 (sliding DCT).
    """

    GAIN = 8.0  # thresholds learn this much faster than filters

    def __init__(self, window: int = 8) -> None:
        super().__init__()
        d = dct_matrix(window, window)
        local = torch.einsum("ki,lj->klij", d, d).reshape(window * window, window, window)
        filters = torch.zeros(3, window * window, 3, window, window)
        for axis in range(3):
            filters[axis, :, axis] = local
        self.analysis = nn.Parameter(filters.flatten(0, 1).clone())
        self.synthesis = nn.Parameter(filters.flatten(0, 1).clone())
        # 1.4 × the rms error of the linear picture along each axis with all tokens, and more of it with few: what few tokens
        # say of local detail is mostly noise (thresholds that scored best on photos)
        first, last = torch.tensor([3.9, 1.7, 1.0]), torch.tensor([0.13, 0.069, 0.045])
        keep = torch.ones(3, window * window)
        keep[:, 0] = 1e-4  # the local mean is never shrunk
        self.threshold = nn.Parameter((first[:, None] * keep).log().flatten() / self.GAIN)
        self.slope = nn.Parameter((last / first).log().repeat_interleave(window * window) / self.GAIN)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Float (B, 3, h, w) along the colour axes, (B,) levels → the same shape."""
        with torch.autocast(x.device.type, enabled=False):
            return self._shrunk(x.to(self.analysis.dtype), level)

    def _shrunk(self, x: Tensor, level: Tensor) -> Tensor:
        n = self.analysis.shape[-1]
        padded = F.pad(x, (n - 1,) * 4, mode="replicate")
        c = F.conv2d(padded.contiguous(memory_format=torch.channels_last), self.analysis)
        t = (self.GAIN * (self.threshold + level[:, None] * self.slope)).exp()[:, :, None, None]
        c = c * F.relu(1 - t.square() / c.square().clamp(min=1e-8))
        # divided here, not in the parameter: Adam's steps are absolute and would drown filters of size 1/n²
        out = F.conv_transpose2d(c, self.synthesis / n**2)
        return out[:, :, n - 1 : n - 1 + x.shape[2], n - 1 : n - 1 + x.shape[3]]


class SpectralDecoder(Decoder):
    """Coefficients to pixels.

    Args:
        tokens, dim, grid, image_size: as :class:`SpectralEncoder`.
        widths: channels at 1/16, 1/8, 1/4, 1/2 and 1/1 of the image size.
        blocks: residual blocks at each of them (the 1/8 level has them before and after the 1/16 level).
        condition: width of the embedding of the number of tokens.
    """

    options = ("window",)
    painter = "out"

    def __init__(
        self,
        tokens: int,
        dim: int,
        grid: int = 64,
        image_size: tuple[int, int] = (256, 256),
        widths: tuple[int, ...] = (192, 128, 64, 32, 16),
        blocks: tuple[int, ...] = (3, 2, 2, 2, 1),
        condition: int = 64,
    ) -> None:
        super().__init__()
        if 4 * grid > min(image_size):
            raise ValueError(f"grid {grid} is finer than a quarter of the image {image_size}; use at most {min(image_size) // 4}")
        self.tokens, self.dim, self.grid = tokens, dim, grid
        self.register_buffer("colour", torch.tensor(OPPONENT))
        self.register_buffer("mean", torch.zeros(3 * grid * grid))
        self.register_buffer("support", zigzag_support(tokens, dim, grid))
        for name, size in (("full", image_size), ("quarter", (image_size[0] // 4, image_size[1] // 4))):
            self.register_buffer(f"{name}_rows", dct_matrix(min(grid, size[0]), size[0]), persistent=False)
            self.register_buffer(f"{name}_cols", dct_matrix(min(grid, size[1]), size[1]), persistent=False)
        self.register_buffer("axes", torch.eye(3), persistent=False)
        self.shrink = Shrinkage()
        self.embed = nn.Sequential(nn.Linear(condition, condition), nn.SiLU(), nn.Linear(condition, condition), nn.SiLU())
        w16, w8, w4, w2, w1 = widths
        self.stem = nn.Conv2d(12, w8, 3, padding=1)
        self.down = nn.Conv2d(w8, w16, 3, stride=2, padding=1)
        self.stage16 = Stage(w16, blocks[0], condition)
        self.stage8a, self.stage8b = Stage(w8, blocks[1], condition), Stage(w8, blocks[1], condition)
        self.up8, self.up4 = nn.Conv2d(w16, w8, 3, padding=1), nn.Conv2d(w8, w4, 3, padding=1)
        self.skip4 = nn.Conv2d(3, w4, 3, padding=1)
        self.stage4, self.stage2, self.stage1 = (Stage(w, b, condition) for w, b in zip((w4, w2, w1), blocks[2:]))
        self.up2, self.up1 = nn.Conv2d(w4, w2, 3, padding=1), nn.Conv2d(w2, w1, 3, padding=1)
        self.out4, self.out = nn.Conv2d(w4, 3, 3, padding=1), nn.Conv2d(w1, 3, 3, padding=1)
        for head in (self.out4, self.out):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def spectrum(self, q: Tensor, mask: Tensor | None) -> Tensor:
        """(B, n, D) codes → coefficients (B, 3, G, G): the sum of what the given tokens say about each."""
        if mask is not None:
            q = q.masked_fill(~mask[..., None], 0)
        flat = q.new_zeros(len(q), 3 * self.grid * self.grid)
        index = self.support[: q.shape[1]].flatten()
        flat = flat.index_add(1, index, q.flatten(1)) + self.mean
        return flat.view(-1, 3, self.grid, self.grid)

    def forward(self, q: Tensor, mask: Tensor | None = None, window: tuple[int, int, int] | None = None) -> Tensor:
        """See :class:`Decoder`; ``window`` (top, left, size) in pixels, multiples of 8, renders that square only (training)."""
        level = self._level(q, mask)
        c = self.embed(self._waves(level))
        plain = synthesise(self.spectrum(q, mask), self.axes, self.quarter_rows, self.quarter_cols)
        clean = self.shrink(plain, level)
        quarter = torch.einsum("bdhw,dc->bchw", clean, self.colour)
        spectrum = analyse(clean, self.axes, self.quarter_rows, self.quarter_cols)
        linear = synthesise(spectrum, self.colour, self.full_rows, self.full_cols)
        x8 = self._trunk(quarter, c)
        if window is not None:
            x8, quarter, linear, cut = _crop(x8, quarter, linear, window)
        x = self._stage4(x8, quarter, c)
        coarse = F.interpolate(self.out4(F.silu(x)), scale_factor=4.0, mode="bilinear", align_corners=False)
        x = self.stage2(self.up2(_double(x)), c)
        x = self.stage1(self.up1(_double(x)), c)
        image = linear + coarse + self.out(F.silu(x))
        return image if window is None else image[:, :, cut[0] : cut[0] + window[2], cut[1] : cut[1] + window[2]]

    def _trunk(self, quarter: Tensor, c: Tensor) -> Tensor:
        x8 = self.stem(F.pixel_unshuffle((quarter - 0.5) * 2, 2).contiguous(memory_format=torch.channels_last))
        x8 = self.stage8a(x8, c)
        x16 = self.stage16(self.down(x8), c)
        return self.stage8b(x8 + self.up8(_double(x16)), c)

    def _stage4(self, x8: Tensor, quarter: Tensor, c: Tensor) -> Tensor:
        skip = self.skip4((quarter - 0.5).contiguous(memory_format=torch.channels_last) * 2)
        return self.stage4(self.up4(_double(x8)) + skip, c)

    def _level(self, q: Tensor, mask: Tensor | None) -> Tensor:
        """(B,) logarithm of the number of given tokens: 0 for 1 of 256, 1 for all."""
        lengths = q.new_full((len(q),), q.shape[1]) if mask is None else mask.sum(1).to(q.dtype)
        return torch.log2(lengths.clamp(min=0.5) * 256 / self.tokens) / 8

    def _waves(self, level: Tensor) -> Tensor:
        """(B,) levels → smooth features (B, condition)."""
        waves = torch.arange(self.embed[0].in_features // 2, device=level.device, dtype=level.dtype) * (math.pi / 2)
        return torch.cat([torch.cos(level[:, None] * waves), torch.sin(level[:, None] * waves)], 1)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _crop(x8: Tensor, quarter: Tensor, linear: Tensor, window: tuple[int, int, int], margin: int = 2):
    """Cut a window with ``margin`` 1/8-resolution cells around it (where there are any) from all three pyramids."""
    top, left, size = (v // 8 for v in window)
    h, w = x8.shape[-2:]
    t, b = max(0, top - margin), min(h, top + size + margin)
    s, e = max(0, left - margin), min(w, left + size + margin)
    return (
        x8[:, :, t:b, s:e], quarter[:, :, 2 * t : 2 * b, 2 * s : 2 * e], linear[:, :, 8 * t : 8 * b, 8 * s : 8 * e],
        ((top - t) * 8, (left - s) * 8),
    )  # fmt: skip
