"""``tok info`` and ``tok truncate``: what token files say about themselves (and model folders), and shorter ones.

Imports no torch for .tok.
"""

from __future__ import annotations

import io
import json
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tok1d.cli import options
from tok1d.cli.decode import Source
from tok1d.cli.paths import TOKEN_FORMATS, Item, check_targets, expand, plan
from tok1d.cli.runtime import PER_INPUT, report_for
from tok1d.sources import STANDARD_WEIGHTS, SUFFIXES, is_ours

if TYPE_CHECKING:
    from tok1d.tokfile import Record


def add_parsers(verbs: Any) -> None:
    parser = options.add_verb(verbs, "info", run_info, "print what token files hold: model, tokens, bits, original sizes")
    parser.add_argument(
        "inputs", nargs="+", metavar="TOKENS", help="files, folders, quoted globs, or - for .tok on standard input; of a model folder, what tok show says"
    )
    options.add_json(parser)
    parser = options.add_verb(verbs, "truncate", run_truncate, "keep the first tokens of .tok files; needs no model")
    parser.add_argument("inputs", nargs="+", metavar="TOKENS", help="files, folders, quoted globs, or - for standard input")
    parser.add_argument("--tokens", type=options.positive_int, metavar="N", required=True, help="how many to keep")
    options.add_output(parser, "for -, standard output; needed otherwise")
    options.add_json(parser)


def run_info(args: Namespace) -> int:
    models = [given for given in args.inputs if is_model(Path(given))]
    for given in models:
        from tok1d import hub
        from tok1d.cli.models import show

        show(hub.find(Path(given)), given, args.json)
    if len(models) == len(args.inputs):
        return 0
    source = Source(expand([given for given in args.inputs if given not in models], TOKEN_FORMATS, "token files"))
    report = report_for(args, len(source.items), "files")
    for item in source.items:
        try:
            if args.json:
                for index, record in enumerate(source.records(item)):
                    print(json.dumps(record_row(item, index, record)), flush=True)
            else:
                print(summary(item, source.records(item), _bytes(item, source)), flush=True)
        except BrokenPipeError:
            raise
        except PER_INPUT as error:
            report.fail(item.label, error)
    return report.close()


def is_model(path: Path) -> bool:
    """Whether a path is a model rather than tokens: a folder of ours or with published weights, or a pickle of weights."""
    if path.is_dir():
        return is_ours(path) or any((path / name).is_file() for name in STANDARD_WEIGHTS)
    return path.is_file() and (path.name in STANDARD_WEIGHTS or path.suffix in SUFFIXES[1:])


def record_row(item: Item, index: int, record: Record) -> dict[str, Any]:
    """The JSON row of one record; bytes and bpp of the file are null where a record has no bytes of its own."""
    g = record.geometry
    pixels = g.height * g.width if g else 0
    return {
        "file": item.label,
        "index": index,
        "model_id": f"{record.model_id:016x}",
        "vocab_size": record.vocab_size,
        "bits_per_token": record.bits_per_token,
        "tokens": record.tokens,
        "tiles": record.tiles,
        "payload_bits": record.payload_bits,
        "file_bytes": record.nbytes or None,
        "bpp_payload": record.payload_bits / pixels if pixels else None,
        "bpp_file": 8 * record.nbytes / pixels if pixels and record.nbytes else None,
        "height": g.height if g else None,
        "width": g.width if g else None,
        "policy": g.policy if g else None,
        "nested": record.nested,
        "frames": record.frames,
        "meta": record.meta,
    }


def summary(item: Item, records: Iterable[Record], size: int | None) -> str:
    """The lines about one file; memory does not grow with its records."""
    count = bits = pixels = tiles = stored = 0
    span: dict[str, tuple[int, int]] = {}
    models: dict[tuple[int, int, int, bool], int] = {}
    shapes: dict[str, int] = {}
    sized = True
    for r in records:
        count, bits, tiles, stored = count + 1, bits + r.payload_bits, tiles + r.tiles, stored + r.nbytes
        for name, value in (("tokens", r.tokens), ("payload", r.payload_bits), ("record", r.nbytes)):
            low, high = span.get(name, (value, value))
            span[name] = (min(low, value), max(high, value))
        kind = (r.model_id, r.vocab_size, r.bits_per_token, r.nested)
        models[kind] = models.get(kind, 0) + 1
        g = r.geometry
        sized = sized and g is not None
        pixels += g.height * g.width if g else 0
        shape = f"{g.height}×{g.width}, {g.policy}" if g else "not recorded"
        if shape in shapes or len(shapes) < 1000:
            shapes[shape] = shapes.get(shape, 0) + 1
    size = stored or size
    lines = [item.label, f"  images        {count}" + (f" ({tiles} tiles)" if tiles > count else "")]
    for (model, vocab, width, nested), n in models.items():
        share = f" ({n} images)" if len(models) > 1 else ""
        lines.append(f"  model         {f'{model:016x}' if model else 'unknown'}{share}, {'nested' if nested else 'fixed length'}")
        lines.append(f"  vocabulary    {_vocabulary(vocab)}, {width} bits a token")
    lines.append(f"  tokens        {_span(span['tokens'])}")
    lines.append(f"  payload       {bits:,} bits ({(bits + 7) // 8:,} bytes)" + (f", {_span(span['payload'])} an image" if count > 1 else ""))
    if size:
        each = f", {_span(span['record'])} an image" if count > 1 and stored else ""
        lines.append(f"  file          {size:,} bytes{each}")
    if sized and pixels:
        by_file = f", {8 * size / pixels:.6f} by file" if size else ""
        lines.append(f"  bits/pixel    {bits / pixels:.6f} by payload{by_file}")
    common = sorted(shapes.items(), key=lambda entry: -entry[1])
    shown = "; ".join(text + (f" ({n})" if count > 1 else "") for text, n in common[:3])
    lines.append(f"  original      {shown}" + (f"; {len(common) - 3} more sizes" if len(common) > 3 else ""))
    return "\n".join(lines)


def _bytes(item: Item, source: Source) -> int | None:
    if item.path is None:
        return None
    try:
        return item.path.stat().st_size
    except OSError:
        return None


def _vocabulary(size: int) -> str:
    return f"{size:,}" if size < 1 << 63 else f"2**{size.bit_length() - 1}"


def _span(ends: tuple[int, int]) -> str:
    return f"{ends[0]:,}" if ends[0] == ends[1] else f"{ends[0]:,}..{ends[1]:,}"


def run_truncate(args: Namespace) -> int:
    from tok1d import tokfile
    from tok1d.errors import TokFileError, UsageError

    items = expand(args.inputs, (".tok",), "token files")
    if args.output is None and any(i.path is not None for i in items):
        raise UsageError("give the output with -o: a file, a folder or -")
    jobs = plan(items, args.output, ".tok")
    silent = any(j.target is None for j in jobs)
    if silent and args.json:
        raise UsageError("--json and the tokens cannot both go to standard output; write the tokens to a file, -o FILE")
    check_targets([(j.label, j.target) for j in jobs], [i.path for i in items], may_exist=args.force or args.skip_existing)
    jobs = [j for j in jobs if not (args.skip_existing and j.target is not None and j.target.is_file())]
    report = report_for(args, len(jobs), "files", silent_stdout=silent)
    for job in jobs:
        try:
            before = sys.stdin.buffer.read() if job.item.path is None else _read(job.item.path)
            # An empty or foreign file is named by the reader, not by what is missing in an empty list.
            records = list(tokfile.iter_records(io.BytesIO(before), name=job.label))
            if not all(r.nested for r in records):
                raise TokFileError("made by a model of fixed length, its prefixes do not decode; encode with a nested model: tok models --filter nested")
            after = tokfile.truncate(before, args.tokens)
            if job.target is None:
                sys.stdout.buffer.write(after)
                sys.stdout.buffer.flush()
            else:
                job.target.parent.mkdir(parents=True, exist_ok=True)
                tokfile.atomic_write(job.target, after)
        except BrokenPipeError:
            raise
        except PER_INPUT as error:
            report.fail(job.label, error)
            continue
        row = {"input": job.label, "output": str(job.target or "-"), "tokens": args.tokens, "bytes_before": len(before), "bytes": len(after)}
        report.ok(row, f"{job.label} → {job.target}: {len(before):,} → {len(after):,} bytes")
    return report.close()


def _read(path: Path) -> bytes:
    from tok1d.errors import TokFileError

    try:
        return path.read_bytes()
    except OSError as error:
        raise TokFileError(f"{path} cannot be read: {error.strerror or error}") from error
