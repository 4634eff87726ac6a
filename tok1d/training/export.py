"""Turn a training run into a model folder: averaged weights, config.json and a generated card.

Lightning checkpoints stay private to training; they are read with weights-only unpickling, and what users load is
safetensors + JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tok1d.errors import ModelError, UsageError
from tok1d.tokenizers.tokenizer import CONFIG_NAME, Tokenizer1D


@dataclass
class Run:
    """What is known about a finished (or interrupted) run.

    Attributes:
        tokenizer: with the averaged weights where the run averaged.
        step: optimizer steps taken.
        settings: the YAML configuration of the run as plain data, {} if it was not found.
    """

    tokenizer: Tokenizer1D
    step: int
    settings: dict[str, Any]


def find_checkpoint(source: Path) -> Path:
    """The checkpoint itself, or the newest one under a run folder.

    Raises:
        ModelError: there is none.
    """
    if source.is_file():
        return source
    found = sorted(source.rglob("*.ckpt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ModelError(f"{source} holds no checkpoint (*.ckpt); give the run folder or a checkpoint of 'tok fit'")
    return found[-1]


def load_run(source: Path) -> Run:
    """Read a checkpoint written by ``tok fit``.

    Raises:
        ModelError: not such a checkpoint, damaged, or its weights do not fit its configuration.
    """
    path = find_checkpoint(source)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes
        raise ModelError(f"{path} is not a checkpoint that can be read safely: {str(error).splitlines()[0]}") from error
    if not isinstance(checkpoint, dict) or "tokenizer_config" not in checkpoint or "state_dict" not in checkpoint:
        raise ModelError(f"{path} was not written by 'tok fit' (no tokenizer_config in it)")
    tokenizer = Tokenizer1D.from_config(checkpoint["tokenizer_config"])
    prefix = "tokenizer."
    state: dict[str, Tensor] = {
        k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)
    }
    try:
        tokenizer.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{path}: weights do not fit the configuration stored beside them: {error}") from error
    bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise ModelError(f"{path}: {bad[0]} and {len(bad) - 1} more hold NaN or infinity; export an earlier checkpoint")
    return Run(tokenizer.eval(), int(checkpoint["global_step"]), checkpoint.get("run_settings", {}))


def export(
    source: Path,
    out: Path,
    *,
    name: str | None = None,
    dtype: str = "float32",
    scores: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write ``out``/config.json, weights and README.md from a run or checkpoint.

    Args:
        source: run folder or checkpoint.
        out: folder to write.
        name: of the model; that of the configuration if None.
        dtype: ``float32`` or ``float16``, of the stored weights.
        scores: JSON written by benchmarks/default_scores.py, shown in the card.
        overwrite: replace an existing model.

    Raises:
        UsageError: ``out`` holds a model already and ``overwrite`` is False.
        ModelError: the run cannot be read.
    """
    if (out / CONFIG_NAME).exists() and not overwrite:
        raise UsageError(f"{out} holds a model already; use -f to replace it")
    run = load_run(source)
    if name:
        run.tokenizer.name = name
    measured = json.loads(scores.read_text()) if scores else {}
    run.tokenizer.save_pretrained(out, dtype=getattr(torch, dtype))
    from tok1d.tokfile import atomic_write

    atomic_write(out / "README.md", model_card(run, dtype, measured).encode())


def model_card(run: Run, dtype: str, measured: dict[str, Any]) -> str:
    """Markdown card of a run, from its configuration and measured scores alone."""
    tok = run.tokenizer
    count = sum(p.numel() for p in tok.state_dict().values())
    lengths = f"any of 1 to {tok.max_tokens}" if tok.is_nested else f"exactly {tok.max_tokens}"
    rows = [
        ("Input", f"RGB {tok.image_size[0]} × {tok.image_size[1]}, float in [0, 1]"),
        ("Tokens", f"{lengths}, {tok.bits_per_token} bits each, vocabulary {tok.vocab_size}"),
        ("Parts", " × ".join(type(p).__name__ for p in (tok.encoder, tok.quantizer, tok.decoder, tok.lengths))),
        ("Values stored", f"{count:,} ({dtype})"),
        ("Steps", f"{run.step:,}"),
        *((str(k).capitalize(), str(v)) for k, v in measured.get("training", {}).items()),
    ]
    lines = [f"# {tok.name}", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows), ""]
    for table in measured.get("tables", []):
        lines += [f"## {table['title']}", "", table["protocol"], ""]
        head = list(table["rows"][0])
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(_cell(row[h]) for h in head) + " |" for row in table["rows"]] + [""]
    lines += [f"{note}\n" for note in measured.get("notes", [])]
    if run.settings:
        lines += ["## Configuration", "", "```json", json.dumps(run.settings, indent=1), "```", ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
