"""Streaming WebDataset for sets too large to index: shards are looked into when their turn comes.

Samples come in *lanes*, endless sequences that share nothing: lane l of L reads units l, l + L … of each epoch's order of units (a
unit is a shard, or a part of one where there are fewer shards than lanes). Global batch n is the next ``batch`` samples of lane
n mod L, rank and loader process read the lanes that are theirs, and every sample is read once an epoch of its lane. Nothing ends,
so uneven shards cannot let one rank wait for another.

Where a lane stands follows from how many samples it has given; nothing is stored. Its shuffle makes that possible: sample i of an
epoch is given at the time i + buffer · u(i), u(i) uniform in [0, 1) by seed and i, so what is pending at any moment is known from
the ``buffer`` samples before it. Resuming reads headers of the shards that the epoch has used up, and no images.

Broken images are counted, named, and left out of their batch, which then is smaller. A damaged shard is used up to the damage.
"""

from __future__ import annotations

import heapq
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from tok1d.data.batches import collate
from tok1d.data.facts import check_names, fields_of
from tok1d.data.index import Sample, scan_shard
from tok1d.data.photos import Views
from tok1d.errors import ImageError, UsageError

log = logging.getLogger(__name__)
BLOCK = 1024  # numbers drawn at once for the shuffle


def expand_shards(patterns: str | Sequence[str]) -> list[Path]:
    """``shards/train-{0000..0123}.tar``, ``{a,b}/*.tar``, folders and files → .tar files, in order, each once.

    Raises:
        ImageError: a pattern that finds none, or a shard that is missing.
    """
    found: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for name in _braces(str(pattern)):
            path = Path(name)
            if path.is_dir():
                shards = sorted(p for p in path.rglob("*.tar") if p.is_file())
            elif "*" in name or "?" in name:
                shards = sorted(p for p in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if p.is_file())
            else:
                shards = [path] if path.is_file() and path.suffix == ".tar" else []
            if not shards:
                raise ImageError(f"{name}: no .tar shard there; give files, folders, or patterns as train-{{0000..0123}}.tar")
            found |= dict.fromkeys(shards)
    return list(found)


def _braces(text: str) -> list[str]:
    """All texts that a pattern with ``{a,b}`` and ``{00..12}`` stands for."""
    inner = re.search(r"\{([^{}]*)\}", text)
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inner[1]) if inner else None
    if inner is None or (span is None and "," not in inner[1]):
        return [text]
    width = len(span[1]) if span else 0
    choices = [str(i).zfill(width) for i in range(int(span[1]), int(span[2]) + 1)] if span else inner[1].split(",")
    return [more for choice in choices for more in _braces(text[: inner.start()] + choice + text[inner.end() :])]


class Unit(NamedTuple):
    """Samples part, part + parts … of a shard."""

    shard: int
    part: int
    parts: int


class Lane:
    """One endless sequence of samples.

    Args:
        shards: all shards.
        number, count: which lane of how many.
        seed: of the order of units and of the shuffle.
        buffer: how far the shuffle may delay a sample; 0 keeps the order of the shards.
        resampled: draw a random unit after each instead of going through all of them once an epoch.
        damaged: uint8 (shards,), set where a shard turned out damaged.
    """

    def __init__(self, shards: Sequence[Path], number: int, count: int, seed: int, buffer: int, resampled: bool, damaged: torch.Tensor) -> None:
        self.shards, self.number, self.count, self.seed = shards, number, count, seed
        self.buffer, self.resampled, self.damaged = buffer, resampled, damaged
        parts = -(-count // len(shards))
        self.all_units = [Unit(s, p, parts) for s in range(len(shards)) for p in range(parts)]
        self.lengths: dict[Unit, int] = {}
        self._last: tuple[int, list[Sample], str | None] = (-1, [], None)

    def samples(self, start: int = 0) -> Iterator[tuple[int, Sample]]:
        """(epoch, sample) pairs from number ``start`` on, without end.

        Raises:
            ImageError: not one image in all its shards.
        """
        epoch, skip = 0, start
        if not self.resampled:
            while (length := self._length(epoch, skip)) <= skip:
                epoch, skip = epoch + 1, skip - length
        while True:
            for sample in self._shuffled(epoch, skip):
                yield epoch, sample
            epoch, skip = epoch + 1, 0

    def units(self, epoch: int) -> Iterator[Unit]:
        """Its units in the order of an epoch; without end if resampled."""
        if self.resampled:
            rng = np.random.default_rng((self.seed, 1, self.number))
            while True:
                yield self.all_units[int(rng.integers(len(self.all_units)))]
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.all_units))
        yield from (self.all_units[i] for i in order[self.number :: self.count])

    def _length(self, epoch: int, enough: int) -> int:
        """Samples of an epoch, counted until there are more than enough."""
        total = 0
        for unit in self.units(epoch):
            total += self._unit_length(unit)
            if total > enough:
                return total
        if total == 0 and not any(self._unit_length(u) for u in self.all_units):
            raise ImageError(f"no images in {len(self.shards)} shards, {self.shards[0]} first among them")
        return total

    def _unit_length(self, unit: Unit) -> int:
        if unit not in self.lengths:
            self._open(unit)
        return self.lengths[unit]

    def _open(self, unit: Unit) -> list[Sample]:
        if unit.shard != self._last[0]:
            self._last = (unit.shard, *scan_shard(self.shards[unit.shard]))
        _, samples, damage = self._last
        for part in range(unit.parts):
            self.lengths[Unit(unit.shard, part, unit.parts)] = len(samples[part :: unit.parts])
        if damage and not self.damaged[unit.shard]:
            self.damaged[unit.shard] = 1
            log.warning("%s; its %d images before that are used", damage, len(samples))
        return samples[unit.part :: unit.parts]

    def _in_order(self, epoch: int, first: int) -> Iterator[tuple[int, Sample]]:
        """(number, sample) of an epoch as the units hold them, from a number on."""
        at = 0
        for unit in self.units(epoch):
            known = self.lengths.get(unit)
            if known is None or at + known > first:
                samples = self._open(unit)
                yield from ((at + i, s) for i, s in enumerate(samples) if at + i >= first)
            at += self.lengths[unit]

    def _shuffled(self, epoch: int, skip: int) -> Iterator[Sample]:
        first = max(0, skip - self.buffer)  # earlier ones have been given before number ``skip``
        pending: list[tuple[float, int, Sample]] = []
        given, block, delays = first, -1, np.empty(0)
        for i, sample in self._in_order(epoch, first):
            if i // BLOCK != block:
                block = i // BLOCK
                delays = np.random.default_rng((self.seed, 2, self.number, epoch, block)).random(BLOCK) * self.buffer
            while pending and pending[0][0] <= i:  # whatever follows has a later time
                given += 1
                if given > skip:
                    yield heapq.heappop(pending)[2]
                else:
                    heapq.heappop(pending)
            heapq.heappush(pending, (i + float(delays[i % BLOCK]), i, sample))
        for _, _, sample in sorted(pending)[max(0, skip - given) :]:
            yield sample


class ShardStream(IterableDataset):
    """Endless batches out of local WebDataset shards; for a DataLoader with ``batch_size=None``.

    Args:
        shards: files, folders or patterns (:func:`expand_shards`).
        views: how samples become views; its fields are set here, by what the first shards hold.
        batch: samples of a batch.
        seed, buffer, resampled: as :class:`Lane`.
        lanes: how many lanes; 0 for one a loader process of each rank. With a fixed number, a multiple of ranks × processes, the
            same batches are made by any of them.

    Attributes:
        start: batches already consumed on this rank; to be set before it is read.
        rank, ranks: which share of the batches is read.
        broken: int64 (1,) images that could not be read, in all loader processes; the same image in another epoch counts again.
        damaged: uint8 (shards,), 1 where a shard is damaged.

    Raises:
        ImageError: no shards, or no image in the first of them.
        UsageError: a number of lanes that does not fit, or class names without ``classes``.
    """

    def __init__(
        self, shards: str | Sequence[str], views: Views, batch: int, *, seed: int = 0, buffer: int = 1000, resampled: bool = False,
        lanes: int = 0,
    ) -> None:  # fmt: skip
        if batch < 1 or min(buffer, lanes) < 0:
            raise UsageError(f"data: batch_size is at least 1, buffer and lanes at least 0; got {batch}, {buffer}, {lanes}")
        self.shards, self.views, self.batch = expand_shards(shards), views, batch
        self.seed, self.buffer, self.resampled, self.lanes = seed, buffer, resampled, lanes
        self.start, self.rank, self.ranks = 0, 0, 1
        looked = next((found for found, _ in map(scan_shard, self.shards) if found), [])
        if not looked:
            raise ImageError(f"no images in {len(self.shards)} shards, {self.shards[0]} first among them")
        check_names(looked, list(views.places))
        views.fields = fields_of(looked)
        self.broken = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.damaged = torch.zeros(len(self.shards), dtype=torch.uint8).share_memory_()

    def lane(self, number: int, count: int) -> Lane:
        """One of ``count`` lanes."""
        return Lane(self.shards, number, count, self.seed, self.buffer, self.resampled, self.damaged)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        count = self.lanes or self.ranks * workers
        if count % (self.ranks * workers):
            raise UsageError(f"data.lanes should be a multiple of {self.ranks} ranks × {workers} loader processes, got {count}")
        open_lanes: dict[int, Iterator[tuple[int, Sample]]] = {}
        step = self.start + worker
        while True:
            turn, number = divmod(step * self.ranks + self.rank, count)
            if number not in open_lanes:
                open_lanes[number] = self.lane(number, count).samples(turn * self.batch)
            draws = [(turn * self.batch + i) * count + number for i in range(self.batch)]
            yield self._batch([(next(open_lanes[number])[1], draw) for draw in draws])
            step += workers

    def _batch(self, chosen: list[tuple[Sample, int]]) -> dict[str, Any]:
        """What can be read of these samples; if nothing can, the first image of the shards that can stands in."""
        found = [s for sample, draw in chosen if (s := self._try(sample, draw)) is not None]
        if not found:
            others = (sample for path in self.shards for sample in scan_shard(path)[0])
            other = next((s for s in (self._try(o, chosen[0][1]) for o in others) if s is not None), None)
            if other is None:
                raise ImageError(f"none of the images in {len(self.shards)} shards can be read, {self.shards[0]} first among them")
            log.warning("a batch held broken images only: %s stands in", other["key"])
            found = [other]
        return collate(found)

    def _try(self, sample: Sample, draw: int) -> dict[str, Any] | None:
        try:
            image, facts = self.views.read(sample)
        except (ImageError, OSError) as error:
            self.broken += 1
            log.warning("skipping %s of %s: %s (%d broken so far)", sample.key, sample.file, error, int(self.broken))
            return None
        return self.views.make(sample.key, image, facts, draw)
