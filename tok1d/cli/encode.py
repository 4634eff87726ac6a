"""``tok encode``: images to tokens — files, folders, globs or standard input; to files, one file of many, or a stream."""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tok1d.cli import options
from tok1d.cli.paths import IMAGE_SUFFIXES, TOKEN_FORMATS, Item, Job, check_targets, expand, is_folder, plan
from tok1d.cli.runtime import PER_INPUT, count, load_model, ordered, report_for, say, together_or_alone
from tok1d.cli.sinks import Separate, Sink, Whole
from tok1d.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from tok1d.tokenizers.budget import Auto, Budget
    from tok1d.tokenizers.tokenizer import Tokenizer1D
    from tok1d.tokens import Geometry, TokenSequence

EPILOG = """examples:
  tok encode photo.jpg --tokens 32               photo.tok beside the photo
  tok encode photos/ -o tokens/ --max-bytes 200  the tree re-created, each record at most 200 bytes
  tok encode photos/ --tokens auto --quality 20  as many as each photo is predicted to need for 20 dB
  tok encode photos/ -o photos.jsonl             one file with all images and their names
  cat photo.jpg | tok encode - | tok info -
"""


def add_parsers(verbs: Any) -> None:
    parser = options.add_verb(verbs, "encode", run, "turn images into token files", EPILOG)
    parser.add_argument("inputs", nargs="+", metavar="IMAGE", help="files, folders, quoted globs, or - for standard input")
    options.add_output(parser, "beside the image; for -, standard output")
    parser.add_argument(
        "--format", choices=sorted(TOKEN_FORMATS.values()), help="default: by the suffix of OUT, else tok; OUT with such a suffix takes all images"
    )
    add_budget(parser)
    options.add_policy(parser)
    options.add_model(parser)
    options.add_json(parser)


def add_budget(parser: options.Parser) -> None:
    """The flags that say how many tokens each image keeps."""
    group = parser.add_argument_group("how many tokens (all, if nothing is asked for)")
    group.add_argument(
        "--tokens", type=options.tokens_or_auto, metavar="N", help="the same number for every image, or auto: what the model says each image needs"
    )
    group.add_argument("--quality", type=options.positive_float, metavar="Q", help="for --tokens auto, in dB or LPIPS as the model predicts it; default: the model's")
    group.add_argument("--target-psnr", type=options.positive_float, metavar="DB", help="the fewest that reach this PSNR at the model's size")
    group.add_argument("--target-lpips", type=options.positive_float, metavar="D", help="the fewest with LPIPS (VGG) of at most D; needs tok1d[eval]")
    group.add_argument("--max-bytes", type=options.positive_int, metavar="B", help="at most what a .tok record of B bytes holds, header included")


def check_budget(args: Namespace) -> None:
    """Refuse flags that contradict each other; imports nothing heavy.

    Raises:
        UsageError: they do.
    """
    auto = args.tokens == "auto"
    if auto and (args.target_psnr is not None or args.target_lpips is not None):
        raise UsageError("--tokens auto predicts, --target-psnr and --target-lpips search; use one of them (--quality says what auto aims at)")
    if args.quality is not None and not auto:
        raise UsageError("--quality is what --tokens auto aims at; to search for a quality use --target-psnr or --target-lpips")
    if args.tokens is not None and not auto and _adaptive(args):
        raise UsageError("--tokens fixes the number; it cannot be combined with --target-psnr, --target-lpips or --max-bytes")


@dataclass
class Loaded:
    """One image at the model's size: uint8 rows (tiles, 3, h, w) and where they came from."""

    job: Job
    rows: Tensor
    geometry: Geometry


@dataclass
class Encoded:
    """Tokens of one image, and the quality that a budget search measured or a halting head predicted."""

    seq: TokenSequence
    psnr: float | None = None
    lpips: float | None = None
    reached: bool = True
    predicted: bool = False


def run(args: Namespace) -> int:
    check_budget(args)
    auto = args.tokens == "auto"
    items = expand(args.inputs, IMAGE_SUFFIXES, "images")
    whole = _whole_output(args.output, args.format, items)
    kind = args.format or (TOKEN_FORMATS.get(Path(whole).suffix.lower(), "tok") if whole else "tok")
    if whole == "-" and args.json:
        raise UsageError("--json and the tokens cannot both go to standard output; write the tokens to a file, -o FILE")
    jobs = [Job(i, None) for i in items] if whole else plan(items, args.output, f".{kind}")
    targets = [("all images", Path(whole))] if whole and whole != "-" else [(j.label, j.target) for j in jobs]
    check_targets(targets, [i.path for i in items], may_exist=args.force or args.skip_existing)
    if args.skip_existing:
        done = [t for _, t in targets if t is not None and t.is_file()]
        jobs = [] if whole and done else [j for j in jobs if j.target not in set(done)]
        if done and not args.quiet:
            say(f"{len(done)} existing outputs are kept")
    if not jobs:
        return 0

    model = load_model(args)
    budget = budget_of(args)
    if auto:  # before anything is read
        from tok1d.tokenizers.halting import head_of

        head_of(model)
    elif args.tokens is not None:
        model._check_tokens(args.tokens)
    sink: Sink = Whole(whole, kind, named=len(items) > 1 or items[0].tree) if whole else Separate()
    report = report_for(args, len(jobs), "images", silent_stdout=whole == "-")
    missed, size, start = [], 0, time.monotonic()
    try:
        for loaded, result in _encode_all(model, jobs, args, budget, sink):
            job = loaded.job if isinstance(loaded, Loaded) else loaded
            if isinstance(result, BaseException):
                report.fail(job.label, result)
                continue
            try:
                written = sink.put(job, result.seq)
            except BrokenPipeError:
                raise
            except PER_INPUT as error:
                report.fail(job.label, error)
                continue
            size += written
            missed += [] if result.reached else [job.label]
            row = describe(job, result, model, written or None, whole)
            report.ok(row, _text(row))
        sink.close()
    except BaseException:
        sink.abort()
        report.progress.clear()
        raise
    code = report.close()
    if missed:
        names = ", ".join(missed[:3]) + (", …" if len(missed) > 3 else "")
        say(f"{len(missed)} of {len(jobs)} images miss the target and keep all tokens they may: {names}")
    if len(jobs) > 1 and not args.quiet:
        seconds, ok = time.monotonic() - start, len(jobs) - len(report.failed)
        say(f"{ok} images{f', {size:,} bytes' if size else ''}, {seconds:.1f} s ({ok / max(seconds, 1e-9):.1f}/s)")
    return code


def _adaptive(args: Namespace) -> bool:
    return any(target is not None for target in (args.target_psnr, args.target_lpips, args.max_bytes))


def budget_of(args: Namespace) -> Budget | Auto | None:
    """The budget of the flags."""
    if args.tokens == "auto":
        from tok1d.tokenizers.budget import Auto

        return Auto(args.quality, args.max_bytes)
    if not _adaptive(args):
        return None
    from tok1d.tokenizers.budget import Budget

    return Budget(psnr=args.target_psnr, lpips=args.target_lpips, max_bytes=args.max_bytes)


def _whole_output(output: str | None, kind: str | None, items: Sequence[Item]) -> str | None:
    """The one file, or ``-``, that takes the tokens of all images; None if each image has its own file."""
    streamed = any(i.path is None for i in items)
    if output is None and streamed:
        if len(items) > 1:
            raise UsageError("standard input beside other inputs needs -o")
        output = "-"
    if output is None or (output != "-" and is_folder(output)):
        return None
    found = "tok" if output == "-" else TOKEN_FORMATS.get(Path(output).suffix.lower())
    if found is None:
        raise UsageError(f"-o {output}: the suffix says no token format; use {', '.join(TOKEN_FORMATS)}, or end a folder in /")
    if kind not in (None, found):
        what = "standard output carries .tok only" if output == "-" else f"-o {output} is a .{found} file"
        raise UsageError(f"--format {kind}, but {what}")
    return output


def _encode_all(
    model: Tokenizer1D, jobs: list[Job], args: Namespace, budget: Budget | Auto | None, sink: Sink
) -> Iterator[tuple[Loaded | Job, Encoded | BaseException]]:
    """Read ahead in threads, encode in batches; results in the order of the jobs."""
    from tok1d.image_io import fit, read_uint8

    def load(job: Job) -> Loaded:
        source = sys.stdin.buffer.read() if job.item.path is None else job.item.path
        rows, geometry = fit(read_uint8(source, frame=args.frame), model.image_size, args.policy)
        return Loaded(job, rows, geometry[0])

    def encode(batch: Sequence[Loaded]) -> list[Encoded]:
        return encode_batch(model, batch, None if budget else args.tokens, budget, args.batch_size, [sink.meta(b.job) for b in batch])

    workers = min(4, os.cpu_count() or 1)
    for group in grouped(ordered(load, jobs, workers, args.batch_size + workers), args.batch_size):
        good = [found for _, found in group if isinstance(found, Loaded)]
        results = {id(loaded.job): (loaded, result) for loaded, result in together_or_alone(encode, good)} if good else {}
        for job, found in group:
            yield results[id(job)] if isinstance(found, Loaded) else (job, found)


def grouped(
    found: Iterable[tuple[Job, Loaded | BaseException]], rows: int
) -> Iterator[list[tuple[Job, Loaded | BaseException]]]:
    """Consecutive results in groups of about ``rows`` rows; what failed to load takes none."""
    group: list[tuple[Job, Loaded | BaseException]] = []
    count = 0
    for job, loaded in found:
        group.append((job, loaded))
        count += len(loaded.rows) if isinstance(loaded, Loaded) else 0
        if count >= rows or len(group) >= 4 * rows:
            yield group
            group, count = [], 0
    if group:
        yield group


def encode_batch(
    model: Tokenizer1D,
    batch: Sequence[Loaded],
    tokens: int | None,
    budget: Budget | Auto | None,
    rows_at_once: int,
    metas: Sequence[dict[str, Any] | None],
) -> list[Encoded]:
    """Encode some images, each with all its tiles, and give each its own tokens."""
    import torch

    from tok1d.tokenizers.budget import image_of
    from tok1d.tokens import TokenSequence

    rows = torch.cat([b.rows for b in batch])
    parts = [model.encode(part, tokens) for part in torch.split(rows, rows_at_once)]
    seq = TokenSequence.stack([replace(p, geometry=None) for p in parts])
    seq = replace(seq, geometry=tuple(b.geometry for b in batch))
    if budget is None:
        return [Encoded(image_of(seq, i)) for i in range(len(batch))]
    found = budget.search(model, rows, seq, [m or {} for m in metas])
    return [
        Encoded(image_of(found.sequence, i)[:, : found.tokens[i]], found.psnr[i], found.lpips[i], found.reached[i], found.predicted)
        for i in range(len(batch))
    ]


def describe(job: Job, result: Encoded, model: Tokenizer1D, size: int | None, whole: str | None) -> dict[str, Any]:
    """The JSON row of one image."""
    seq = result.seq
    assert seq.geometry is not None
    g = seq.geometry[0]
    bits = seq.bits_per_image[0]
    row = {
        "input": job.label,
        "output": whole or str(job.target),
        "tokens": seq.shape[1],
        "tiles": g.tiles,
        "bits": bits,
        "bytes": size,
        "bpp": bits / (g.height * g.width),
        "height": g.height,
        "width": g.width,
        "policy": g.policy,
        "model": model.name,
        "model_id": f"{seq.model_id:016x}",
    }
    for name in ("psnr", "lpips"):
        value = getattr(result, name)
        if value is not None:
            row[f"predicted_{name}" if result.predicted else name] = value if value != float("inf") else None
            row["reached"] = result.reached
    return row


def _text(row: dict[str, Any]) -> str:
    tiles = f" × {row['tiles']} tiles" if row["tiles"] > 1 else ""
    size = f", {row['bytes']} bytes" if row["bytes"] is not None else ""
    named = [(prefix, name, digits) for prefix in ("", "predicted_") for name, digits in (("psnr", 2), ("lpips", 3))]
    quality = "".join(f", {p.replace('_', ' ')}{n.upper()} {row[p + n]:.{d}f}" for p, n, d in named if row.get(p + n) is not None)
    return f"{row['input']} → {row['output']}: {count(row['tokens'], 'token')}{tiles}, {row['bits']} bits{size}{quality}"
