"""Features of sets of images: read, cropped, through a network once, and kept for the next time.

Shapes: n images, D features, K classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tok1d.data.index import Sample, fingerprint, read_sample
from tok1d.data.photos import centre_crop, decode_rgb
from tok1d.errors import ImageError, TokError

if TYPE_CHECKING:
    from tok1d.eval.features import FeatureNet


@dataclass
class Pictures:
    """Features of a set of images.

    Attributes:
        keys: of those that could be read.
        features: float32 (n, D).
        logits: float32 (n, K) of the network's own classes, or None.
        broken: key and reason of those that could not.
        data: hash of keys and sizes of all.
    """

    keys: list[str]
    features: Tensor
    logits: Tensor | None
    broken: list[tuple[str, str]]
    data: str


def pictures_of(
    samples: Sequence[Sample],
    net: FeatureNet,
    size: int,
    *,
    batch_size: int = 16,
    readers: int = 2,
    cache: Path | None = None,
    strict: bool = False,
    progress: Callable[[int, int], Any] | None = None,
) -> Pictures:
    """Features of images, as centre crops of one size.

    Args:
        samples: where they lie.
        net: of the features.
        size: of the crops.
        batch_size, readers: images at once, and threads that read them.
        progress: called with images done and their number.
        cache: folder that keeps them.
        strict: images that cannot be read are an error rather than left out.

    Raises:
        TokError: an unreadable image where ``strict``, or none that can be read.
    """
    data = fingerprint(samples)
    key = hashlib.sha256(f"{data} {net.id} {size}".encode()).hexdigest()[:16]
    path = None if cache is None else cache / f"{key}.safetensors"
    if path is not None and path.is_file():
        return _load(path, data)

    def read(sample: Sample) -> Tensor | str:
        try:
            return centre_crop(decode_rgb(read_sample(sample)), size)
        except (ImageError, OSError) as error:
            if strict:
                raise TokError(f"{sample.file}: {error}") from error
            return " ".join(str(error).split())

    keys: list[str] = []
    broken: list[tuple[str, str]] = []
    parts: list[dict[str, Tensor]] = []
    with ThreadPoolExecutor(readers) as pool:
        for start in range(0, len(samples), batch_size):
            part = samples[start : start + batch_size]
            views = list(pool.map(read, part))
            good = [v for v in views if isinstance(v, Tensor)]
            keys += [s.key for s, v in zip(part, views) if isinstance(v, Tensor)]
            broken += [(s.key, v) for s, v in zip(part, views) if isinstance(v, str)]
            if good:
                parts.append({name: value.cpu().float() for name, value in net.features(torch.stack(good)).items()})
            if progress is not None:
                progress(min(start + batch_size, len(samples)), len(samples))
    if not parts:
        raise TokError(f"none of {len(samples)} images could be read: {broken[0][0]} ({broken[0][1]}) …")
    whole = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
    found = Pictures(keys, whole["pooled"], whole.get("logits"), broken, data)
    if path is not None:
        _save(path, found)
    return found


def _save(path: Path, found: Pictures) -> None:
    from safetensors.torch import save

    from tok1d.disk import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"features": found.features.contiguous()} | ({} if found.logits is None else {"logits": found.logits.contiguous()})
    atomic_write(path, save(tensors, metadata={"keys": json.dumps(found.keys), "broken": json.dumps(found.broken)}))


def _load(path: Path, data: str) -> Pictures:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            notes, names = file.metadata() or {}, set(file.keys())
            keys, broken = json.loads(notes["keys"]), [(k, r) for k, r in json.loads(notes["broken"])]
            found = Pictures(keys, file.get_tensor("features"), file.get_tensor("logits") if "logits" in names else None, broken, data)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TokError(f"{path}: damaged cache of features ({error}); remove it") from error
    if found.features.ndim != 2 or len(found.features) != len(keys):
        raise TokError(f"{path}: damaged cache of features; remove it")
    return found
