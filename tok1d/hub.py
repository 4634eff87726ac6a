"""Find models: by name (shipped in the package or published), by folder or file, or by hub id, and load them.

Our own folders are safetensors and plain JSON. Published weights of the families in :mod:`tok1d.tokenizers.official` are
recognised by the names and shapes of their tensors; pickles among them are opened with weights-only unpickling. Nothing that
is downloaded is ever executed. torch is imported by :func:`load` alone, so that tables and cards cost nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tok1d import licences
from tok1d.errors import ModelError, UsageError
from tok1d.presets import PRESETS, Placed, Preset
from tok1d.sources import CONFIG, OUR_FILES, OUR_WEIGHTS, SUFFIXES, HubName, hub_name, is_ours, weights_in

if TYPE_CHECKING:
    import torch

    from tok1d.tokenizers.tokenizer import Tokenizer1D

FILTERS = ("nested", "variable", "fixed", "continuous", "research", "free")


@dataclass(frozen=True)
class Found:
    """A model on this machine.

    Attributes:
        path: folder of ours, folder of published files, or one weights file.
        name: what it is called.
        ours: whether it is a folder of ours.
        preset: its row in the table that was asked, if it came by one: a :class:`tok1d.presets.Preset` or another row with a place.
    """

    path: Path
    name: str
    ours: bool
    preset: Any = None


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    accept_license: bool = False,
    layout: str | None = None,
    options: dict[str, Any] | None = None,
) -> Tokenizer1D:
    """Load a tokenizer, ready to encode and decode.

    Args:
        source: a name of :func:`list_models` (``default`` ships inside the package); a folder written by
            ``save_pretrained`` or ``tok export``; published weights of a known family, as a folder with or without
            ``config.json`` or as one file (``.safetensors``, or a pickle of tensors: ``.bin .pth .pt .ckpt``); or a hub
            id of either, ``owner/name``, ``owner/name@revision``, ``owner/name:file``.
        device: where it runs.
        dtype: of encoder and decoder (``torch.bfloat16`` …); quantizers stay float32, where ids are decided.
        revision: branch, tag or commit, for hub ids and published names only.
        accept_license: needed to fetch weights that are licensed for research only (:mod:`tok1d.licences`).
        layout: family of published weights (``titok-legacy`` …); None recognises it.
        options: entries of the published configuration to replace or add, by name or dotted path:
            ``{"scaling_factor": 0.5}``.

    Raises:
        ModelError: unknown name, unusable files, another family, a licence not accepted, or a hub that cannot be reached.

    Example:
        >>> load("default").is_nested
        True
    """
    found = find(source, revision=revision, accept_license=accept_license)
    return load_found(found, device=device, dtype=dtype, layout=layout, options=options)


def load_found(
    found: Found,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    layout: str | None = None,
    options: dict[str, Any] | None = None,
) -> Tokenizer1D:
    """Load what :func:`find` found; arguments as :func:`load`."""
    if found.ours:
        from tok1d.tokenizers.tokenizer import Tokenizer1D

        if layout or options:
            raise UsageError(f"{found.name} is a model folder of tok1d with a configuration of its own: layout and options are for published weights")
        model = Tokenizer1D.from_pretrained(found.path)
    else:
        from tok1d.tokenizers.official import load_published

        known = found.preset
        family, model = load_published(
            found.path,
            name=found.name,
            layout=layout or (known.layout if known else None),
            options={**(known.options if known else {}), **(options or {})},
        )
        licences.announce_layout(family)
    if dtype is not None:
        model.encoder.to(dtype)
        model.decoder.to(dtype)
    return model.to(device)


def list_models(containing: str = "") -> list[Preset]:
    """Models that can be loaded by name.

    Args:
        containing: keep those with this word in their name, description, place or licence; ``nested``, ``fixed``,
            ``continuous``, ``research`` (only) and ``free`` (licence) choose by kind.
    """
    word = containing.lower()
    if word in FILTERS:
        kinds = {"nested": "nested", "variable": "nested", "continuous": "continuous", "research": "research_only"}
        if word in kinds:
            return [p for p in PRESETS if getattr(p, kinds[word])]
        return [p for p in PRESETS if not (p.nested if word == "fixed" else p.research_only)]
    return [p for p in PRESETS if word in f"{p.name} {p.description} {p.where} {p.layout} {p.licence}".lower()]


def resolve(source: str | Path, *, revision: str | None = None, accept_license: bool = False) -> Path:
    """The local folder or file of a model, downloaded first if need be; imports no torch.

    Raises:
        ModelError: as :func:`load`.
    """
    return find(source, revision=revision, accept_license=accept_license).path


def find(
    source: str | Path,
    *,
    revision: str | None = None,
    accept_license: bool = False,
    progress: bool = True,
    cached: bool = False,
    table: Sequence[Placed] | None = None,
) -> Found:
    """Where a model is on this machine, downloaded first if need be; imports no torch.

    Args:
        source, revision, accept_license: as :func:`load`.
        progress: whether downloads show bars on a terminal.
        cached: fetch nothing, and ask for no licence: only what is on this machine already.
        table: rows that have names, as :data:`tok1d.generators.presets.GENERATORS`; those of tokenizers if None.

    Raises:
        ModelError: as :func:`load`.
    """
    text, table = str(source), PRESETS if table is None else table
    preset = next((p for p in table if p.name == text), None)
    if preset is not None and preset.where == "package":
        folder = _checked(_shipped(text), text)
        return Found(folder, text, True, preset)
    path = Path(text).expanduser()
    if preset is None and path.is_dir():
        return Found(_checked(path, text), path.resolve().name, is_ours(path))
    if preset is None and path.is_file():
        if path.suffix not in SUFFIXES:
            raise ModelError(f"{text} is not a file of weights ({', '.join(SUFFIXES)})")
        return Found(path, _file_name(path), False)
    hub = hub_name(preset.hub_id if preset is not None else text)
    if isinstance(source, Path) or hub is None:
        raise ModelError(_unknown(text, table))
    if hub.revision and revision and hub.revision != revision:
        raise UsageError(f"{text} names revision {hub.revision}, and revision={revision} was given: choose one")
    preset, hub = preset_of(hub, table) if preset is None else (preset, hub)
    hub = replace(hub, revision=revision or hub.revision)
    # A file beside those of the table is no less under the licence of its repository.
    terms = preset or next((p for p in (*table, *PRESETS) if p.repository == hub.repo), None)
    if terms is not None and not cached:
        licences.require_acceptance(terms, accept_license)
    return _fetched(hub, preset, progress, cached)


def preset_of(hub: HubName, table: Sequence[Placed]) -> tuple[Placed | None, HubName]:
    """The row of a hub id and the file it means: a repository the table knows by one file stands for that file.

    Raises:
        ModelError: the repository has several models in the table.
    """
    entries = {where.removeprefix("hub:"): p for p in table for where in (p.where, *p.also) if where.startswith("hub:")}
    if str(hub) in entries:
        return entries[str(hub)], hub
    files = [name for name in entries if name.startswith(f"{hub.repo}:")]
    if hub.file or not files:
        return None, hub
    if len(files) > 1:
        raise ModelError(f"{hub.repo} holds several models: give one, of {', '.join(sorted(files))}")
    return entries[files[0]], replace(hub, file=files[0].partition(":")[2])


def _fetched(hub: HubName, preset: Placed | None, progress: bool, cached: bool) -> Found:
    from tok1d.download import fetch

    pinned = preset if preset is not None and preset.hub_id == str(hub) else None  # not its copies elsewhere
    if pinned is not None and hub.revision is None:
        hub = replace(hub, revision=pinned.revision)
    sha256 = pinned.sha256 if pinned is not None and hub.revision == pinned.revision else None
    ours = preset is None and not hub.file
    path = fetch(hub, ours=ours, sha256=sha256, progress=progress, cached=cached)
    ours = path.is_dir() and is_ours(path)
    if path.is_dir() and not ours:
        _checked(path, str(hub))
    name = preset.name if preset else _file_name(path) if hub.file else hub.repo.rpartition("/")[2]
    return Found(path, name, ours, preset)


def _file_name(path: Path) -> str:
    """A file by its own name, or by its folder's where every model is called so."""
    return path.resolve().parent.name if path.stem in ("model", "pytorch_model") else path.stem


def _shipped(name: str) -> Path:
    return Path(str(resources.files("tok1d") / "weights" / name))


def _checked(folder: Path, name: str) -> Path:
    """The folder, if it holds a model of ours or published weights."""
    if is_ours(folder):
        return folder
    if (folder / OUR_WEIGHTS).is_file() or weights_in(folder) is None:
        missing = [f for f in OUR_FILES if not (folder / f).is_file()]
        raise ModelError(
            f"{name}: no model there, {' and '.join(missing)} missing in {folder}; published weights are model.safetensors, "
            f"pytorch_model.bin, or one other file ({', '.join(SUFFIXES)}), {CONFIG} beside them if there is one"
        )
    return folder


def _unknown(name: str, table: Sequence[Placed]) -> str:
    if Path(name).suffix in SUFFIXES:
        return f"{name}: no such file"
    from tok1d.generators.presets import GENERATORS

    tokenizers = table is PRESETS
    if name in (p.name for p in (GENERATORS if tokenizers else PRESETS)):
        if tokenizers:
            return f"{name} is a generator, which makes tokens: tok generate {name}"
        return f"{name} is a tokenizer, which encodes and decodes; a generator for its tokens is needed (tok generate --help names some)"
    close = difflib.get_close_matches(re.sub(r"[\s_]+", "-", name.lower()), [p.name for p in table], n=1, cutoff=0.5)
    guess = f"; did you mean {close[0]!r}?" if close else "."
    what, names = ("model", "tok models") if tokenizers else ("generator", "tok generate --help")
    return f"no {what}, folder or file {name!r}{guess} Names: {names}. Else give a folder, a weights file, or a hub id owner/name"
