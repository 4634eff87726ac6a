"""LPIPS as a loss, by the network that the evaluator measures with. Paper: https://arxiv.org/abs/1801.03924."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tok1d.training.frozen import Frozen
from tok1d.training.losses.base import ImageLoss


class LPIPS(ImageLoss):
    """Mean LPIPS of a batch.

    Args:
        net: ``vgg`` or ``alex``.

    Raises:
        MissingExtraError: the package lpips is not installed.
        ModelError: unknown net, or its trunk is neither installed nor downloadable.
    """

    def __init__(self, net: str = "vgg") -> None:
        from tok1d.eval.perceptual import Perceptual

        super().__init__()
        self.frozen = Frozen(distance=Perceptual(net))

    def forward(self, reconstruction: Tensor, target: Tensor, batch: dict[str, Any]) -> Tensor:
        """See :class:`ImageLoss`."""
        distance = self.frozen.on(reconstruction.device)["distance"]
        return distance(reconstruction, target).mean()
