"""Pictures for the report, kept during the pass: the same few images at every rate, the best and worst of each rate, words and faces.

They live in the states of the run, so they survive kills and come together from all ranks; memory is a few pictures a rate.
What is kept has the smallest keys (a hash of the id, or the value), so any order, batch and number of ranks keeps the same.
Shapes: pictures are uint8 (n, 2, 3, S, S), originals beside reconstructions, S at most 256; crops uint8 (n, 3, h, W) padded on the right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.eval.distribution import hash_keys
from tok1d.eval.measures import Batch, Measure, State
from tok1d.eval.systems import Pictures

SIDE = 256
SCALE = 1e9  # values become integers, so that their order is the same everywhere


class Gallery(Measure):
    """Keeps pictures.

    States, for each rate and ``end`` of fixed, best, worst: ``keys`` int64 (n,), ascending; ``ids`` int64 (n,), hashes of the ids
    (:func:`tok1d.eval.distribution.hash_keys` with seed 1); ``pictures``.

    Args:
        fixed: images shown at every rate, those whose ids have the smallest hashes.
        extremes: best and worst of each rate.
        columns: what decides: the first of them that was measured; a leading ``-`` says that less is better.
    """

    name = "gallery"

    def __init__(self, fixed: int = 8, extremes: int = 4, columns: Sequence[str] = ("-lpips_vgg", "-dists", "psnr")) -> None:
        self.fixed, self.extremes, self.columns = fixed, extremes, tuple(columns)
        self._state: State = {}

    def after(self, batch: Batch, pictures: Pictures, columns: Mapping[str, Sequence[float | None]]) -> None:
        ok = [i for i, status in enumerate(pictures.status) if status == "ok"]
        if not ok:
            return
        both = torch.stack([small(batch.views[ok]), small(pictures.images[ok])], 1)
        ids = hash_keys([batch.samples[i].id for i in ok], seed=1)
        rate = pictures.rate.name
        fresh = {f"{rate}/fixed/keys": ids, f"{rate}/fixed/ids": ids, f"{rate}/fixed/pictures": both}
        column = self.decides(columns)
        if column is not None and self.extremes:
            values = torch.tensor([float(columns[column.lstrip("-")][i] or 0.0) for i in ok], dtype=torch.float64)  # type: ignore[index]
            goodness = (values * (-SCALE if column.startswith("-") else SCALE)).round().long()
            for end, order in (("worst", goodness), ("best", -goodness)):
                fresh |= {f"{rate}/{end}/keys": order, f"{rate}/{end}/ids": ids, f"{rate}/{end}/pictures": both}
        self._state = self.add(self._state, fresh)

    def decides(self, columns: Mapping[str, object]) -> str | None:
        """Which column chose the best and worst, with its ``-``."""
        return next((c for c in self.columns if c.lstrip("-") in columns), None)

    def state(self) -> State:
        held, self._state = self._state, {}
        return held

    def add(self, a: State, b: State) -> State:
        out: State = {}
        for side in sorted({k.rpartition("/")[0] for k in (*a, *b)}):
            out |= _least(a, b, side, self.fixed if side.endswith("/fixed") else self.extremes)
        return out


class Crops(Measure):
    """Keeps crops of instances (words, faces): the same few of each size bin at every rate, chosen by a hash of image and number.

    A measure of instances holds one, hands it the crops it makes anyway, and gives its state as its own. Rows of the run say what
    was read or how similar it was; they are found by the key. An instance that fails at one rate is missing there only:
    the others of the same rate keep their places, because those kept of the originals are its smallest keys anywhere.

    States, for each rate and bin: ``keys`` int64 (n,), ascending; ``crops`` uint8 (n, 3, height, width), padded; ``widths`` int64 (n,).

    Args:
        name: of the measure that holds it.
        each: crops kept of a bin.
        height, width: crops are scaled to this height, and squeezed to at most this width.
    """

    table = ""

    def __init__(self, name: str, each: int = 8, height: int = 32, width: int = 160) -> None:
        self.name, self.each, self.height, self.width = name, each, height, width
        self._state: State = {}

    def keep(self, rate: str, label: str, sample: str, number: int, crop: Tensor) -> None:
        """Take up a crop, uint8 (3, h, w), of an instance of the bin ``label``, if its key is small enough."""
        side, key = f"{rate}/{label}", crop_keys([(sample, number)])
        held = self._state.get(f"{side}/keys")
        if held is not None and len(held) >= self.each and int(key) > int(held[-1]):
            return
        wide = max(1, min(self.width, round(crop.shape[-1] * self.height / crop.shape[-2])))
        shown = F.interpolate(crop[None].cpu(), (self.height, wide), mode="bicubic", antialias=True)
        padded = F.pad(shown, (0, self.width - wide))
        fresh = {f"{side}/keys": key, f"{side}/crops": padded, f"{side}/widths": torch.tensor([wide])}
        self._state |= _least({k: v for k, v in self._state.items() if k.startswith(f"{side}/")}, fresh, side, self.each)

    def state(self) -> State:
        held, self._state = self._state, {}
        return held

    def add(self, a: State, b: State) -> State:
        out: State = {}
        for side in sorted({k.rpartition("/")[0] for k in (*a, *b)}):
            out |= _least(a, b, side, self.each)
        return out


def crop_keys(instances: Sequence[tuple[str, int]]) -> Tensor:
    """int64 (n,), a key for each id of an image with the number of the instance in it."""
    return hash_keys([f"{sample}/{number}" for sample, number in instances], seed=2)


def small(images: Tensor) -> Tensor:
    """uint8 (n, 3, S, S) → at most 256 pixels a side."""
    if images.shape[-1] <= SIDE:
        return images
    return F.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True)


def _least(a: State, b: State, side: str, count: int) -> State:
    """The rows of ``side`` in both with the smallest keys; ties go by ``ids``, so that the order of chunks does not matter."""
    held = [s for s in (a, b) if f"{side}/keys" in s]
    names = sorted({k.rpartition("/")[2] for s in held for k in s if k.rpartition("/")[0] == side})
    joined = {name: torch.cat([s[f"{side}/{name}"] for s in held]) for name in names}
    order = joined["ids"].argsort(stable=True) if "ids" in joined else torch.arange(len(joined["keys"]))
    order = order[joined["keys"][order].argsort(stable=True)][:count]
    return {f"{side}/{name}": values[order] for name, values in joined.items()}
