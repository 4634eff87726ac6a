"""Small photo files for tests: folders and WebDataset shards of drawn images."""

import io
import json
import tarfile
from pathlib import Path

from tok1d.data.drawn import DrawnImages
from tok1d.image_io import to_bytes


def encoded(count: int, size: int = 24, suffix: str = ".png", seed: int = 0, first: int = 0) -> dict[str, bytes]:
    """File name → bytes of ``count`` drawn images; heights differ from widths."""
    images = DrawnImages(first + count, size, seed)
    return {f"{i:03d}{suffix}": to_bytes(images[i]["image"][:, : size - i % 3], suffix) for i in range(first, first + count)}


def folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def shard(path: Path, files: dict[str, bytes], rows: dict[str, dict] | None = None) -> Path:
    """A shard with a caption beside each image, as WebDataset has them; ``rows`` are .json members by stem instead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            stem = name.rsplit(".", 1)[0]
            beside = (stem + ".txt", b"a picture") if rows is None else (stem + ".json", json.dumps(rows.get(stem, {})).encode())
            for member, content in ((name, data), beside):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def shards(path: Path, counts: list[int], **options) -> list[Path]:
    """Shards of so many images each, with keys 000, 001 … throughout."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [shard(path / f"s-{i:02d}.tar", encoded(n, first=a, **options)) for i, (n, a) in enumerate(zip(counts, starts))]
