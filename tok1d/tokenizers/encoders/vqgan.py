"""VQGANEncoder: convolutions that turn an image into a grid of latents, read row by row (MaskGIT-VQGAN).

The picture is halved between levels by averaging 2×2 pixels; there is no attention. Papers: VQGAN
https://arxiv.org/abs/2012.09841, MaskGIT https://arxiv.org/abs/2202.04200.

Shapes: B images, h × w = N cells of the grid, D latent width, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.tokenizers.blocks import check_range, init_weights, patch_grid
from tok1d.tokenizers.convolutions import EPS, Level, level_widths, norm_silu
from tok1d.tokenizers.part import Encoder


class VQGANEncoder(Encoder):
    """Image to a raster of latents.

    Args:
        dim: D.
        width: C of the first convolution.
        multipliers: C of each level over ``width``, highest resolution first; each level but the last halves the image.
        depth: residual blocks a level.
        image_size: an int, or (height, width).
        groups: of the group norms; divides ``width``.
        shortcut: ``input``; ``output`` for published MaskGIT-VQGAN weights only, see
            :class:`tok1d.tokenizers.convolutions.ResidualBlock`.

    Example:
        >>> VQGANEncoder(8, width=32, multipliers=(1, 2), depth=1, image_size=32)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 256, 8])
    """

    def __init__(
        self,
        dim: int = 256,
        width: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        depth: int = 2,
        image_size: int | Sequence[int] = 256,
        groups: int = 32,
        shortcut: str = "input",
    ) -> None:
        super().__init__()
        check_range("dim", dim, 1, 65536)
        widths = level_widths(width, multipliers, depth, groups, shortcut)
        self.grid = patch_grid(image_size, 2 ** (len(widths) - 1))
        self.tokens, self.dim = self.grid[0] * self.grid[1], dim
        self.conv_in = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            Level([before, *[after] * depth], groups, shortcut) for before, after in zip([width, *widths], widths, strict=False)
        )
        self.mid = Level([widths[-1]] * (depth + 1), groups, shortcut).block
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], dim, 1)
        self.apply(init_weights)

    def forward(self, images: Tensor) -> Tensor:
        """Float (B, 3, H, W) in [0, 1] → float (B, N, D), row by row."""
        x = self.conv_in(images.contiguous(memory_format=torch.channels_last))
        for i, level in enumerate(self.down):
            x = level(F.avg_pool2d(x, 2) if i else x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(norm_silu(self.norm_out, x)).permute(0, 2, 3, 1).flatten(1, 2)
