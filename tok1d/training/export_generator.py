"""Turn a training run of a generator into a folder: averaged weights, config.json (its tokenizer and classes are in it), a card."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tok1d.disk import atomic_write
from tok1d.errors import UsageError
from tok1d.generators.condition import ClassCondition
from tok1d.generators.generator import Generator
from tok1d.sources import is_ours
from tok1d.tokenizers.folder import CONFIG_NAME, WEIGHTS_NAME
from tok1d.training.card import table, training_lines
from tok1d.training.export import check_fits, fill, find_checkpoint, is_published, load_plain, parts_of


@dataclass
class GeneratorRun:
    """What is known about a run, see :class:`tok1d.training.card.Run`."""

    generator: Generator
    step: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    images: int = 0


def holds_generator(source: Path) -> bool:
    """Whether a path is a generator's folder, or a run or checkpoint of one; looks at no weights."""
    if is_ours(source):
        try:
            config = json.loads((source / CONFIG_NAME).read_text())
        except (OSError, ValueError):
            return False
        return isinstance(config, dict) and "space" in config
    if not source.exists() or is_published(source):
        return False
    try:
        checkpoint = torch.load(find_checkpoint(source), map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whatever is wrong with it is said where it is read in earnest
        return False
    return isinstance(checkpoint, dict) and "generator_config" in checkpoint


def load_generator_run(source: Path) -> GeneratorRun:
    """Read a run folder or checkpoint of ``tok fit``, or a generator's folder.

    Raises:
        ModelError: neither, damaged, or weights that do not fit their configuration or are not finite.
    """
    if is_ours(source):
        return GeneratorRun(Generator.from_pretrained(source))
    path = find_checkpoint(source)
    config, state, kept = parts_of(path, load_plain(path), "generator")
    generator = Generator.from_config(config)
    fill(generator, state, path)
    return GeneratorRun(generator.eval(), **kept)


def export_generator(
    source: Path, out: Path, *, name: str | None = None, dtype: str = "float32", scores: Path | None = None, overwrite: bool = False
) -> None:
    """Write ``out``/config.json, weights and README.md.

    Args:
        source: run folder, checkpoint or generator's folder.
        out: folder to write.
        name: in the card; that of the folder if None.
        dtype: ``float32`` or ``float16``, of the stored weights.
        scores: result of ``tok eval generate``, shown in the card.
        overwrite: replace an existing model.

    Raises:
        UsageError: ``out`` holds a model already and ``overwrite`` is False, or ``scores`` is not what it should be.
        ModelError: the run cannot be read, or its weights do not fit into float16.
    """
    held = [n for n in (CONFIG_NAME, WEIGHTS_NAME, "README.md") if (out / n).exists()]
    if held and not overwrite:
        raise UsageError(f"{out} holds {held[0]} already; use -f to replace it, or name another folder")
    measured = _read_scores(scores) if scores else {}
    run, kind = load_generator_run(source), getattr(torch, dtype)
    check_fits(run.generator, kind)
    run.generator.save_pretrained(out, dtype=kind)
    atomic_write(out / "README.md", generator_card(run, name or out.resolve().name, dtype, measured).encode())


def generator_card(run: GeneratorRun, name: str, dtype: str, scores: dict[str, Any]) -> str:
    """Markdown: what it is, how to use it, how it was trained, how well it does."""
    model, space = run.generator, run.generator.space
    bits = f" of {space.bits} bits, {space.bits_per_image:,} bits an image" if space.kind != "latents" else f", latents of width {space.channels}"
    rows = {
        "Makes": (f"1 to {space.tokens}" if space.lengths is None and space.nested else ", ".join(map(str, space.allowed[-8:]))) + f" tokens{bits}",
        "Tokenizer": f"{space.tokenizer} {space.model_id}".rstrip(),
        "Told": _told(model),
        "Class": type(model).__name__,
        "Parameters": f"{sum(p.numel() for p in model.parameters()):,}, stored as {dtype}",
    }
    ask = {"label": " --class 0", "text": ' --prompt "…"'}.get(model.condition.takes, "")
    lines = [f"# {name}", "", f"Makes images as tokens of the 1D tokenizer {space.tokenizer}, with tok1d (`tok export`).", ""]
    lines += ["```", f"tok generate FOLDER{ask} -n 16 --seed 0 -o samples/", "```", "", "## Model", "", *table(rows)]
    if isinstance(model.condition, ClassCondition) and model.condition.names:
        lines += ["Classes: " + ", ".join(f"{i} {label}" for i, label in enumerate(model.condition.names)) + ".", ""]
    lines += training_lines(run) + _score_lines(scores)
    return "\n".join(lines).rstrip() + "\n"


def _told(model: Generator) -> str:
    condition = model.condition
    if isinstance(condition, ClassCondition):
        return f"one of {condition.classes} classes"
    return {"text": "a description"}.get(condition.takes, "nothing")


def _read_scores(path: Path) -> dict[str, Any]:
    """The result of ``tok eval generate``.

    Raises:
        UsageError: unreadable, or of another form.
    """
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        _score_lines(scores)
    except (OSError, ValueError) as error:
        raise UsageError(f"--scores {path}: cannot be read ({error})") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--scores {path}: not the result of tok eval generate ({type(error).__name__}: {error})") from error
    return scores


def _score_lines(scores: dict[str, Any]) -> list[str]:
    if not scores:
        return []
    asked = scores["asked"]
    how = ", ".join(f"{key} {value}" for key, value in asked["options"].items() if value is not None)
    head = f"{asked['samples']} samples, {scores['features']['id']}, {scores['reference']['images']} images to compare with" + (f"; {how}" if how else "")
    rows = {name: f"{value:.4g}" for name, value in scores["results"].items() if isinstance(value, int | float)}
    return ["## Scores", "", f"{head}.", "", *table(rows)]
