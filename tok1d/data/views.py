"""Views: which window of an image is served at which size, and where boxes go with it.

A view is a :class:`Window` in whole pixels of the image, brought to its size by antialiased bicubic interpolation. Random ones follow
from a generator; named ones (``centre``, ``flip``, the ten crops) from the image's size alone, and can be stored and cut again exactly.

Shapes: images are uint8 (H, W, 3), views uint8 (3, *size), points float32 (M, K, 2) as (x, y). Sizes are (height, width).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tok1d.errors import UsageError

Size = tuple[int, int]
TEN_CROP_SCALE = 1.1  # as LlamaGen caches codes (https://arxiv.org/abs/2406.06525): crops of a square 1.1 times as large
CORNERS = {"middle": (0.5, 0.5), "top-left": (0.0, 0.0), "top-right": (0.0, 1.0), "bottom-left": (1.0, 0.0), "bottom-right": (1.0, 1.0)}
FACE_MIRRORED = (1, 0, 2, 4, 3)  # eyes and corners of the mouth change sides


class Window(NamedTuple):
    """A rectangle of an image, mirrored or not."""

    top: int
    left: int
    height: int
    width: int
    mirror: bool = False


def centre(image: Size, size: Size) -> Window:
    """The largest centred window with the shape of ``size``: the field's evaluation view.

    Example:
        >>> centre((40, 100), (16, 16))
        Window(top=0, left=30, height=40, width=40, mirror=False)
    """
    h, w = _largest(image, size)
    return Window((image[0] - h) // 2, (image[1] - w) // 2, h, w)


def random_crop(image: Size, size: Size, area: tuple[float, float], rng: np.random.Generator, mirror: bool = True) -> Window:
    """A window holding a random share (``area``) of the largest one, anywhere, mirrored half the time."""
    h, w = _largest(image, size)
    share = float(np.sqrt(rng.uniform(*area)))
    return _anywhere(image, (max(1, round(share * h)), max(1, round(share * w))), rng, mirror)


def random_window(image: Size, size: Size, rng: np.random.Generator, mirror: bool = True) -> Window:
    """A window of exactly ``size`` pixels, so nothing is resized; the largest one where the image is smaller."""
    h, w = _largest(image, size)
    return _anywhere(image, (min(h, size[0]), min(w, size[1])), rng, mirror)


def _largest(image: Size, size: Size) -> Size:
    scale = min(image[0] / size[0], image[1] / size[1])
    return max(1, min(image[0], round(size[0] * scale))), max(1, min(image[1], round(size[1] * scale)))


def _anywhere(image: Size, window: Size, rng: np.random.Generator, mirror: bool) -> Window:
    top, left = int(rng.integers(0, image[0] - window[0] + 1)), int(rng.integers(0, image[1] - window[1] + 1))
    return Window(top, left, *window, bool(rng.random() < 0.5) and mirror)


def view_names(views: str) -> list[str]:
    """Names of the views of every image: ``centre``, ``flip`` (centre and its mirror image), ``ten-crop``, or ``N`` (random crops).

    Raises:
        UsageError: something else.

    Example:
        >>> view_names("flip"), view_names("2")
        (['centre', 'centre-flip'], ['random-0', 'random-1'])
    """
    if views.isdecimal() and 0 < int(views) <= 1000:
        return [f"random-{i}" for i in range(int(views))]
    if views not in ("centre", "flip", "ten-crop"):
        raise UsageError(f"views are centre, flip, ten-crop or a number of random crops from 1 to 1000, got {views!r}")
    names = list(CORNERS) if views == "ten-crop" else ["centre"]
    return names if views == "centre" else [*names, *(f"{name}-flip" for name in names)]


def named_view(name: str, image: Size, size: Size, *, key: str = "", seed: int = 0, area: tuple[float, float] = (0.35, 1.0)) -> Window:
    """The window of a named view; those of random crops follow from seed, key and number.

    Example:
        >>> named_view("bottom-right-flip", (220, 330), (100, 100))
        Window(top=20, left=75, height=200, width=200, mirror=True)
    """
    kind, _, number = name.partition("-")
    if kind == "random":
        digest = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "little")
        return random_crop(image, size, area, np.random.default_rng((seed, digest, int(number))))
    plain = name.removesuffix("-flip")
    whole = centre(image, size)
    if plain != "centre":
        h, w = max(1, round(whole.height / TEN_CROP_SCALE)), max(1, round(whole.width / TEN_CROP_SCALE))
        down, right = CORNERS[plain]
        whole = Window(whole.top + round(down * (whole.height - h)), whole.left + round(right * (whole.width - w)), h, w)
    return whole._replace(mirror=name != plain)


def cut(image: NDArray[np.uint8], window: Window, size: Size) -> Tensor:
    """The view of an image (H, W, 3): uint8 (3, *size)."""
    top, left, h, w, mirror = window
    x = torch.from_numpy(np.ascontiguousarray(image[top : top + h, left : left + w])).permute(2, 0, 1)[None]
    if (h, w) != tuple(size):
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True)
    return (x.flip(3) if mirror else x)[0].contiguous()


def carry(points: Tensor, window: Window, size: Size) -> tuple[Tensor, Tensor]:
    """Points of an image → points of its view, and which rows lie wholly inside it.

    Coordinates are continuous: the image's left edge is x = 0, its right edge x = width.

    Args:
        points: float32 (M, K, 2).
        window, size: of the view.

    Returns:
        Float32 (M, K, 2) and bool (M,).
    """
    scale = torch.tensor([size[1] / window.width, size[0] / window.height])
    moved = (points - torch.tensor([float(window.left), float(window.top)])) * scale
    if window.mirror:
        moved[..., 0] = size[1] - moved[..., 0]
    edge = torch.tensor([float(size[1]), float(size[0])])
    return moved, ((moved >= -1e-3) & (moved <= edge + 1e-3)).flatten(1).all(1)
