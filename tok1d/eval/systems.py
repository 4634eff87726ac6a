"""Systems: whatever makes pictures from views and spends bytes on it — a tokenizer, an image codec, a resize, a folder of files.

All of them go through the same door: a batch of views in, for each rate the pictures and their bytes out. A tokenizer encodes
once and decodes once a rate. Shapes: views are uint8 (B, 3, S, S).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import ImageError, TokError, UsageError
from tok1d.eval import codecs
from tok1d.eval.pixel import to_uint8

if TYPE_CHECKING:
    from tok1d.tokenizers.tokenizer import Tokenizer1D


@dataclass(frozen=True)
class Rate:
    """One point of a system's curve.

    Attributes:
        name: short, unique in the system, as ``k32`` or ``q50``.
        tokens: kept of each image, None for what has no tokens.
    """

    name: str
    tokens: int | None = None


@dataclass
class Pictures:
    """A batch at one rate.

    Attributes:
        rate: which.
        images: uint8 (B, 3, S, S); rows whose ``status`` is not ok are undefined.
        bytes: of the payload of each image (codes alone; a file without container).
        file_bytes: of the whole file of each image.
        status: ``ok``, or why an image has no picture at this rate.
        codes: int64 (B, n) ids, or uint8 (B, n, d) bits, or None.
    """

    rate: Rate
    images: Tensor
    bytes: list[float]
    file_bytes: list[float]
    status: list[str]
    codes: Tensor | None = None


class System(ABC):
    """What is measured.

    Attributes:
        name: shown in tables.
        rates: the points of its curve, fewest bytes first.
    """

    name: str
    rates: list[Rate]

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Provenance: versions, hashes, settings — whatever another number must share to be this system's."""

    @abstractmethod
    def reconstruct(self, views: Tensor, names: Sequence[str]) -> Iterator[Pictures]:
        """uint8 (B, 3, S, S) views with the ids of their images → one Pictures a rate."""


class TokenizerSystem(System):
    """A tokenizer at several numbers of tokens.

    Args:
        tokenizer: discrete.
        tokens: rates; for nested ones powers of two up to all if None.
        options: of its decoder (``steps``, ``guidance``, ``seeds`` …).
    """

    def __init__(self, tokenizer: Tokenizer1D, tokens: Sequence[int] | None = None, options: dict[str, Any] | None = None) -> None:
        if not tokenizer.is_discrete:
            raise UsageError(f"{tokenizer.name} has a continuous bottleneck and no bits to count; quantize it first (per-channel post-training)")
        most = tokenizer.max_tokens
        doubling = [2**i for i in range(most.bit_length()) if 2**i <= most]
        wanted = list(tokens) if tokens is not None else (sorted({*doubling, most}) if tokenizer.is_nested else [most])
        for n in wanted:
            if n not in tokenizer.token_lengths:
                allowed = f"1 to {most}" if tokenizer.is_nested else str(most)
                raise UsageError(f"--tokens {n}: {tokenizer.name} makes {allowed} tokens")
        self.tokenizer, self.options = tokenizer, options or {}
        self.name, self.rates = tokenizer.name, [Rate(f"k{n}", n) for n in sorted(set(wanted))]

    def describe(self) -> dict[str, Any]:
        t = self.tokenizer
        return {
            "kind": "tokenizer", "name": t.name, "model_id": f"{t.model_id:016x}", "bits_per_token": t.bits_per_token, "vocab_size": str(t.vocab_size),
            "dtype": str(t.dtype).removeprefix("torch."), "device": t.device.type, "options": self.options,
        }  # fmt: skip

    def reconstruct(self, views: Tensor, names: Sequence[str]) -> Iterator[Pictures]:
        from tok1d import tokfile

        if tuple(views.shape[-2:]) != self.tokenizer.image_size and not self.tokenizer.any_size:
            h, w = self.tokenizer.image_size
            raise UsageError(f"{self.name} works at {h}×{w} pixels, this protocol's views are {views.shape[-2]}×{views.shape[-1]}; choose a protocol of its size")
        seq = self.tokenizer.encode(views.to(self.tokenizer.device))
        for rate in self.rates:
            part = seq[:, : rate.tokens]
            pictures = self.tokenizer.decode(part, **self.options)
            payload = -(-part.shape[1] * part.bits_per_token // 8)
            whole = len(tokfile.pack(part[:1]))
            images = to_uint8(pictures if isinstance(pictures, Tensor) else torch.stack(pictures)).cpu()
            yield Pictures(rate, images, [payload] * len(views), [whole] * len(views), ["ok"] * len(views), part.data.cpu())


class CodecSystem(System):
    """An image codec at qualities, or at the best picture within budgets of bytes.

    Args:
        codec: a key of ``tok1d.eval.codecs.OPTIONS``.
        qualities: 0..100.
        side: shrink the picture first.
        budgets: bytes; searches size and quality for the best PSNR within each, instead of ``qualities``.
        workers: processes that search.
    """

    def __init__(
        self, codec: str, qualities: Sequence[int] = (), side: int | None = None, budgets: Sequence[int] = (), workers: int = 1
    ) -> None:
        missing = codecs.available().get(codec, f"unknown codec; there are {', '.join(codecs.OPTIONS)}")
        if missing:
            raise UsageError(f"codec {codec}: {missing}")
        if bool(qualities) == bool(budgets):
            raise UsageError(f"codec {codec}: give qualities or budgets of bytes, one of them")
        self.codec, self.side, self.workers, self.name = codec, side, workers, codec if side is None else f"{codec}@{side}"
        self.settings = sorted(qualities) or sorted(budgets)
        self.budgets = bool(budgets)
        self.rates = [Rate(f"b{n}" if budgets else f"q{n}") for n in self.settings]
        self._pool: Any = None

    def describe(self) -> dict[str, Any]:
        from PIL import __version__, features

        library = {"webp": "webp", "avif": "avif", "jpeg": "libjpeg_turbo"}.get(self.codec)
        version = features.version(library) if library else None
        how = {"search": codecs.settings()} if self.budgets else {"options": codecs.OPTIONS[self.codec], "side": self.side}
        return {"kind": "codec", "name": self.codec, "pillow": __version__, "library": version, **json.loads(json.dumps(how))}

    def reconstruct(self, views: Tensor, names: Sequence[str]) -> Iterator[Pictures]:
        arrays = [np.ascontiguousarray(v.permute(1, 2, 0).numpy()) for v in views]
        found = self._search(arrays) if self.budgets else None
        for setting, rate in zip(self.settings, self.rates):
            images, payload, whole, status = torch.zeros_like(views), [], [], []
            for i, array in enumerate(arrays):
                if found is not None:
                    best = found[i][setting]
                    status.append("ok" if best else "does not fit")
                    payload.append(best.payload if best else 0.0)
                    whole.append(best.bytes if best else 0.0)
                    picture = best.pixels if best else array * 0
                else:
                    data, picture = codecs.at_quality(array, self.codec, setting, self.side)
                    payload.append(codecs.payload_bytes(data))
                    whole.append(len(data))
                    status.append("ok")
                images[i] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            yield Pictures(rate, images, payload, whole, status)

    def _search(self, arrays: list[np.ndarray]) -> list[dict[int, codecs.Candidate | None]]:
        if self.workers <= 1:
            return [codecs.search(a, self.codec, self.settings) for a in arrays]
        if self._pool is None:
            import multiprocessing
            from concurrent.futures import ProcessPoolExecutor

            self._pool = ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("spawn"))
        jobs = [self._pool.submit(codecs.search, a, self.codec, self.settings) for a in arrays]
        return [job.result() for job in jobs]


class ResizeSystem(System):
    """Shrink and enlarge: what is lost to resolution alone. At the full side it is the upper bound of every metric.

    Args:
        sides: of the small picture, longer edge.
    """

    name = "resize"

    def __init__(self, sides: Sequence[int] = (256,)) -> None:
        self.sides = sorted(set(sides))
        self.rates = [Rate(f"s{side}") for side in self.sides]

    def describe(self) -> dict[str, Any]:
        return {"kind": "resize", "name": "resize", "resample": "bicubic, antialiased"}

    def reconstruct(self, views: Tensor, names: Sequence[str]) -> Iterator[Pictures]:
        size = tuple(views.shape[-2:])
        for side, rate in zip(self.sides, self.rates):
            small = views if side >= size[0] else F.interpolate(views, (side, side), mode="bicubic", antialias=True)
            back = small if small.shape == views.shape else F.interpolate(small, size, mode="bicubic", antialias=True)
            raw = float(3 * small.shape[-1] * small.shape[-2])
            yield Pictures(rate, back, [raw] * len(views), [raw] * len(views), ["ok"] * len(views))


class FolderSystem(System):
    """Reconstructions made elsewhere: files named as the images they show, at the size of the view.

    Args:
        folder: of PNG files (lossy ones are counted as they are and said so), named ``<id>.<suffix>``.
        bytes_of: JSON file {id: bytes} of what each picture cost; unknown if None.
    """

    def __init__(self, folder: Path, bytes_of: Path | None = None) -> None:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder of reconstructions")
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        self.files = {str(p.relative_to(folder).with_suffix("")): p for p in files}
        self.lossy = sum(p.suffix.lower() != ".png" for p in files)
        self.folder, self.name, self.rates = folder, folder.name, [Rate("files")]
        try:
            self.cost: dict[str, float] = json.loads(bytes_of.read_text()) if bytes_of else {}
        except (OSError, ValueError) as error:
            raise TokError(f"{bytes_of}: cannot be read ({error}); it should be JSON, {{id: bytes}}") from error

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps([[k, p.stat().st_size] for k, p in sorted(self.files.items())]).encode())
        return {"kind": "folder", "name": self.name, "files": len(self.files), "lossy_files": self.lossy, "listing": digest.hexdigest()[:16]}

    def reconstruct(self, views: Tensor, names: Sequence[str]) -> Iterator[Pictures]:
        from tok1d.image_io import read_uint8

        images, status = torch.zeros_like(views), []
        for i, name in enumerate(names):
            path = self.files.get(name) or self.files.get(str(Path(name).with_suffix("")))
            try:
                if path is None:
                    raise ImageError("missing reconstruction")
                picture = read_uint8(path)[0]
                if picture.shape != views[i].shape:
                    raise ImageError(f"reconstruction is {picture.shape[-2]}×{picture.shape[-1]}, the view {views.shape[-2]}×{views.shape[-1]}")
                images[i] = picture
                status.append("ok")
            except ImageError as error:
                status.append(str(error))
        cost = [float(self.cost.get(name, float("nan"))) for name in names]
        yield Pictures(self.rates[0], images, cost, cost, status)
