"""A folder of samples: pictures, their tokens, a contact sheet, and a JSON of every setting that made them.

    OUT/0207-00003.png .tok   class 207, seed 3; a prompt has eight hex digits of its SHA-256 in the place of the class
    OUT/sheet.png             a row for each class or prompt
    OUT/samples.json          settings with the ids of both models, then what every file shows

A row depends on its own class or prompt and seed alone, so a folder grows: what is there already is kept, as long as the settings
are the same. Every file is written at once or not at all.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tok1d import tokfile
from tok1d.disk import atomic_write
from tok1d.errors import TokError, UsageError
from tok1d.generators.condition import ClassCondition, Condition
from tok1d.generators.generator import Generator
from tok1d.generators.images import paint, tokens_of
from tok1d.image_io import to_bytes
from tok1d.tokens import TokenSequence

if TYPE_CHECKING:
    from tok1d.tokenizers.tokenizer import Tokenizer1D

FORMAT = "tok1d.samples/1"
RECORD, SHEET = "samples.json", "sheet.png"


@dataclass(frozen=True)
class Wanted:
    """One sample.

    Attributes:
        seed: of its tokens, and of its decoder's noise where there is any.
        label: class by number, -1 for none in particular; None where the generator takes none.
        text: prompt, or None.
        shown: what a person calls it: class name, prompt, or nothing.
    """

    seed: int
    label: int | None = None
    text: str | None = None
    shown: str = ""

    @property
    def name(self) -> str:
        """Of its files."""
        asked = "" if self.label is None else f"{self.label:04d}-" if self.label >= 0 else "none-"
        if self.text is not None:
            asked = hashlib.sha256(self.text.encode()).hexdigest()[:8] + "-"
        return f"{asked}{self.seed:05d}"

    def row(self) -> dict[str, Any]:
        """Plain data."""
        found = {"file": f"{self.name}.png", "seed": self.seed, "label": self.label, "class": self.shown or None, "text": self.text}
        if self.text is not None:
            del found["class"]
        return {key: value for key, value in found.items() if value is not None}


def wanted_of(condition: Condition, n: int, seed: int = 0, labels: Sequence[Any] = (), texts: Sequence[str] = ()) -> list[Wanted]:
    """``n`` samples for each class or prompt, with seeds ``seed``, ``seed`` + 1, … for each.

    Args:
        condition: of the generator.
        labels: classes by number or name; ``all`` stands for every one.
        texts: prompts.

    Raises:
        TokenError: no such class, a prompt that is too long, or a condition that takes something else.
    """
    if isinstance(condition, ClassCondition):
        every = list(range(condition.classes))
        chosen = [i for label in labels for i in (every if label == "all" else [condition.index(label)])]
        condition.request(max(1, len(chosen)), chosen or None, list(texts) or None)
        named = {i: condition.names[i] if condition.names and i >= 0 else "" for i in chosen}
        return [Wanted(seed + j, label, None, named[label]) for label in dict.fromkeys(chosen) for j in range(n)]
    given = list(texts) or None
    condition.request(max(1, len(texts)), list(labels) or None, given)
    if given is None:
        return [Wanted(seed + j) for j in range(n)]
    return [Wanted(seed + j, None, text, text) for text in dict.fromkeys(given) for j in range(n)]


def settings_of(generator: Generator, tokenizer: Tokenizer1D, tokens: int | None, options: dict[str, Any], decoder: dict[str, Any]) -> dict[str, Any]:
    """What samples depend on beside their own class or prompt and seed, plain data."""
    return {
        "generator": {"class": type(generator).__name__, "model_id": f"{generator.model_id:016x}"},
        "tokenizer": {"name": tokenizer.name, "model_id": f"{tokenizer.model_id:016x}"},
        "kind": generator.space.kind,
        "tokens": generator.space.check_tokens(tokens),
        "options": dict(sorted({**generator.sampling, **options}.items())),
        "decoder": dict(sorted(decoder.items())),
    }


def begin(out: Path, settings: dict[str, Any], wanted: Sequence[Wanted], *, overwrite: bool = False) -> tuple[dict[str, Any], list[Wanted]]:
    """Open a folder of samples.

    Args:
        out: made if missing.
        settings: of :func:`settings_of`.
        wanted: what will be in it.
        overwrite: make everything anew.

    Returns:
        Its record so far, and the samples that are still to be made.

    Raises:
        UsageError: it holds samples made with other settings, or files that are none of ours.
    """
    record = {"format": FORMAT, "settings": settings, "runs": [], "images": []}
    held = read_record(out) if (out / RECORD).exists() and not overwrite else None
    names = [w for w in wanted if (out / f"{w.name}.png").exists()]
    if held is None and names and not overwrite:
        raise UsageError(f"{out} holds {names[0].name}.png, and no {RECORD} that says how it was made; choose another folder, or -f to overwrite")
    if held is not None:
        different = _differences(held["settings"], settings)
        if different:
            raise UsageError(f"{out} holds samples made with other settings ({different}); choose another folder, or -f to overwrite")
        record = held
    whole = [".png"] if settings["kind"] == "latents" else [".png", ".tok"]
    missing = [w for w in wanted if overwrite or not all((out / f"{w.name}{suffix}").is_file() for suffix in whole)]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TokError(f"{out} cannot be written: {error}") from error
    _store(out, record)
    return record, missing


def read_record(out: Path) -> dict[str, Any]:
    """``samples.json`` of a folder.

    Raises:
        TokError: missing, damaged or another file.
    """
    try:
        found = json.loads((out / RECORD).read_bytes())
        good = found["format"] == FORMAT and isinstance(found["settings"], dict)
        good = good and isinstance(found["runs"], list) and all(isinstance(row["file"], str) and isinstance(row["seed"], int) for row in found["images"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TokError(f"{out / RECORD} cannot be read as the record of tok generate ({type(error).__name__}: {error})") from error
    if not good:
        raise TokError(f"{out / RECORD} is not the record of tok generate ({FORMAT}), or is damaged")
    return found


def make(
    generator: Generator,
    tokenizer: Tokenizer1D,
    wanted: Sequence[Wanted],
    *,
    tokens: int | None,
    options: dict[str, Any],
    decoder: dict[str, Any],
    batch_size: int = 16,
) -> Iterator[tuple[Wanted, Tensor, TokenSequence | None]]:
    """Samples one by one: what was wanted, float (3, H, W) in [0, 1], its tokens (None for latents that have none).

    Args:
        generator, tokenizer: that fit each other.
        wanted: as :func:`wanted_of`.
        tokens: how many to make of each.
        options: of :meth:`Generator.generate`.
        decoder: options of the tokenizer's decoder.
        batch_size: rows at once.
    """
    for start in range(0, len(wanted), batch_size):
        part = wanted[start : start + batch_size]
        asked: dict[str, Any] = {}
        if part[0].label is not None:
            asked["label"] = [w.label for w in part]
        if part[0].text is not None:
            asked["text"] = [w.text for w in part]
        seeds = [w.seed for w in part]
        made = generator.generate(len(part), tokens=tokens, seeds=seeds, **asked, **options)
        pictures, seq = paint(tokenizer, made, seeds=seeds, **decoder).cpu(), tokens_of(tokenizer, made)
        seq = None if seq is None else seq.to("cpu")
        for i, one in enumerate(part):
            yield one, pictures[i], None if seq is None else seq[i : i + 1]


def _row(out: Path, wanted: Wanted) -> dict[str, Any]:
    """What the record says of a sample whose files are there."""
    path = out / f"{wanted.name}.tok"
    if not path.is_file():
        return wanted.row()
    return {**wanted.row(), "tokens": next(tokfile.iter_file(path)).tokens, "bytes": path.stat().st_size}


def store(out: Path, wanted: Wanted, picture: Tensor, seq: TokenSequence | None) -> dict[str, Any]:
    """Write the files of one sample; its row."""
    if seq is not None:
        assert seq.lengths is not None
        atomic_write(out / f"{wanted.name}.tok", tokfile.pack(seq[:, : int(seq.lengths[0])]))
    atomic_write(out / f"{wanted.name}.png", to_bytes(picture, ".png"))
    return _row(out, wanted)


def finish(out: Path, record: dict[str, Any], wanted: Sequence[Wanted], rows: Sequence[dict[str, Any]], seconds: float, device: str) -> dict[str, Any]:
    """Write the record of a folder whose samples are all there; returns it."""
    from tok1d import __version__

    held = {row["file"]: row for row in record["images"]}
    held |= {f"{w.name}.png": _row(out, w) for w in wanted if f"{w.name}.png" not in held}  # of a run that was killed
    held |= {row["file"]: row for row in rows}
    run = {
        "images": len(rows), "seconds": round(seconds, 3), "images_per_second": round(len(rows) / max(seconds, 1e-9), 3), "device": device,
        "threads": torch.get_num_threads(), "machine": f"{platform.system()} {platform.machine()}", "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "tok1d": __version__, "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    record = {**record, "runs": record["runs"] + ([run] if rows else []), "images": sorted(held.values(), key=lambda row: row["file"])}
    _store(out, record)
    return record


def sheet(out: Path, wanted: Sequence[Wanted], *, columns: int = 8, rows: int = 32, height: int = 128) -> None:
    """Draw the contact sheet of a folder: at most so many samples of a class or prompt, and so many rows.

    Classes with few samples share a row; a single one, or none, fills the sheet row by row.
    """
    from tok1d.cli.grid import Cell, draw
    from tok1d.image_io import read_uint8, write

    groups: dict[Any, list[Wanted]] = {}
    for w in wanted:
        groups.setdefault((w.label, w.text), []).append(w)
    shown = [group[:columns] for group in groups.values()] if len(groups) > 1 else [list(wanted)]
    most = max(len(group) for group in shown)
    flat, wide = [w for group in shown for w in group], most * (columns // most) if most < columns else columns
    lines = [flat[i : i + wide] for i in range(0, len(flat), wide)]

    def cell(w: Wanted) -> Cell:
        known = w.shown or ("" if w.label is None else f"class {w.label}" if w.label >= 0 else "no class")
        title = known if len(known) <= 24 else f"{known[:23]}…"
        return Cell.of(read_uint8(out / f"{w.name}.png")[0], height, [title, f"seed {w.seed}"] if title else [f"seed {w.seed}"])

    write(out / SHEET, draw([[cell(w) for w in line] for line in lines[:rows]]))


def _store(out: Path, record: dict[str, Any]) -> None:
    atomic_write(out / RECORD, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def _differences(a: dict[str, Any], b: dict[str, Any], shorten: Callable[[Any], str] = lambda value: str(value)[:60]) -> str:
    b = json.loads(json.dumps(b))
    return "; ".join(f"{key} {shorten(a.get(key))} ≠ {shorten(b.get(key))}" for key in sorted({*a, *b}) if a.get(key) != b.get(key))
