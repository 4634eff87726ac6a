"""Losses of pixels, known to training tasks by name: l1, l2, smooth_l1, log_l2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import UsageError
from tok1d.training.losses.base import ImageLoss


def log_l2(out: Tensor, target: Tensor) -> Tensor:
    """Mean over images of the natural logarithm of their mean squared error: minus 4.34 of it is the mean PSNR in dB.

    Every image counts alike, however few tokens it was given.

    Example:
        >>> import torch
        >>> round(log_l2(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.1)).item(), 3)
        -4.605
    """
    return (out - target).square().flatten(1).mean(1).clamp(min=1e-6).log().mean()


PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss, "log_l2": log_l2}


class PixelLoss(ImageLoss):
    """One of the named losses of pixels, with the setting it has.

    Args:
        name: ``l1``, ``l2``, ``smooth_l1`` or ``log_l2``.
        beta: error at which ``smooth_l1`` turns from square to linear. Differences of pixels in [0, 1] are below the usual 1.0
            everywhere, where the loss is half of ``l2``.

    Example:
        >>> import torch
        >>> round(PixelLoss("smooth_l1", beta=0.1)(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5), {}).item(), 3)
        0.45
    """

    def __init__(self, name: str, beta: float = 1.0) -> None:
        super().__init__()
        if name not in PIXEL_LOSSES:
            raise UsageError(f"losses of pixels are {', '.join(PIXEL_LOSSES)}; got {name!r}")
        if not beta > 0:
            raise UsageError(f"beta is an error of a pixel above 0, got {beta}")
        self.name, self.beta = name, beta

    def forward(self, reconstruction: Tensor, target: Tensor, batch: dict[str, Any]) -> Tensor:
        """See :class:`ImageLoss`."""
        if self.name == "smooth_l1":
            return F.smooth_l1_loss(reconstruction, target, beta=self.beta)
        return PIXEL_LOSSES[self.name](reconstruction, target)
