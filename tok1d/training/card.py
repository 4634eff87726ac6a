"""Model cards: Markdown made from what a run recorded and what was measured, never by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tok1d.errors import UsageError
from tok1d.tokenizers.tokenizer import Tokenizer1D


@dataclass
class Run:
    """What is known about a run (finished or interrupted).

    Attributes:
        tokenizer: with the averaged weights where the run averaged.
        step: optimizer steps taken; None where only the model is known.
        settings: how it was trained, plain data, {} if unknown.
        seconds: time spent in training steps, over all interruptions; 0 if unknown.
        images: training images seen, with repetitions; 0 if unknown.
    """

    tokenizer: Tokenizer1D
    step: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    images: int = 0


def read_scores(path: Path) -> dict[str, Any]:
    """The JSON of benchmarks/default_scores.py: ``protocol`` and ``sets`` with a ``curve`` each; ``notes`` may be added.

    Raises:
        UsageError: unreadable, or of another form.
    """
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        _score_lines(scores)
    except (OSError, ValueError) as error:
        raise UsageError(f"--scores {path}: cannot be read ({error})") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--scores {path}: not the result of a scoring program ({type(error).__name__}: {error}). It needs 'protocol' and "
            "'sets', each with a 'curve' of tokens, bits, psnr and lpips, as benchmarks/default_scores.py writes"
        ) from error
    return scores


def model_card(run: Run, dtype: str, scores: dict[str, Any]) -> str:
    """Markdown: what it is, how to use it, how it was trained, how well it does.

    Args:
        run: what was trained.
        dtype: of the stored weights.
        scores: from :func:`read_scores`, or {}.
    """
    tok = run.tokenizer
    parts = (tok.encoder, tok.quantizer, tok.decoder, tok.lengths)
    height, width = tok.image_size
    rows = {
        "Input": f"RGB {height} × {width}, float in [0, 1]",
        "Output": _output(tok),
        "Parts": " × ".join(type(part).__name__ for part in parts),
        "Parameters": f"{sum(p.numel() for p in tok.parameters()):,}, stored as {dtype}",
    }
    lines = [f"# {tok.name}", "", _sentence(tok), "", *_usage(tok), "## Model", "", *table(rows)]
    lines += training_lines(run)
    lines += _score_lines(scores) if scores else []
    return "\n".join(lines).rstrip() + "\n"


def _sentence(tok: Tokenizer1D) -> str:
    kind = "nested discrete" if tok.is_nested and tok.is_discrete else "discrete" if tok.is_discrete else "continuous"
    more = " Fewer tokens are a prefix of more: a file can be cut short and still decodes." if tok.is_nested else ""
    return f"A {kind} 1D image tokenizer, made with tok1d (`tok export`).{more}"


def _output(tok: Tokenizer1D) -> str:
    most = f"any number of tokens from 1 to {tok.max_tokens}" if tok.is_nested else f"{tok.max_tokens} tokens"
    if not tok.is_discrete:
        return f"{tok.max_tokens} latents of width {tok.quantizer.code_dim}"
    bits = tok.max_tokens * tok.bits_per_token
    return f"{most} of {tok.bits_per_token} bits (vocabulary {tok.vocab_size:,}); at most {bits:,} bits, {-(-bits // 8):,} bytes an image"


def _usage(tok: Tokenizer1D) -> list[str]:
    if not tok.is_discrete:
        return []
    keep = f", tokens={min(32, tok.max_tokens)}" if tok.is_nested else ""
    return [
        "```python",
        "import tok1d",
        'tok = tok1d.load("FOLDER")  # this one',
        f'seq = tok.encode(tok1d.read("photo.jpg"){keep}, policy="resize")',
        'tok1d.write("again.png", tok.decode(seq)[0])',
        "```",
        "",
    ]


def training_lines(run: Any) -> list[str]:
    """The section on the training of a run; one that has ``step``, ``settings``, ``seconds`` and ``images``."""
    if run.step is None:
        return []
    s, data = run.settings, run.settings.get("data", {})
    batch = data.get("batch_size", 0) * s.get("devices", 1) * s.get("accumulate_grad_batches", 1)
    clip = f", gradients clipped at {s['gradient_clip_val']}" if s.get("gradient_clip_val") else ""
    rows = {
        "Steps": f"{run.step:,}" + (f" of {batch} images" if batch else ""),
        "Images seen": f"{run.images:,}" if run.images else "",
        "Training images": f"{data['images']:,}, crops of {data['size']} × {data['size']}" if data.get("images") else "",
        "Time": _duration(run.seconds),
        "Hardware": s.get("hardware", ""),
        "Losses": " + ".join(f"{w:g} {name}" + _start(name, s) for name, w in s.get("weights", {}).items()),
        "Optimizer": f"AdamW, learning rate {s['lr']:g}, {s['warmup_steps']} warm-up steps, cosine to {s['final_lr']:g} of it, "
        f"weight decay {s['weight_decay']:g}{clip}" if "lr" in s else "",
        "Window": f"the decoder was trained on squares of {s['window']} pixels" if s.get("window") else "",
        "Precision": s.get("precision", ""),
        "Seed": str(s.get("seed", "")),
    }  # fmt: skip
    return ["## Training", "", *table({k: v for k, v in rows.items() if v})]


def _start(name: str, settings: dict[str, Any]) -> str:
    step = settings.get("starts", {}).get(name, 0)
    return f" (from step {step:,})" if step else ""


def _score_lines(scores: dict[str, Any]) -> list[str]:
    protocol = scores["protocol"]
    lines = ["## Scores", "", f"Protocol {protocol['id']}: {protocol.get('view', '')}.", ""]
    for found in scores["sets"]:
        count = f"{found['images']} images" + (f" of {found['of']}" if found.get("of", found["images"]) != found["images"] else "")
        lines += [f"### {found['set']} ({count})", "", "| tokens | bits | .tok file, bytes | PSNR, dB | LPIPS (VGG) |", "|--:|--:|--:|--:|--:|"]
        for row in found["curve"]:
            size = row.get("file_bytes", "")
            lines.append(f"| {row['tokens']} | {row['bits']} | {size} | {row['psnr']['mean']:.2f} | {row['lpips']['mean']:.3f} |")
        lines.append("")
    lines += [f"{note}\n" for note in scores.get("notes", [])]
    return lines


def table(rows: dict[str, str]) -> list[str]:
    """Lines of a table with two columns."""
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]


def _duration(seconds: float) -> str:
    """``""`` for 0.

    Example:
        >>> _duration(42), _duration(5400), _duration(0)
        ('42 seconds', '1 h 30 min', '')
    """
    if not seconds:
        return ""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} seconds" if seconds < 600 else f"{minutes // 60} h {minutes % 60} min"
