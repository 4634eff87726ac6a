"""Small manifests for tests of the evaluator."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import torch
from PIL import Image

from tests.dct_model import picture
from tok1d.eval.manifest import Face, Manifest, Sample, Word

KPS = ((3.0, 4.0), (8.0, 4.0), (5.5, 6.0), (3.5, 8.0), (7.5, 8.0))


def png(seed: int = 0, width: int = 24, height: int = 16) -> bytes:
    """The bytes of a PNG file."""
    out = io.BytesIO()
    pixels = (picture(seed, height, width)[0].permute(1, 2, 0) * 255).round().to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(out, "PNG")
    return out.getvalue()


def tar(path: Path, files: dict[str, bytes]) -> Path:
    """An uncompressed tar."""
    with tarfile.open(path, "w:") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def annotated(folder: Path, count: int = 3) -> Manifest:
    """Images of 24 × 16 pixels in ``folder``/images, with words and faces."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    samples = []
    for i in range(count):
        (folder / "images" / f"{i}.png").write_bytes(png(i))
        words = (Word((1, 2, 13, 8), f"wörd{i}", 0.1, tags=("sign",)), Word((4, 9, 20, 15), 'a "b", c', 0.09, ((4, 10), (19, 9), (20, 14), (5, 15))))
        faces = (Face(KPS, 0.4, (2, 2, 10, 11), "somebody"),)
        samples.append(Sample(f"s{i}", f"images/{i}.png", 24, 16, words=words[: i + 1], faces=faces[:i], group="drawn", split="val", tags=("t",)))
    return Manifest("drawn", folder, tuple(samples), "2", "CC0", ("1 word is left out",))


def jsonl(path: Path, *rows: object, head: dict | None = None) -> Path:
    """A manifest file as somebody may have written it."""
    lines = [head or {"manifest": 1, "name": "by hand"}, *rows]
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in lines) + "\n")
    return path
