"""``tok reconstruct``: a picture of originals beside their reconstructions from few and many tokens, with the price below."""

from __future__ import annotations

import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tok1d.cli import options
from tok1d.cli.paths import IMAGE_SUFFIXES, Item, check_targets, expand
from tok1d.cli.runtime import PER_INPUT, count, decode_options, for_rows, load_model, report_for, say
from tok1d.errors import MissingExtraError, ModelError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from tok1d.cli.grid import Cell
    from tok1d.tokenizers.tokenizer import Tokenizer1D

EPILOG = """PSNR and LPIPS (VGG) are measured at the model's size, on the whole image or all its tiles.

example:
  tok reconstruct photo.jpg --tokens 1,8,32,128,256 -o grid.png
"""
DEFAULT_TOKENS = (1, 8, 32, 128, 256)


def add_parsers(verbs: Any) -> None:
    parser = options.add_verb(verbs, "reconstruct", run, "draw originals and reconstructions side by side", EPILOG)
    parser.add_argument("inputs", nargs="+", metavar="IMAGE", help="files, folders, quoted globs, or - for standard input; each becomes a row")
    parser.add_argument(
        "--tokens", type=options.int_list, metavar="K,K,…", help="numbers of tokens, a column each; default: 1,8,32,128,256 as far as the model goes"
    )
    parser.add_argument("-o", "--output", metavar="OUT", default="grid.png", help="image file; default: grid.png")
    parser.add_argument("-f", "--force", action="store_true", help="overwrite an existing file")
    parser.add_argument("--height", type=options.positive_int, default=256, metavar="PX", help="of each picture; default: 256")
    options.add_policy(parser)
    options.add_sampling(parser)
    options.add_model(parser)
    options.add_json(parser)


def run(args: Namespace) -> int:
    from PIL import Image

    items = expand(args.inputs, IMAGE_SUFFIXES, "images")
    if args.output == "-" or Image.registered_extensions().get(Path(args.output).suffix.lower()) not in Image.SAVE:
        raise UsageError(f"-o {args.output}: the picture needs a file name with an image suffix, as grid.png")
    if args.height > 4096:
        raise UsageError(f"--height {args.height}: at most 4096 pixels")
    check_targets([("the picture", Path(args.output))], [i.path for i in items], may_exist=args.force)

    model = load_model(args)
    wanted = args.tokens or [k for k in DEFAULT_TOKENS if k in model.token_lengths] or [model.max_tokens]
    for k in wanted:
        model._check_tokens(k)
    sampling = decode_options(model, args)
    distance = _distance(model)
    report = report_for(args, len(items), "images")
    rows: list[list[Cell]] = []
    for item in items:
        try:
            cells, measured = reconstruct(model, item, wanted, args, distance, sampling)
        except PER_INPUT as error:
            report.fail(item.label, error)
            continue
        rows.append(cells)
        for found in measured:
            text = f"{item.label}: {count(found['tokens'], 'token')}, {found['bits']} bits, PSNR {_number(found['psnr'], 2)} dB, LPIPS {_number(found['lpips'], 3)}"
            report.show({"input": item.label, "output": args.output, **found}, text)
        report.progress.step()
    if rows:
        from tok1d.cli.grid import draw
        from tok1d.image_io import write

        write(args.output, draw(rows))
        if not args.quiet:
            say(f"{args.output} drawn")
    return report.close()


def reconstruct(
    model: Tokenizer1D,
    item: Item,
    wanted: list[int],
    args: Namespace,
    distance: Callable[[Tensor, Tensor], Tensor] | None,
    sampling: dict[str, Any],
) -> tuple[list[Cell], list[dict[str, Any]]]:
    """One row of the picture and its numbers: one encode, a decode for each number of tokens."""
    import torch

    from tok1d.cli.grid import Cell
    from tok1d.image_io import fit, read_uint8, unfit
    from tok1d.tokens import TokenSequence

    image = read_uint8(sys.stdin.buffer.read() if item.path is None else item.path, frame=args.frame)
    pixels, geometry = fit(image, model.image_size, args.policy)
    parts = torch.split(pixels, args.batch_size)
    seq = TokenSequence.stack([replace(model.encode(part), geometry=None) for part in parts])
    height, width = image.shape[-2:]
    # What the decoded image will be compared with by eye: the window that was kept, for --crop.
    shown = unfit(pixels.float() / 255, geometry) if args.policy == "crop" else image
    cells = [Cell.of(shown[0], args.height, [_short(os.path.basename(item.label)), f"{height}×{width}"])]
    measured = []
    for k in wanted:
        prefix = seq[:, :k]
        decoded, errors, distances = [], [], []
        for start, part in zip(range(0, len(pixels), args.batch_size), parts):
            rows = model.decode(prefix[start : start + len(part)], **for_rows(sampling, len(part)))
            assert isinstance(rows, torch.Tensor)
            original = part.to(rows.device).float() / 255
            errors.append((rows - original).square().double().mean((1, 2, 3)))
            if distance is not None:
                with torch.inference_mode():
                    distances.append(distance(rows, original).reshape(-1).double())
            decoded.append(rows.cpu())
        mse = float(torch.cat(errors).mean())
        found = {
            "tokens": k,
            "bits": sum(prefix.bits_per_image),
            "psnr": -10 * math.log10(mse) if mse else None,
            "lpips": float(torch.cat(distances).mean()) if distances else None,
        }
        measured.append(found)
        tiles = f" × {len(pixels)} tiles" if len(pixels) > 1 else ""
        lines = [f"{count(k, 'token')}{tiles}", f"{found['bits']:,} bits", f"PSNR {_number(found['psnr'], 1)} dB", f"LPIPS {_number(found['lpips'], 3)}"]
        cells.append(Cell.of(unfit(torch.cat(decoded), geometry)[0], args.height, lines))
    return cells, measured


def _distance(model: Tokenizer1D) -> Callable[[Tensor, Tensor], Tensor] | None:
    """LPIPS, or None with one line about why."""
    from tok1d.tokenizers.budget import lpips_on

    try:
        return lpips_on(model.device)
    except (MissingExtraError, ModelError) as error:
        say(f"LPIPS is n/a: {' '.join(str(error).split())}")
        return None


def _number(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _short(name: str, limit: int = 28) -> str:
    return name if len(name) <= limit else f"{name[: limit - 9]}…{name[-8:]}"
