"""PhotoData: the Lightning data module behind ``tok fit``, and images drawn by formula for debugging.

The order of samples and every crop follow from (seed, draw number), and the draw number from the trainer's step, so a
resumed run sees exactly what the uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from tok1d.data.photos import Photos, index_images


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (sample, draw) pairs; every sample once an epoch, in an order that depends on the seed alone.

    Args:
        samples: size of the set.
        batch: samples of one batch on this rank.
        start: batches already consumed.
        rank, ranks: every rank takes its share of each global batch.
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
        cache: keep decoded training photos in memory (use with ``workers: 0``).
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
        trainer = self.trainer
        # batches, not optimizer steps: with gradient accumulation the trainer counts the latter
        start = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        share = (trainer.global_rank, trainer.world_size)
        sampler = StepSampler(len(self.train_set), self.batch_size, self.seed, start, *share)
        workers = self.workers
        return DataLoader(self.train_set, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)

    def val_dataloader(self) -> DataLoader | list:
        if self.val_set is None:
            return []
        share = range(self.trainer.global_rank, len(self.val_set), self.trainer.world_size)
        return DataLoader(Subset(self.val_set, share), batch_size=self.val_batch_size, num_workers=0)


class DrawnImages(Dataset):
    """Images computed from their index: a gradient, discs and bars; no files needed.

    Example:
        >>> DrawnImages(4, 32)[0].shape
        torch.Size([3, 32, 32])
    """

    def __init__(self, count: int, size: int, seed: int = 0) -> None:
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int | tuple[int, int]) -> Tensor:
        index = index[0] if isinstance(index, tuple) else index
        rng = np.random.default_rng((self.seed, index))
        axis = np.linspace(0, 1, self.size, dtype=np.float32)
        y, x = axis[:, None], axis[None]
        a, b, slope = rng.random(3), rng.random(3), rng.random()
        image = a[:, None, None] + (b - a)[:, None, None] * (slope * x + (1 - slope) * y)
        for _ in range(3):
            cx, cy, r, colour = rng.random(), rng.random(), 0.08 + 0.25 * rng.random(), rng.random(3)
            shape = (x - cx) ** 2 + (y - cy) ** 2 < r * r if rng.random() < 0.5 else (abs(x - cx) < r) & (abs(y - cy) < r / 2)
            image = np.where(shape, colour[:, None, None], image)
        return torch.from_numpy((image * 255).round().clip(0, 255).astype(np.uint8))


class DrawnData(PhotoData):
    """:class:`PhotoData` over :class:`DrawnImages`: trains anywhere, for tests and debug configurations."""

    def __init__(
        self, images: int = 256, val_images: int = 16, size: int = 32, batch_size: int = 8, seed: int = 0
    ) -> None:
        super().__init__(train=[], size=size, batch_size=batch_size, val_images=val_images, workers=0, seed=seed)
        self.train_set = DrawnImages(images, size, seed)
        self.val_set = DrawnImages(val_images, size, seed + 1)
