"""Differentiable augmentation: the same kind of change to real and reconstructed pictures, so that a discriminator cannot learn the set
by heart. Colour, translation and cutout. Paper: https://arxiv.org/abs/2006.10738.

Chance comes from torch's global generator, which training tasks seed for every batch. Shapes: pictures are float (B, 3, H, W), about [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from tok1d.errors import UsageError


def color(x: Tensor) -> Tensor:
    """Brightness ± 1/4 of the range, then saturation × [0, 2], then contrast × [1/2, 3/2]."""
    brightness, saturation, contrast = torch.rand(3, len(x), 1, 1, 1, device=x.device)
    x = x + (brightness - 0.5) / 2
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    middle = x.mean((1, 2, 3), keepdim=True)
    return middle + (x - middle) * (contrast + 0.5)


def translation(x: Tensor) -> Tensor:
    """Moved by up to an eighth of each side, black outside."""
    rows, inside_rows = _moved(x, x.shape[2])
    columns, inside_columns = _moved(x, x.shape[3])
    index = torch.arange(len(x), device=x.device)[:, None, None]
    inside = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
    return x.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2) * inside


def _moved(x: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Where each row (or column) of each picture comes from, int64 (B, side), and whether that is inside."""
    most = round(side / 8)
    shift = torch.randint(-most, most + 1, (len(x), 1), device=x.device)
    source = torch.arange(side, device=x.device) + shift
    return source.clamp(0, side - 1), (source >= 0) & (source < side)


def cutout(x: Tensor) -> Tensor:
    """A black rectangle of half of each side, its centre anywhere."""
    hidden = [_stripe(x, side) for side in x.shape[2:]]
    return x * ~(hidden[0][:, None, :, None] & hidden[1][:, None, None, :])


def _stripe(x: Tensor, side: int) -> Tensor:
    """Bool (B, side): half a side around a random place."""
    centre = torch.randint(0, side, (len(x), 1), device=x.device)
    start = centre - side // 4
    place = torch.arange(side, device=x.device)
    return (place >= start) & (place < start + side // 2)


AUGMENTATIONS = {"color": color, "translation": translation, "cutout": cutout}


def check_augmentations(names: list[str]) -> list[str]:
    """The names, if all are known.

    Raises:
        UsageError: one is not.
    """
    unknown = [name for name in names if name not in AUGMENTATIONS]
    if unknown:
        raise UsageError(f"augmentations are {', '.join(AUGMENTATIONS)}; got {', '.join(map(str, unknown))}")
    return list(names)


def augment(x: Tensor, names: list[str]) -> Tensor:
    """Float (B, 3, H, W) → the same shape, changed in the ways named, each picture by chance of its own."""
    for name in names:
        x = AUGMENTATIONS[name](x)
    return x
