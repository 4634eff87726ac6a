"""Views: an image as a system sees it, and back; words and landmarks move with it.

Shapes: images are uint8 (3, H, W), views (3, S, S); points are (x, y) in pixels, the upper left corner of the image at (0, 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.eval.protocol import Protocol


@dataclass(frozen=True)
class Geometry:
    """Where the image lies in its view: view = original × scale + offset.

    Attributes:
        width, height: of the original.
        size: side of the view.
        scale_x, scale_y: pixels of the view per pixel of the original.
        left, top: of the image's corner in the view, negative where it was cropped.
        inner: (left, top, right, bottom) of the part of the view that shows the image.
    """

    width: int
    height: int
    size: int
    scale_x: float
    scale_y: float
    left: float
    top: float
    inner: tuple[int, int, int, int]

    def to_view(self, points: Tensor) -> Tensor:
        """Float (…, 2) in the original → in the view."""
        return points * points.new_tensor([self.scale_x, self.scale_y]) + points.new_tensor([self.left, self.top])

    def to_original(self, points: Tensor) -> Tensor:
        """The inverse of :meth:`to_view`."""
        return (points - points.new_tensor([self.left, self.top])) / points.new_tensor([self.scale_x, self.scale_y])

    def shows(self, points: Tensor) -> bool:
        """Whether all points of the original, float (n, 2), lie inside the view (half a pixel of grace)."""
        p = self.to_view(points)
        return bool((p >= -0.5).all() and (p <= self.size + 0.5).all())


def make_view(image: Tensor, protocol: Protocol) -> tuple[Tensor, Geometry]:
    """uint8 (3, H, W) → uint8 (3, S, S) and where the image lies in it.

    Example:
        >>> from tok1d.eval.protocol import protocol
        >>> view, geometry = make_view(torch.zeros(3, 100, 300, dtype=torch.uint8), protocol("recon256-v1"))
        >>> view.shape, round(geometry.scale_x, 2), geometry.left
        (torch.Size([3, 256, 256]), 2.56, -256.0)
    """
    height, width = image.shape[-2:]
    size = protocol.size
    if protocol.fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        view = resize(image[:, top : top + side, left : left + side], (size, size), protocol.resample)
        scale = size / side
        return view, Geometry(width, height, size, scale, scale, -left * scale, -top * scale, (0, 0, size, size))
    scale = size / max(height, width)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size - h) // 2, (size - w) // 2
    view = torch.zeros(3, size, size, dtype=torch.uint8)
    view[:, top : top + h, left : left + w] = resize(image, (h, w), protocol.resample)
    return view, Geometry(width, height, size, w / width, h / height, float(left), float(top), (left, top, left + w, top + h))


def restore(view: Tensor, geometry: Geometry, protocol: Protocol) -> Tensor:
    """The part of a view that shows the image, at the original size: uint8 (3, H, W); a cropped view gives the crop's square."""
    left, top, right, bottom = geometry.inner
    inner = view[:, top:bottom, left:right]
    size = (geometry.height, geometry.width) if protocol.fit == "pad" else (min(geometry.height, geometry.width),) * 2
    return resize(inner, size, protocol.resample)


def resize(image: Tensor, size: tuple[int, int], resample: str) -> Tensor:
    """uint8 (3, H, W) → uint8 (3, *size)."""
    if tuple(image.shape[-2:]) == size:
        return image
    if resample == "bicubic":
        return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]
    from PIL import Image

    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return torch.from_numpy(np.array(picture.resize((size[1], size[0]), Image.Resampling.LANCZOS))).permute(2, 0, 1).contiguous()
