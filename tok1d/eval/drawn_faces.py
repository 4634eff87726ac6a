"""Schematic faces: ellipses and polygons whose landmarks and boxes are known exactly; each seed is another person.

A face is drawn in its own coordinates — origin between the features, x right, y down, half the height of the face is 1 — and brought
into the picture by a similarity, so landmarks are exact to the last digit. Nothing here is a photograph of anybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tok1d.eval.manifest import Face

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Points = NDArray[np.float64]
FINER = 4  # pictures are drawn this much larger and shrunk: edges are smooth, and placed to a quarter of a pixel
SKIN = ((250, 224, 200), (236, 198, 165), (219, 172, 132), (190, 138, 98), (146, 99, 66), (104, 68, 46), (72, 47, 35))
HAIR = ((28, 22, 20), (62, 40, 26), (108, 70, 38), (170, 122, 66), (214, 180, 118), (150, 64, 34), (148, 146, 144))
IRIS = ((74, 48, 28), (104, 74, 38), (62, 98, 72), (76, 112, 152), (92, 96, 100))


@dataclass(frozen=True)
class Person:
    """How a face looks; lengths in halves of its height.

    Attributes:
        skin, hair, iris, lips: colours.
        width: of the face, half.
        jaw: how narrow the chin is, 0 round to 1 pointed.
        eye_x, eye_y, eye: place and half width of the eyes.
        brow, brow_tilt, brow_gap: thickness, slope and distance of the brows.
        nose, nose_width: its tip below the middle, and half its width.
        mouth_y, mouth, lip, smile: place, half width, fullness and curve of the mouth.
        style: 0 short hair, 1 long, 2 bald.
        fringe: how far hair covers the forehead.
        glasses: whether there are any.
    """

    skin: tuple[int, int, int]
    hair: tuple[int, int, int]
    iris: tuple[int, int, int]
    lips: tuple[int, int, int]
    width: float
    jaw: float
    eye_x: float
    eye_y: float
    eye: float
    brow: float
    brow_tilt: float
    brow_gap: float
    nose: float
    nose_width: float
    mouth_y: float
    mouth: float
    lip: float
    smile: float
    style: int
    fringe: float
    glasses: bool

    @staticmethod
    def draw_lots(rng: np.random.Generator) -> Person:
        """Somebody."""
        skin = _colour(np.array(SKIN[rng.integers(len(SKIN))]) + rng.integers(-10, 11, 3))
        lips = _colour(np.array(skin) * (0.80, 0.52, 0.50) + rng.integers(0, 20, 3))
        u = rng.uniform
        return Person(
            skin=skin, hair=HAIR[rng.integers(len(HAIR))], iris=IRIS[rng.integers(len(IRIS))], lips=lips,
            width=u(0.68, 0.84), jaw=u(0.0, 0.6), eye_x=u(0.29, 0.36), eye_y=u(-0.18, -0.08), eye=u(0.115, 0.16),
            brow=u(0.025, 0.06), brow_tilt=u(-0.04, 0.05), brow_gap=u(0.13, 0.2), nose=u(0.14, 0.26), nose_width=u(0.09, 0.15),
            mouth_y=u(0.44, 0.54), mouth=u(0.21, 0.32), lip=u(0.035, 0.07), smile=u(-0.02, 0.08),
            style=int(rng.choice(3, p=(0.55, 0.35, 0.1))), fringe=u(0.0, 0.22), glasses=bool(rng.random() < 0.2),
        )  # fmt: skip


def _colour(values: ArrayLike) -> tuple[int, int, int]:
    r, g, b = (int(v) for v in np.clip(np.asarray(values), 0, 255))
    return r, g, b


def oval(cx: float, cy: float, rx: float, ry: float, steps: int = 48) -> Points:
    """An ellipse as a polygon, (steps, 2)."""
    angle = np.linspace(0, 2 * np.pi, steps, endpoint=False)
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], -1)


def _band(line: Points, above: float, below: float) -> Points:
    """A line drawn out downwards, from ``above`` to ``below`` it."""
    return np.concatenate([line + np.array([0, above]), (line + np.array([0, below]))[::-1]])


def outline(person: Person) -> Points:
    """The face from forehead to chin, (64, 2); its height is 2."""
    points = oval(0, 0, person.width, 1.0, 64)
    below = np.clip(points[:, 1], 0, 1)
    points[:, 0] *= 1 - 0.28 * person.jaw * below**1.5
    return points


def landmarks(person: Person) -> Points:
    """Eyes, tip of the nose, corners of the mouth, (5, 2), left ones first."""
    p = person
    corner = p.mouth_y - p.smile
    return np.array([(-p.eye_x, p.eye_y), (p.eye_x, p.eye_y), (0, p.nose), (-p.mouth, corner), (p.mouth, corner)])


def draw_face(canvas: ImageDraw, person: Person, centre: ArrayLike, height: float, turn: float, size: int) -> Face:
    """Draw one face.

    Args:
        canvas: in mode RGBA over an RGB picture ``FINER`` times as large as the final one.
        person: whose.
        centre: in pixels of the final picture.
        height: of the face from forehead to chin, in pixels.
        turn: of the head, in radians, clockwise.
        size: longer side of the final picture.

    Returns:
        Its landmarks, and the box of the face without hair.
    """
    p = person
    rotation = np.array([(np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))]) * height / 2

    def place(points: Points) -> Points:
        placed: Points = points @ rotation + np.asarray(centre)
        return placed

    def fill(points: Points, colour: ArrayLike, alpha: int = 255) -> None:
        # Pillow's coordinates name centres of pixels, ours their corners.
        canvas.polygon([tuple(xy) for xy in place(points) * FINER - 0.5], fill=(*(int(c) for c in np.asarray(colour)), alpha))

    skin, dark = np.array(p.skin), np.array(p.skin) * 0.78
    shape = outline(p)
    if p.style == 1:
        fill(oval(0, 0.12, p.width * 1.24, 1.28), p.hair)
    elif p.style == 0:
        fill(oval(0, -0.22, p.width * 1.12, 0.92), p.hair)
    fill(np.array([(-0.3, 0.7), (0.3, 0.7), (0.34, 1.35), (-0.34, 1.35)]), dark)
    for side in (-1, 1):
        fill(oval(side * p.width * 0.98, 0.05, 0.09, 0.19), dark)
    fill(shape, skin)
    for step in range(1, 6):  # a soft shade on one side, a soft light on the other
        fill(shape * (1 - 0.07 * step, 1 - 0.04 * step) + (0.035 * step, -0.01 * step), np.minimum(255, skin * (1 + 0.02 * step)), 70)
    if p.style < 2:
        top = shape[shape[:, 1] < -0.62 + p.fringe]
        fill(top * (1.03, 1.05), p.hair)
    for side in (-1, 1):
        x, y = side * p.eye_x, p.eye_y
        fill(oval(x, y + 0.01, p.eye * 1.2, p.eye * 0.75), dark, 90)
        fill(oval(x, y, p.eye, p.eye * 0.52), (246, 244, 240))
        fill(oval(x, y, p.eye * 0.48, p.eye * 0.48), p.iris)
        fill(oval(x, y, p.eye * 0.22, p.eye * 0.22), (16, 14, 14))
        fill(oval(x - p.eye * 0.15, y - p.eye * 0.17, p.eye * 0.1, p.eye * 0.1), (255, 255, 255))
        lid = oval(x, y, p.eye * 1.04, p.eye * 0.56)
        upper = lid[lid[:, 1] <= y + 1e-9]
        fill(_band(upper, 0.0, 0.028), np.array(p.skin) * 0.32)
        inner, outer = x - side * p.eye * 1.1, x + side * p.eye * 1.35
        low, high = y - p.brow_gap + p.brow_tilt, y - p.brow_gap - p.brow_tilt
        brow = np.array([(inner, low), (x, high - 0.03), (outer, high), (outer, high + p.brow * 0.6), (x, high - 0.03 + p.brow), (inner, low + p.brow)])
        fill(brow, np.array(p.hair) * 0.8 if p.style < 2 else dark * 0.5)
    bridge = np.array([(-0.035, p.eye_y + 0.06), (0.035, p.eye_y + 0.06), (p.nose_width * 0.6, p.nose), (-p.nose_width * 0.6, p.nose)])
    fill(bridge, np.minimum(255, skin * 1.08), 120)
    fill(oval(0, p.nose + 0.035, p.nose_width, 0.055), dark, 200)
    fill(oval(0, p.nose, p.nose_width * 0.55, 0.06), np.minimum(255, skin * 1.06))
    for side in (-1, 1):
        fill(oval(side * p.nose_width * 0.5, p.nose + 0.06, 0.028, 0.018), dark * 0.45)
    t = np.linspace(-1, 1, 17)
    middle = p.mouth_y - p.smile * np.abs(t) ** 2
    upper = middle - p.lip * (1 - t**2) * (1 - 0.35 * np.exp(-((t / 0.22) ** 2)))
    lower = middle + 1.4 * p.lip * (1 - t**2)
    line = np.stack([t * p.mouth, middle], -1)
    fill(np.concatenate([np.stack([t * p.mouth, upper], -1), np.stack([t * p.mouth, lower], -1)[::-1]]), p.lips)
    fill(_band(line, -0.009, 0.009), np.array(p.lips) * 0.5)
    if p.glasses:
        for side in (-1, 1):
            ring = oval(side * p.eye_x, p.eye_y, 0.23, 0.19)
            canvas.line([tuple(xy) for xy in place(np.concatenate([ring, ring[:2]])) * FINER - 0.5], fill=(30, 30, 34, 255), width=max(1, round(height * FINER / 90)))
        fill(np.array([(-p.eye_x + 0.22, p.eye_y - 0.03), (p.eye_x - 0.22, p.eye_y - 0.03), (p.eye_x - 0.22, p.eye_y), (-p.eye_x + 0.22, p.eye_y)]), (30, 30, 34))
    kps, seen = place(landmarks(p)), place(shape)
    x0, y0, x1, y1 = (float(v) for v in (*seen.min(0), *seen.max(0)))
    return Face(tuple((float(x), float(y)) for x, y in kps), max(x1 - x0, y1 - y0) / size, (x0, y0, x1, y1))  # type: ignore[arg-type]
