"""The text measure: words cut from every picture, read together across images, scored by size of their characters.

Words below the smallest size bin are left out before they are cropped (exact, and most of the work); everything else is a row with a status.
Originals are read too: they are the ceiling, and say which words this recogniser can read at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from tok1d.eval.binned import Bins
from tok1d.eval.bootstrap import clustered_intervals
from tok1d.eval.gallery import Crops
from tok1d.eval.manifest import Sample, Word
from tok1d.eval.measures import Batch, Measure, Row, State
from tok1d.eval.ocr import Recogniser
from tok1d.eval.systems import Pictures, Rate
from tok1d.eval.text import SCORES, VARIANTS, ChanceFloor, text_scores
from tok1d.eval.view import restore
from tok1d.eval.words import OK, OUTSIDE_IMAGE, UNREADABLE_IMAGE, WordPool, crop_word, word_status

ORIGINAL = "original"
OUTSIDE_VIEW = "outside_view"
_Original = Rate(ORIGINAL)


class Text(Measure):
    """T-ACC and T-NED by size bin, with the chance floor, intervals clustered by image, and the ceiling of the originals.

    Args:
        recogniser: see :class:`tok1d.eval.ocr.Recogniser`.
        bins: by relative size of a character.
        pool: crops read at once.
    """

    name, table = "text", "words"

    def __init__(self, recogniser: Recogniser, bins: Bins, pool: int = 512) -> None:
        self.recogniser, self.bins = recogniser, bins
        self._pool: WordPool[Row] = WordPool(recogniser, pool)
        self._rows: list[Row] = []
        self._crops = Crops(self.name)  # a few, for the report

    def describe(self) -> dict[str, Any]:
        return {"recogniser": self.recogniser.id, "bins": self.bins.name}

    def originals(self, batch: Batch) -> None:
        pictures = Pictures(_Original, batch.views, [], [], [OK] * len(batch.views))
        self._read(batch, pictures)

    def pictures(self, batch: Batch, pictures: Pictures) -> dict[str, list[float | None]]:
        self._read(batch, pictures)
        return {}

    def missing(self, sample: Sample, rates: Sequence[str]) -> None:
        for rate in (ORIGINAL, *rates):
            self._rows += [_row(sample, rate, n, w, UNREADABLE_IMAGE) for n, w in self._wanted(sample)]

    def _wanted(self, sample: Sample) -> list[tuple[int, Word]]:
        return [(n, w) for n, w in enumerate(sample.words) if self.bins.index(w.scale) >= 0]

    def _read(self, batch: Batch, pictures: Pictures) -> None:
        for i, sample in enumerate(batch.samples):
            words = self._wanted(sample)
            if not words:
                continue
            original = batch.protocol.space == "original"
            image = pictures.images[i]
            if original and pictures.status[i] == OK:
                image = batch.images[i] if pictures.rate is _Original else restore(image, batch.geometry[i], batch.protocol)
            for number, word in words:
                row = _row(sample, pictures.rate.name, number, word, pictures.status[i])
                if row["status"] == OK:
                    row["status"] = word_status(word.value, self.recogniser.charset)
                crop = None
                if row["status"] == OK:
                    crop, row["status"] = _crop(image, word, None if original else batch, i)
                if crop is None:
                    self._rows.append(row)
                else:
                    label = self.bins.labels[self.bins.index(word.scale)]
                    self._crops.keep(pictures.rate.name, label, sample.id, number, torch.from_numpy(crop).permute(2, 0, 1))
                    self._take(self._pool.add(row, crop))

    def _take(self, readings: Sequence[Any]) -> None:
        for reading in readings:
            self._rows.append({**reading.payload, "read": reading.text, "confidence": round(reading.confidence, 6)})

    def flush(self) -> list[Row]:
        self._take(self._pool.flush())
        rows, self._rows = self._rows, []
        return sorted(rows, key=lambda r: (r["id"], r["rate"], r["word"]))

    def state(self) -> State:
        return self._crops.state()

    def add(self, a: State, b: State) -> State:
        return self._crops.add(a, b)

    def instances(self, rows: Sequence[Row], rate: str) -> Row:
        ceiling = [r for r in rows if r["rate"] == ORIGINAL]
        own = sorted((r for r in rows if r["rate"] == rate), key=lambda r: (r["id"], r["word"]))
        readable = {(r["id"], r["word"]) for r in ceiling if r["read"] == r["truth"]}
        if not own:
            return {}
        return {
            "words": len(own),
            "statuses": dict(Counter(r["status"] for r in own).most_common()),
            "all": self._table(own),
            "recognisable": self._table([r for r in own if (r["id"], r["word"]) in readable]),
            "ceiling": self._table(sorted(ceiling, key=lambda r: (r["id"], r["word"])), floor=False),
        }

    def _table(self, rows: Sequence[Row], floor: bool = True) -> Row:
        """Scores of the words that were read; ``n`` says how many."""
        rows = [r for r in rows if r["status"] == OK]
        truths, reads, scales = ([r[k] for r in rows] for k in ("truth", "read", "scale"))
        found: Row = {"n": len(rows), "images": len({r["id"] for r in rows})}
        for score in SCORES:
            for variant in VARIANTS:
                values = text_scores(truths, reads, score, variant).numpy()
                intervals = clustered_intervals(values, scales, [r["id"] for r in rows], self.bins)
                found[f"t_{score}_{variant}"] = {k: vars(v) for k, v in intervals.items()}
        if floor and rows:
            for score in SCORES:
                metric = ChanceFloor(self.bins, score)
                metric.update([f"{r['id']}/{r['word']}" for r in rows], truths, reads, scales)
                chance = metric.compute()
                found[f"chance_{score}"] = {**dict(zip(chance.labels, chance.mean)), "macro": chance.macro, "micro": chance.micro}
        return found


def _row(sample: Sample, rate: str, number: int, word: Word, status: str) -> Row:
    return {
        "id": sample.id, "rate": rate, "word": number, "truth": word.value, "scale": word.scale, "group": sample.group,
        "status": status, "read": None, "confidence": None,
    }  # fmt: skip


def _crop(image: torch.Tensor, word: Word, batch: Batch | None, i: int) -> tuple[Any, str]:
    """A word of a picture: of the original size, or of the view if a batch is given."""
    if batch is None:
        return crop_word(image, word.box, word.poly)
    geometry = batch.geometry[i]
    slanted = word.poly is not None and len(word.poly) == 4
    corners = torch.tensor(word.poly if slanted else (word.box[:2], word.box[2:]), dtype=torch.float64)
    edge = corners.new_tensor([geometry.width, geometry.height])
    if corners.isfinite().all():
        if (corners.amin(0) >= edge).any() or (corners.amax(0) <= 0).any():
            return None, OUTSIDE_IMAGE
        # What lies beyond the image's edge is cut off, as it is in the original; what the view cut off cannot be judged.
        if not geometry.shows(corners.clamp(min=0).minimum(edge)):
            return None, OUTSIDE_VIEW
    left, top, right, bottom = geometry.inner
    origin = corners.new_tensor([left, top])
    box = (geometry.to_view(corners.new_tensor(word.box).reshape(2, 2)) - origin).flatten().tolist()
    poly = (geometry.to_view(corners) - origin).tolist() if slanted else None
    return crop_word(image[:, top:bottom, left:right], box, poly)
