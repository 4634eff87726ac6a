"""The order of samples: a pure function of seed and step, the same for one process and its shares for several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from tok1d.errors import UsageError


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (sample, draw) pairs; every sample once an epoch, in an order that depends on the seed alone.

    Args:
        samples: size of the set.
        batch: samples of one batch on this rank.
        start: batches already consumed.
        rank, ranks: every rank takes its share of each global batch.

    Example:
        >>> [[sample for sample, _ in batch] for batch, _ in zip(StepSampler(4, 2, seed=0), range(2))]
        [[2, 0], [1, 3]]
    """

    def __init__(self, samples: int, batch: int, seed: int, start: int = 0, rank: int = 0, ranks: int = 1) -> None:
        self.samples, self.batch, self.seed, self.start, self.rank, self.ranks = samples, batch, seed, start, rank, ranks

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step, epoch, order = self.start, -1, np.empty(0, np.int64)
        while True:
            first = (step * self.ranks + self.rank) * self.batch
            picks = []
            for draw in range(first, first + self.batch):
                if draw // self.samples != epoch:
                    epoch = draw // self.samples
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.samples)
                picks.append((int(order[draw % self.samples]), draw))
            yield picks
            step += 1


def validation_batches(samples: int, batch: int, rank: int = 0, ranks: int = 1) -> list[list[int]]:
    """Every sample once over all ranks, in equally many batches on each: no rank waits for one that has finished.

    Batches hold ``batch`` samples or fewer, and more only where the set does not divide into equally many otherwise.

    Raises:
        UsageError: fewer samples than ranks.

    Example:
        >>> validation_batches(5, 2, rank=0, ranks=2), validation_batches(5, 2, rank=1, ranks=2)
        ([[0, 2], [4]], [[1], [3]])
    """
    if samples < ranks:
        raise UsageError(f"{samples} validation images cannot be shared by {ranks} processes; use at least one for each, or none")
    count = min(-(-samples // (batch * ranks)), samples // ranks)
    return [part.tolist() for part in np.array_split(np.arange(rank, samples, ranks), count)]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """``count`` evenly spaced items (all of them for 0 or more than there are).

    Example:
        >>> spread([0, 1, 2, 3, 4, 5], 3)
        [0, 2, 4]
    """
    return list(items) if not 0 < count < len(items) else [items[i * len(items) // count] for i in range(count)]
