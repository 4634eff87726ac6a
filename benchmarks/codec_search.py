"""The best picture an image codec can put in a file of few bytes: a search over size and quality. Needs Pillow only.

A candidate is the view shrunk to s × s, encoded at one quality without metadata, decoded and enlarged back (both
bicubic). Its cost is the whole file, container included.

Shapes: views are uint8 (H, W, 3).
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, features

SIZES = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256)
QUALITIES = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 17, 20, 24, 28, 32, 36, 40, 45, 50, 55, 60, 65, 70, 75, 80, 85, 90, 95, 100)
OPTIONS: dict[str, dict[str, Any]] = {
    "jpeg": {"format": "JPEG", "optimize": True, "subsampling": "4:2:0"},
    "webp": {"format": "WEBP", "method": 6},
    "avif": {"format": "AVIF", "speed": 2, "subsampling": "4:2:0", "max_threads": 1},
    "jxl": {"format": "JXL", "effort": 9},
}


@dataclass(frozen=True)
class Candidate:
    """One file: its bytes, how it was made, its PSNR at the size of the view, and what decodes from it."""

    bytes: int
    side: int
    quality: int
    psnr: float
    pixels: np.ndarray


def available() -> dict[str, str]:
    """Codecs of this installation: name → empty, or why it is skipped."""
    found = {name: "" if features.check(name) else "this Pillow was built without it" for name in ("webp", "avif")}
    jxl = importlib.util.find_spec("pillow_jxl") is not None
    return {"jpeg": "", **found, "jxl": "" if jxl else "no JPEG XL plugin for Pillow is installed (pillow-jxl-plugin)"}


def settings() -> dict[str, Any]:
    """What the search tries, for the record."""
    return {"sizes": list(SIZES), "qualities": list(QUALITIES), "options": OPTIONS}


def encode(image: Image.Image, codec: str, quality: int) -> bytes:
    """One file without metadata."""
    if codec == "jxl":
        import pillow_jxl  # noqa: F401  registers the format
    out = io.BytesIO()
    image.save(out, quality=quality, **OPTIONS[codec])
    return out.getvalue()


def candidates(view: np.ndarray, codec: str, limit: int) -> Iterator[Candidate]:
    """Every file of at most ``limit`` bytes: upwards in quality until two in a row are too large, upwards in size until
    two in a row have none that fits."""
    whole, empty = Image.fromarray(view), 0
    for side in SIZES:
        small = whole if side == view.shape[0] else whole.resize((side, side), Image.Resampling.BICUBIC)
        misses, seen = 0, set[bytes]()
        for quality in QUALITIES:
            data = encode(small, codec, quality)
            if len(data) > limit:
                misses += 1
                if misses == 2:
                    break
                continue
            misses = 0
            if data not in seen:
                seen.add(data)
                with Image.open(io.BytesIO(data)) as file:
                    back = file.convert("RGB").resize((view.shape[1], view.shape[0]), Image.Resampling.BICUBIC)
                pixels = np.asarray(back)
                yield Candidate(len(data), side, quality, _psnr(view, pixels), pixels)
        empty = 0 if seen else empty + 1
        if empty == 2:
            return


def search(view: np.ndarray, codec: str, budgets: Sequence[int]) -> dict[int, Candidate | None]:
    """The candidate of the best PSNR within each budget of bytes; None where no file fits.

    Args:
        view: uint8 (H, W, 3), square.
        codec: a key of :data:`OPTIONS`.
        budgets: bytes.
    """
    best: dict[int, Candidate | None] = dict.fromkeys(budgets)
    for one in candidates(view, codec, max(budgets)):
        for budget in budgets:
            held = best[budget]
            if one.bytes <= budget and (held is None or one.psnr > held.psnr):
                best[budget] = one
    return best


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.square(a.astype(np.float32) - b.astype(np.float32)).mean())
    return 100.0 if error < 1e-5 else 10 * math.log10(255**2 / error)
