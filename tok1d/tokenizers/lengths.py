"""Length rules: how many tokens a model may keep, and how many it keeps while it trains.

Tail drop keeps a prefix of random length: One-D-Piece (https://arxiv.org/abs/2501.10064) draws it uniformly, FlexTok
(https://arxiv.org/abs/2502.13967, nested dropout) also from powers of two.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from tok1d.errors import TokenError
from tok1d.tokenizers.part import Part

DISTRIBUTIONS = ("uniform", "powers_of_two", "log_uniform", "uniform_powers_of_two")


class LengthRule(Part):
    """How many of the N tokens are kept.

    Attributes:
        nested: whether any prefix decodes.
    """

    nested: bool

    @abstractmethod
    def sample(self, batch: int, tokens: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw training lengths, int64 (batch,) in 1..tokens."""

    def allowed(self, tokens: int) -> list[int]:
        """Every length that may be asked for at encode and decode."""
        return list(range(1, tokens + 1)) if self.nested else [tokens]


class FixedLength(LengthRule):
    """All tokens, always."""

    nested = False

    def __init__(self) -> None:
        super().__init__()

    def sample(self, batch: int, tokens: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.full((batch,), tokens, dtype=torch.int64)


class TailDrop(LengthRule):
    """Keep a prefix of random length in training; any prefix decodes afterwards.

    Args:
        distribution: ``uniform`` over minimum..N, ``powers_of_two`` over {1, 2, 4, …, N} (N included), or ``log_uniform``:
            the logarithm is uniform, so 1..2 tokens are drawn as often as 128..256, or ``uniform_powers_of_two``: uniform,
            then rounded up to a power of two (at most N).
        per_sample: draw a length for each sample; one for the whole batch otherwise (as One-D-Piece does).
        minimum: shortest length drawn.
        full: probability of keeping every token, on top of the distribution.

    Example:
        >>> sorted(set(TailDrop("powers_of_two").sample(1000, 8).tolist()))
        [1, 2, 4, 8]
    """

    nested = True

    def __init__(
        self, distribution: str = "uniform", per_sample: bool = True, minimum: int = 1, full: float = 0.0
    ) -> None:
        super().__init__()
        if distribution not in DISTRIBUTIONS:
            raise TokenError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r:.100}")
        self.distribution, self.per_sample, self.minimum, self.full = distribution, per_sample, minimum, full

    def sample(self, batch: int, tokens: int, generator: torch.Generator | None = None) -> Tensor:
        n = batch if self.per_sample else 1
        if self.distribution.startswith("uniform"):
            lengths = torch.randint(min(self.minimum, tokens), tokens + 1, (n,), generator=generator)
            if self.distribution == "uniform_powers_of_two":
                lengths = torch.tensor([min(1 << (k - 1).bit_length(), tokens) for k in lengths.tolist()])
        elif self.distribution == "log_uniform":
            low = math.log2(min(self.minimum, tokens))
            level = low + torch.rand(n, generator=generator, dtype=torch.float64) * (math.log2(tokens + 1) - low)
            lengths = (2**level).long().clamp(min(self.minimum, tokens), tokens)
        else:
            steps = [2**i for i in range(tokens.bit_length()) if self.minimum <= 2**i < tokens] + [tokens]
            lengths = torch.tensor(steps)[torch.randint(len(steps), (n,), generator=generator)]
        if self.full:
            keep = torch.rand(n, generator=generator) < self.full
            lengths = torch.where(keep, torch.tensor(tokens), lengths)
        return lengths.expand(batch).clone()
