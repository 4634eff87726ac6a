"""SpectralDecoder: linear synthesis of the coded coefficients, and a convolutional net that paints what they cannot say.

The band-limited picture is the conditional mean of a linear code: right colours and layout, no edges. A small U-shaped
net sees it together with the number of tokens and adds a residual, so an untrained decoder already stands on the
linear line. Upsampling is nearest-neighbour + convolution (pixel shuffle invites checkerboards under LPIPS).

Shapes: B images, n ≤ N given tokens, D coefficients of a token, G grid, H × W pixels (H = W = 4 G).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.tokenizers.encoders.spectral import OPPONENT
from tok1d.tokenizers.part import Decoder
from tok1d.tokenizers.spectral import dct_matrix, synthesise, zigzag_support


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


class SpectralDecoder(Decoder):
    """Coefficients to pixels.

    Args:
        tokens, dim, grid, image_size: as :class:`SpectralEncoder`.
        widths: channels at 1/16, 1/8, 1/4, 1/2 and 1/1 of the image size.
        blocks: residual blocks at each of them (the 1/8 level has them before and after the 1/16 level).
        condition: width of the embedding of the number of tokens.
    """

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
        self.tokens, self.dim, self.grid = tokens, dim, grid
        self.register_buffer("colour", torch.tensor(OPPONENT))
        self.register_buffer("mean", torch.zeros(3 * grid * grid))
        self.register_buffer("support", zigzag_support(tokens, dim, grid))
        for name, size in (("full", image_size), ("quarter", (image_size[0] // 4, image_size[1] // 4))):
            self.register_buffer(f"{name}_rows", dct_matrix(min(grid, size[0]), size[0]), persistent=False)
            self.register_buffer(f"{name}_cols", dct_matrix(min(grid, size[1]), size[1]), persistent=False)
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
        self.out = nn.Conv2d(w1, 3, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def spectrum(self, q: Tensor, mask: Tensor | None) -> Tensor:
        """(B, n, D) codes → coefficients (B, 3, G, G): the sum of what the given tokens say about each."""
        if mask is not None:
            q = q * mask[..., None]
        flat = q.new_zeros(len(q), 3 * self.grid * self.grid)
        index = self.support[: q.shape[1]].flatten()
        flat = flat.index_add(1, index, q.flatten(1)) + self.mean
        return flat.view(-1, 3, self.grid, self.grid)

    def forward(self, q: Tensor, mask: Tensor | None = None, window: tuple[int, int, int] | None = None) -> Tensor:
        """See :class:`Decoder`; ``window`` (top, left, size) in pixels, multiples of 8, renders that square only (training)."""
        lengths = q.new_full((len(q),), q.shape[1]) if mask is None else mask.sum(1).to(q.dtype)
        spectrum = self.spectrum(q, mask)
        r, c = self.quarter_rows.shape[0], self.quarter_cols.shape[0]
        quarter = synthesise(spectrum[:, :, :r, :c], self.colour, self.quarter_rows, self.quarter_cols)
        linear = synthesise(spectrum, self.colour, self.full_rows, self.full_cols)
        c = self.embed(self._count_features(lengths))

        fast = torch.channels_last
        x8 = self.stem(F.pixel_unshuffle((quarter - 0.5) * 2, 2).contiguous(memory_format=fast))
        x8 = self.stage8a(x8, c)
        x16 = self.stage16(self.down(x8), c)
        x8 = self.stage8b(x8 + self.up8(_double(x16)), c)
        if window is not None:
            x8, quarter, linear, cut = _crop(x8, quarter, linear, window)
        x = self.up4(_double(x8)) + self.skip4((quarter - 0.5).contiguous(memory_format=fast) * 2)
        x = self.stage4(x, c)
        x = self.stage2(self.up2(_double(x)), c)
        x = self.stage1(self.up1(_double(x)), c)
        image = linear + self.out(F.silu(x))
        return image if window is None else image[:, :, cut[0] : cut[0] + window[2], cut[1] : cut[1] + window[2]]

    def _count_features(self, lengths: Tensor) -> Tensor:
        """(B,) token counts → smooth features of their logarithm (B, condition)."""
        width = self.embed[0].in_features
        level = torch.log2(lengths.clamp(min=0.5) * 256 / self.tokens)[:, None] / 8  # 1 token of 256 → 0, all → 1
        waves = torch.arange(width // 2, device=lengths.device, dtype=level.dtype) * (math.pi / 2)
        return torch.cat([torch.cos(level * waves), torch.sin(level * waves)], 1)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _crop(x8: Tensor, quarter: Tensor, linear: Tensor, window: tuple[int, int, int], margin: int = 2):
    """Cut a window with ``margin`` 1/8-resolution cells around it (where there are any) from all three pyramids."""
    top, left, size = (v // 8 for v in window)
    h, w = x8.shape[-2:]
    t, b = max(0, top - margin), min(h, top + size + margin)
    l, r = max(0, left - margin), min(w, left + size + margin)
    return (
        x8[:, :, t:b, l:r], quarter[:, :, 2 * t : 2 * b, 2 * l : 2 * r], linear[:, :, 8 * t : 8 * b, 8 * l : 8 * r],
        ((top - t) * 8, (left - l) * 8),
    )  # fmt: skip
