"""VQGANDecoder: convolutions that turn a grid of codes, given row by row, into an image (MaskGIT-VQGAN).

Between levels the map is enlarged to twice its size; there is no attention. A cell without a code holds zeros, so a prefix
decodes too. Papers: VQGAN https://arxiv.org/abs/2012.09841, MaskGIT https://arxiv.org/abs/2202.04200.

Shapes: B images, h × w = N cells of the grid, n ≤ N given codes, D code width, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import TokenError
from tok1d.tokenizers.blocks import check_range, init_weights, patch_grid
from tok1d.tokenizers.convolutions import EPS, Level, level_widths, norm_silu
from tok1d.tokenizers.part import Decoder

# Numbers in a map from which a CPU takes image after image: the C library does not reuse pieces of memory beyond 32 MB,
# and filling in fresh ones costs more than the norms that write them. It also keeps the peak at that of one image.
LARGE = 2**23


class VQGANDecoder(Decoder):
    """A raster of codes to pixels.

    Args:
        dim: D of a code.
        width, multipliers, depth, image_size, groups, shortcut: as
            :class:`tok1d.tokenizers.encoders.vqgan.VQGANEncoder`; the levels run from last to first.

    Example:
        >>> VQGANDecoder(8, width=32, multipliers=(1, 2), depth=1, image_size=32)(torch.rand(2, 256, 8)).shape
        torch.Size([2, 3, 32, 32])
    """

    painter = "conv_out"

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
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid = Level([widths[-1]] * (depth + 1), groups, shortcut).block
        before = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            Level([before[i], *[widths[i]] * depth], groups, shortcut, upsample=i > 0) for i in range(len(widths))
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        self.apply(init_weights)
        nn.init.constant_(self.conv_out.bias, 0.5)  # start around grey

    def forward(self, q: Tensor, mask: Tensor | None = None) -> Tensor:
        """Float (B, n, D), bool mask (B, n) True = given → float (B, 3, H, W), about [0, 1], not clamped."""
        batch, n, _ = q.shape
        if n > self.tokens:
            raise TokenError(f"this decoder takes up to {self.tokens} tokens, got {n}")
        if mask is not None:
            q = q.masked_fill(~mask[..., None], 0)
        q = F.pad(q, (0, 0, 0, self.tokens - n))
        x = self.conv_in(q.view(batch, *self.grid, self.dim).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last))
        for block in self.mid:
            x = block(x)
        return self._rise(x, len(self.up) - 1).contiguous()

    def _rise(self, x: Tensor, level: int) -> Tensor:
        """The map that enters ``up[level]`` → pictures."""
        if level < 0:
            return self.conv_out(norm_silu(self.norm_out, x))
        if len(x) > 1 and x.numel() >= LARGE and x.device.type == "cpu" and not torch.is_grad_enabled():
            return torch.cat([self._rise(image, level) for image in x.split(1)])
        return self._rise(self.up[level](x), level - 1)
