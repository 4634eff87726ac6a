"""Token shards as training data: TokenShards serves batches of one set, TokenData feeds a trainer, exactly resumable.

Batches: ``ids`` int64 (B, N), ``bits`` uint8 (B, N, d) or ``latents`` float16 (B, N, D) or (B, C, h, w); ``key`` list of B; ``label``
int64 (B,) and ``text`` list of B where the data have them; ``lengths`` int64 (B,) where rows are of several lengths: entries beyond are zero
and count for nothing. An epoch is every image once, in one of its views.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tok1d.data.batches import choose_text
from tok1d.data.order import StepSampler, spread, validation_batches
from tok1d.data.photos import as_they_are
from tok1d.data.shards import Arrays, Head, Notes, map_shard, read_head, read_notes
from tok1d.data.views import Window
from tok1d.errors import TokError, UsageError
from tok1d.extras import require

lightning = require("lightning", "train")


class TokenShards(Dataset):
    """The images of a folder of token shards, by number.

    Args:
        folder: of ``tok tokenize``.
        model_id: 16 hex digits the shards must have been made by; not compared if None.

    Indexing takes an int (the first view) or a pair (image, draw), or a list of them, and gives a batch.

    Attributes:
        head: what the set is.
        keys: of all images.

    Raises:
        TokError: no token shards, unfinished or damaged ones, or those of another model.
    """

    def __init__(self, folder: str | Path, model_id: str | None = None) -> None:
        self.folder = Path(folder)
        self.head: Head = read_head(self.folder)
        made_by = self.head.space
        if model_id is not None and model_id != made_by["model_id"]:
            raise TokError(
                f"{folder} was made by {made_by['tokenizer']} {made_by['model_id']}, wanted are tokens of model {model_id}: "
                "its tokens mean something else. Run tok tokenize with that model"
            )
        found = [read_notes(self.folder, i) for i in range(self.head.shards)]
        notes = [n for n in found if n is not None]
        if len(notes) < len(found):
            raise TokError(f"{folder}: {len(found) - len(notes)} of {len(found)} shards are not finished; run the same tok tokenize again")
        self._notes: list[Notes] = notes
        self._ends = np.cumsum([len(n.keys) for n in notes]).tolist()
        self._maps: dict[int, Arrays] = {}
        if not len(self):
            raise TokError(f"{folder} holds no images: none of {self.head.images} could be read")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # loader processes map the files themselves

    @property
    def keys(self) -> list[str]:
        return [key for notes in self._notes for key in notes.keys]

    @property
    def broken(self) -> list[tuple[str, str]]:
        """Key and reason of images that could not be read."""
        return [(key, reason) for notes in self._notes for key, reason in notes.broken]

    def _place(self, index: int) -> tuple[int, int]:
        """Shard and row of an image."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)} images")
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _arrays(self, shard: int) -> Arrays:
        if shard not in self._maps:
            arrays = map_shard(self.folder, shard)
            images, views = len(self._notes[shard].keys), len(self.head.views)
            array = arrays.get(self.head.array)
            if array is None or array.shape[:2] != (images, views) or arrays["windows"].shape != (images, views, 5):
                raise TokError(f"{self.folder}: shard {shard} does not fit its notes; remove both its files and run tok tokenize again")
            if self.head.budget and not _are_lengths(arrays.get("lengths"), array.shape[:3]):
                raise TokError(f"{self.folder}: shard {shard} has no lengths in 1..{array.shape[2]}; remove both its files and run tok tokenize again")
            self._maps[shard] = arrays
        return self._maps[shard]

    def view_of(self, index: int, draw: int | None) -> int:
        """The view that a draw takes; the first one if None."""
        views = len(self.head.views)
        return 0 if draw is None or views == 1 else int(np.random.default_rng((3, draw)).integers(views))

    def values(self, index: int, view: int) -> Tensor:
        """Ids int64 (N,), bits uint8 (N, d) or latents float16 (…) of one view."""
        shard, row = self._place(index)
        return torch.from_numpy(self._unpack(self._arrays(shard)[self.head.array][row, view]))

    def length(self, index: int, view: int) -> int:
        """How many tokens of one view count."""
        shard, row = self._place(index)
        return int(self._arrays(shard)["lengths"][row, view]) if self.head.budget else int(self.head.shape[0])

    def window(self, index: int, view: int) -> Window:
        """The window of an image that a view shows."""
        shard, row = self._place(index)
        top, left, height, width, mirror = self._arrays(shard)["windows"][row, view].tolist()
        return Window(top, left, height, width, bool(mirror))

    def _unpack(self, stored: NDArray[Any]) -> NDArray[Any]:
        if self.head.kind == "ids":
            return stored.astype(np.int64)
        if self.head.kind == "bits":
            return np.unpackbits(stored, axis=-1, count=self.head.shape[-1])
        return np.array(stored)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        return {k: v[0] for k, v in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> dict[str, Any]:
        pairs: list[tuple[int, int | None]] = [i if isinstance(i, tuple) else (i, None) for i in indices]
        places = [self._place(index) for index, _ in pairs]
        views = [self.view_of(i, d) for i, d in pairs]
        stored = np.stack([self._arrays(s)[self.head.array][row, view] for (s, row), view in zip(places, views)])
        batch: dict[str, Any] = {self.head.array: torch.from_numpy(self._unpack(stored))}
        batch["key"] = [self._notes[s].keys[row] for s, row in places]
        if self.head.budget:
            batch["lengths"] = torch.tensor([self.length(i, view) for (i, _), view in zip(pairs, views)])
        if "label" in self.head.fields:
            batch["label"] = torch.tensor([self._notes[s].labels[row] for s, row in places])
        if "text" in self.head.fields:
            batch["text"] = [choose_text(tuple(self._notes[s].texts[row]), draw) for (s, row), (_, draw) in zip(places, pairs)]
        return batch


def _are_lengths(found: NDArray[Any] | None, shape: tuple[int, ...]) -> bool:
    """Whether there is a length in 1..N for every view; ``shape`` (images, views, N)."""
    return found is not None and found.shape == shape[:2] and (not found.size or (int(found.min()) >= 1 and int(found.max()) <= shape[2]))


class TokenData(lightning.LightningDataModule):
    """Token shards for training and validation of generators.

    Args:
        train: folder of ``tok tokenize``.
        val: the same for validation; empty for none.
        batch_size: on each rank.
        val_batch_size: on each rank.
        val_images: validate on so many, evenly spaced (0 = all).
        workers: loader processes; memory-mapped tokens rarely need one.
        seed: of the order.
        model_id: 16 hex digits of the tokenizer that must have made the shards; not compared if empty.
    """

    def __init__(
        self,
        train: str,
        val: str = "",
        batch_size: int = 64,
        val_batch_size: int = 64,
        val_images: int = 0,
        workers: int = 0,
        seed: int = 0,
        model_id: str = "",
    ) -> None:
        super().__init__()
        if min(batch_size, val_batch_size) < 1 or min(workers, val_images) < 0:
            raise UsageError(f"data: batch sizes are at least 1, workers and val_images at least 0; got {batch_size}, {val_batch_size}, {workers}, {val_images}")
        self.batch_size, self.val_batch_size, self.val_images = batch_size, val_batch_size, val_images
        self.workers, self.seed = workers, seed
        self.train_set = TokenShards(train, model_id or None)
        self.val_set = TokenShards(val, self.train_set.head.space["model_id"]) if val else None
        if self.val_set is not None and self.val_set.head.kind != self.train_set.head.kind:
            raise UsageError(f"{val} holds {self.val_set.head.kind}, {train} holds {self.train_set.head.kind}: make both with the same --what")

    @property
    def space(self) -> Any:
        """The :class:`tok1d.generators.space.TokenSpace` of the training shards."""
        from tok1d.generators.space import TokenSpace

        return TokenSpace.from_config(self.train_set.head.space)

    @property
    def classes(self) -> list[str]:
        """Class names in the order of their numbers; [] if there are none."""
        return self.train_set.head.classes

    def every_image(self) -> Iterator[dict[str, Any]]:
        """Batches of every training image once, each in one of its views; the same in every process."""
        for start in range(0, len(self.train_set), 512):
            yield self.train_set.__getitems__([(i, i) for i in range(start, min(start + 512, len(self.train_set)))])

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        share = (self.trainer.global_rank, self.trainer.world_size)
        sampler = StepSampler(len(self.train_set), self.batch_size, self.seed, done, *share)
        return DataLoader(
            self.train_set,
            batch_sampler=sampler,
            collate_fn=as_they_are,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def val_dataloader(self) -> DataLoader | list[Any]:
        if self.val_set is None:
            return []
        assert self.trainer is not None
        chosen = spread(range(len(self.val_set)), self.val_images)
        share = validation_batches(len(chosen), self.val_batch_size, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(self.val_set, batch_sampler=[[chosen[i] for i in batch] for batch in share], collate_fn=as_they_are)

    def describe(self) -> dict[str, Any]:
        """What a model card says of the training data; no paths."""
        head = self.train_set.head
        kept = {"tokenizer": head.space["tokenizer"], "model_id": head.space["model_id"], "kind": head.kind, "views": len(head.views)}
        kept |= {"lengths": head.budget} if head.budget else {}
        return {"images": len(self.train_set), "size": head.size[0], "batch_size": self.batch_size, "seed": self.seed, **kept}
