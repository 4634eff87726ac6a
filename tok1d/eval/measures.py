"""Measures: what is computed of every picture, in one pass over the data.

A measure sees a batch of originals with its pictures at all rates. It returns values an image (columns of the image table),
rows an instance (words, faces), and states that add up over chunks, ranks and resumed runs. Sums are exact — features are first
rounded to a grid of 2⁻¹² — so the same images give the same numbers to the last bit however they were shared.
Shapes: views and pictures are uint8 (B, 3, S, S).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tok1d.eval import pixel
from tok1d.eval.frechet import Moments, Sums
from tok1d.eval.manifest import Sample
from tok1d.eval.protocol import Protocol
from tok1d.eval.systems import Pictures
from tok1d.eval.view import Geometry

Row = dict[str, Any]
State = dict[str, Tensor]
GRID = 2.0**-12  # of features, before they are squared and added: sums of multiples of 2⁻²⁴ are exact in float64


@dataclass
class Batch:
    """Originals as the system saw them.

    Attributes:
        samples: their rows of the manifest.
        views: uint8 (B, 3, S, S).
        geometry: where each image lies in its view.
        images: originals, uint8 (3, H, W) each.
        protocol: that made the views.
    """

    samples: Sequence[Sample]
    views: Tensor
    geometry: Sequence[Geometry]
    images: Sequence[Tensor]
    protocol: Protocol


class Measure:
    """Base of all measures; everything is optional.

    Attributes:
        name: of the measure, prefix of its states.
        table: name of its instance rows, as ``words``.
    """

    name: str
    table: str = ""

    def describe(self) -> dict[str, Any]:
        """What its numbers depend on: network ids, settings."""
        return {}

    def see(self, batch: Batch, rates: Sequence[Pictures]) -> list[dict[str, list[float | None]]]:
        """See a batch and its pictures at all rates; values by column, one an image, for each rate."""
        self.originals(batch)
        return [self.pictures(batch, pictures) for pictures in rates]

    def originals(self, batch: Batch) -> None:
        """See a batch before its pictures."""

    def pictures(self, batch: Batch, pictures: Pictures) -> dict[str, list[float | None]]:
        """Values by column, one an image."""
        return {}

    def after(self, batch: Batch, pictures: Pictures, columns: Mapping[str, Sequence[float | None]]) -> None:
        """See the values all measures gave to the pictures of a rate."""

    def missing(self, sample: Sample, rates: Sequence[str]) -> None:
        """An image that could not be read: its instances are rows, too."""

    def flush(self) -> list[Row]:
        """Instance rows since the last flush; called at the end of a chunk."""
        return []

    def state(self) -> State:
        """What adds up, and start anew; called at the end of a chunk."""
        return {}

    def add(self, a: State, b: State) -> State:
        """Two states together, sums by default; ``a`` may be used up."""
        return {k: a[k] + b[k] if k in a and k in b else a.get(k, b.get(k)) for k in {*a, *b}}  # type: ignore[misc]

    def results(self, state: State, rate: str) -> Row:
        """Numbers of a whole run at one rate, from the states of all its chunks."""
        return {}

    def instances(self, rows: Sequence[Row], rate: str) -> Row:
        """Numbers of a whole run at one rate, from all instance rows of the run."""
        return {}


class Pixels(Measure):
    """MAE (grey levels), PSNR (dB), SSIM and MS-SSIM of the view."""

    name = "pixels"

    def pictures(self, batch: Batch, pictures: Pictures) -> dict[str, list[float | None]]:
        a, b = batch.views, pictures.images
        columns = {"mae": pixel.mae(a, b), "psnr": pixel.psnr(a, b).clamp(max=100)}
        if min(a.shape[-2:]) >= pixel.MS_SSIM_LEAST:
            columns["ssim"], columns["ms_ssim"] = pixel.ssim_and_ms_ssim(a, b)
        else:
            columns["ssim"] = pixel.ssim(a, b)
        return {name: values.tolist() for name, values in columns.items()}


class Perceptuals(Measure):
    """LPIPS by trunk and DISTS.

    Args:
        nets: of ``lpips_vgg``, ``lpips_alex``, ``dists``.
        device: where they run.
    """

    name = "perceptual"

    def __init__(self, nets: Sequence[str] = ("lpips_vgg", "lpips_alex"), device: str | torch.device = "cpu") -> None:
        from tok1d.eval.perceptual_pass import Distances

        self.distances = Distances(nets, device)

    def describe(self) -> dict[str, Any]:
        return {"nets": sorted(self.distances.names)}

    def see(self, batch: Batch, rates: Sequence[Pictures]) -> list[dict[str, list[float | None]]]:
        found = self.distances(batch.views, [pictures.images for pictures in rates])
        return [{name: values[i].tolist() for name, values in found.items()} for i in range(len(rates))]


class Features(Measure):
    """Fréchet distance, kernel distance and inception score in the space of one network, and the cosine of each pair.

    Args:
        net: a ``FeatureNet`` (``tok1d.eval.features``).
        sample: images kept for the kernel distance and precision, chosen by a hash of their ids.
        reference: moments of the real side from a cache; else the originals of this run are the real side.
    """

    def __init__(self, net: Any, sample: int = 5000, reference: Moments | None = None) -> None:
        self.net, self.sample, self.reference = net, sample, reference
        self.name = f"features/{net.name}"
        self._rows: dict[str, list[Tensor]] = {}  # of the chunk so far, by side and name
        self._real: Tensor | None = None

    def describe(self) -> dict[str, Any]:
        return {"net": self.net.id, "reference": "cached" if self.reference is not None else "originals of this run"}

    def originals(self, batch: Batch) -> None:
        found = self.net.features(batch.views)
        self._real = found["pooled"].cpu()
        if self.reference is None:
            self._keep("real", [s.id for s in batch.samples], found, torch.ones(len(batch.views), dtype=torch.bool))

    def pictures(self, batch: Batch, pictures: Pictures) -> dict[str, list[float | None]]:
        found = self.net.features(pictures.images)
        ok = torch.tensor([s == "ok" for s in pictures.status])
        self._keep(pictures.rate.name, [s.id for s in batch.samples], found, ok)
        assert self._real is not None
        cosine = torch.nn.functional.cosine_similarity(self._real.double(), found["pooled"].cpu().double())
        return {f"cosine_{self.net.name}": cosine.tolist()}

    def _keep(self, side: str, ids: Sequence[str], found: dict[str, Tensor], ok: Tensor) -> None:
        from tok1d.eval.distribution import hash_keys

        x = (found["pooled"].cpu().double() / GRID).round() * GRID
        fresh = {"keys": hash_keys(ids), "sample": x}
        if found.get("logits") is not None:
            fresh["logits"] = found["logits"].cpu().float()
        for name, values in fresh.items():
            self._rows.setdefault(f"{side}/{name}", []).append(values[ok])

    def state(self) -> State:
        rows, self._rows = {name: torch.cat(parts) for name, parts in self._rows.items()}, {}
        state: State = {}
        for side in _sides(rows):
            sums = Sums.of(rows[f"{side}/sample"])  # one product a chunk
            state |= {f"{side}/n": sums.n, f"{side}/sum": sums.total, f"{side}/outer": sums.outer}
            rows[f"{side}/sample"] = rows[f"{side}/sample"].float()
        return self._sampled(state | rows)

    def add(self, a: State, b: State) -> State:
        for key, value in b.items():
            if key not in a:
                a[key] = value
            elif key.endswith(("/n", "/sum", "/outer")):
                a[key] += value  # in place: new memory for D × D numbers costs more than the sum
            else:
                a[key] = torch.cat([a[key], value])
        return self._sampled(a)

    def _sampled(self, state: State) -> State:
        from tok1d.eval.distribution import least

        for side in _sides(state):
            rows = {name: state[f"{side}/{name}"] for name in ("keys", "sample", "logits") if f"{side}/{name}" in state}
            state |= {f"{side}/{name}": values for name, values in least(rows, self.sample).items()}
        return state

    def moments(self, state: State, side: str) -> Moments:
        """Of ``real`` or a rate."""
        return Sums(state[f"{side}/n"], state[f"{side}/sum"], state[f"{side}/outer"]).moments()

    def results(self, state: State, rate: str) -> Row:
        from tok1d.eval.frechet import frechet_distance, inception_score, kernel_distance_of_subsets, precision_recall

        if f"{rate}/n" not in state:
            return {}
        fake = self.moments(state, rate)
        real = self.reference if self.reference is not None else self.moments(state, "real")
        row: Row = {"real_images": real.n, "images": fake.n}
        if min(real.n, fake.n) >= 2:
            row[self.net.distance_name] = frechet_distance(real, fake)
        samples = [state.get(f"{side}/sample") for side in ("real", rate)]
        if all(s is not None and len(s) > 10 for s in samples):
            mean, deviation = kernel_distance_of_subsets(samples[0], samples[1], size=min(1000, len(samples[1]) // 2))
            row["kernel_distance"] = {"mean": mean, "deviation": deviation}
            near = precision_recall(samples[0], samples[1], k=3)
            row |= {"precision": near.precision, "recall": near.recall, "density": near.density, "coverage": near.coverage}
        if len(state.get(f"{rate}/logits", ())):
            row["inception_score"] = inception_score(state[f"{rate}/logits"])[0]
        return row


def _sides(state: State) -> list[str]:
    """``real`` and the rates of which features are held."""
    return sorted(key.removesuffix("/keys") for key in state if key.endswith("/keys"))
