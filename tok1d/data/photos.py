"""Photos with random access: folders, shards and manifests of :mod:`tok1d.data.index` as samples of a training or validation set.

The order of a run is a pure function of seed and step, so an interrupted run continues with exactly the samples it would have seen.
Small sets can be kept decoded in memory. A broken image is counted, named once and left out of its batch, which then is smaller;
nothing takes its place unless the whole batch is broken.

Shapes: images are uint8, (H, W, 3) as read. A sample is a dict with ``image``, uint8 (3, size, size), ``key`` and what the set has
beside them (:mod:`tok1d.data.batches`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tok1d.data.batches import collate, make_sample
from tok1d.data.facts import Facts, check_names, class_names, fields_of, label_of, read_facts
from tok1d.data.index import SUFFIXES, Sample, index_images, read_sample
from tok1d.data.views import Window, centre, cut, random_crop, random_window
from tok1d.errors import ImageError, UsageError
from tok1d.image_io import read_uint8

__all__ = ["SUFFIXES", "Photos", "Sample", "Views", "centre_crop", "decode_rgb", "index_images", "random_resized_crop", "read_sample"]
log = logging.getLogger(__name__)
VIEWS = ("crop", "window", "centre")


def decode_rgb(data: bytes) -> NDArray[np.uint8]:
    """Encoded image → uint8 (H, W, 3), as :func:`tok1d.read` sees it (orientation, white behind alpha, first frame).

    Raises:
        ImageError: not an image, damaged, or not representable.
    """
    return read_uint8(data, frame=0)[0].permute(1, 2, 0).numpy()


def centre_crop(image: NDArray[np.uint8], size: int) -> Tensor:
    """Shorter edge to ``size`` (bicubic, antialias), centre crop: the field's evaluation view, uint8 (3, size, size)."""
    return cut(image, centre(image.shape[:2], (size, size)), (size, size))


def random_resized_crop(image: NDArray[np.uint8], size: int, area: tuple[float, float], rng: np.random.Generator) -> Tensor:
    """Square crop holding a random share (``area``) of the largest square, mirrored half the time: uint8 (3, size, size)."""
    return cut(image, random_crop(image.shape[:2], (size, size), area, rng), (size, size))


class Views:
    """How samples become views: size, kind of window, randomness, fields and classes.

    Args:
        size: side of the square views.
        area: share of the largest square that a random crop holds; None for the centre.
        seed: with the draw number it decides every view.
        kind: ``crop`` (a random share, resized), ``window`` (a random square of ``size`` pixels as they are) or ``centre``.
        mirror: mirror half of the views; never those of images with words.
        fields: which of ``label``, ``text``, ``words``, ``faces`` the samples get.
        classes: names in the order of their numbers, for data with class names.

    Raises:
        UsageError: another kind.
    """

    def __init__(
        self, size: int, area: tuple[float, float] | None = None, seed: int = 0, kind: str = "crop", mirror: bool = True,
        fields: tuple[str, ...] = (), classes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        if kind not in VIEWS:
            raise UsageError(f"data.view is one of {', '.join(VIEWS)}, got {kind!r}")
        self.size, self.area, self.seed, self.mirror, self.fields = (size, size), area, seed, mirror, fields
        self.kind = "centre" if area is None else kind
        self.places = {name: number for number, name in enumerate(classes)}

    def window(self, image: NDArray[np.uint8], facts: Facts, draw: int) -> Window:
        """The window of a draw."""
        shape = (image.shape[0], image.shape[1])
        if self.kind == "centre" or self.area is None:
            return centre(shape, self.size)
        rng, mirror = np.random.default_rng((self.seed, draw)), self.mirror and not facts.words
        if self.kind == "window":
            return random_window(shape, self.size, rng, mirror)
        return random_crop(shape, self.size, self.area, rng, mirror)

    def read(self, sample: Sample) -> tuple[NDArray[np.uint8], Facts]:
        """Image uint8 (H, W, 3) and facts, the label a number.

        Raises:
            ImageError, OSError: the image or what belongs to it is damaged or gone.
        """
        facts = read_facts(sample) if self.fields else Facts()
        label = label_of(facts, self.places) if "label" in self.fields else -1
        return decode_rgb(read_sample(sample)), Facts(label, "", facts.texts, facts.words, facts.faces)

    def make(self, key: str, image: NDArray[np.uint8], facts: Facts, draw: int, window: Window | None = None) -> dict[str, Any]:
        """One sample; ``window`` instead of the draw's own."""
        chosen = self.window(image, facts, draw) if window is None else window
        return make_sample(key, image, facts, chosen, self.size, self.fields, None if self.kind == "centre" else draw)


class Photos(Dataset):
    """Random-access photos for training or evaluation.

    Args:
        samples: from :func:`index_images`.
        size: side of the square views.
        area: random-crop share for training; None for the centre crop.
        seed: with the draw number it decides every crop.
        cache: keep decoded images in memory (about 0.2 MB each at 256 pixels).
        view, mirror, classes: as :class:`Views`; classes of the index in sorted order if None.
        target: ``(index, draw) → (window, more)``: the view to serve and tensors that belong to it (cached teacher targets).

    Indexing takes an int (the n-th view, without augmentation randomness) or a pair (sample, draw). A list of them gives a batch
    without its broken images.

    Attributes:
        broken: bool (samples,), True where an image could not be read; shared with loader processes.
        classes: names in the order of their numbers.

    Raises:
        UsageError: the data name classes that ``classes`` lacks.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: int,
        area: tuple[float, float] | None = None,
        seed: int = 0,
        cache: bool = False,
        view: str = "crop",
        mirror: bool = True,
        classes: Sequence[str] | None = None,
        target: Callable[[int, int], tuple[Window, dict[str, Tensor]]] | None = None,
    ) -> None:
        self.samples, self.target = [Sample(*s) for s in samples], target
        self.classes = class_names(self.samples) if classes is None else list(classes)
        check_names(self.samples, self.classes)
        self.views = Views(size, area, seed, view, mirror, fields_of(self.samples), self.classes)
        self.broken = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()
        self._cache: dict[int, tuple[NDArray[np.uint8], Facts]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def fields(self) -> tuple[str, ...]:
        """What samples have beside image and key: of ``label``, ``text``, ``words``, ``faces``."""
        return self.views.fields

    def read(self, index: int) -> tuple[NDArray[np.uint8], Facts]:
        """Image and facts, from memory where they are kept."""
        if self._cache is None:
            return self.views.read(self.samples[index])
        if index not in self._cache:
            self._cache[index] = self.views.read(self.samples[index])
        return self._cache[index]

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """One sample.

        Raises:
            ImageError: it is broken.
        """
        index, draw = index if isinstance(index, tuple) else (index, index)
        if not 0 <= index < len(self.samples):
            raise IndexError(f"{index} of {len(self.samples)} images")
        sample = self.samples[index]
        try:
            if self.broken[index]:
                raise ImageError("broken, as said before")
            image, facts = self.read(index)
        except (OSError, ImageError) as error:
            if not self.broken[index]:
                self.broken[index] = True
                log.warning("skipping %s of %s: %s (%d broken so far)", sample.key, sample.file, error, int(self.broken.sum()))
            raise ImageError(f"{sample.key} of {sample.file}: {error}") from error
        window, more = self.target(index, draw) if self.target else (None, {})
        return {**self.views.make(sample.key, image, facts, draw, window), **more}

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> dict[str, Any]:
        """A batch; if every image of it is broken, the next readable one of the set alone, named in the log."""
        found = [sample for sample in map(self._try, indices) if sample is not None]
        if not found:
            index, draw = indices[-1] if isinstance(indices[-1], tuple) else (indices[-1], indices[-1])
            others = ((index + i) % len(self) for i in range(1, len(self)))
            other = next((s for s in (self._try((i, draw)) for i in others) if s is not None), None)
            if other is None:
                raise ImageError(f"none of the {len(self.samples)} images can be read, {self.samples[0].file} first among them")
            log.warning("a batch held broken images only: %s stands in", other["key"])
            found = [other]
        return collate(found)

    def _try(self, index: int | tuple[int, int]) -> dict[str, Any] | None:
        try:
            return self[index]
        except ImageError:
            return None


def as_they_are(batch: dict[str, Any]) -> dict[str, Any]:
    """``collate_fn`` of data sets that make whole batches."""
    return batch
