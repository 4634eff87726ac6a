"""Lightning data modules behind ``tok fit``: PhotoData (indexed photos), StreamData (shards too large to index), DrawnData.

The order of samples and every crop follow from (seed, draw number), and the draw number from the batches the trainer has
finished, so a resumed run sees exactly what the uninterrupted one would have seen. Batches are dicts (:mod:`tok1d.data.batches`).
"""

from __future__ import annotations

import logging
from typing import Any

from torch.utils.data import DataLoader, Dataset

from tok1d.data.batches import collate
from tok1d.data.drawn import DrawnImages
from tok1d.data.facts import class_names, read_classes
from tok1d.data.index import index_images
from tok1d.data.order import StepSampler, spread, validation_batches
from tok1d.data.photos import VIEWS, Photos, Views, as_they_are
from tok1d.data.stream import ShardStream
from tok1d.data.targets import Targets
from tok1d.errors import UsageError
from tok1d.extras import require

__all__ = ["DrawnData", "PhotoData", "StepSampler", "StreamData", "spread"]
lightning = require("lightning", "train")
log = logging.getLogger(__name__)


class PhotoData(lightning.LightningDataModule):
    """Photos for training and validation.

    Args:
        train: folders (class folders and Hugging Face's imagefolder too), .tar shards, manifests or image files.
        val: the same for validation; empty for none.
        size: side of the square views.
        area: share of the largest square that a training crop holds.
        batch_size: on each rank.
        val_batch_size: on each rank.
        val_images: validate on so many, evenly spaced (0 = all).
        workers: loader processes.
        cache: keep decoded training photos in memory (use with ``workers: 0``; every worker would keep its own).
        seed: of order and crops.
        view: of training: ``crop`` (a random share, resized), ``window`` (a random square of ``size`` pixels as they are) or ``centre``.
        mirror: mirror half of the training views, but never those of images with words.
        classes: class names in the order of their numbers, or a JSON file of them; class folders in sorted order if None.
        targets: folder of ``tok tokenize`` over ``train``: its views are served with the codes or latents made of them.
        val_targets: the same over ``val``; the first view of each image is served.
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
        view: str = "crop",
        mirror: bool = True,
        classes: list[str] | str | None = None,
        targets: str | None = None,
        val_targets: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 < area[0] <= area[1] <= 1:
            raise UsageError(f"data.area must be two rising shares in (0, 1], got {list(area)}")
        if min(size, batch_size, val_batch_size) < 1 or workers < 0:
            raise UsageError(f"data: size and batch sizes are at least 1, workers at least 0; got {size}, {batch_size}, {workers}")
        if view not in VIEWS:
            raise UsageError(f"data.view is one of {', '.join(VIEWS)}, got {view!r}")
        self.train, self.val = list(train), list(val or [])
        self.size, self.area, self.seed, self.cache = size, (area[0], area[1]), seed, cache
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.val_images, self.workers = val_images, workers
        self.view, self.mirror, self.targets, self.val_targets = view, mirror, targets, val_targets
        self.classes = read_classes(classes)
        self.train_set: Dataset | None = None
        self.val_set: Dataset | None = None

    def setup(self, stage: str) -> None:
        if self.train_set is None and stage == "fit":
            self.train_set = self._train_set()
        if self.val_set is None and self.val:
            samples, target = index_images(self.val), None
            if self.val_targets:
                target = Targets(self.val_targets, samples, self.size, random=False)
                samples = target.samples
            chosen = spread(range(len(samples)), self.val_images)
            at = None if target is None else lambda index, draw: target(chosen[index], draw)
            self.val_set = Photos([samples[i] for i in chosen], self.size, classes=self.classes, target=at)

    def _train_set(self) -> Dataset:
        samples, target = index_images(self.train), None
        self.classes = class_names(samples) if self.classes is None else self.classes
        if self.targets:
            target = Targets(self.targets, samples, self.size, random=True)
            samples = target.samples
        return Photos(samples, self.size, self.area, self.seed, self.cache, self.view, self.mirror, self.classes, target)

    def _position(self) -> tuple[int, int, int]:
        """Batches finished, this rank, ranks."""
        assert self.trainer is not None
        # Finished batches, not optimizer steps: with gradient accumulation the trainer's global_step counts the latter.
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        return done, self.trainer.global_rank, self.trainer.world_size

    def _loader(self, data: Dataset, **order: Any) -> DataLoader:
        assert self.trainer is not None
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(data, num_workers=self.workers, persistent_workers=self.workers > 0, pin_memory=on_gpu, **order)

    def train_dataloader(self) -> DataLoader:
        assert self.train_set is not None
        sampler = StepSampler(len(self.train_set), self.batch_size, self.seed, *self._position())
        return self._loader(self.train_set, batch_sampler=sampler, collate_fn=_collate(self.train_set))

    def val_dataloader(self) -> DataLoader | list:
        if self.val_set is None:
            return []
        _, rank, ranks = self._position()
        batches = validation_batches(len(self.val_set), self.val_batch_size, rank, ranks)
        return DataLoader(self.val_set, batch_sampler=batches, collate_fn=_collate(self.val_set))

    def describe(self) -> dict[str, Any]:
        """What a model card says of the training data; no paths."""
        count = len(self.train_set) if hasattr(self.train_set, "__len__") else None
        return {"images": count, "size": self.size, "area": list(self.area), "batch_size": self.batch_size, "seed": self.seed}

    def teardown(self, stage: str) -> None:
        for name, data in (("training", self.train_set), ("validation", self.val_set)):
            broken = int(data.broken.sum()) if isinstance(data, Photos | ShardStream) else 0
            if broken:
                of = f" of {len(data)}" if isinstance(data, Photos) else ""
                log.warning("%d%s %s images could not be read and were skipped", broken, of, name)


def _collate(data: Dataset) -> Any:
    """Photos make whole batches, so that broken images can be left out."""
    return as_they_are if isinstance(data, Photos) else collate


class StreamData(PhotoData):
    """:class:`PhotoData` out of WebDataset shards too large to index; they are read in turn (:mod:`tok1d.data.stream`).

    Args:
        train: shards, folders of them, or patterns as ``train-{0000..0123}.tar``.
        buffer: how many samples the shuffle may delay one.
        resampled: draw random shards instead of reading all of them once an epoch.
        lanes: shards read side by side, 0 for one a loader process of each rank; with a fixed number the same batches are made by
            any number of ranks and processes that divides it.
        val, size, area, batch_size, val_batch_size, val_images, workers, seed, view, mirror, classes: as :class:`PhotoData`.
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
        seed: int = 0,
        view: str = "crop",
        mirror: bool = True,
        classes: list[str] | str | None = None,
        buffer: int = 1000,
        resampled: bool = False,
        lanes: int = 0,
    ) -> None:
        super().__init__(train, val, size, area, batch_size, val_batch_size, val_images, workers, False, seed, view, mirror, classes)
        self.buffer, self.resampled, self.lanes = buffer, resampled, lanes

    def _train_set(self) -> Dataset:
        views = Views(self.size, self.area, self.seed, self.view, self.mirror, classes=self.classes or ())
        return ShardStream(self.train, views, self.batch_size, seed=self.seed, buffer=self.buffer, resampled=self.resampled, lanes=self.lanes)

    def train_dataloader(self) -> DataLoader:
        assert isinstance(self.train_set, ShardStream)
        self.train_set.start, self.train_set.rank, self.train_set.ranks = self._position()
        return self._loader(self.train_set, batch_size=None)


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
