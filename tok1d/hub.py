"""Find models: by name (shipped in the package or published), by folder, or by hub id, and load them.

Only safetensors and plain JSON are read; nothing that is downloaded is ever executed or unpickled. torch is imported by
:func:`load` alone, so that tables and cards cost nothing.
"""

from __future__ import annotations

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from tok1d.errors import ModelError
from tok1d.presets import PRESETS, Preset

if TYPE_CHECKING:
    import torch

    from tok1d.tokenizers.tokenizer import Tokenizer1D

FILES = ("config.json", "diffusion_pytorch_model.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load(
    name_or_folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> Tokenizer1D:
    """Load a tokenizer, ready to encode and decode.

    Args:
        name_or_folder: a name of :func:`list_models` (``default`` ships inside the package), a folder written by
            ``save_pretrained`` or ``tok export``, or a hub id ``owner/name`` of such a folder.
        device: where it runs.
        dtype: of encoder and decoder (``torch.bfloat16`` …); quantizers stay float32, where ids are decided.
        revision: branch, tag or commit, for hub ids only.

    Raises:
        ModelError: unknown name, unusable folder, or a hub that cannot be reached.

    Example:
        >>> load("default").is_nested
        True
    """
    from tok1d.tokenizers.tokenizer import Tokenizer1D

    model = Tokenizer1D.from_pretrained(resolve(name_or_folder, revision=revision))
    if dtype is not None:
        model.encoder.to(dtype)
        model.decoder.to(dtype)
    return model.to(device)


def list_models(containing: str = "") -> list[Preset]:
    """Models that can be loaded by name.

    Args:
        containing: keep those with this word in their name or description; ``nested`` and ``fixed`` choose by length rule.
    """
    word = containing.lower()
    if word in ("nested", "variable", "fixed"):
        return [p for p in PRESETS if p.nested == (word != "fixed")]
    return [p for p in PRESETS if word in f"{p.name} {p.description} {p.where}".lower()]


def resolve(name_or_folder: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a model, downloaded first if it is a hub id; imports no torch.

    Raises:
        ModelError: as :func:`load`.
    """
    name = str(name_or_folder)
    preset = next((p for p in PRESETS if p.name == name), None)
    if preset is not None and preset.where == "package":
        return _checked(_shipped(name), name)
    folder = Path(name).expanduser()
    if preset is None and folder.is_dir():
        return _checked(folder, name)
    hub_id = preset.where.removeprefix("hub:") if preset is not None else name
    if not isinstance(name_or_folder, Path) and _HUB_ID.fullmatch(hub_id):
        return _checked(_download(hub_id, revision), hub_id)
    raise ModelError(_unknown(name))


def _shipped(name: str) -> Path:
    return Path(str(resources.files("tok1d") / "weights" / name))


def _checked(folder: Path, name: str) -> Path:
    missing = [f for f in FILES if not (folder / f).is_file()]
    if missing:
        pickled = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.ckpt")]
        hint = f"; {pickled[0]} is a pickle and is never opened: tok export turns a training checkpoint into safetensors" if pickled else ""
        raise ModelError(f"{name}: no model there, {' and '.join(missing)} missing in {folder}{hint}")
    return folder


def _unknown(name: str) -> str:
    known = [p.name for p in PRESETS]
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    guess = f"; did you mean {close[0]!r}?" if close else "."
    return f"no model or folder {name!r}{guess} Names: tok models. Else give a folder, or a hub id owner/name"


def _download(hub_id: str, revision: str | None) -> Path:
    """Fetch config, weights and card into the Hugging Face cache (taken from there when offline)."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelError(f"{hub_id}: models on the hub need the package huggingface_hub: pip install huggingface_hub") from error
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=[*FILES, "README.md"]))
    except Exception as error:  # the hub client raises its own, requests', httpx' and OS errors
        raise ModelError(_hub_trouble(hub_id, revision, error)) from error


def _hub_trouble(hub_id: str, revision: str | None, error: Exception) -> str:
    kind = type(error).__name__
    if kind in ("RepositoryNotFoundError", "GatedRepoError", "HFValidationError"):
        return f"{hub_id}: the hub has no such repository, or it is private or gated (then: hf auth login). Names: tok models"
    if kind == "RevisionNotFoundError":
        return f"{hub_id}: the hub has no revision {revision!r} of it"
    cause = str(error).strip().splitlines()[0][:160] if str(error).strip() else kind
    return (
        f"{hub_id}: not a local folder and the hub cannot be reached ({cause}). Offline, only models fetched before can be used; "
        "copy its folder here and give the path, or use a shipped one: tok models"
    )
