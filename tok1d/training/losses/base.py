"""What a loss is to a training task: a small module, weighted by its log name.

Shapes: B images of H × W pixels, N tokens, D latent width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from tok1d.tokenizers.tokenizer import Tokenizer1D


class ImageLoss(nn.Module):
    """Compares reconstructions with what they should be.

    Networks that are used and not trained are held in a :class:`tok1d.training.frozen.Frozen`; parameters of the loss itself
    are trained with the tokenizer and stay out of its average and its export.

    Attributes:
        whole_images: whether it needs whole pictures (because its batch entries hold places in them); a task that trains on
            windows refuses it.
    """

    whole_images: bool = False

    @abstractmethod
    def forward(self, reconstruction: Tensor, target: Tensor, batch: dict[str, Any]) -> Tensor:
        """Scalar, unweighted.

        Args:
            reconstruction: float32 (B, 3, H, W), not clamped.
            target: float32 (B, 3, H, W) in [0, 1].
            batch: what else is known of these images: ``key``, ``label``, ``text``, boxes …
        """


class LatentLoss(nn.Module):
    """Regularises encoder latents and codes; may hold a head that is trained with the tokenizer."""

    def attach(self, tokenizer: Tokenizer1D) -> None:
        """Called once by the task with the tokenizer it trains, whose blocks a loss may hook."""

    @abstractmethod
    def forward(self, z: Tensor, q: Tensor, mask: Tensor | None, images: Tensor, batch: dict[str, Any]) -> Tensor:
        """Scalar, unweighted.

        Args:
            z: float (B, N, D), before the quantizer.
            q: float (B, N, D) codes, zero where the mask is False.
            mask: bool (B, N) True = kept; None where all are.
            images: float (B, 3, H, W) in [0, 1].
            batch: what else is known of these images: ``key``, ``label``, ``text``, boxes …
        """
