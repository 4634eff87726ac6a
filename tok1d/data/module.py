"""PhotoData: the Lightning data module behind ``tok fit``, and the same over images drawn by formula.

The order of samples and every crop follow from (seed, draw number), and the draw number from the batches the trainer has
finished, so a resumed run sees exactly what the uninterrupted one would have seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from tok1d.data.drawn import DrawnImages
from tok1d.data.photos import Photos, index_images
from tok1d.errors import UsageError
from tok1d.extras import require

lightning = require("lightning", "train")
log = logging.getLogger(__name__)


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


def spread(items: list, count: int) -> list:
    """``count`` evenly spaced items (all of them for 0 or more than there are).

    Example:
        >>> spread([0, 1, 2, 3, 4, 5], 3)
        [0, 2, 4]
    """
    return items if not 0 < count < len(items) else [items[i * len(items) // count] for i in range(count)]


class PhotoData(lightning.LightningDataModule):
    """Photos for training and validation.

    Args:
        train: folders, .tar shards or image files.
        val: the same for validation; empty for none.
        size: side of the square crops.
        area: share of the largest square that a training crop holds.
        batch_size: on each rank.
        val_batch_size: on each rank.
        val_images: validate on so many, evenly spaced (0 = all).
        workers: loader processes.
        cache: keep decoded training photos in memory (use with ``workers: 0``; every worker would keep its own).
        seed: of order and crops.
    """

    def __init__(
        self,
        train: list[str],
        val: list[str] | None = None,
        size: int = 256,
        area: tuple[float, float] = (0.35, 1.0),
        batch_size: int = 8,
        val_batch_size: int = 8,
        val_images: int = 0,
        workers: int = 2,
        cache: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < area[0] <= area[1] <= 1:
            raise UsageError(f"data.area must be two rising shares in (0, 1], got {list(area)}")
        if min(size, batch_size, val_batch_size) < 1 or workers < 0:
            raise UsageError(f"data: size and batch sizes are at least 1, workers at least 0; got {size}, {batch_size}, {workers}")
        self.train, self.val = list(train), list(val or [])
        self.size, self.area, self.seed, self.cache = size, (area[0], area[1]), seed, cache
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.val_images, self.workers = val_images, workers
        self.train_set: Dataset | None = None
        self.val_set: Dataset | None = None

    def setup(self, stage: str) -> None:
        if self.train_set is None and stage == "fit":
            self.train_set = Photos(index_images(self.train), self.size, self.area, self.seed, self.cache)
        if self.val_set is None and self.val:
            self.val_set = Photos(spread(index_images(self.val), self.val_images), self.size)

    def train_dataloader(self) -> DataLoader:
        assert self.train_set is not None and self.trainer is not None
        # Finished batches, not optimizer steps: with gradient accumulation the trainer's global_step counts the latter.
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        share = (self.trainer.global_rank, self.trainer.world_size)
        sampler = StepSampler(len(self.train_set), self.batch_size, self.seed, done, *share)
        return DataLoader(
            self.train_set,
            batch_sampler=sampler,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def val_dataloader(self) -> DataLoader | list:
        if self.val_set is None:
            return []
        share = range(self.trainer.global_rank, len(self.val_set), self.trainer.world_size)
        return DataLoader(Subset(self.val_set, share), batch_size=self.val_batch_size, num_workers=0)

    def describe(self) -> dict[str, Any]:
        """What a model card says of the training data; no paths."""
        count = None if self.train_set is None else len(self.train_set)
        return {"images": count, "size": self.size, "area": list(self.area), "batch_size": self.batch_size, "seed": self.seed}

    def teardown(self, stage: str) -> None:
        for name, data in (("training", self.train_set), ("validation", self.val_set)):
            broken = int(data.broken.sum()) if isinstance(data, Photos) else 0
            if broken:
                log.warning("%d of %d %s images could not be read and were skipped", broken, len(data), name)


class DrawnData(PhotoData):
    """:class:`PhotoData` over :class:`tok1d.data.drawn.DrawnImages`: trains anywhere, for tests and debug configurations.

    Args:
        images, val_images: how many are drawn for training and validation.
        size, batch_size, seed: as :class:`PhotoData`.
    """

    def __init__(
        self, images: int = 256, val_images: int = 16, size: int = 32, batch_size: int = 8, seed: int = 0
    ) -> None:
        super().__init__(train=[], size=size, batch_size=batch_size, val_images=val_images, workers=0, seed=seed)
        self.train_set = DrawnImages(images, size, seed)
        self.val_set = DrawnImages(val_images, size, seed + 1)
