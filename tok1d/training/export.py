"""Turn a training run, or published weights, into a model folder: averaged weights, config.json and a generated card; or
a model into the files of a published family.

Lightning checkpoints stay private to training; they are read with weights-only unpickling, and what users load is
safetensors + JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tok1d import hub
from tok1d.disk import atomic_write
from tok1d.errors import ModelError, UsageError
from tok1d.presets import Preset
from tok1d.sources import INDEX, SUFFIXES, is_ours
from tok1d.tokenizers.folder import CONFIG_NAME, WEIGHTS_NAME
from tok1d.tokenizers.official.write import write_published
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.card import Run, model_card, read_scores


def find_checkpoint(source: Path) -> Path:
    """The checkpoint itself, or the newest one under a run folder.

    Raises:
        ModelError: there is none.
    """
    if source.is_file():
        return source
    found = sorted(source.rglob("*.ckpt"), key=lambda p: p.stat().st_mtime)
    if not found:
        what = "holds no checkpoint (*.ckpt)" if source.is_dir() else "does not exist"
        raise ModelError(f"{source} {what}; give the run folder or a checkpoint of 'tok fit', or a model folder")
    return found[-1]


def is_published(source: Path) -> bool:
    """Whether a path holds published weights rather than a run; a run folder holds checkpoints (.ckpt)."""
    if source.is_file():
        return source.suffix in SUFFIXES and source.suffix != ".ckpt"
    return any((p.suffix in SUFFIXES and p.suffix != ".ckpt") or p.name == INDEX for p in source.glob("*"))


def load_run(source: Path) -> Run:
    """Read a run folder or checkpoint of ``tok fit``, a model folder (to store it otherwise or add scores), or published
    weights of a known family.

    Raises:
        ModelError: neither, damaged, or weights that do not fit their configuration or are not finite.
    """
    if is_ours(source):
        return Run(Tokenizer1D.from_pretrained(source))
    if is_published(source):
        return Run(hub.load(source))
    path = find_checkpoint(source)
    checkpoint = load_plain(path)
    if "tokenizer_config" not in checkpoint and "run_settings" not in checkpoint:
        return Run(hub.load(path))  # a checkpoint of somebody else's training, perhaps of a known family
    config, state, kept = parts_of(path, checkpoint, "tokenizer")
    tokenizer = Tokenizer1D.from_config(config)
    fill(tokenizer, state, path)
    return Run(tokenizer.eval(), **kept)


def parts_of(path: Path, checkpoint: dict[str, Any], kind: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Of a checkpoint of ``tok fit``: configuration, weights, and step, settings, seconds and images.

    Args:
        path: of the checkpoint, for messages.
        checkpoint: what :func:`load_plain` read.
        kind: what was trained, ``tokenizer`` or ``generator``.

    Raises:
        ModelError: these are not in it.
    """
    step, settings, state, config = (checkpoint.get(k) for k in ("global_step", "run_settings", "state_dict", f"{kind}_config"))
    plain = isinstance(config, dict) and isinstance(state, dict) and isinstance(step, int)
    if not plain or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ModelError(f"{path} was not written by 'tok fit' (no {kind}_config and weights in it)")
    weights = {k.removeprefix(f"{kind}."): v for k, v in state.items() if k.startswith(f"{kind}.")}
    spent = _throughput(checkpoint)
    known = settings if isinstance(settings, dict) else {}
    kept = {"step": step, "settings": known, "seconds": float(spent.get("seconds", 0)), "images": int(spent.get("images", 0))}
    return config, weights, kept


def fill(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load the weights of a checkpoint into a model.

    Raises:
        ModelError: they do not fit, or are not finite.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(f"{path}: weights do not fit the configuration stored beside them: {error}") from error
    bad = [k for k, v in weights.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise ModelError(f"{path}: {bad[0]} and {len(bad) - 1} more hold NaN or infinity; export an earlier checkpoint")


def load_plain(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint that holds tensors and plain data; a pickle with anything else in it is refused, not run.

    Raises:
        ModelError: missing, damaged, or not such a file.
    """
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such checkpoint") from error
    except Exception as error:  # whatever a damaged or hostile file provokes
        first = str(error).strip().split("\n")[0]
        raise ModelError(f"{path} is not a checkpoint that can be read safely ({type(error).__name__}: {first[:200]})") from error
    if not isinstance(checkpoint, dict):
        raise ModelError(f"{path} is not a checkpoint but a {type(checkpoint).__name__}")
    return checkpoint


def export(
    source: str | Path,
    out: Path,
    *,
    name: str | None = None,
    dtype: str = "float32",
    scores: Path | None = None,
    overwrite: bool = False,
    layout: str | None = None,
    revision: str | None = None,
    accept_license: bool = False,
) -> None:
    """Write ``out``/config.json, weights and README.md, of a tokenizer or a generator; for a published layout, what its readers take.

    Args:
        source: run folder, checkpoint, model folder, or anything :func:`tok1d.load` takes.
        out: folder to write.
        name: of the model; that of the configuration if None.
        dtype: ``float32`` or ``float16``, of the stored weights.
        scores: JSON written by benchmarks/default_scores.py, or of a generator by ``tok eval generate``, shown in the card.
        overwrite: replace an existing model.
        layout: a published family (``titok-legacy`` …) instead of our own folder; there is no card then.
        revision, accept_license: as :func:`tok1d.load`, of a source on the hub.

    Raises:
        UsageError: ``out`` holds a model already and ``overwrite`` is False, or ``scores`` is not what it should be.
        ModelError: the run cannot be read, or its weights do not fit into float16.
    """
    from tok1d.training.export_generator import export_generator, holds_generator

    if holds_generator(Path(source)):
        if layout:
            raise UsageError(f"{source} is a generator; --layout writes tokenizers")
        export_generator(Path(source), out, name=name, dtype=dtype, scores=scores, overwrite=overwrite)
        return
    names = (CONFIG_NAME, "model.safetensors") if layout else (CONFIG_NAME, WEIGHTS_NAME, "README.md")
    held = [n for n in names if (out / n).exists()]
    if layout and scores:
        raise UsageError("--scores go into the card of our own folder; --layout writes none")
    if held and not overwrite:
        raise UsageError(f"{out} holds {held[0]} already; use -f to replace it, or name another folder")
    measured = read_scores(scores) if scores else {}
    preset = None
    if Path(source).exists() or isinstance(source, Path):
        run = load_run(Path(source))
    else:
        found = hub.find(source, revision=revision, accept_license=accept_license)
        run, preset = Run(hub.load_found(found)), found.preset
    if name:
        run.tokenizer.name = name
    kind: torch.dtype = getattr(torch, dtype)
    check_fits(run.tokenizer, kind)
    if layout:
        write_published(run.tokenizer, layout, out, dtype=kind)
        return
    run.tokenizer.save_pretrained(out, dtype=kind)
    atomic_write(out / "README.md", (model_card(run, dtype, measured) + _origin(preset)).encode())


def check_fits(model: nn.Module, dtype: torch.dtype) -> None:
    """Refuse to round weights to infinity.

    Raises:
        ModelError: one is too large for the precision they are to be stored in.
    """
    name = str(dtype).removeprefix("torch.")
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value.to(dtype)).all():
            raise ModelError(f"{key} does not fit into {name} (largest value {value.abs().max():.4g}); use --dtype float32")


def _origin(preset: Preset | None) -> str:
    """The card's section about published weights; they keep their licence."""
    if preset is None or not preset.hub_id:
        return ""
    terms = " (for research only)" if preset.research_only else ""
    return (
        f"\n## Origin\n\nConverted from the published weights {preset.url}, licence of the weights: "
        f"{preset.licence}{terms}. Paper: {preset.paper}, code: {preset.code}\n"
    )


def _throughput(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the Throughput callback counted, {} for runs without it."""
    callbacks = checkpoint.get("callbacks")
    found = callbacks.get("Throughput") if isinstance(callbacks, dict) else None
    return found if isinstance(found, dict) else {}
