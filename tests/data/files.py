"""Small photo files for tests: folders and WebDataset shards of drawn images."""

import io
import tarfile
from pathlib import Path

from tok1d.data.drawn import DrawnImages
from tok1d.image_io import to_bytes


def encoded(count: int, size: int = 24, suffix: str = ".png", seed: int = 0) -> dict[str, bytes]:
    """File name → bytes of ``count`` drawn images; heights differ from widths."""
    images = DrawnImages(count, size, seed)
    return {f"{i:03d}{suffix}": to_bytes(images[i]["image"][:, : size - i % 3], suffix) for i in range(count)}


def folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def shard(path: Path, files: dict[str, bytes]) -> Path:
    """A shard with a caption beside each image, as WebDataset has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            for member, content in ((name, data), (name.rsplit(".", 1)[0] + ".txt", b"a picture")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


