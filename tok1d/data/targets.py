"""Cached targets beside images: what a frozen teacher made of exactly the view that is served."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from tok1d.data.index import Sample, fingerprint
from tok1d.data.tokens import TokenShards
from tok1d.data.views import Window
from tok1d.errors import UsageError

log = logging.getLogger(__name__)


class Targets:
    """Joins token shards to the photos they were made of.

    Args:
        folder: of ``tok tokenize``.
        samples: the photos, all that were given to it.
        size: side of the views that will be served.
        random: take one of the views by the draw; the first one if False.

    Attributes:
        samples: photos that have targets; the others could not be read when the shards were made.

    Raises:
        TokError: no token shards, or unfinished ones.
        UsageError: shards of other data, or of views of another size.
    """

    def __init__(self, folder: str, samples: Sequence[Sample], size: int, random: bool) -> None:
        self.shards, self.random = TokenShards(folder), random
        head = self.shards.head
        if head.budget:
            raise UsageError(f"{folder} holds rows of several lengths, which are no targets: run tok tokenize without a number of tokens")
        if head.kind == "encoder":
            raise UsageError(f"{folder} holds latents from before quantization, for generators; targets are ids, latents or those of a VAE")
        if head.size != [size, size]:
            raise UsageError(f"{folder} holds targets of views of {head.size[0]}×{head.size[1]} pixels; data.size is {size}")
        if head.data != fingerprint(samples):
            raise UsageError(f"{folder} was made of other images than these {len(samples)}: run tok tokenize on the paths of data.train, in their order")
        rows = {key: row for row, key in enumerate(self.shards.keys)}
        self.samples = [s for s in samples if s.key in rows]
        self._rows = [rows[s.key] for s in self.samples]
        if len(self.samples) < len(samples):
            log.warning("%d of %d images have no targets in %s (they could not be read) and are left out", len(samples) - len(self.samples), len(samples), folder)
        self.name = {"ids": "codes", "bits": "bits"}.get(head.kind, "latents")

    def __call__(self, index: int, draw: int) -> tuple[Window, dict[str, Tensor]]:
        """Window of the view, and ``codes`` int64 (N,), ``bits`` uint8 (N, d) or ``latents`` float16 (…)."""
        row = self._rows[index]
        view = self.shards.view_of(row, draw if self.random else None)
        return self.shards.window(row, view), {self.name: self.shards.values(row, view)}
