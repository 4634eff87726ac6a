"""``tok fit`` (LightningCLI over a YAML file) and ``tok export`` (runs and published weights become model folders)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tok1d.cli.options import add_license, add_verb
from tok1d.tokenizers.official import NAMES


def add_parsers(subparsers: Any) -> None:
    """Register the verbs; nothing heavy is imported here."""
    fit = subparsers.add_parser(
        "fit",
        help="train a tokenizer from a YAML configuration",
        description="Everything after 'fit' goes to LightningCLI: --config FILE|NAME, --model.*, --data.*, --trainer.*, "
        "--ckpt_path, --print_config. NAME is a file of configs/ without its suffix, e.g. debug/fsq.",
        add_help=False,
    )
    fit.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of LightningCLI")
    fit.set_defaults(run=run_fit)
    text = "turn a training run or published weights into a model folder with a card, or a model into published files"
    export = add_verb(subparsers, "export", run_export, text)
    source = "run folder, checkpoint (.ckpt), model folder, published weights (folder or file), name (tok models) or hub id"
    export.add_argument("source", metavar="SRC", help=source)
    export.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    export.add_argument("--name", help="name of the model (default: that of the configuration)")
    export.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="precision of the stored weights")
    export.add_argument("--scores", type=Path, help="JSON of measured scores to put in the card")
    export.add_argument("--layout", choices=NAMES, help="write the files that readers of a published family take, instead of our own folder")
    export.add_argument("-f", "--force", action="store_true", help="replace an existing model folder")
    export.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    add_license(export)


def run_fit(args: argparse.Namespace) -> int:
    from tok1d.training.fit import fit

    arguments = [word for word in args.arguments if word != "--debug"]
    args.debug = args.debug or len(arguments) < len(args.arguments)
    return fit(arguments)


def run_export(args: argparse.Namespace) -> int:
    from tok1d.training.export import export

    export(
        args.source, args.out, name=args.name, dtype=args.dtype, scores=args.scores, overwrite=args.force, layout=args.layout,
        revision=args.revision, accept_license=args.accept_license,
    )  # fmt: skip
    return 0
