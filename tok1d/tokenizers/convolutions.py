"""Residual convolution blocks shared by the convolutional encoder and decoder of VQGAN (https://arxiv.org/abs/2012.09841).

Feature maps are kept channels-last: convolutions and group norms then read whole pixels, on CPUs and tensor cores alike.

Shapes: B images, H × W positions, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.tokenizers.blocks import check_range

EPS = 1e-6


class ResidualBlock(nn.Module):
    """Group norm, SiLU, 3×3 convolution, twice, added to the input.

    Args:
        before: C of the input.
        after: C of the output; a 1×1 convolution joins inputs of another width.
        groups: of the norms.
        shortcut: what that convolution projects: ``input``, so that it is a residual block, or ``output``: the published
            MaskGIT-VQGAN projects its own output and drops the input. For those weights only.
    """

    def __init__(self, before: int, after: int, groups: int, shortcut: str) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.norm1 = nn.GroupNorm(groups, before, eps=EPS)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, after, eps=EPS)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.nin_shortcut = None
        if before != after:
            self.nin_shortcut = nn.Conv2d(before if shortcut == "input" else after, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Float (B, before, H, W) → float (B, after, H, W)."""
        y = norm_silu(self.norm2, self.conv1(norm_silu(self.norm1, x)))
        if self.nin_shortcut is not None and self.shortcut == "output":  # y + N y of y = W … is one convolution, (1 + N) W
            weight, project = self.conv2.weight, self.nin_shortcut.weight[:, :, 0, 0]
            return F.conv2d(y, weight + torch.einsum("oc,cikl->oikl", project, weight), padding=1)
        y = self.conv2(y)
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(x)
        return y + x if y.requires_grad else y.add_(x)


class Upsample(nn.Conv2d):
    """Nearest-neighbour enlargement to twice the size, then a 3×3 convolution of as many channels.

    Each output pixel sees only 2×2 different input pixels. A transposed convolution whose 4×4 kernel sums the weights that
    fall on the same pixel gives the same result from 16 products instead of 36.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Float (B, C, H, W) → float (B, C, 2H, 2W)."""
        pixels = len(x) * x.shape[2] * x.shape[3]
        if torch.is_grad_enabled() or x.device.type != "cpu" or pixels < self.in_channels:  # summing weights costs too
            return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        weight = self.weight.transpose(0, 1).flatten(2) @ _spread(x)  # (in, out, 16)
        return F.conv_transpose2d(x, weight.unflatten(2, (4, 4)), self.bias, stride=2, padding=1)


def _spread(like: Tensor) -> Tensor:
    """Float (9, 16): which places of a 4×4 transposed kernel a weight of the 3×3 kernel is added to, after a doubling."""
    line = like.new_tensor([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
    return torch.kron(line, line)


class Level(nn.Module):
    """Residual blocks at one resolution, and the upsampling after them if there is one.

    Args:
        widths: C before and after each block: ``len(widths) - 1`` blocks.
        groups, shortcut: as :class:`ResidualBlock`.
        upsample: whether the level ends with :class:`Upsample`.
    """

    def __init__(self, widths: Sequence[int], groups: int, shortcut: str, upsample: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(a, b, groups, shortcut) for a, b in zip(widths, widths[1:], strict=False))
        self.upsample_conv = Upsample(widths[-1]) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.upsample_conv is None else self.upsample_conv(x)


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Group norm, then SiLU."""
    return F.silu(norm(x), inplace=True)


def level_widths(width: int, multipliers: Sequence[int], depth: int, groups: int, shortcut: str) -> list[int]:
    """Channels of every level, highest resolution first, of checked arguments.

    Raises:
        ModelError: sizes no model has, or widths that the groups do not divide.
    """
    check_range("width", width, 1, 8192)
    check_range("depth", depth, 1, 64)
    check_range("groups", groups, 1, 8192)
    if not isinstance(multipliers, Sequence) or not 1 <= len(multipliers) <= 10:
        raise ModelError(f"multipliers must be a list of 1 to 10 integers, one a resolution, got {multipliers!r:.100}")
    for multiplier in multipliers:
        check_range("a multiplier", multiplier, 1, 64)
    if shortcut not in ("input", "output"):
        raise ModelError(f"shortcut must be input (or output, for the published MaskGIT-VQGAN only), got {shortcut!r:.100}")
    if width % groups:
        raise ModelError(f"width {width} cannot be split into {groups} groups; choose groups that divide the width")
    return [width * multiplier for multiplier in multipliers]
