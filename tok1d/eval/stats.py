"""Reference statistics: moments of the real images in a feature space, made once and reused.

The file names what it is of — data, view, network, profile — and is refused for anything else, because a Fréchet distance against
another crop or resize is another number. Its name in the cache is a hash of these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tok1d.errors import ImageError, TokError, UsageError
from tok1d.eval.frechet import Moments, Sums
from tok1d.eval.manifest import Manifest
from tok1d.eval.measures import GRID
from tok1d.eval.protocol import Protocol, differences
from tok1d.eval.view import make_view

if TYPE_CHECKING:
    from tok1d.eval.features import FeatureNet

VIEW = ("size", "fit", "resample")  # what of a protocol decides the pictures


def key(manifest: Manifest, protocol: Protocol, net_id: str) -> dict[str, Any]:
    """What statistics are of."""
    view = {k: v for k, v in asdict(protocol).items() if k in VIEW}
    return {"data": manifest.hash, "images": len(manifest), "view": view, "net": net_id}


def file_name(of: dict[str, Any]) -> str:
    """Name in the cache."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:20] + ".safetensors"


def make_reference(
    manifest: Manifest,
    protocol: Protocol,
    net: FeatureNet,
    folder: Path,
    *,
    batch_size: int = 32,
    readers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the moments of a manifest's views into ``folder`` and return the file; one that is there already is kept.

    Raises:
        TokError: an image cannot be read (a reference of fewer images would be another one), or fewer than two images.
    """
    of = key(manifest, protocol, net.id)
    path = folder / file_name(of)
    if path.is_file():
        return path
    sums: Sums | None = None
    with ThreadPoolExecutor(readers) as pool:
        for start in range(0, len(manifest), batch_size):
            part = manifest.samples[start : start + batch_size]
            try:
                views = torch.stack(list(pool.map(lambda s: make_view(manifest.read(s), protocol)[0], part)))
            except ImageError as error:
                raise TokError(f"reference statistics need every image: {error}") from error
            pooled = net.features(views)["pooled"].cpu().double()
            pooled = (pooled / GRID).round() * GRID
            if sums is None:
                sums = Sums.of(pooled)
            else:
                sums.update(pooled)
            if progress:
                progress(min(start + batch_size, len(manifest)), len(manifest))
    if sums is None or sums.n < 2:
        raise TokError(f"{manifest.name}: reference statistics need at least 2 images, there are {len(manifest)}")
    folder.mkdir(parents=True, exist_ok=True)
    sums.moments().save(path, of=json.dumps(of), name=manifest.name)
    return path


def load_reference(path: Path, net_id: str, protocol: Protocol) -> Moments:
    """Moments from a file of :func:`make_reference`.

    Raises:
        TokError: damaged or another file.
        UsageError: made with another network or view (spelt out).
    """
    from safetensors import SafetensorError, safe_open

    moments = Moments.load(path)
    try:
        with safe_open(path, "pt") as file:
            of = json.loads((file.metadata() or {})["of"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise TokError(f"{path}: does not say what it is of ({error}); make it with tok eval stats") from error
    view = {k: v for k, v in asdict(protocol).items() if k in VIEW}
    found = differences({"net": of["net"], "view": of["view"]}, {"net": net_id, "view": view})
    if found:
        raise UsageError(f"{path}: made differently from what is measured here: {'; '.join(found)}")
    return moments
