"""What is random in a training step, drawn for the whole batch of all processes; each takes the rows it has.

So two processes draw what one does on their joined batch, in any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tok1d.tokenizers.quantizers.common import world


class Chance:
    """Random numbers for the rows of a batch.

    Args:
        rows: B of this process, the same in every process.
        generator: CPU generator in the same state in every process; the global one if None.
        device: where the numbers go.

    Example:
        >>> chance = Chance(2, torch.Generator().manual_seed(0))
        >>> chance.uniform(3).shape
        torch.Size([2, 3])
    """

    def __init__(self, rows: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> None:
        self.rank, self.world = world()
        self.rows, self.generator, self.device = rows, generator, device

    def uniform(self, *shape: int) -> Tensor:
        """float32 (B, *shape) in [0, 1)."""
        return self.draw(lambda rows: torch.rand(rows, *shape, generator=self.generator, device="cpu"))

    def normal(self, *shape: int) -> Tensor:
        """float32 (B, *shape), standard normal."""
        return self.draw(lambda rows: torch.randn(rows, *shape, generator=self.generator, device="cpu"))

    def draw(self, source: Callable[[int], Tensor]) -> Tensor:
        """The rows of this process of ``source(all rows)``."""
        return source(self.world * self.rows)[self.rank * self.rows : (self.rank + 1) * self.rows].to(self.device)
