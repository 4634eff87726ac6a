"""Pictures for the report, kept during the pass: the same few images at every rate, and the best and worst of each rate.

They live in the states of the run, so they survive kills and come together from all ranks; memory is a few pictures a rate.
Shapes: pictures are uint8 (n, 2, 3, S, S), originals beside reconstructions, S at most 256.
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


class Gallery(Measure):
    """Keeps pictures.

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
        keys = hash_keys([batch.samples[i].id for i in ok], seed=1)
        fresh = {f"{pictures.rate.name}/fixed/keys": keys, f"{pictures.rate.name}/fixed/pictures": both}
        column = next((c for c in self.columns if c.lstrip("-") in columns), None)
        if column is not None and self.extremes:
            values = torch.tensor([float(columns[column.lstrip("-")][i] or 0.0) for i in ok], dtype=torch.float64)  # type: ignore[index]
            rank = (values * (-1 if column.startswith("-") else 1) * 1e9).round().long()  # large: good
            for end, order in (("worst", rank), ("best", -rank)):
                fresh |= {f"{pictures.rate.name}/{end}/keys": order, f"{pictures.rate.name}/{end}/pictures": both}
        self._state = self.add(self._state, fresh)

    def state(self) -> State:
        held, self._state = self._state, {}
        return held

    def add(self, a: State, b: State) -> State:
        out: State = {}
        for side in sorted({k.rpartition("/")[0] for k in (*a, *b)}):
            keys = torch.cat([s[f"{side}/keys"] for s in (a, b) if f"{side}/keys" in s])
            shown = torch.cat([s[f"{side}/pictures"] for s in (a, b) if f"{side}/pictures" in s])
            order = keys.argsort(stable=True)[: self.fixed if side.endswith("/fixed") else self.extremes]
            out |= {f"{side}/keys": keys[order], f"{side}/pictures": shown[order]}
        return out


def small(images: Tensor) -> Tensor:
    """uint8 (n, 3, S, S) → at most 256 pixels a side."""
    if images.shape[-1] <= SIDE:
        return images
    return F.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True)
