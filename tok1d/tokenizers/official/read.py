"""Published weights from disk: state dict, configuration and safetensors header, as plain data; nothing in them is run.

    folder     model.safetensors, or its shards by model.safetensors.index.json, or pytorch_model.bin, or the only weights
               file there; config.json beside it is optional
    one file   .safetensors, or a pickle of tensors: .bin .pth .pt .ckpt

Pickles are opened with torch's weights-only unpickler, which knows tensors and plain containers and runs nothing; whatever
else a file holds is named and refused. Weights inside a training checkpoint are found: under ``ema``, ``state_dict``,
``model`` or ``module`` (the first of them there is, at any depth; averaged weights are the published ones), and
the prefixes ``module.``, ``_orig_mod.`` and ``model.`` that wrappers put before every name are taken off.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tok1d.errors import ModelError
from tok1d.sources import CONFIG, INDEX, STANDARD_WEIGHTS, shard_names, weights_in
from tok1d.tokenizers.official.interpolate import interpolate

WRAPPERS = ("ema", "state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.", "model.")
MOST_CONFIG_BYTES = 4_000_000


@dataclass(frozen=True)
class Published:
    """What was published.

    Attributes:
        state: tensors by published name, on the CPU; backed by the file where it allows that.
        config: configuration without references, {} if none; the header of a safetensors file is its ``__metadata__``.
        path: the weights file.
    """

    state: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(value.shape) for key, value in self.state.items()}


def read(source: Path) -> Published:
    """Read a folder or a file.

    Raises:
        ModelError: nothing there, damaged, a pickle with more than tensors and plain data, or a configuration that
            cannot be resolved.
    """
    file = weights_in(source) if source.is_dir() else source
    if file is None or not file.is_file():
        raise ModelError(f"{source}: no weights there (model.safetensors, pytorch_model.bin or one other weights file)")
    metadata: dict[str, str] = {}
    if file.name == INDEX:
        state = _read_shards(file)
    elif file.suffix == ".safetensors":
        state, metadata = _read_safetensors(file)
    else:
        state = unwrap(read_pickle(file), str(file))
    state = strip_prefixes(state)
    beside = source if source.is_dir() else file.parent if file.name in STANDARD_WEIGHTS else None
    config = read_config(beside / CONFIG) if beside is not None and (beside / CONFIG).is_file() else {}
    return Published(state, {**config, **({"__metadata__": metadata} if metadata else {})}, file)


def read_config(path: Path) -> dict[str, Any]:
    """config.json with its references resolved.

    Raises:
        ModelError: not JSON, not a tree, or references that cannot be followed.
    """
    try:
        if path.stat().st_size > MOST_CONFIG_BYTES:
            raise ModelError(f"{path}: {path.stat().st_size:,} bytes are no configuration (at most {MOST_CONFIG_BYTES:,})")
        tree = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a JSON file that can be read ({str(error)[:120]}); download it again") from error
    if not isinstance(tree, dict):
        raise ModelError(f"{path}: a configuration is a JSON object, got {type(tree).__name__}")
    return interpolate(tree)


def read_pickle(path: Path) -> Any:
    """The tensors and plain containers of a pickle, mapped rather than read where its format allows.

    Raises:
        ModelError: missing, damaged, or anything else in it, which is named and was not run.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; what cannot be read is an error
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file") from error
    except Exception as error:  # whatever a damaged or hostile file provokes
        # The unpickler's own text recommends weights_only=False, which would run the file: it is not passed on.
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ModelError(
                f"{path} holds {named[1]}, not only tensors and plain data; it was not run. Only weights are opened: save the "
                "state dict alone, best as safetensors (safetensors.torch.save_file), on a machine where you trust the file"
            ) from error
        raise ModelError(
            f"{path} is not a file of tensors that can be read safely ({type(error).__name__}): damaged, or a pickle of another "
            "kind. Download it again, or convert it to safetensors where you trust it"
        ) from error


def unwrap(found: Any, label: str) -> dict[str, Tensor]:
    """The state dict inside what a pickle held.

    Raises:
        ModelError: none, or entries that are no tensors.
    """
    for _ in range(8):
        if isinstance(found, dict) and "tokenizer_config" in found and "state_dict" in found:
            raise ModelError(f"{label} is a training checkpoint of 'tok fit': tok export turns it into a model folder")
        inner = next((found[key] for key in WRAPPERS if isinstance(found.get(key), dict)), None) if isinstance(found, dict) else None
        if inner is None:
            break
        found = inner
    if not isinstance(found, dict) or not any(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(f"{label} holds no state dict, neither bare nor under {', '.join(WRAPPERS)}")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ModelError(f"{label}: entry {key!r:.80} of the state dict is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_quantized:
            raise ModelError(f"{label}: {key} is a sparse or quantized tensor; save it dense, in floating point")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ModelError(f"{label}: {key} of shape {tuple(value.shape)} stands for more numbers than the file holds")
    return dict(found)


def strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without what a wrapper put before all of its names."""
    while prefix := next((p for p in PREFIXES if state and all(key.startswith(p) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({str(error)[:120]}); download it again") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    """All shards that an index names; they lie beside it."""
    names = shard_names(index)
    state: dict[str, Tensor] = {}
    for name in sorted(set(names.values())):
        state |= _read_safetensors(index.parent / name)[0]
    if state.keys() != names.keys():
        odd = sorted(state.keys() ^ names.keys())[0]
        raise ModelError(f"{index}: {odd} is in the index or in the shards, not in both; download the model again")
    return state
