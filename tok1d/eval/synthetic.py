"""Sets drawn by the package, with exact ground truth and without a download: a ladder of text sizes, and schematic faces.

Image ``i`` of a seed is the same however many are drawn. Text is set in the font that Pillow carries, so its pixels are those of one
Pillow version. Images are uint8 (3, size, size).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tok1d.errors import MissingExtraError, TokError, UsageError
from tok1d.eval.drawn_faces import FINER, Person, draw_face
from tok1d.eval.manifest import Face, Manifest, Sample, Word, word

KINDS = ("text", "faces")
LEAST, MOST = 64, 4096  # pixels of an image
STEPS = (4.0, 5.5, 6.5, 7.5, 9.0, 11.0, 14.0, 18.0, 24.0, 32.0, 40.0)  # pixels from one character to the next, at 256 pixels
WORDS = """
the and for you not are his her one our out day man new now old see two way who
hand high home land last life line name next open part play right room school show side small sound spell still study
table think three water where white world young Paper Light River Stone Green Music Bread Clock House Metal North Storm
Garden Market Window Bridge Silver Orange Summer Letter Street Museum Coffee Yellow Ticket Planet Number Pocket
Station Library Kitchen Holiday Picture Journey Mountain Exchange Chemistry Hospital Sandwich Business
EXIT OPEN SALE TAXI STOP CAFE HOTEL METRO FRESH PHONE BANK PARK ROAD TEA BAR SHOP
""".split()  # noqa: SIM905 (a paragraph reads better than a list)
CODES = ("ABDEFGHJKLMNPQRTUVWXY", "abdefghjkmnqrty", "23456789")  # alphabets of random strings, each without what looks alike in it
MARGIN = 0.15  # around the ink, of its height; a recogniser reads half as many words in boxes without any
FACES = (0.14, 0.18, 0.23, 0.28, 0.38, 0.52)  # heights of faces relative to the image, through all bins


def text_ladder(count: int, size: int = 256, seed: int = 0) -> Iterator[tuple[Tensor, Sample]]:
    """The first ``count`` of :func:`text_image`."""
    _check(count, size)
    return (text_image(i, size, seed) for i in range(count))


def face_set(count: int, size: int = 256, seed: int = 0) -> Iterator[tuple[Tensor, Sample]]:
    """The first ``count`` of :func:`face_image`."""
    _check(count, size)
    return (face_image(i, size, seed) for i in range(count))


def text_image(index: int, size: int = 256, seed: int = 0) -> tuple[Tensor, Sample]:
    """Rendered words, half of them random strings; one size of characters an image, the sizes of :data:`STEPS` in turn.

    Args:
        index: of the image in its set.
        size: pixels, square; sizes of characters grow with it.
        seed: of words, colours and places.

    Returns:
        The image and its sample: boxes are those of the ink with :data:`MARGIN` around, scales those of the ink; the tag
        ``step=N`` is the size of characters in pixels at 256.
    """
    rng = np.random.default_rng((seed, 1, index))
    paper, ink = _colours(rng)
    canvas = _background(rng, paper, size, 6.0)
    step = STEPS[index % len(STEPS)]
    words = tuple(_page(rng, canvas, ink, step * size / 256))
    name = f"text-{index:05d}"
    return _uint8(canvas), Sample(name, f"images/{name}.png", size, size, words=words, group="ladder", tags=(f"step={step:g}",))


def face_image(index: int, size: int = 256, seed: int = 0) -> tuple[Tensor, Sample]:
    """Drawn faces, another person each, one to four an image, in the sizes of :data:`FACES` in turn.

    Args:
        index: of the image in its set.
        size: pixels, square.
        seed: of people and places.

    Returns:
        The image and its sample: landmarks and boxes are exact.
    """
    from PIL import Image, ImageDraw

    rng = np.random.default_rng((seed, 2, index))
    share = FACES[index % len(FACES)]
    ground = _uint8(_background(rng, rng.integers(40, 230, 3).astype(np.float64), size, 14.0)).permute(1, 2, 0).contiguous()
    picture = Image.fromarray(ground.numpy()).resize((size * FINER, size * FINER), Image.Resampling.NEAREST)
    canvas = ImageDraw.Draw(picture, "RGBA")
    faces: list[Face] = []
    for cell in _cells(rng, share):
        height = share * size * rng.uniform(0.95, 1.05)
        centre = (np.array(cell) + rng.uniform(-0.03, 0.03, 2)) * size
        face = draw_face(canvas, Person.draw_lots(rng), centre, height, float(rng.uniform(-0.25, 0.25)), size)
        faces.append(replace(face, person=f"{seed}-{index}-{len(faces)}"))
    image = torch.from_numpy(np.array(picture.reduce(FINER))).permute(2, 0, 1).contiguous()
    name = f"face-{index:05d}"
    return image, Sample(name, f"images/{name}.png", size, size, faces=tuple(faces), group="drawn")


def write_set(kind: str, folder: Path, count: int = 200, size: int = 256, seed: int = 0) -> Manifest:
    """Write a set: PNG files, and ``manifest.jsonl`` at the end. A set that was begun is finished, one with fewer images grows.

    Args:
        kind: ``text`` or ``faces``.
        folder: made if missing.
        count, size, seed: see :func:`text_ladder`.

    Raises:
        UsageError: unknown kind, a size out of range, or another set lies in the folder.
    """
    from tok1d.disk import atomic_write
    from tok1d.image_io import to_bytes

    if kind not in KINDS:
        raise UsageError(f"sets of kind {kind!r} are not drawn; there are {', '.join(KINDS)}")
    _check(count, size)
    asked = {"kind": kind, "size": size, "seed": seed, "renderer": _renderer(kind)}
    record = folder / "set.json"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    if record.exists():
        try:
            held = json.loads(record.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise TokError(f"{record}: cannot be read ({error}); remove the folder, or choose another") from error
        if held != asked:
            raise UsageError(f"{folder} holds another set ({held}, asked for {asked}); choose another folder")
    atomic_write(record, (json.dumps(asked) + "\n").encode())
    samples = []
    for image, sample in (text_ladder if kind == "text" else face_set)(count, size, seed):
        path = folder / sample.path
        data = to_bytes(image, ".png")
        if not path.is_file() or path.read_bytes() != data:
            atomic_write(path, data)
        samples.append(sample)
    name = f"{'text-ladder' if kind == 'text' else 'drawn-faces'}-{size}"
    manifest = Manifest(name, folder, tuple(samples), f"1, seed {seed}, {_renderer(kind)}", "drawn by tok1d, no rights reserved")
    manifest.write(folder / "manifest.jsonl")
    return manifest


def _check(count: int, size: int) -> None:
    if not LEAST <= size <= MOST:
        raise UsageError(f"images of a drawn set are {LEAST} to {MOST} pixels wide, got size={size}")
    if count < 1:
        raise UsageError(f"a drawn set needs at least one image, got count={count}")


def _renderer(kind: str) -> str:
    from PIL import __version__

    return f"Pillow {__version__}" if kind == "text" else f"Pillow {__version__.split('.')[0]}"


def _colours(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Paper and ink that differ by 100 to 200 grey levels; every third pair is grey, every third light on dark."""
    grey = np.array([0.299, 0.587, 0.114])
    while True:
        pair = rng.uniform(0, 255, (2, 1 if rng.random() < 1 / 3 else 3)) * np.ones(3)
        levels = pair @ grey
        if 100 <= abs(levels[0] - levels[1]) <= 200:
            light_first = levels[0] > levels[1]
            dark_paper = rng.random() < 1 / 3
            return (pair[1], pair[0]) if light_first == dark_paper else (pair[0], pair[1])


def _background(rng: np.random.Generator, colour: NDArray[np.float64], size: int, depth: float) -> NDArray[np.float64]:
    """A colour with soft patches ``depth`` grey levels deep and a little grain, (size, size, 3)."""
    coarse = torch.from_numpy(rng.normal(0, 1, (1, 1, 7, 7)))
    patches = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)[0, 0].numpy()
    grain = rng.normal(0, 1, (size, size))
    return colour + (patches * depth + grain * 1.5)[..., None]


def _page(rng: np.random.Generator, canvas: NDArray[np.float64], ink: NDArray[np.float64], pitch: float) -> Iterator[Word]:
    """Set up to 15 words in lines, spread over the page; the canvas is painted on."""
    size = len(canvas)
    margin = max(2, round(0.03 * size))
    y, placed = margin + round(rng.uniform(0, 0.5 * pitch)), 0
    while placed < 15:
        x, tallest = margin + round(rng.uniform(0, max(1.5 * pitch, 0.1 * size))), 0
        while placed < 15:
            room = int((size - margin - x) / pitch * 0.98)
            if room < 3:
                break
            value = _value(rng, room)
            mask, width, height = _ink(value, pitch)
            rows, columns = mask.shape
            if x + columns > size - margin or y + rows > size - margin:
                break
            part = canvas[y : y + rows, x : x + columns]
            part += (ink - part) * mask[..., None]
            around = MARGIN * height
            box = (max(0.0, x - around), max(0.0, y - around), min(float(size), x + width + around), min(float(size), y + height + around))
            yield replace(word((x, y, x + width, y + height), value, size, size), box=box)
            placed, tallest = placed + 1, max(tallest, rows)
            x += columns + round(rng.uniform(1.0 * pitch, max(2.5 * pitch, 0.3 * size)))
        if not tallest:
            return
        y += tallest + round(rng.uniform(0.6 * pitch, max(1.2 * pitch, 0.2 * size)))


def _value(rng: np.random.Generator, longest: int) -> str:
    if rng.random() < 0.5:
        known = [w for w in WORDS if len(w) <= longest]
        return known[rng.integers(len(known))]
    letters = CODES[rng.integers(len(CODES))]
    return "".join(letters[k] for k in rng.integers(len(letters), size=rng.integers(3, min(8, longest) + 1)))


def _ink(value: str, pitch: float) -> tuple[NDArray[np.float64], float, float]:
    """A word whose ink is ``pitch`` × its characters wide.

    It is drawn large and shrunk by area: no hinting, so that widths are exact at every size.

    Returns:
        Coverage (rows, columns) in [0, 1] with the ink at the upper left, and the ink's width and height in pixels.
    """
    from PIL import Image, ImageDraw

    font = _font(max(128, 2 ** math.ceil(math.log2(4 * pitch))))
    x0, y0, x1, y1 = font.getbbox(value)
    large = Image.new("L", (math.ceil(x1 - x0) + 16, math.ceil(y1 - y0) + 16))
    ImageDraw.Draw(large).text((8 - x0, 8 - y0), value, fill=255, font=font)
    left, top, right, bottom = large.getbbox() or (0, 0, 1, 1)  # no word is without ink
    shrink = (right - left) / (pitch * len(value))
    width, height = (right - left) / shrink, (bottom - top) / shrink
    columns, rows = math.ceil(width - 1e-6), math.ceil(height - 1e-6)
    room = Image.new("L", (math.ceil(columns * shrink) + 1, math.ceil(rows * shrink) + 1))
    room.paste(large.crop((left, top, right, bottom)))
    mask = room.resize((columns, rows), Image.Resampling.BOX, (0, 0, columns * shrink, rows * shrink))
    return np.asarray(mask, np.float64) / 255, width, height


@lru_cache(maxsize=8)
def _font(em: int) -> Any:
    from PIL import ImageFont

    try:
        return ImageFont.load_default(float(em))
    except ImportError as error:
        raise MissingExtraError(f"text is drawn with Pillow's FreeType support, which this Pillow lacks ({error}); install its wheel") from error


def _uint8(canvas: NDArray[np.float64]) -> Tensor:
    """(H, W, 3) → uint8 (3, H, W), rounded."""
    return torch.from_numpy(canvas.round().clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()


def _cells(rng: np.random.Generator, share: float) -> list[tuple[float, float]]:
    """Centres of faces: four in a grid if they are small, two if middling, else one."""
    if share <= 0.2:
        return [(x, y) for x in (0.26, 0.74) for y in (0.28, 0.72)]
    if share <= 0.3:
        return [(0.28, 0.45), (0.72, 0.55)] if rng.random() < 0.5 else [(0.28, 0.55), (0.72, 0.45)]
    return [(0.5, 0.5)]
