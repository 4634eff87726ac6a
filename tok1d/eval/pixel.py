"""Pixel metrics of whole batches, one value an image: MAE, PSNR, SSIM, MS-SSIM, on images rounded to 8 bits.

SSIM is our own because nobody's is both batched and faithful at the border (torchmetrics averages reflected pixels in,
scikit-image takes one image); windows as products with two band matrices also make it many times faster. Shapes: B images of H × W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import ImageError
from tok1d.eval.threads import each

MS_SSIM_LEAST = 161  # pixels: five scales, the smallest still larger than the 11-tap window


def to_uint8(images: Tensor) -> Tensor:
    """Float [0, 1] → uint8 by rounding (truncation darkens by half a level and loses a level on 63 of 256 greys).

    Example:
        >>> to_uint8(torch.tensor([0.0, 0.4999 / 255, 0.5001 / 255, 1.2])).tolist()
        [0, 0, 1, 255]
    """
    if images.dtype == torch.uint8:
        return images
    return images.float().mul(255).round_().clamp_(0, 255).to(torch.uint8)


def mae(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute error in grey levels, float64 (B,). uint8 (B, 3, H, W) twice."""
    _same(a, b)
    return (a.int() - b.int()).abs().sum((1, 2, 3)).double() / a[0].numel()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio over all channels in dB, float64 (B,), infinite for equal images. uint8 (B, 3, H, W) twice."""
    _same(a, b)
    squares = (a.int() - b.int()).square().sum((1, 2, 3), dtype=torch.int64).double()  # exact
    return 10 * torch.log10(255.0**2 * a[0].numel() / squares)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), float64 (B,). uint8 (B, 3, H, W) twice, at least 11 pixels a side.

    11-tap Gaussian of deviation 1.5, where it lies wholly inside the image; mean over places, then channels.
    """
    _same(a, b)
    if min(a.shape[-2:]) < len(_WINDOW):
        raise ImageError(f"SSIM needs images of at least 11×11 pixels, got {a.shape[-2]}×{a.shape[-1]}")
    return _scales(a, b, 1)[0][0].mean(-1).double()


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM over five scales (Wang et al. 2003), float64 (B,). uint8 (B, 3, H, W) twice, at least 161 pixels a side.

    2×2 means between scales; negative terms count as 0; channel by channel, then the mean.
    """
    return ssim_and_ms_ssim(a, b)[1]


def ssim_and_ms_ssim(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`ssim` and :func:`ms_ssim` for the price of the second: its first scale is the first."""
    _same(a, b)
    if min(a.shape[-2:]) < MS_SSIM_LEAST:
        raise ImageError(f"MS-SSIM needs images of at least {MS_SSIM_LEAST} pixels a side, got {a.shape[-2]}×{a.shape[-1]}")
    found = _scales(a, b, len(_SCALE_WEIGHTS))
    terms = [contrast for _, contrast in found[:-1]] + [found[-1][0]]
    powers = [term.clamp(min=0) ** weight for term, weight in zip(terms, _SCALE_WEIGHTS)]
    return found[0][0].mean(-1).double(), torch.stack(powers).prod(0).mean(-1).double()


_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
_MIDDLE = 127.5  # variances are taken about it: float32 then keeps the digits that x² - mean² would lose


def _scales(a: Tensor, b: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """uint8 (B, C, H, W) twice → for each of ``count`` scales SSIM and its contrast term alone, float (B, C)."""
    if a.device.type != "cpu":
        return _pyramid(a, b, count)
    found = each(lambda i: _pyramid(a[i : i + 1], b[i : i + 1], count), len(a))
    return [(torch.cat([f[n][0] for f in found]), torch.cat([f[n][1] for f in found])) for n in range(count)]


def _pyramid(a: Tensor, b: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    x, y = a.float() - _MIDDLE, b.float() - _MIDDLE
    found = [_similarity(x, y)]
    while len(found) < count:
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        found.append(_similarity(x, y))
    return found


def _similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Float (B, C, H, W) about _MIDDLE → SSIM and its contrast term alone, float (B, C)."""
    maps = torch.stack([x, y, x * x + y * y, x * y])
    maps = _band(x.shape[-2], x.device).mT @ (maps @ _band(x.shape[-1], x.device))
    mx, my, squares, products = maps.flatten(-2)
    between = mx * my
    both, covariance = mx * mx + my * my, products - between
    contrast = (2 * covariance + (0.03 * 255) ** 2) / (squares - both + (0.03 * 255) ** 2)
    # about zero the means are m + 127.5
    shift = _MIDDLE * (mx + my) + _MIDDLE**2
    luminance = (2 * (between + shift) + (0.01 * 255) ** 2) / (both + 2 * shift + (0.01 * 255) ** 2)
    return (luminance * contrast).mean(-1), contrast.mean(-1)


def _band(length: int, device: torch.device) -> Tensor:
    """Float (length, length - 10): multiplied from the right it moves the window along a line."""
    window = torch.tensor(_WINDOW, device=device)
    return F.conv1d(torch.eye(length, device=device)[:, None], (window / window.sum())[None, None])[:, 0]


def _same(a: Tensor, b: Tensor) -> None:
    if a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ImageError(f"metrics take uint8 images (to_uint8 rounds), got {a.dtype} and {b.dtype}")
    if a.shape != b.shape or a.ndim != 4:
        raise ImageError(f"images to compare must have one shape (B, 3, H, W), got {tuple(a.shape)} and {tuple(b.shape)}")
