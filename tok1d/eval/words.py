"""Words out of images and into a recogniser: crops, a pool across images, and the choice of words that can be read at all.

Nothing is dropped silently: a word that cannot be cropped or read gets a status. Crops are uint8 (h, w, 3) numpy arrays,
images uint8 (3, H, W) tensors, coordinates continuous pixels (the first pixel covers 0 to 1).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tok1d.errors import ImageError, TokError
from tok1d.eval.text import text_scores

if TYPE_CHECKING:
    from tok1d.eval.manifest import Manifest, Sample, Word
    from tok1d.eval.ocr import Recogniser

Crop = NDArray[np.uint8]
Payload = TypeVar("Payload")

OK = "ok"
BAD_BOX = "bad_box"  # empty, not finite, or corners that are not a clockwise convex quadrilateral
OUTSIDE_IMAGE = "outside_image"
OUTSIDE_ALPHABET = "outside_alphabet"  # the recogniser could never read it right
NO_TEXT = "no_text"  # the truth is empty
MISREAD = "misread"  # refine only: read wrongly on the original
UNREADABLE_IMAGE = "unreadable_image"  # refine only: missing or damaged


def crop_word(image: Tensor, box: Sequence[float], poly: Sequence[Sequence[float]] | None = None) -> tuple[Crop | None, str]:
    """Cut one word out.

    Args:
        image: uint8 (3, H, W).
        box: (x0, y0, x1, y1); rounded outwards to whole pixels and clipped to the image.
        poly: four corners, clockwise from the upper left of the text: the word is warped upright, with the border's pixels
            repeated outside of the image. Outlines of more corners (curved text) use the box, as TokBench does.

    Returns:
        A copy, uint8 (h, w, 3), and ``ok``; or None and why not: ``bad_box`` or ``outside_image``.
    """
    height, width = image.shape[-2:]
    if poly is not None and len(poly) == 4:
        return _warp(image, np.asarray(poly, np.float64))
    if not all(map(math.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3]:
        return None, BAD_BOX
    x0, y0 = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
    x1, y1 = min(width, math.ceil(box[2])), min(height, math.ceil(box[3]))
    if x0 >= x1 or y0 >= y1:
        return None, OUTSIDE_IMAGE
    return _pixels(image[:, y0:y1, x0:x1]), OK


def word_status(value: str, charset: frozenset[str] | None) -> str:
    """``ok``, ``no_text``, or ``outside_alphabet`` if the recogniser cannot write a character of ``value``."""
    if not value:
        return NO_TEXT
    return OK if charset is None or charset.issuperset(value) else OUTSIDE_ALPHABET


def _warp(image: Tensor, corners_42: NDArray[np.float64]) -> tuple[Crop | None, str]:
    """The quadrilateral as an upright rectangle of its mean width and height."""
    height, width = image.shape[-2:]
    if not np.isfinite(corners_42).all():
        return None, BAD_BOX
    sides = np.roll(corners_42, -1, 0) - corners_42
    turns = sides[:, 0] * np.roll(sides[:, 1], -1) - sides[:, 1] * np.roll(sides[:, 0], -1)
    lengths = np.hypot(*sides.T)
    columns, rows = (max(1, round(float(lengths[i::2].mean()))) for i in (0, 1))
    # Every turn to the right: clockwise and convex, else the text would come out mirrored or folded.
    if (turns <= 0).any() or columns > 4 * (width + height) or rows > 4 * (width + height):
        return None, BAD_BOX
    low, high = np.floor(corners_42.min(0)).astype(int), np.ceil(corners_42.max(0)).astype(int)
    x0, y0, x1, y1 = max(0, low[0] - 1), max(0, low[1] - 1), min(width, high[0] + 1), min(height, high[1] + 1)
    if low[0] >= width or low[1] >= height or high[0] <= 0 or high[1] <= 0:
        return None, OUTSIDE_IMAGE
    part = image[:, y0:y1, x0:x1].float()[None]
    h_33 = homography(np.array([(0, 0), (columns, 0), (columns, rows), (0, rows)], np.float64), corners_42 - (x0, y0))
    v, u = np.mgrid[0:rows, 0:columns] + 0.5  # centres of the pixels
    x, y, z = np.tensordot(h_33, np.stack([u, v, np.ones_like(u)]), 1)
    grid = np.stack([2 * x / z / (x1 - x0) - 1, 2 * y / z / (y1 - y0) - 1], -1)
    warped = torch.nn.functional.grid_sample(
        part, torch.from_numpy(grid).to(part)[None], mode="bilinear", padding_mode="border", align_corners=False
    )
    return _pixels(warped[0].round().clamp(0, 255).byte()), OK


def homography(source_42: NDArray[np.float64], target_42: NDArray[np.float64]) -> NDArray[np.float64]:
    """The 3 × 3 projective map that takes four points to four others (no three on a line)."""
    rows, right = [], []
    for (u, v), (x, y) in zip(source_42, target_42):
        rows += [[u, v, 1, 0, 0, 0, -x * u, -x * v], [0, 0, 0, u, v, 1, -y * u, -y * v]]
        right += [x, y]
    return np.append(np.linalg.solve(np.array(rows), np.array(right)), 1.0).reshape(3, 3)


def _pixels(part: Tensor) -> Crop:
    # A copy: a view would keep the whole image in memory while the word waits in the pool.
    return np.array(part.permute(1, 2, 0).cpu().numpy(), order="C")


@dataclass(frozen=True)
class Reading(Generic[Payload]):
    """What was read in one crop, and whatever was handed in with it.

    Attributes:
        payload: as given.
        text: the reading.
        confidence: the backend's own, in [0, 1].
    """

    payload: Payload
    text: str
    confidence: float


class WordPool(Generic[Payload]):
    """Collects crops across images and has them read together; readings come back in the order they were put in.

    Args:
        recogniser: see :class:`tok1d.eval.ocr.Recogniser`.
        size: crops read at once.
        max_bytes: of waiting crops; a few large crops are read before ``size`` is reached. Backends read a crop alike in
            any company, so neither number changes a result.

    Example::

        pool = WordPool(recogniser)
        for word in words:
            for reading in pool.add(word, crop):    # mostly none, now and then 512
                write(reading)
        for reading in pool.flush():
            write(reading)
    """

    def __init__(self, recogniser: Recogniser, size: int = 512, max_bytes: int = 64 << 20) -> None:
        if size < 1:
            raise TokError(f"a pool of words needs room for at least one, got size={size}")
        self.recogniser, self.size, self.max_bytes = recogniser, size, max_bytes
        self._waiting: list[tuple[Payload, Crop]] = []
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, payload: Payload, crop: Crop) -> list[Reading[Payload]]:
        """Put in uint8 (h, w, 3); readings of all that waited if that filled the pool, else none."""
        self._waiting.append((payload, crop))
        self._bytes += crop.nbytes
        return self.flush() if len(self) >= self.size or self._bytes >= self.max_bytes else []

    def flush(self) -> list[Reading[Payload]]:
        """Readings of all that waits; the pool is empty afterwards."""
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if not waiting:
            return []
        read = self.recogniser.recognise([crop for _, crop in waiting])
        if len(read) != len(waiting):
            raise TokError(f"the recogniser {self.recogniser.id} was given {len(waiting)} crops and returned {len(read)} readings")
        return [Reading(payload, text, confidence) for (payload, _), (text, confidence) in zip(waiting, read)]


@dataclass(frozen=True)
class WordRow:
    """What became of one word of a manifest: its sample, place there, truth, reading (None if not read) and status."""

    sample: str
    index: int
    value: str
    text: str | None
    confidence: float
    status: str


@dataclass(frozen=True)
class Refined:
    """Attributes:
    manifest: only words that the recogniser reads right on the originals, and samples that hold a word or a face.
    rows: one a word of the old manifest, in its order; those with status ``ok`` were kept.
    counts: words by status, and ``samples_left_out``.
    """

    manifest: Manifest
    rows: list[WordRow]
    counts: dict[str, int]


def refine(manifest: Manifest, recogniser: Recogniser, variant: str = "raw") -> Refined:
    """Keep the words that ``recogniser`` reads right on the originals, so that 100 % is what a perfect system scores.

    Scores on such words belong to this recogniser: the new manifest's version names it. The variant says what is right, see
    :func:`tok1d.eval.text.normalise`.
    """
    pool: WordPool[tuple[Sample, int, Word]] = WordPool(recogniser)
    rows: list[WordRow] = []

    def note(readings: list[Reading[tuple[Sample, int, Word]]]) -> None:
        for reading in readings:
            sample, index, word = reading.payload
            right = bool(text_scores([word.value], [reading.text], "acc", variant) == 1)
            rows.append(WordRow(sample.id, index, word.value, reading.text, reading.confidence, OK if right else MISREAD))

    for sample in manifest.samples:
        if not sample.words:
            continue
        try:
            image = manifest.read(sample)
        except ImageError:
            image = None
        for index, word in enumerate(sample.words):
            status = word_status(word.value, recogniser.charset) if image is not None else UNREADABLE_IMAGE
            crop = None
            if image is not None and status == OK:
                crop, status = crop_word(image, word.box, word.poly)
            if crop is None:
                rows.append(WordRow(sample.id, index, word.value, None, 0.0, status))
            else:
                note(pool.add((sample, index, word), crop))
    note(pool.flush())

    order = {sample.id: i for i, sample in enumerate(manifest.samples)}
    rows.sort(key=lambda row: (order[row.sample], row.index))
    kept = {(row.sample, row.index) for row in rows if row.status == OK}
    samples = [replace(s, words=tuple(w for i, w in enumerate(s.words) if (s.id, i) in kept)) for s in manifest.samples]
    samples = [s for s in samples if s.words or s.faces]
    counts = dict(sorted(Counter(row.status for row in rows).items())) | {"samples_left_out": len(manifest) - len(samples)}
    made = replace(manifest, samples=tuple(samples), version=f"{manifest.version}, words that {recogniser.id} reads ({variant})")
    return Refined(made, rows, counts)
