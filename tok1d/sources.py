"""Where a model may come from: what its name means and which files of a folder are its weights. Imports nothing heavy."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tok1d.errors import ModelError

CONFIG = "config.json"
OUR_WEIGHTS = "diffusion_pytorch_model.safetensors"
OUR_HEAD = "halting.safetensors"  # beside it, if config.json has a part "halting"
OUR_FILES = (CONFIG, OUR_WEIGHTS)
INDEX = "model.safetensors.index.json"
STANDARD_WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin")  # of published models, in the order they are looked for
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")

_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+))?")


@dataclass(frozen=True)
class HubName:
    """``owner/name@revision:file``, revision and file optional."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return self.repo + (f":{self.file}" if self.file else "")


def hub_name(text: str) -> HubName | None:
    """The parts of a hub id, None if ``text`` is none.

    Example:
        >>> hub_name("owner/name@v1:weights/model.bin")
        HubName(repo='owner/name', revision='v1', file='weights/model.bin')
        >>> hub_name("weights/model.bin") is None
        True
    """
    found = _HUB.fullmatch(text)
    if found is None or (found["file"] is None and Path(text).suffix in SUFFIXES):
        return None
    if found["file"] and (found["file"].startswith("/") or ".." in found["file"].split("/")):
        return None
    return HubName(found["repo"], found["revision"], found["file"])


def is_ours(folder: Path) -> bool:
    """Whether a folder was written by ``save_pretrained`` or ``tok export``."""
    return all((folder / name).is_file() for name in OUR_FILES)


def weights_in(folder: Path) -> Path | None:
    """The published weights in a folder: a standard name, else the only weights file, else the only model.safetensors below.

    Raises:
        ModelError: several files, none of a standard name.
    """
    for name in STANDARD_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    loose = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file() and p.name != OUR_WEIGHTS)
    below = sorted(folder.glob(f"*/{STANDARD_WEIGHTS[0]}"))
    found = only([str(p) for p in loose] or [str(p) for p in below], str(folder))
    return Path(found) if found else None


def only(files: list[str], where: str) -> str | None:
    """The one file, or None of none.

    Raises:
        ModelError: several.
    """
    if len(files) > 1:
        some = ", ".join(files[:6]) + (" …" if len(files) > 6 else "")
        raise ModelError(f"{where} holds several models: give one file, of {some}")
    return files[0] if files else None


def shard_names(index: Path) -> dict[str, str]:
    """Tensor name → file beside the index, of a model in several files.

    Raises:
        ModelError: not such an index, or one that names files elsewhere.
    """
    try:
        names = json.loads(index.read_text("utf-8"))["weight_map"]
        plain = all(isinstance(n, str) and n == Path(n).name and n.endswith(".safetensors") for n in names.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index}: not an index of shards ({str(error)[:100]}); download it again") from error
    if not plain or not names:
        raise ModelError(f"{index}: its weight_map must name safetensors files in the same folder")
    return dict(names)
