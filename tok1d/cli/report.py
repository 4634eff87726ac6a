"""``tok report``: one HTML page of one or more runs of ``tok eval``."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from tok1d.cli import options
from tok1d.cli.runtime import say

EPILOG = """Runs must share data and protocol; the page says what they were. It needs no network and no other file.

examples:
  tok report results/default -o report.html
  tok report results/* -o report.html --png figures/
"""


def add_parsers(verbs: Any) -> None:
    parser = options.add_verb(verbs, "report", run_report, "make one HTML page of runs of tok eval: tables, curves, pictures", EPILOG)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of tok eval, or a folder that holds some")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html; overwritten if it is there")
    parser.add_argument(
        "--gallery", type=options.natural_int, default=4, metavar="N",
        help="images at every rate, words and faces of each size, and a quarter as many best and worst of each rate; default: 4, 0: none, 8: all kept",
    )  # fmt: skip
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="plots and grids of pictures as PNG, and curves.json; default: the page's name with _files")
    parser.add_argument("--no-png", action="store_true", help="write the page alone")
    options.add_json(parser)


def run_report(args: Namespace) -> int:
    from tok1d.eval.report import make_report

    folder = None if args.no_png else args.png or args.output.with_name(f"{args.output.stem}_files")
    made = make_report(args.runs, args.output, folder, gallery=args.gallery)
    for note in made.notes:
        say(note)
    if args.json:
        print(json.dumps({"page": str(made.page), "images": [str(p) for p in made.images], "notes": made.notes}))
    elif not args.quiet:
        print(made.page)
    return 0
