"""Images drawn by formula: a gradient, discs and bars. No files, no network; for tests and debug configurations.

Shapes: a sample is ``image``, uint8 (3, size, size), and ``key``, its number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


class DrawnImages(Dataset):
    """Images computed from their index.

    Args:
        count: how many there are.
        size: pixels along each side.
        seed: another seed, other images.

    Example:
        >>> DrawnImages(4, 32)[0]["image"].shape
        torch.Size([3, 32, 32])
    """

    def __init__(self, count: int, size: int, seed: int = 0) -> None:
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        index = index[0] if isinstance(index, tuple) else index
        if not 0 <= index < self.count:
            raise IndexError(f"{index} of {self.count} images")
        rng = np.random.default_rng((self.seed, index))
        axis = np.linspace(0, 1, self.size, dtype=np.float32)
        y, x = axis[:, None], axis[None]
        a, b, slope = rng.random(3), rng.random(3), rng.random()
        image = a[:, None, None] + (b - a)[:, None, None] * (slope * x + (1 - slope) * y)
        for _ in range(3):
            cx, cy, r, colour = rng.random(), rng.random(), 0.08 + 0.25 * rng.random(), rng.random(3)
            disc = (x - cx) ** 2 + (y - cy) ** 2 < r * r
            bar = (abs(x - cx) < r) & (abs(y - cy) < r / 2)
            image = np.where(disc if rng.random() < 0.5 else bar, colour[:, None, None], image)
        return {"image": torch.from_numpy((image * 255).round().clip(0, 255).astype(np.uint8)), "key": f"{index:06d}"}
