"""Random numbers of samples with a generator for each row, so that an image is the same alone and in any batch.

Samplers of many steps draw a step's numbers when they get there: all of them at once would be gigabytes for bit vectors.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RowNoise:
    """Streams of random numbers, one for each seed.

    Args:
        seeds: B of them.
        device: where the numbers go; they are drawn on the CPU, so every device gets the same.

    Example:
        >>> both, alone = RowNoise([3, 4]), RowNoise([4])
        >>> torch.equal(both.normal(2)[1:], alone.normal(2)), torch.equal(both.uniform(5)[1:], alone.uniform(5))
        (True, True)
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def uniform(self, *shape: int) -> Tensor:
        """The next float32 (B, *shape) in [0, 1)."""
        return torch.stack([torch.rand(shape, generator=g, device="cpu") for g in self.generators]).to(self.device)

    def normal(self, *shape: int) -> Tensor:
        """The next float32 (B, *shape), standard normal."""
        return torch.stack([torch.randn(shape, generator=g, device="cpu") for g in self.generators]).to(self.device)
