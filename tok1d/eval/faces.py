"""Face fidelity: faces aligned by five landmarks, embedded across images, and the cosine between each original and its reconstruction.

F-Sim of TokBench (https://arxiv.org/abs/2505.18142): landmarks are given, the same for both pictures; no detector takes part. Originals are
embedded once for all rates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from tok1d.errors import TokError
from tok1d.eval.binned import BinnedMean, Bins
from tok1d.eval.bootstrap import clustered_intervals
from tok1d.eval.face_align import BAD_LANDMARKS, OK, OUTSIDE_IMAGE, align, face_status, similarity_transform
from tok1d.eval.face_nets import Embedder
from tok1d.eval.gallery import Crops
from tok1d.eval.manifest import Face, Sample, landmarks
from tok1d.eval.measures import Batch, Measure, Row, State
from tok1d.eval.systems import Pictures, Rate
from tok1d.eval.text import partners
from tok1d.eval.threads import one_thread
from tok1d.eval.view import restore

__all__ = [
    "BAD_LANDMARKS", "OUTSIDE_IMAGE", "OUTSIDE_VIEW", "UNREADABLE_IMAGE", "FacePool", "FaceSimilarity", "Faces", "align", "face_status", "similarity_transform",
]  # fmt: skip

Payload = TypeVar("Payload")
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

ORIGINAL, OUTSIDE_VIEW, UNREADABLE_IMAGE = "original", "outside_view", "unreadable_image"
_Original = Rate(ORIGINAL)


class FacePool(Generic[Payload]):
    """Collects aligned faces across images and has them embedded together; vectors come back in the order faces were put in.

    Args:
        embedder: see :class:`tok1d.eval.face_nets.Embedder`; it embeds a face alike in any company, so ``size`` changes no result.
        size: faces embedded at once.
    """

    def __init__(self, embedder: Embedder, size: int = 256) -> None:
        if size < 1:
            raise TokError(f"a pool of faces needs room for at least one, got size={size}")
        self.embedder, self.size = embedder, size
        self._waiting: list[tuple[Payload, Tensor]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, payload: Payload, aligned: Tensor) -> list[tuple[Payload, Tensor]]:
        """Put in uint8 (3, 112, 112); what waited with its vectors (D,) if that filled the pool, else nothing."""
        self._waiting.append((payload, aligned))
        return self.flush() if len(self) >= self.size else []

    def flush(self) -> list[tuple[Payload, Tensor]]:
        """All that waits, with its vectors; the pool is empty afterwards."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return []
        vectors = self.embedder.embed(torch.stack([aligned for _, aligned in waiting]))
        if len(vectors) != len(waiting):
            raise TokError(f"the embedder {self.embedder.id} was given {len(waiting)} faces and returned {len(vectors)} vectors")
        return [(payload, vector) for (payload, _), vector in zip(waiting, vectors)]


class FaceSimilarity(BinnedMean):
    """Mean cosine by size of the face, with a histogram for quantiles and the share that passes verification.

    Args:
        bins: by relative size of a face.
        groups: source sets to keep apart.
        threshold: cosine from which two faces count as one person; None counts none.

    Example::

        metric = FaceSimilarity(Bins.named("face-v2-256"), threshold=0.363)
        metric.update(cosines, scales)      # float (n,) twice
        metric.compute().macro, metric.quantiles([0.05, 0.5]), metric.verified()
    """

    def __init__(self, bins: Bins, groups: Sequence[str] = (), threshold: float | None = None) -> None:
        super().__init__(bins, groups)
        self.threshold = threshold
        self.add_state("histogram", torch.zeros(64, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("above", torch.zeros(len(bins) + 2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, scales: Tensor, groups: Sequence[str] | None = None) -> None:
        """Float (n,) cosines in [-1, 1] and relative sizes; histogram and shares are of the faces inside the bins."""
        super().update(values, scales, groups)
        values, cells = values.detach().double().to(self.n.device), self.bins.cells(scales.to(self.n.device))
        known = ~values.isnan() & (cells > 0) & (cells <= len(self.bins))
        places = ((values[known] + 1) * 32).floor().long().clamp(0, 63)
        self.histogram += torch.bincount(places, minlength=64).double()
        if self.threshold is not None:
            self.above += torch.bincount(cells[known & (values >= self.threshold)], minlength=len(self.above)).double()

    def quantiles(self, levels: Sequence[float]) -> list[float]:
        """From the histogram, exact to 1/32; NaN without faces."""
        total = self.histogram.cumsum(0)
        if not total[-1]:
            return [float("nan")] * len(levels)
        found = []
        for level in levels:
            wanted = level * float(total[-1])
            place = min(63, int(torch.searchsorted(total, torch.tensor(max(wanted, 1e-9), dtype=torch.float64, device=total.device))))
            count = float(self.histogram[place])
            found.append((place + (wanted - float(total[place]) + count) / count) / 32 - 1)
        return found

    def verified(self) -> list[float]:
        """Share of each bin at or above the threshold, NaN for an empty bin."""
        share: list[float] = (self.above / self.n.sum(0))[1:-1].tolist()
        return share


class Faces(Measure):
    """F-Sim by size bin with intervals clustered by image, quantiles, the share that passes verification, and two landmarks of the scale: what
    the faces of two people score (``chance``) and, where the manifest says who is who, two photos of one person (``two_photos``).

    Originals against themselves score 1 by construction. Chance pairs each reconstruction with the original of another face of its
    bin and its chunk of 64 images, chosen by a hash of their ids.

    Args:
        embedder: see :class:`tok1d.eval.face_nets.Embedder`.
        bins: by relative size of a face.
        pool: faces embedded at once.
        device: where faces are aligned.
    """

    name, table = "faces", "faces"

    def __init__(self, embedder: Embedder, bins: Bins, pool: int = 256, device: str | torch.device = "cpu") -> None:
        self.embedder, self.bins, self.device = embedder, bins, torch.device(device)
        self._pool: FacePool[Row] = FacePool(embedder, pool)
        self._rows: list[tuple[Row, Tensor | None]] = []
        self._crops = Crops(self.name, each=6, height=64, width=64)  # a few, for the report

    def describe(self) -> dict[str, Any]:
        return {"embedder": self.embedder.id, "licence": self.embedder.licence, "threshold": self.embedder.threshold, "bins": self.bins.name}

    def originals(self, batch: Batch) -> None:
        self._embed(batch, Pictures(_Original, batch.views, [], [], [OK] * len(batch.views)))

    def pictures(self, batch: Batch, pictures: Pictures) -> dict[str, list[float | None]]:
        self._embed(batch, pictures)
        return {}

    def missing(self, sample: Sample, rates: Sequence[str]) -> None:
        for rate in (ORIGINAL, *rates):
            self._rows += [(_row(sample, rate, n, f, UNREADABLE_IMAGE), None) for n, f in self._wanted(sample)]

    def _wanted(self, sample: Sample) -> list[tuple[int, Face]]:
        return [(n, f) for n, f in enumerate(sample.faces) if self.bins.index(f.scale) >= 0]

    def _embed(self, batch: Batch, pictures: Pictures) -> None:
        whole = batch.protocol.space == "original"
        rows: list[Row] = []
        points: list[Tensor] = []
        places: list[int] = []
        for i, sample in enumerate(batch.samples):
            first = len(rows)
            for number, face in self._wanted(sample):
                kps = landmarks([face])[0].double()
                row = _row(sample, pictures.rate.name, number, face, pictures.status[i])
                if row["status"] == OK:
                    row["status"] = face_status(kps, *batch.images[i].shape[-2:])
                if row["status"] == OK and not whole:
                    row["status"] = OK if batch.geometry[i].shows(kps) else OUTSIDE_VIEW
                    kps = batch.geometry[i].to_view(kps + 0.5) - 0.5  # geometry counts from corners of pixels
                if row["status"] == OK:
                    rows.append(row)
                    points.append(kps)
                    places.append(i)
                else:
                    self._rows.append((row, None))
            if whole and len(rows) > first:
                image = batch.images[i] if pictures.rate is _Original else restore(pictures.images[i], batch.geometry[i], batch.protocol)
                self._add(rows[first:], self._align(image, points[first:], None))
        if rows and not whole:
            self._add(rows, self._align(pictures.images, points, places))

    def _align(self, images: Tensor, points: Sequence[Tensor], places: Sequence[int] | None) -> Tensor:
        with one_thread():  # a few faces are warped sooner than other threads wake up
            return align(images.to(self.device), torch.stack(list(points)), places).cpu()

    def _add(self, rows: Sequence[Row], aligned: Tensor) -> None:
        for row, face in zip(rows, aligned):
            self._crops.keep(row["rate"], self.bins.labels[self.bins.index(row["scale"])], row["id"], row["face"], face)
            self._rows += self._pool.add(row, face.clone())  # a view would keep the whole batch in memory

    def flush(self) -> list[Row]:
        self._rows += self._pool.flush()
        held, self._rows = sorted(self._rows, key=lambda r: (r[0]["id"], r[0]["rate"], r[0]["face"])), []
        original = {(r["id"], r["face"]): v for r, v in held if v is not None and r["rate"] == ORIGINAL}
        known = [r for r, v in held if v is not None and r["rate"] == ORIGINAL]
        chosen = partners([f"{r['id']}/{r['face']}" for r in known], [self.bins.index(r["scale"]) for r in known])
        pairs = [(r, known[j]) for r, j in zip(known, chosen)]
        stranger = {(r["id"], r["face"]): other for r, other in pairs if other is not r and not _same(r, other)}
        before: dict[str, Row] = {}
        for row, vector in held:
            key = (row["id"], row["face"])
            if vector is None or key not in original:
                continue
            other = stranger.get(key)
            if other is not None:
                row["chance"] = _cosine(original[other["id"], other["face"]], vector)
            if row["rate"] != ORIGINAL:
                row["similarity"] = _cosine(original[key], vector)
            elif row["person"]:
                twin = before.get(row["person"])
                if twin is not None and twin["id"] != row["id"]:
                    row["two_photos"] = _cosine(original[twin["id"], twin["face"]], vector)
                before[row["person"]] = row
        return [row for row, _ in held]

    def state(self) -> State:
        return self._crops.state()

    def add(self, a: State, b: State) -> State:
        return self._crops.add(a, b)

    def instances(self, rows: Sequence[Row], rate: str) -> Row:
        own = sorted((r for r in rows if r["rate"] == rate), key=lambda r: (r["id"], r["face"]))
        if not own:
            return {}
        seen = [r for r in own if r["similarity"] is not None]
        found: Row = {"faces": len(own), "statuses": dict(Counter(r["status"] for r in own).most_common()), "n": len(seen)}
        found |= {"images": len({r["id"] for r in seen}), "f_sim": self._table(seen, "similarity"), "chance": self._table(seen, "chance")}
        cosines = np.array([r["similarity"] for r in seen])
        if len(seen):
            found["quantiles"] = {f"{q:g}": float(np.quantile(cosines, q)) for q in QUANTILES}
        if self.embedder.threshold is not None:
            passed = [{**r, "passed": float(r["similarity"] >= self.embedder.threshold)} for r in seen]
            found["verified"] = {"threshold": self.embedder.threshold, **self._table(passed, "passed")}
        groups = sorted({r["group"] for r in seen})
        if len(groups) > 1:
            found["groups"] = {g: self._table([r for r in seen if r["group"] == g], "similarity") for g in groups}
        pairs = [r["two_photos"] for r in rows if r["rate"] == ORIGINAL and r["two_photos"] is not None]
        if pairs:
            found["two_photos"] = {"mean": float(np.mean(pairs)), "n": len(pairs)}
        return found

    def _table(self, rows: Sequence[Row], column: str) -> Row:
        values = [np.nan if r[column] is None else r[column] for r in rows]
        intervals = clustered_intervals(values, [r["scale"] for r in rows], [r["id"] for r in rows], self.bins)
        return {k: vars(v) for k, v in intervals.items()}


def _row(sample: Sample, rate: str, number: int, face: Face, status: str) -> Row:
    return {
        "id": sample.id, "rate": rate, "face": number, "similarity": None, "scale": face.scale, "status": status, "group": sample.group,
        "person": face.person, "chance": None, "two_photos": None,
    }  # fmt: skip


def _same(a: Row, b: Row) -> bool:
    """Whether two rows are known to show one person."""
    return bool(a["person"]) and a["person"] == b["person"]


def _cosine(a: Tensor, b: Tensor) -> float:
    return round(float((a.double() * b.double()).sum()), 6)
