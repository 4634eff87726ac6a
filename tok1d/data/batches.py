"""A sample becomes a view with what belongs to it; samples become a batch, a plain dict.

    image       uint8 (B, 3, H, W)
    key         list of B names
    label       int64 (B,), -1 = none                         where the data has labels
    text        list of B captions, "" = none                 where it has captions
    word_quads  float32 (M, 4, 2), word_image int64 (M,), word_text list of M      where it has words
    face_points float32 (F, 5, 2), face_image int64 (F,)      where it has landmarks
    codes, latents                                            where a teacher's targets are served with the images

Boxes are in pixels (x, y) of the view, clockwise from the upper left corner, and of the image ``*_image`` of the batch; those not
wholly inside the view are left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tok1d.data.facts import Facts
from tok1d.data.views import FACE_MIRRORED, Size, Window, carry, cut

STACKED = ("image", "codes", "latents", "ids", "bits")


def make_sample(key: str, image: NDArray[np.uint8], facts: Facts, window: Window, size: Size, fields: tuple[str, ...], draw: int | None = None) -> dict[str, Any]:
    """One view with its boxes.

    Args:
        key: name of the image.
        image: uint8 (H, W, 3).
        facts: what belongs to it; its label is a number already.
        window, size: of the view.
        fields: which of ``label``, ``text``, ``words``, ``faces`` the set has.
        draw: chooses among several captions; the first if None.
    """
    sample: dict[str, Any] = {"image": cut(image, window, size), "key": key}
    if "label" in fields:
        sample["label"] = facts.label
    if "text" in fields:
        sample["text"] = choose_text(facts.texts, draw)
    if "words" in fields:
        words = () if window.mirror else facts.words  # mirrored letters are no letters
        quads, inside = carry(torch.tensor([q for q, _ in words], dtype=torch.float32).reshape(-1, 4, 2), window, size)
        sample["words"] = quads[inside], [text for (_, text), keep in zip(words, inside.tolist()) if keep]
    if "faces" in fields:
        points, inside = carry(torch.tensor(facts.faces, dtype=torch.float32).reshape(-1, 5, 2), window, size)
        sample["faces"] = points[inside][:, FACE_MIRRORED] if window.mirror else points[inside]
    return sample


def choose_text(texts: tuple[str, ...], draw: int | None) -> str:
    """One of several captions by a draw number, the first if None, "" of none."""
    if len(texts) < 2 or draw is None:
        return texts[0] if texts else ""
    return texts[int(np.random.default_rng((7, draw)).integers(len(texts)))]


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples of one set → a batch, as above."""
    first = samples[0]
    batch: dict[str, Any] = {name: torch.stack([s[name] for s in samples]) for name in STACKED if name in first}
    batch["key"] = [s["key"] for s in samples]
    if "label" in first:
        batch["label"] = torch.tensor([s["label"] for s in samples])
    if "text" in first:
        batch["text"] = [s["text"] for s in samples]
    if "words" in first:
        batch["word_quads"] = torch.cat([s["words"][0] for s in samples])
        batch["word_text"] = [text for s in samples for text in s["words"][1]]
        batch["word_image"] = _rows([len(s["words"][1]) for s in samples])
    if "faces" in first:
        batch["face_points"] = torch.cat([s["faces"] for s in samples])
        batch["face_image"] = _rows([len(s["faces"]) for s in samples])
    return batch


def _rows(counts: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
