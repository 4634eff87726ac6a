"""Alignment: faces brought upright by five landmarks onto the template that recognisers were trained with, in batches, on any device.

The published path (insightface: scikit-image's similarity transform, OpenCV's warpAffine) one face at a time gives the same pixels within one grey
level. Landmarks are (n, 5, 2) as (x, y) where the centre of the first pixel is (0, 0), as there; aligned faces are uint8 (n, 3, 112, 112).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import TokError
from tok1d.eval.face_nets import SIDE

# The ArcFace template for 112 × 112: eyes, nose, corners of the mouth, left ones in the image first.
TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
OK, BAD_LANDMARKS, OUTSIDE_IMAGE = "ok", "bad_landmarks", "outside_image"  # bad: not finite, or all on one spot


def similarity_transform(source: Tensor, target: Tensor) -> Tensor:
    """Least-squares similarity maps in closed form (Umeyama 1991; points as complex numbers, so that there is no reflection).

    Args:
        source: float (n, p, 2).
        target: float (p, 2) or (n, p, 2).

    Returns:
        float64 (n, 2, 3): rotation, scale and shift, ``target ≈ M[:, :2] @ source + M[:, 2]``; NaN where the points coincide.

    Example:
        >>> square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        >>> similarity_transform(square[None], square * 2 + 3)[0].round(decimals=6).tolist()
        [[2.0, -0.0, 3.0], [0.0, 2.0, 3.0]]
    """
    z, w = torch.view_as_complex(source.double().contiguous()), torch.view_as_complex(target.double().contiguous())
    z0, w0 = z.mean(-1, keepdim=True), w.mean(-1, keepdim=True)
    spread = (z - z0).abs().square().sum(-1)
    a = ((z - z0).conj() * (w - w0)).sum(-1) / spread.where(spread > 0, torch.nan)
    b = w0[..., 0] - a * z0[..., 0]
    return torch.stack([torch.stack([a.real, -a.imag, b.real], -1), torch.stack([a.imag, a.real, b.imag], -1)], -2)


def face_status(kps: Tensor, height: int, width: int) -> str:
    """``ok``, ``bad_landmarks``, or ``outside_image`` if none of the five points (5, 2) lies in the image."""
    if not kps.isfinite().all() or float((kps - kps[:1]).abs().max()) < 1e-3:
        return BAD_LANDMARKS
    inside = (kps >= -0.5) & (kps < kps.new_tensor([width, height]) - 0.5)
    return OK if inside.all(-1).any() else OUTSIDE_IMAGE


def align(images: Tensor, kps: Tensor, index: Sequence[int] | None = None, size: int = SIDE) -> Tensor:
    """Faces upright on the ArcFace template: similarity transform, bilinear, black outside of the image; on the images' device.

    Args:
        images: uint8 (3, H, W), or (B, 3, H, W) with ``index``.
        kps: float (n, 5, 2), usable ones (see :func:`face_status`).
        index: image of each face.
        size: side of the result, a multiple of the template's 112.

    Returns:
        uint8 (n, 3, size, size).
    """
    stack = images[None] if images.dim() == 3 else images
    places = torch.zeros(len(kps), dtype=torch.int64) if index is None else torch.as_tensor(index, dtype=torch.int64)
    if kps.shape[1:] != (5, 2) or len(places) != len(kps) or stack.dtype != torch.uint8 or (images.dim() == 4 and index is None):
        raise TokError(f"align takes uint8 images, landmarks (n, 5, 2) and the image of each, got {images.dtype}, {tuple(kps.shape)} and {len(places)}")
    height, width = stack.shape[-2:]
    target = torch.tensor(TEMPLATE, dtype=torch.float64) * (size / SIDE)
    m = similarity_transform(kps.cpu(), target)
    turn = m[:, :, :2]
    back = turn.mT / turn[:, :, 0].square().sum(-1)[:, None, None]  # its inverse: where each pixel comes from
    shift = -(back @ m[:, :, 2:])[..., 0]
    line = torch.arange(size, dtype=torch.float64)
    columns, lines = back[:, :, 0, None] * line, back[:, :, 1, None] * line  # (n, 2, size)
    extent = torch.tensor([width, height], dtype=torch.float64)
    unit = 2 / extent[:, None]  # grid_sample counts from -1 to 1 between the outer corners of the pixels
    columns, lines = columns * unit, lines * unit + (shift * 2 + 1)[..., None] / extent[:, None] - 1
    grid = (columns[:, :, None, :] + lines[:, :, :, None]).float().permute(0, 2, 3, 1)
    result = torch.empty((len(kps), 3, size, size), dtype=torch.uint8, device=images.device)
    # Images with equally many faces go together, their faces one below the other: no image is copied twice.
    counts = torch.bincount(places, minlength=len(stack))
    for count in sorted(set(counts.tolist())):
        if count:
            chosen = (counts == count).nonzero().flatten()
            rows = torch.cat([(places == i).nonzero().flatten() for i in chosen])
            tall = grid[rows].reshape(len(chosen), count * size, size, 2).to(images.device)
            part = stack if len(chosen) == len(stack) else stack[chosen.to(images.device)]
            warped = F.grid_sample(part.float(), tall, mode="bilinear", padding_mode="zeros", align_corners=False)
            faces = warped.reshape(len(chosen), 3, count, size, size).transpose(1, 2).flatten(0, 1)
            result[rows.to(images.device)] = faces.round_().byte()  # a mean of bytes is in their range
    return result
