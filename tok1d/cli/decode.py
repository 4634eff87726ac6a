"""``tok decode``: tokens to images, brought back to their original size; several images in a file become a folder."""

from __future__ import annotations

import io
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tok1d.cli import options
from tok1d.cli.paths import TOKEN_FORMATS, Item, check_targets, expand, is_folder, plan, safe_name
from tok1d.cli.runtime import (
    PER_INPUT,
    Report,
    count,
    decode_options,
    for_rows,
    load_model,
    ordered,
    report_for,
    say,
    together_or_alone,
)
from tok1d.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from tok1d.tokenizers.tokenizer import Tokenizer1D
    from tok1d.tokfile import Record

EPILOG = """examples:
  tok decode photo.tok -o again.png
  tok decode photo.tok --tokens 8 -o coarse.png   from the first 8 tokens only
  tok decode tokens/ -o images/ --format jpg
"""


def add_parsers(verbs: Any) -> None:
    parser = options.add_verb(verbs, "decode", run, "turn token files back into images", EPILOG)
    parser.add_argument("inputs", nargs="+", metavar="TOKENS", help="files (.tok .jsonl .npz .safetensors), folders, quoted globs, or - for .tok on standard input")
    options.add_output(parser, "beside the token file; for -, standard output")
    parser.add_argument("--format", metavar="SUFFIX", help="png, jpg, webp, …; default: by the suffix of OUT, else png")
    parser.add_argument("--tokens", type=options.positive_int, metavar="N", help="use the first N tokens only (nested models)")
    parser.add_argument("--model-size", action="store_true", help="leave images at the model's size instead of undoing the size policy")
    options.add_sampling(parser)
    options.add_model(parser)
    options.add_json(parser)


@dataclass
class Piece:
    """One image to be decoded: record ``index`` of an input, and the file it goes to (None: standard output)."""

    item: Item
    index: int
    target: Path | None
    several: bool

    @property
    def label(self) -> str:
        return f"{self.item.label} #{self.index}" if self.several else self.item.label


@dataclass
class Decoded:
    """Rows float (tiles, 3, h, w) at the model's size, still to be restored and written."""

    piece: Piece
    record: Record
    rows: Tensor


def run(args: Namespace) -> int:
    suffix = _suffix(args)
    source = Source(expand(args.inputs, TOKEN_FORMATS, "token files"))
    planned = plan(source.items, args.output, suffix) if args.output is None or args.output == "-" or is_folder(args.output) else None
    pieces: list[Piece] = []
    broken: list[tuple[Item, BaseException]] = []
    for i, item in enumerate(source.items):
        try:
            names = [safe_name(r.meta.get("name")) for r in source.records(item)]
        except PER_INPUT as error:
            broken.append((item, error))
            continue
        target = planned[i].target if planned else Path(args.output)
        pieces += _pieces(item, names, target, suffix, args.output)
    if planned is None and len(source.items) > 1:
        raise UsageError(f"{len(source.items)} inputs cannot share the output {args.output}: give a folder, -o {Path(args.output).stem}/")
    if args.json and any(p.target is None for p in pieces):
        raise UsageError("--json and the image cannot both go to standard output; write the image to a file, -o FILE")
    check_targets([(p.label, p.target) for p in pieces], [i.path for i in source.items], may_exist=args.force or args.skip_existing)
    if args.skip_existing:
        kept = [p for p in pieces if p.target is not None and p.target.is_file()]
        pieces = [p for p in pieces if not (p.target is not None and p.target.is_file())]
        if kept and not args.quiet:
            say(f"{len(kept)} existing outputs are kept")

    silent = any(p.target is None for p in pieces)
    report = report_for(args, len(pieces) + len(broken), "images", silent_stdout=silent)
    for item, trouble in broken:
        report.fail(item.label, trouble)
    if pieces:
        _decode_all(load_model(args), pieces, source, args, suffix, report)
    return report.close()


def _suffix(args: Namespace) -> str:
    """The suffix of the images, with its dot."""
    given = f".{args.format.lstrip('.').lower()}" if args.format else None
    named = args.output if args.output and args.output != "-" and not is_folder(args.output) else None
    found = Path(named).suffix.lower() if named else None
    if given and found and given != found:
        raise UsageError(f"--format {args.format}, but -o {args.output} ends in {found}")
    suffix = given or found or ".png"
    from PIL import Image

    if Image.registered_extensions().get(suffix) not in Image.SAVE:
        raise UsageError(f"no image format is known for the suffix {suffix!r}; use png, jpg, webp, avif, tiff or bmp (a folder ends in /)")
    return suffix


def _pieces(item: Item, names: list[str | None], target: Path | None, suffix: str, output: str | None) -> list[Piece]:
    """One record goes to the target itself; several go to a folder of its name, under their own names if they have any."""
    if len(names) == 1:
        return [Piece(item, 0, target, several=False)]
    if target is None or (output is not None and not is_folder(output)):
        raise UsageError(f"{item.label} holds {len(names)} images: give a folder, -o out/")
    files = [Path(name).with_suffix(suffix) if name else None for name in names]
    if None in files or len(set(files)) < len(files):
        files = [Path(f"{i:05d}{suffix}") for i in range(len(names))]
    return [Piece(item, i, target.with_suffix("") / str(file), several=True) for i, file in enumerate(files)]


class Source:
    """Token files, read record by record as often as needed (standard input is kept: it comes only once)."""

    def __init__(self, items: list[Item]) -> None:
        self.items = items
        self.stdin: bytes | None = None

    def records(self, item: Item) -> Iterator[Record]:
        """The records of one input.

        Raises:
            TokFileError: damaged, or no token file.
        """
        from tok1d import tokfile

        if item.path is None:
            if self.stdin is None:
                self.stdin = sys.stdin.buffer.read()
            yield from tokfile.iter_records(io.BytesIO(self.stdin), name="standard input")
        elif TOKEN_FORMATS.get(item.path.suffix.lower(), "tok") == "tok":
            yield from tokfile.iter_file(item.path)
        else:
            from tok1d.token_formats import read_tokens

            yield from tokfile.records_of(read_tokens(item.path))


def _decode_all(model: Tokenizer1D, pieces: list[Piece], source: Source, args: Namespace, suffix: str, report: Report) -> None:
    """Decode in batches, restore and write in threads; every piece ends in the report."""
    from tok1d.disk import atomic_write
    from tok1d.image_io import to_bytes, unfit

    options = decode_options(model, args)

    def write(found: tuple[Piece, Decoded | BaseException]) -> dict[str, Any]:
        piece, decoded = found
        if isinstance(decoded, BaseException):
            raise decoded
        g = None if args.model_size else decoded.record.geometry
        image = decoded.rows[:1] if g is None and len(decoded.rows) == 1 else unfit(decoded.rows, (g,) if g else _tiles_apart(decoded))[0]
        data = to_bytes(image, suffix)
        if piece.target is None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            piece.target.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(piece.target, data)
        return {
            "input": piece.item.label,
            "record": piece.index,
            "output": "-" if piece.target is None else str(piece.target),
            "tokens": min(decoded.record.tokens, args.tokens or decoded.record.tokens),
            "height": image.shape[-2],
            "width": image.shape[-1],
            "bytes": len(data),
            "model": model.name,
        }

    start, workers = time.monotonic(), min(4, os.cpu_count() or 1)
    decoded = _batches(model, pieces, source, args, options)
    for (piece, _), row in ordered(write, decoded, workers, workers + 1):
        if isinstance(row, BrokenPipeError):
            raise row
        if isinstance(row, BaseException):
            report.fail(piece.label, row)
        else:
            report.ok(row, f"{piece.label} → {row['output']}: {row['height']}×{row['width']} from {count(row['tokens'], 'token')}")
    if len(pieces) > 1 and not args.quiet:
        report.progress.clear()
        seconds = time.monotonic() - start
        say(f"{len(pieces)} images, {seconds:.1f} s ({len(pieces) / max(seconds, 1e-9):.1f}/s)")


def _batches(
    model: Tokenizer1D, pieces: list[Piece], source: Source, args: Namespace, options: dict[str, Any]
) -> Iterator[tuple[Piece, Decoded | BaseException]]:
    """Records of the same kind, about ``--batch-size`` rows at once, decoded; in the order of the pieces."""

    def decode(batch: Sequence[tuple[Piece, Record]]) -> list[Decoded]:
        return decode_batch(model, batch, args.tokens, args.batch_size, options)

    waiting: list[tuple[Piece, Record]] = []
    for piece, record in _wanted(pieces, source):
        if isinstance(record, BaseException):
            yield from _pairs(decode, waiting)
            waiting = []
            yield piece, record
            continue
        first = waiting[0][1] if waiting else record
        same = (record.vocab_size, record.model_id, record.bits is None) == (first.vocab_size, first.model_id, first.bits is None)
        if waiting and (not same or sum(r.tiles for _, r in waiting) + record.tiles > args.batch_size):
            yield from _pairs(decode, waiting)
            waiting = []
        waiting.append((piece, record))
    yield from _pairs(decode, waiting)


def _pairs(decode: Any, waiting: list[tuple[Piece, Record]]) -> Iterator[tuple[Piece, Decoded | BaseException]]:
    if waiting:
        yield from ((piece, result) for (piece, _), result in together_or_alone(decode, waiting))


def _wanted(pieces: list[Piece], source: Source) -> Iterator[tuple[Piece, Record | BaseException]]:
    """The records of the pieces, each input read once more from its start."""
    by_item: dict[Item, dict[int, Piece]] = {}
    for piece in pieces:
        by_item.setdefault(piece.item, {})[piece.index] = piece
    for item, wanted in by_item.items():
        try:
            for index, record in enumerate(source.records(item)):
                if index in wanted:
                    yield wanted.pop(index), record
        except PER_INPUT as error:  # it was whole a moment ago: somebody changed it
            yield from ((piece, error) for piece in wanted.values())


def decode_batch(
    model: Tokenizer1D,
    batch: Sequence[tuple[Piece, Record]],
    tokens: int | None,
    rows_at_once: int,
    options: dict[str, Any],
) -> list[Decoded]:
    """Decode some records to images at the model's size, their tiles apart; ``options`` of the decoder."""
    from dataclasses import replace

    import torch

    from tok1d.image_io import check_restorable
    from tok1d.tokfile import stack_rows

    records = [record for _, record in batch]
    check_restorable([r.geometry for r in records if r.geometry is not None], model.image_size)
    first = records[0]
    seq = stack_rows(
        [row[:tokens] for r in records for row in r.data],
        vocab_size=first.vocab_size, model_id=first.model_id, geometry=None, nested=all(r.nested for r in records),
    )  # fmt: skip
    seq = replace(seq, geometry=None)
    chunks = [seq[i : i + rows_at_once] for i in range(0, len(seq), rows_at_once)]
    parts = [model.decode(chunk, **for_rows(options, len(chunk))) for chunk in chunks]
    images = torch.cat([p if isinstance(p, torch.Tensor) else torch.stack(p) for p in parts]).cpu()
    ends = [sum(r.tiles for r in records[: i + 1]) for i in range(len(records))]
    return [Decoded(piece, record, images[end - record.tiles : end]) for (piece, record), end in zip(batch, ends)]


def _tiles_apart(decoded: Decoded) -> tuple[Any, ...]:
    """The geometry that only puts tiles together, for ``--model-size`` of a tiled image."""
    from dataclasses import replace

    g = decoded.record.geometry
    assert g is not None
    h, w = decoded.rows.shape[-2:]
    return (replace(g, height=g.rows * h, width=g.cols * w),)
