"""The argument parser with did-you-mean, and the flags that several verbs share. Imports nothing heavy."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

Run = Callable[[argparse.Namespace], int]
POLICY_HELP = {
    "resize": "bring to the model's size, aspect ratio given up; undone on decode (default)",
    "crop": "keep the largest centred window; decode gives the window",
    "pad": "fit inside and repeat the edges; undone on decode",
    "tile": "cut in pieces of the model's size: detail kept, tokens for every piece",
}


class Parser(argparse.ArgumentParser):
    """ArgumentParser that takes no abbreviated flags and guesses what a misspelt verb or choice was meant to be.

    Attributes:
        verbs: the subparsers by name (``verbs.choices``), on the parser of the command itself.
    """

    verbs: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Print one line, exit 2."""
        wrong = re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message)
        if wrong:
            given, known = wrong[1], re.findall(r"[\w.-]+", wrong[2])
            message = f"{given!r} is not one of {', '.join(known)}" + did_you_mean(given, known)
        hint = "" if "--help" in message else f" (see {self.prog} --help)"
        self.exit(2, f"{self.prog}: {message}{hint}\n")

    def unknown_flags(self, extras: list[str]) -> NoReturn:
        """Refuse arguments nobody took, with a guess for the first flag among them."""
        flag = next((e for e in extras if e.startswith("-")), extras[0])
        name = flag.partition("=")[0]
        known = sorted(set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", self.format_help())))
        self.error(f"unknown argument {name}{did_you_mean(name, known)}")


def did_you_mean(given: str, known: list[str]) -> str:
    """``; did you mean X?`` or nothing.

    Example:
        >>> did_you_mean("encdoe", ["encode", "decode"])
        '; did you mean encode?'
    """
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def add_verb(verbs: Any, name: str, run: Run, text: str, epilog: str = "") -> Parser:
    """A verb with the flags that every verb has; ``run(args)`` returns the exit code."""
    parser: Parser = verbs.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".", epilog=epilog)
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object a line on standard output, everything else on standard error")


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "-o", "--output", metavar="OUT", help=f"a file, a folder (ends in / or has no suffix; the tree is re-created) or - ; default: {default}"
    )
    parser.add_argument("-f", "--force", action="store_true", help="overwrite existing files")
    parser.add_argument("--skip-existing", action="store_true", help="leave out inputs whose output exists: resumes a run")


def add_model(parser: argparse.ArgumentParser, *, by_flag: bool = True) -> None:
    """The flags that say which model runs where; ``by_flag=False`` for verbs that name the model first."""
    group = parser.add_argument_group("model")
    if by_flag:
        name = "name (tok models), folder, weights file, or hub id owner/name; default: default"
        group.add_argument("--model", default="default", metavar="M", help=name)
    group.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    add_license(group)
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: auto")
    group.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of encoder and decoder; default: float32")
    group.add_argument("--batch-size", type=positive_int, default=16, metavar="B", help="images at once; default: 16")


def add_license(parser: Any) -> None:
    parser.add_argument("--accept-license", action="store_true", help="fetch weights that are licensed for research only (tok models)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Options of decoders that sample or read text; refused by decoders that have no such option."""
    group = parser.add_argument_group("decoders that sample (flow), draw noise, or read text")
    group.add_argument("--steps", type=positive_int, metavar="N", help="steps of the sampler")
    group.add_argument("--guidance", type=finite_float, metavar="G", help="strength of guidance; 1: none")
    group.add_argument("--solver", metavar="NAME", help="euler, heun or midpoint")
    group.add_argument("--seed", type=natural_int, metavar="S", help="of the noise, the same for every image; default: 0")
    group.add_argument("--text", metavar="TEXT", help="what the pictures show, for decoders that read text; needs tok1d[text]")


def add_policy(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("images of another size than the model's (recorded in the file)").add_mutually_exclusive_group()
    for policy, text in POLICY_HELP.items():
        group.add_argument(f"--{policy}", dest="policy", action="store_const", const=policy, help=text)
    parser.set_defaults(policy="resize")
    parser.add_argument("--frame", type=natural_int, metavar="I", help="of animated or many-page images, counted from 0 (refused without)")


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    return _int(text, 1)


def natural_int(text: str) -> int:
    """argparse type: an integer of at least 0."""
    return _int(text, 0)


def _int(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"an integer of at least {least} is needed, got {text!r}")
    return value


def tokens_or_auto(text: str) -> int | str:
    """argparse type: ``auto`` or an integer of at least 1."""
    return text if text == "auto" else positive_int(text)


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"a number above 0 is needed, got {text!r}")
    return value


def finite_float(text: str) -> float:
    """argparse type: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"a number is needed, got {text!r}")
    return value


def int_list(text: str) -> list[int]:
    """argparse type: comma-separated integers of at least 1, as ``1,8,32``."""
    return [positive_int(part) for part in text.split(",") if part.strip()] or [positive_int(text)]
