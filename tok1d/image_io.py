"""Images in and out of files; :func:`fit` and :func:`unfit` (to a model's size and back) come from :mod:`tok1d.sizes`.

Read: EXIF orientation applied, alpha composited on white, grey, palette, CMYK, 1-bit and 16-bit brought to RGB; everything
that cannot be read faithfully is refused with one line. Write: rounded (never truncated) to 8 bits, atomically.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from tok1d.errors import ImageError
from tok1d.sizes import MAX_PIXELS, check_restorable, fit, unfit

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

__all__ = ["check_restorable", "fit", "read", "read_uint8", "to_bytes", "unfit", "write"]

LOSSY = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}, "AVIF": {"quality": 90}}
STILL_FORMATS = ("MPO",)  # photos of phones with previews or depth maps attached: the first frame is the photo


def read(source: str | Path | bytes | BinaryIO, *, frame: int | None = None) -> Tensor:
    """Read one image as float.

    Args:
        source: a path, the bytes of a file, or an open binary stream.
        frame: which frame of an animated or many-page image, 0 the first; such images are refused if None.

    Returns:
        float32 (1, 3, H, W) in [0, 1]; 16-bit images keep their precision.

    Raises:
        ImageError: missing, empty, truncated, damaged, animated, too large, or not an image.

    Example:
        >>> read(to_bytes(torch.ones(3, 2, 5), ".png")).shape
        torch.Size([1, 3, 2, 5])
    """
    pixels = torch.from_numpy(_load(source, frame)).permute(2, 0, 1)[None].contiguous()
    return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels


def read_uint8(source: str | Path | bytes | BinaryIO, *, frame: int | None = None) -> Tensor:
    """As :func:`read`, but uint8 (1, 3, H, W) in 0..255, channels last in memory: a quarter of the size, fastest to resize."""
    pixels = torch.from_numpy(_load(source, frame)).permute(2, 0, 1)[None]
    return pixels if pixels.dtype == torch.uint8 else pixels.mul(255).round_().to(torch.uint8)


def write(path: str | Path, image: Tensor) -> int:
    """Write one image atomically, in the format of the suffix, and return the size of the file in bytes.

    Args:
        path: ends in .png, .jpg, .webp, .avif, .tiff, …; PNG is lossless.
        image: float (3, H, W) or (1, 3, H, W) in [0, 1] (values outside are clamped), or uint8 in 0..255.

    Raises:
        ImageError: unknown suffix, wrong shape, NaN, or the format cannot hold the image.
    """
    from tok1d.tokfile import atomic_write

    data = to_bytes(image, Path(path).suffix)
    atomic_write(path, data)
    return len(data)


def to_bytes(image: Tensor, suffix: str) -> bytes:
    """The file that :func:`write` would write, as bytes.

    Args:
        image: float (3, H, W) or (1, 3, H, W) in [0, 1], or uint8 in 0..255.
        suffix: with its dot, as ``.png``.
    """
    from PIL import Image

    kind = Image.registered_extensions().get(suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise ImageError(f"no image format is known for the suffix {suffix!r}; use .png, .jpg, .webp, .avif, .tiff or .bmp")
    out = io.BytesIO()
    try:
        Image.fromarray(_to_uint8(image).permute(1, 2, 0).numpy()).save(out, format=kind, **LOSSY.get(kind, {}))
    except (OSError, ValueError, TypeError, KeyError) as error:
        size = "×".join(str(n) for n in image.shape[-2:])
        raise ImageError(f"a {size} RGB image cannot be written as {kind} ({error}); use .png") from error
    return out.getvalue()


def _to_uint8(image: Tensor) -> Tensor:
    """Float in [0, 1] or uint8, (3, H, W) or (1, 3, H, W) → uint8 (3, H, W) on the CPU, rounded to nearest."""
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ImageError(f"one image (3, H, W) or (1, 3, H, W) is written at a time, got shape {tuple(image.shape)}")
    if image.dtype == torch.uint8:
        return image.cpu()
    if not image.is_floating_point():
        raise ImageError(f"images are float in [0, 1] or uint8, got {image.dtype}")
    image = image.detach().float()
    if image.isnan().any():
        raise ImageError("the image holds NaN")
    return image.clamp(0, 1).mul(255).round_().to(torch.uint8).cpu()


def _load(source: str | Path | bytes | BinaryIO, frame: int | None) -> np.ndarray:
    """→ (H, W, 3) uint8, or float32 in [0, 1] for sources of more than 8 bits."""
    from PIL import Image, UnidentifiedImageError

    name, stream = _open(source)
    with stream:
        try:
            if not stream.read(1):
                raise ImageError(f"{name}: empty (0 bytes), not an image")
            stream.seek(0)
            with Image.open(stream) as image:
                return _pixels(image, name, frame)
        except ImageError:
            raise
        except UnidentifiedImageError as error:
            tokens = ". It holds tokens: tok decode" if name.endswith(".tok") else ""
            raise ImageError(f"{name}: not an image, or of a format that Pillow does not read (save it as PNG){tokens}") from error
        except Image.DecompressionBombError as error:
            raise ImageError(f"{name}: more than {MAX_PIXELS:,} pixels, refused as a decompression bomb; shrink it") from error
        except Exception as error:  # broken files make Pillow's decoders raise nearly anything
            raise ImageError(f"{name}: damaged or truncated image ({type(error).__name__}: {str(error)[:200]})") from error


def _open(source: str | Path | bytes | BinaryIO) -> tuple[str, BinaryIO]:
    """A name for messages and a seekable stream that the caller closes."""
    if isinstance(source, bytes):
        return "image", io.BytesIO(source)
    if not isinstance(source, str | Path):
        return str(getattr(source, "name", "image")), io.BytesIO(source.read())
    try:
        return str(source), open(source, "rb")
    except FileNotFoundError as error:
        raise ImageError(f"{source}: no such file") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{source}: cannot be opened ({getattr(error, 'strerror', None) or error})") from error


def _pixels(image: Image.Image, name: str, frame: int | None) -> np.ndarray:
    """Frame choice, size limits, orientation, colour → pixels as of :func:`_load`."""
    import numpy as np
    from PIL import ImageOps

    width, height = image.size
    if not (width and height):
        raise ImageError(f"{name}: the image has no pixels ({height}×{width})")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {height}×{width} pixels, at most {MAX_PIXELS:,} are read; shrink it")
    if frame is None and getattr(image, "is_animated", False) and image.format not in STILL_FORMATS:
        raise ImageError(f"{name}: several frames or pages, not one image; choose one with --frame 0 (in Python: read(path, frame=0))")
    if frame:
        try:
            image.seek(frame)
        except (EOFError, ValueError) as error:
            raise ImageError(f"{name}: has no frame {frame} (counted from 0)") from error
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(np.array(image), image.mode, name)
    if image.mode in ("LAB", "HSV"):
        raise ImageError(f"{name}: {image.mode} colour is not supported; save it as RGB")
    if image.has_transparency_data:
        image = _on_white(image)
    return np.array(image.convert("RGB"))


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "La":  # premultiplied grey has no direct way to RGBA
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _deep_grey(values: Any, mode: str, name: str) -> np.ndarray:
    """Grey of 16-bit (I;16…, I) or float (F) → float32 (H, W, 3) in [0, 1]."""
    import numpy as np

    top = 1.0 if mode == "F" else 65535.0
    if not (values.min() >= 0 and values.max() <= top):  # also False for NaN
        raise ImageError(f"{name}: values from {values.min():.4g} to {values.max():.4g} have no known scale; save it as 8 or 16-bit PNG")
    grey = (values.astype(np.float64) / top).astype(np.float32)
    return np.repeat(grey[..., None], 3, axis=2)
