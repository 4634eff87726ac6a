"""Length rules: how many tokens a model may keep, and how many it keeps while it trains.

Tail drop keeps a prefix of random length: One-D-Piece (https://arxiv.org/abs/2501.10064) draws it uniformly, FlexTok
(https://arxiv.org/abs/2502.13967, nested dropout) also from powers of two. Lengths around a budget (``NormalDrop``) or mostly
short ones (``ZipfDrop``) put the training where a model will be used.
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
        """Draw training lengths, int64 (batch,) in 1..tokens.

        Processes that share a batch draw for all of it, with one generator state on every rank, and each takes its rows:
        that is what one process would have drawn for the concatenated batch, also where a batch shares one length.

        Args:
            batch: how many samples.
            tokens: N.
            generator: a CPU generator; the global one if None.
        """

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
        _check(minimum, full)
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
        return _some_full(lengths, tokens, self.full, generator).expand(batch).clone()


class WeightedDrop(LengthRule):
    """Keep a prefix of random length whose probabilities have a closed form; any prefix decodes afterwards.

    Args:
        per_sample: draw a length for each sample; one for the whole batch otherwise.
        minimum: shortest length drawn.
        full: probability of keeping every token, on top of the distribution.
    """

    nested = True

    def __init__(self, per_sample: bool = True, minimum: int = 1, full: float = 0.0) -> None:
        super().__init__()
        _check(minimum, full)
        self.per_sample, self.minimum, self.full = per_sample, minimum, full

    @abstractmethod
    def log_weights(self, lengths: Tensor) -> Tensor:
        """float64 (n,) lengths → float64 (n,): logarithm of how likely each is, up to a constant."""

    def probabilities(self, tokens: int) -> Tensor:
        """float64 (tokens,): how likely 1, 2, …, ``tokens`` are, ``full`` left out."""
        lengths = torch.arange(1, tokens + 1, dtype=torch.float64)
        weights = self.log_weights(lengths).masked_fill(lengths < min(self.minimum, tokens), -math.inf)
        return weights.softmax(0)

    def sample(self, batch: int, tokens: int, generator: torch.Generator | None = None) -> Tensor:
        n = batch if self.per_sample else 1
        reached = self.probabilities(tokens).cumsum(0)  # inverse of this: one uniform number a length
        drawn = torch.rand(n, generator=generator, dtype=torch.float64) * reached[-1]
        lengths = torch.searchsorted(reached, drawn, right=True).clamp(max=tokens - 1) + 1
        return _some_full(lengths, tokens, self.full, generator).expand(batch).clone()


class NormalDrop(WeightedDrop):
    """Lengths around a budget: a normal distribution on the integers of minimum..N, P(k) ∝ exp(-(k - mean)² / (2 sd²)).

    Args:
        mean, sd: in tokens, before what lies outside minimum..N is cut off; the mean may lie outside.
        per_sample, minimum, full: as :class:`WeightedDrop`.

    Example:
        >>> NormalDrop(mean=2, sd=1).probabilities(3).mul(1000).round().tolist()
        [274.0, 452.0, 274.0]
    """

    def __init__(
        self, mean: float, sd: float, per_sample: bool = True, minimum: int = 1, full: float = 0.0
    ) -> None:
        super().__init__(per_sample, minimum, full)
        if not (math.isfinite(mean) and math.isfinite(sd) and sd > 0):
            raise TokenError(f"mean must be a number of tokens and sd above 0, got mean={mean}, sd={sd}")
        self.mean, self.sd = mean, sd

    def log_weights(self, lengths: Tensor) -> Tensor:
        return -((lengths - self.mean) / self.sd).square() / 2


class ZipfDrop(WeightedDrop):
    """Mostly few tokens: P(k) ∝ k^-exponent on minimum..N; 0 is uniform, 1 gives octaves nearly equal shares.

    Args:
        exponent: below 0 favours many tokens.
        per_sample, minimum, full: as :class:`WeightedDrop`.

    Example:
        >>> ZipfDrop(exponent=1).probabilities(2).mul(3).tolist()
        [2.0, 1.0]
    """

    def __init__(self, exponent: float = 1.0, per_sample: bool = True, minimum: int = 1, full: float = 0.0) -> None:
        super().__init__(per_sample, minimum, full)
        if not math.isfinite(exponent):
            raise TokenError(f"exponent must be a number, got {exponent}")
        self.exponent = exponent

    def log_weights(self, lengths: Tensor) -> Tensor:
        return -self.exponent * lengths.log()


def _check(minimum: int, full: float) -> None:
    if minimum < 1 or not 0 <= full <= 1:
        raise TokenError(f"minimum must be at least 1 and full a probability in 0..1, got minimum={minimum}, full={full}")


def _some_full(lengths: Tensor, tokens: int, full: float, generator: torch.Generator | None) -> Tensor:
    """int64 (n,) lengths, each replaced by all tokens with probability ``full``."""
    if not full:
        return lengths
    return torch.where(torch.rand(len(lengths), generator=generator) < full, torch.tensor(tokens), lengths)
