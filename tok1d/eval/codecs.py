"""Image codecs at few bytes: JPEG, WebP, AVIF, JPEG XL through Pillow, with the real bytes of real files.

At 256 × 256 pixels tokenizers spend less than a codec's smallest file, so a codec may also shrink the picture first:
:func:`search` finds the best picture within a budget over size and quality. Cost is the whole file; :func:`payload_bytes` says what is
left without the container. Needs Pillow only. Shapes: views are uint8 (H, W, 3).
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, features

SIZES = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256)
QUALITIES = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 17, 20, 24, 28, 32, 36, 40, 45, 50, 55, 60, 65, 70, 75, 80, 85, 90, 95, 100)
OPTIONS: dict[str, dict[str, Any]] = {
    "jpeg": {"format": "JPEG", "optimize": True, "subsampling": "4:2:0"},
    "webp": {"format": "WEBP", "method": 6},
    "avif": {"format": "AVIF", "speed": 2, "subsampling": "4:2:0", "max_threads": 1},
    "jxl": {"format": "JXL", "effort": 9, "num_threads": 1},
}


@dataclass(frozen=True)
class Candidate:
    """One file: its bytes, how it was made, its PSNR at the size of the view, and what decodes from it."""

    bytes: int
    side: int
    quality: int
    psnr: float
    pixels: np.ndarray
    payload: int = 0


def available() -> dict[str, str]:
    """Codecs of this installation: name → empty, or why it is skipped."""
    found = {name: "" if features.check(name) else "this Pillow was built without it" for name in ("webp", "avif")}
    jxl = importlib.util.find_spec("pillow_jxl") is not None
    return {"jpeg": "", **found, "jxl": "" if jxl else "no JPEG XL plugin for Pillow is installed: pip install pillow-jxl-plugin, or 'tok1d[eval]'"}


def settings() -> dict[str, Any]:
    """What the search tries, for the record."""
    return {"sizes": list(SIZES), "qualities": list(QUALITIES), "options": OPTIONS}


def encode(image: Image.Image, codec: str, quality: int) -> bytes:
    """One file without metadata."""
    if codec == "jxl":
        import pillow_jxl  # noqa: F401  registers the format
    out = io.BytesIO()
    exact = {"lossless": True} if codec == "jxl" and quality == 100 else {}  # its encoder takes 100 in no other way
    image.save(out, quality=quality, **OPTIONS[codec], **exact)
    return out.getvalue()


def decode(data: bytes) -> np.ndarray:
    """The picture of a file, uint8 (h, w, 3)."""
    if data[:2] == b"\xff\x0a" or data[4:8] == b"JXL ":
        import pillow_jxl  # noqa: F401  registers the format
    with Image.open(io.BytesIO(data)) as file:
        return np.asarray(file.convert("RGB"))


def at_quality(view: np.ndarray, codec: str, quality: int, side: int | None = None) -> tuple[bytes, np.ndarray]:
    """One file and the picture it holds, at the size of the view.

    Args:
        view: uint8 (H, W, 3).
        codec: a key of :data:`OPTIONS`.
        quality: 0..100.
        side: shrink the longer edge to so many pixels first (bicubic, enlarged back); None keeps the size.
    """
    whole = Image.fromarray(view)
    height, width = view.shape[:2]
    small = whole
    if side is not None and side < max(height, width):
        scale = side / max(height, width)
        small = whole.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)
    data = encode(small, codec, quality)
    back = Image.fromarray(decode(data))
    return data, np.asarray(back if back.size == (width, height) else back.resize((width, height), Image.Resampling.BICUBIC))


def payload_bytes(data: bytes) -> int:
    """Bytes of a file without its container: what a decoder that knew the format beforehand would still need.

    JPEG: without start, end, application and comment segments. WebP: the VP8 data without RIFF and chunk headers. AVIF: the media data
    (``mdat``). JPEG XL: the code stream. Sizes and tables stay counted where they lie inside the data.
    """
    if data[:2] == b"\xff\xd8":
        return len(data) - 4 - sum(length for marker, length in _jpeg_segments(data) if 0xE0 <= marker <= 0xEF or marker == 0xFE)
    if data[:4] == b"RIFF":
        return sum(length for name, length in _chunks(data, 12, "little") if name in (b"VP8 ", b"VP8L", b"ALPH"))
    if data[4:8] in (b"ftyp", b"JXL "):
        wanted = b"mdat" if data[4:8] == b"ftyp" else b"jxlc"
        return sum(length for name, length in _boxes(data) if name in (wanted, b"jxlp"))
    return len(data)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(marker, bytes with the marker) of every segment before the scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        length = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield data[at + 1], length
        at += length


def _chunks(data: bytes, at: int, order: Literal["little", "big"]) -> Iterator[tuple[bytes, int]]:
    """(name, bytes) of RIFF chunks; extended files hold the picture among other chunks."""
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], order)
        yield data[at : at + 4], length
        at += 8 + length + length % 2


def _boxes(data: bytes) -> Iterator[tuple[bytes, int]]:
    """(name, bytes of content) of the outer boxes of an ISO media file."""
    at = 0
    while at + 8 <= len(data):
        length, head = int.from_bytes(data[at : at + 4], "big"), 8
        if length == 1:
            length, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        length = length or len(data) - at
        yield data[at + 4 : at + 8], length - head
        at += max(length, head)


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
                yield Candidate(len(data), side, quality, _psnr(view, pixels), pixels, payload_bytes(data))
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
