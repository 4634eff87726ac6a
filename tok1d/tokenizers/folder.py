"""A tokenizer's folder on disk (config.json + safetensors, the layout of diffusers) and the id of what it holds.

Neither diffusers nor pickle is involved; importing diffusers alone costs seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.tokenizers.part import Part

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
CONFIG_NAME = "config.json"
HALTING = "halting"  # the part that is no part of the id, and its prefix in state dicts
HALTING_NAME = "halting.safetensors"


def write_folder(folder: str | Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write weights, then config.json, each atomically; the folder is made if missing.

    A halting head has a file of its own, so that the model's is the same bytes with and without it.
    """
    from safetensors.torch import save

    from tok1d.tokfile import atomic_write

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    main, head = split_state(state)
    atomic_write(folder / WEIGHTS_NAME, save(main, metadata={"format": "pt"}))
    if head:
        atomic_write(folder / HALTING_NAME, save(head, metadata={"format": "pt"}))
    atomic_write(folder / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], memoryview]:
    """Configuration, weights, and the bytes of the model's weights without the file's header, whose text is free.

    Raises:
        ModelError: files missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        blob = (folder / WEIGHTS_NAME).read_bytes()
        state = load(blob)
        if isinstance(config, dict) and HALTING in config:
            head = load((folder / HALTING_NAME).read_bytes())
            state |= {f"{HALTING}.{key}": value for key, value in head.items()}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        raise ModelError(f"{folder}: cannot be loaded ({error}). A model folder holds {CONFIG_NAME} and {WEIGHTS_NAME}") from error
    return config, state, memoryview(blob)[8 + int.from_bytes(blob[:8], "little") :]


def plain_state(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Contiguous CPU tensors that inference needs, by state dict key, floats cast to ``dtype`` if given."""
    parts = ((path, part) for path, part in model.named_modules() if isinstance(part, Part))
    skipped = {f"{path}.{name}" for path, part in parts for name in part.training_only}
    state = {}
    for key, value in model.state_dict().items():
        if key in skipped:
            continue
        value = value.detach().cpu()
        state[key] = (value.to(dtype) if dtype is not None and value.is_floating_point() else value).contiguous()
    return state


def as_stored(state: dict[str, Tensor], stored: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """The same numbers in the precision they were read in, where that loses nothing: the model then keeps its id.

    Args:
        state: of :func:`plain_state`.
        stored: dtype by key, {} of a model that was not read.
    """
    found = {key: value.to(stored.get(key, value.dtype)) for key, value in state.items()}
    return found if all(torch.equal(found[key].to(value.dtype), value) for key, value in state.items()) else state


def split_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict → that of the model, and that of its halting head with plain keys, {} if it has none."""
    prefix = f"{HALTING}."
    head = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in state.items() if not key.startswith(prefix)}, head


def chunks_of(state: dict[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of contiguous CPU tensors in the order in which a safetensors file has them, without a copy of them all."""
    from safetensors.torch import save

    like = save({key: torch.empty(1, dtype=value.dtype, device="cpu") for key, value in state.items()})
    header = json.loads(like[8 : 8 + int.from_bytes(like[:8], "little")])
    for key in sorted(state, key=lambda name: header[name]["data_offsets"][0]):
        yield memoryview(state[key].reshape(-1).view(torch.uint8).numpy())


def fingerprint(config: dict[str, Any], chunks: Iterable[memoryview]) -> int:
    """64 bits of SHA-256 over the architecture and the tensor bytes; a halting head changes nothing that ids mean."""
    parts = {k: v for k, v in config.items() if k not in ("name", HALTING)}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for chunk in chunks:
        digest.update(chunk)
    return int.from_bytes(digest.digest()[:8], "big") or 1
