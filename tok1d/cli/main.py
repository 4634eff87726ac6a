"""The command ``tok``: verbs, and how errors leave it (1: failed, 2: wrong usage, 130: interrupted).

Nothing heavy is imported before a verb that needs it runs.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
import warnings
from argparse import Namespace
from typing import Any

from tok1d.cli.evaluate import VERBS as EVAL_VERBS
from tok1d.cli.options import Parser
from tok1d.errors import TokError, UsageError

# In the order of the help. Each module offers add_parsers(verbs) and imports torch only when its verb runs.
MODULES = ("encode", "decode", "info", "reconstruct", "models", "tokenize", "train", "generate", "evaluate", "report")
EXAMPLES = """examples:
  tok encode photo.jpg --tokens 32              photo.tok, about 100 bytes
  tok decode photo.tok -o again.png
  tok encode photos/ -o tokens/ --target-psnr 24 --json
  tok reconstruct photo.jpg --tokens 1,8,32,128,256 -o grid.png
"""


def build_parser() -> Parser:
    """The parser of all verbs."""
    parser = Parser(prog="tok", description="Discrete 1D image tokenizers: images to a few tokens and back.", epilog=EXAMPLES)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--debug", dest="debug_all", action="store_true", help="show tracebacks of errors")
    parser.verbs = verbs = parser.add_subparsers(metavar="verb", dest="verb", parser_class=Parser)
    for module in MODULES:
        importlib.import_module(f"tok1d.cli.{module}").add_parsers(verbs)
    return parser


def parse(argv: list[str] | None) -> Namespace:
    """Arguments of one call; exits with 0 after --help and 2 on wrong usage."""
    given = sys.argv[1:] if argv is None else list(argv)
    verb = next((i for i, a in enumerate(given) if not a.startswith("-")), len(given))
    if given[verb : verb + 1] == ["eval"] and not set(given[verb + 1 : verb + 2]) & {*EVAL_VERBS, "-h", "--help"}:
        given.insert(verb + 1, "run")  # tok eval MODEL DATA
    passed = given[verb + 1 :] if given[verb : verb + 1] == ["fit"] else []  # LightningCLI parses what follows fit
    parser = build_parser()
    args, extras = parser.parse_known_args(given[: verb + 1] if passed else given)
    if args.version:
        from tok1d import __version__

        print(f"tok1d {__version__}")
        parser.exit(0)
    if args.verb is None:
        if extras:
            parser.unknown_flags(extras)
        parser.print_help(sys.stderr)
        parser.exit(2)
    if extras:
        used = parser.verbs.choices[args.verb]
        (used.verbs.choices[args.what] if used.verbs else used).unknown_flags(extras)
    if passed:
        args.arguments = passed
    args.debug = getattr(args, "debug", False) or args.debug_all
    return args


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        The exit code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names of any bytes, terminals of any encoding
    args = Namespace(debug=False, verb="")
    try:
        args = parse(argv)
        with warnings.catch_warnings():
            # Pillow warns of large images and odd EXIF blocks that do not keep us from reading (what does is an error),
            # torchvision of how lpips calls it: nothing the person at the terminal could act on.
            warnings.filterwarnings("ignore", module=r"(PIL|torchvision)\.")
            warnings.showwarning = _show_warning
            code = int(args.run(args))
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("tok: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has left (| head). Python flushes stdout once more at exit, which must not fail again.
        _detach_stdout()
        return 141
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        return _explain(error, args.verb)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Ours (UserWarning: licences, guesses) as one line; others with the place they come from, as Python has them."""
    if category is UserWarning or category.__module__.startswith("tok1d"):
        print(f"tok: {' '.join(str(message).split())}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, *where[:2]), end="", file=sys.stderr)


def _explain(error: Exception, verb: str) -> int:
    text = " ".join(str(error).split())
    if isinstance(error, UsageError):
        print(f"tok {verb}: {text}", file=sys.stderr)
        return 2
    if isinstance(error, TokError):
        print(f"tok: {text}", file=sys.stderr)
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        print("tok: out of memory; try a smaller --batch-size or --device cpu", file=sys.stderr)
    elif isinstance(error, OSError):
        print(f"tok: {text}", file=sys.stderr)
    else:
        print(f"tok: internal error, {type(error).__name__}: {text[:500]} (--debug shows where; please report it)", file=sys.stderr)
    return 1


def _detach_stdout() -> None:
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        pass  # stdout is not a real file (a test's buffer)


if __name__ == "__main__":
    sys.exit(main())
