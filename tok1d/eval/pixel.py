"""Pixel metrics of whole batches, one value an image: MAE, PSNR, SSIM, MS-SSIM, on images rounded to 8 bits.

SSIM is our own because nobody's is both batched and faithful at the border (torchmetrics averages reflected pixels in,
scikit-image takes one image); separable windows also make it several times faster. Shapes: B images of H × W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import ImageError

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
    return _similarity(_centred(a), _centred(b))[0].mean(-1).double()


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM over five scales (Wang et al. 2003), float64 (B,). uint8 (B, 3, H, W) twice, at least 161 pixels a side.

    2×2 means between scales; negative terms count as 0; channel by channel, then the mean.
    """
    _same(a, b)
    if min(a.shape[-2:]) < MS_SSIM_LEAST:
        raise ImageError(f"MS-SSIM needs images of at least {MS_SSIM_LEAST} pixels a side, got {a.shape[-2]}×{a.shape[-1]}")
    x, y = _centred(a), _centred(b)
    product = torch.ones(a.shape[:2], device=a.device)
    for scale, weight in enumerate(_SCALE_WEIGHTS):
        whole, contrast = _similarity(x, y)
        product = product * (whole if scale == len(_SCALE_WEIGHTS) - 1 else contrast).clamp(min=0) ** weight
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return product.mean(-1).double()


_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
_MIDDLE = 127.5  # variances are taken about it: float32 then keeps the digits that x² - mean² would lose


def _centred(images: Tensor) -> Tensor:
    return images.float() - _MIDDLE


def _similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Float (B, C, H, W) about _MIDDLE → SSIM and its contrast term alone, float (B, C)."""
    batch, channels, height, width = x.shape
    maps = torch.cat([x, y, x * x, y * y, x * y]).reshape(-1, 1, height, width)
    window = torch.tensor(_WINDOW, device=x.device)
    window = window / window.sum()
    maps = F.conv2d(F.conv2d(maps, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))
    mx, my, xx, yy, xy = maps.view(5, batch, channels, -1)
    vx, vy, covariance = xx - mx * mx, yy - my * my, xy - mx * my
    contrast = (2 * covariance + (0.03 * 255) ** 2) / (vx + vy + (0.03 * 255) ** 2)
    mx, my = mx + _MIDDLE, my + _MIDDLE
    luminance = (2 * mx * my + (0.01 * 255) ** 2) / (mx * mx + my * my + (0.01 * 255) ** 2)
    return (luminance * contrast).mean(-1), contrast.mean(-1)


def _same(a: Tensor, b: Tensor) -> None:
    if a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ImageError(f"metrics take uint8 images (to_uint8 rounds), got {a.dtype} and {b.dtype}")
    if a.shape != b.shape or a.ndim != 4:
        raise ImageError(f"images to compare must have one shape (B, 3, H, W), got {tuple(a.shape)} and {tuple(b.shape)}")
