"""Draw a table of pictures with captions, using Pillow and its built-in font only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

GAP, MARGIN = 14, 20
INK, SOFT, PAPER = (24, 24, 27), (113, 113, 122), (255, 255, 255)
WIDEST = 2.0  # wider pictures are shown lower, so that a panorama does not blow up its column


@dataclass
class Cell:
    """A picture, already scaled, and the lines under it; the first line is its title."""

    picture: Image.Image
    lines: list[str]

    @staticmethod
    def of(image: Tensor, height: int, lines: list[str]) -> Cell:
        """Scale an image, (3, H, W) float in [0, 1] or uint8, to ``height`` rows, or to the widest a cell may be."""
        import torch
        from PIL import Image

        if image.dtype != torch.uint8:
            image = image.clamp(0, 1).mul(255).round().to(torch.uint8)
        picture = Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())
        scale = min(height / picture.height, WIDEST * height / picture.width)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        return Cell(picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS), lines)


def draw(rows: list[list[Cell]]) -> Tensor:
    """Lay the cells out: columns as wide as their widest, pictures centred, captions under them.

    Returns:
        uint8 (3, H, W).
    """
    import numpy as np
    import torch
    from PIL import Image, ImageDraw, ImageFont

    base = max(13, round(max(c.picture.height for row in rows for c in row) / 17))
    title, plain = ImageFont.load_default(base + 1), ImageFont.load_default(base - 1)
    rows = [[Cell(cell.picture, [_drawable(text) for text in cell.lines]) for cell in row] for row in rows]

    def fonts(line: int) -> Any:
        return title if line == 0 else plain

    step = round(1.35 * base)
    columns = max(len(row) for row in rows)
    widths = [0] * columns
    for row in rows:
        for i, cell in enumerate(row):
            widths[i] = max(widths[i], cell.picture.width, *(int(fonts(n).getlength(t)) + 2 for n, t in enumerate(cell.lines)))
    heights = [max(c.picture.height for c in row) for row in rows]
    captions = [max(len(c.lines) for c in row) * step + base // 2 for row in rows]
    width = sum(widths) + GAP * (columns - 1) + 2 * MARGIN
    height = sum(heights) + sum(captions) + GAP * (len(rows) - 1) + 2 * MARGIN
    canvas = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(canvas)
    y = MARGIN
    for row, tall, caption in zip(rows, heights, captions):
        x = MARGIN
        for cell, wide in zip(row, widths):
            canvas.paste(cell.picture, (x + (wide - cell.picture.width) // 2, y + (tall - cell.picture.height) // 2))
            for n, text in enumerate(cell.lines):
                pen.text((x + wide / 2, y + tall + base // 2 + n * step), text, fill=INK if n == 0 else SOFT, font=fonts(n), anchor="ma")
            x += wide + GAP
        y += tall + caption + GAP
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def _drawable(text: str) -> str:
    """The built-in font has Latin letters but neither × nor …"""
    return text.replace("×", "x").replace("…", "...")
