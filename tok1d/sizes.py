"""Size policies: bring images to a model's size (:func:`fit`) and back (:func:`unfit`).

Shapes: B images of H × W pixels, size = (h, w) of the model, R rows of a batch after tiling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tok1d.errors import ImageError
from tok1d.tokens import POLICIES, Geometry

MAX_PIXELS = 178_956_970  # where Pillow, too, calls an image a decompression bomb: 0.5 GB as 8-bit RGB



def fit(images: Tensor, size: tuple[int, int], policy: str = "none") -> tuple[Tensor, tuple[Geometry, ...]]:
    """Bring images to a model's size.

    - ``none``: they must have it already.
    - ``resize``: bicubic with antialiasing, aspect ratio given up.
    - ``crop``: the largest centred window of the model's aspect ratio, then resized.
    - ``pad``: resized until it fits inside, centred, edges repeated outwards.
    - ``tile``: cut in pieces of the model's size without scaling, edges repeated; R = B × rows × cols.

    Args:
        images: float (B, 3, H, W) in [0, 1], or uint8 in 0..255 (fastest when channels last).
        size: (height, width) wanted.
        policy: one of the above.

    Returns:
        Images (R, 3, *size) of the same dtype, and a Geometry for each of the B originals, which :func:`unfit` undoes.

    Raises:
        ImageError: another size with policy ``none``, an unknown policy, or no pixels.

    Example:
        >>> tiles, geometry = fit(torch.rand(1, 3, 300, 500), (256, 256), "tile")
        >>> tiles.shape, unfit(tiles, geometry).shape
        (torch.Size([4, 3, 256, 256]), torch.Size([1, 3, 300, 500]))
    """
    batch, (height, width), (h, w) = len(images), images.shape[-2:], size
    if policy not in POLICIES:
        raise ImageError(f"the size policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    if not (height and width):
        raise ImageError(f"images of {height}×{width} have no pixels")
    geometry = Geometry(height, width, policy)
    if policy == "none":
        if (height, width) != (h, w):
            raise ImageError(
                f"the model takes {h}×{w} images, got {height}×{width} (height×width). "
                'Choose --resize, --crop, --pad or --tile (in Python: policy="resize")'
            )
    elif policy == "resize":
        images = _resize(images, size)
    elif policy == "crop":
        top, left, ch, cw = _crop_box(height, width, size)
        images = _resize(images[..., top : top + ch, left : left + cw], size)
    elif policy == "pad":
        top, left, ih, iw = _pad_box(height, width, size)
        images = _repeat_edges(_resize(images, (ih, iw)), top, h - ih - top, left, w - iw - left)
    else:
        rows, cols = -(-height // h), -(-width // w)
        geometry = Geometry(height, width, policy, rows, cols)
        grid = _repeat_edges(images, 0, rows * h - height, 0, cols * w - width).reshape(batch, 3, rows, h, cols, w)
        images = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch * rows * cols, 3, h, w)
    return images, (geometry,) * batch


def unfit(images: Tensor, geometry: Sequence[Geometry]) -> Tensor | list[Tensor]:
    """Undo :func:`fit`: back to the size of the originals (for ``crop``: of the window that was kept).

    Args:
        images: float (R, 3, h, w) in [0, 1] at the model's size; the tiles of an image are consecutive rows.
        geometry: one entry per original, covering the R rows.

    Returns:
        (B, 3, H, W) if all restored images agree in size, else a list of B tensors (3, H, W).

    Raises:
        ImageError: the geometry does not cover the rows, or asks for more than MAX_PIXELS (a forged file).
    """
    if sum(g.tiles for g in geometry) != len(images):
        raise ImageError(f"{len(images)} rows cannot be shared among {len(geometry)} images of {sum(g.tiles for g in geometry)} tiles")
    check_restorable(geometry, (images.shape[-2], images.shape[-1]))
    if geometry and len(set(geometry)) == 1 and geometry[0].policy != "tile":
        return _restore(images, geometry[0])
    restored, start = [], 0
    for g in geometry:
        restored.append(_restore(images[start : start + g.tiles], g)[0])
        start += g.tiles
    return torch.stack(restored) if len({r.shape for r in restored}) == 1 else restored


def check_restorable(geometry: Sequence[Geometry], size: tuple[int, int]) -> None:
    """Refuse, before anything is decoded, a geometry no honest file of a model of this size has.

    Raises:
        ImageError: unknown policy, wrong number of tiles, no pixels, or more than MAX_PIXELS.
    """
    for g in set(geometry):
        if not (min(g.height, g.width) > 0 and g.height * g.width <= MAX_PIXELS):
            raise ImageError(f"an original size of {g.height}×{g.width} pixels is not plausible (at most {MAX_PIXELS:,}); the file may be forged")
        tiles = (-(-g.height // size[0]), -(-g.width // size[1])) if g.policy == "tile" else (1, 1)
        if g.policy not in POLICIES or (g.rows, g.cols) != tiles:
            raise ImageError(f"{g} does not describe images of {size[0]}×{size[1]}; the tokens belong to another model or the file is damaged")


def _restore(images: Tensor, g: Geometry) -> Tensor:
    """(B, 3, h, w) of one geometry → (B, 3, H, W), or the tiles of one image → (1, 3, H, W)."""
    h, w = images.shape[-2:]
    if g.policy == "none":
        return images
    if g.policy == "resize":
        return _resize(images, (g.height, g.width))
    if g.policy == "crop":
        return _resize(images, _crop_box(g.height, g.width, (h, w))[2:])
    if g.policy == "pad":
        top, left, ih, iw = _pad_box(g.height, g.width, (h, w))
        return _resize(images[..., top : top + ih, left : left + iw], (g.height, g.width))
    grid = images.reshape(g.rows, g.cols, 3, h, w).permute(2, 0, 3, 1, 4).reshape(1, 3, g.rows * h, g.cols * w)
    return grid[..., : g.height, : g.width]


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic with antialiasing, dtype kept; float is clamped to [0, 1] because bicubic overshoots at edges."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    if images.dtype == torch.uint8:
        if images.device.type == "cpu":
            return F.interpolate(images, size, mode="bicubic", antialias=True)
        return F.interpolate(images.float(), size, mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)
    if size[1] == 1 and images.shape[-2] != size[0]:
        # torch (2.13, float) gets the vertical pass wrong when one column comes out: do it on two or more, then go to one.
        columns = images if images.shape[-1] > 1 else images.expand(-1, -1, -1, 2)
        images = _resize(columns, (size[0], columns.shape[-1]))
    return F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 1).to(images.dtype)


def _crop_box(height: int, width: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """top, left, height, width of the largest centred window with the aspect ratio of ``size``."""
    h, w = size
    if height * w >= width * h:
        ch, cw = min(height, max(1, round(width * h / w))), width
    else:
        ch, cw = height, min(width, max(1, round(height * w / h)))
    return (height - ch) // 2, (width - cw) // 2, ch, cw


def _pad_box(height: int, width: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """top, left, height, width of the image inside the padded one."""
    scale = min(size[0] / height, size[1] / width)
    ih, iw = (min(s, max(1, round(n * scale))) for s, n in zip(size, (height, width)))
    return (size[0] - ih) // 2, (size[1] - iw) // 2, ih, iw


def _repeat_edges(images: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """Replicate padding for any dtype and any width (F.pad knows no uint8)."""
    if top or bottom:
        images = images[..., torch.arange(-top, images.shape[-2] + bottom, device=images.device).clamp(0, images.shape[-2] - 1), :]
    if left or right:
        images = images[..., torch.arange(-left, images.shape[-1] + right, device=images.device).clamp(0, images.shape[-1] - 1)]
    return images
