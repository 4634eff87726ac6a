"""``tok generate``: pictures of a class or a description, as files, tokens, a contact sheet and a record of every setting."""

from __future__ import annotations

import json
import time
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from tok1d.cli import options
from tok1d.cli.runtime import Progress, choose_device, count, load_model, say
from tok1d.errors import TokError, UsageError

EPILOG = """A sample depends on its own class or prompt and seed alone: a stopped run goes on, and a folder grows when more is asked for.

examples:
  tok generate models/flowers --class daisy -n 16 -o samples/
  tok generate models/flowers --class all -n 4 --tokens 32 --guidance 3 --schedule linear -o grid/
  tok generate models/captions --prompt "a red bicycle" -n 8 --seed 100 -o bicycles/
  tok generate titok-l-32-maskgit --class 207 -n 8     published, of ImageNet's classes by number; its tokenizer comes along
"""


def add_parsers(verbs: Any) -> None:
    parser = options.add_verb(verbs, "generate", run, "make images with a generator of tokens", EPILOG + _published())
    parser.add_argument("generator", metavar="MODEL", help="name (below), folder of tok export, published weights, or hub id owner/name")
    parser.add_argument("--class", dest="labels", action="append", default=[], metavar="C", help="number, name, or all; may be repeated; -1: none in particular")
    parser.add_argument("--prompt", dest="texts", action="append", default=[], metavar="TEXT", help="what to show; may be repeated")
    parser.add_argument("-n", dest="count", type=options.positive_int, default=16, metavar="N", help="images of each class or prompt; default: 16")
    parser.add_argument("--seed", type=options.natural_int, default=0, metavar="S", help="of the first image, the others have the next ones; default: 0")
    parser.add_argument("-o", "--output", type=Path, default=Path("samples"), metavar="FOLDER", help="default: samples/")
    parser.add_argument("-f", "--force", action="store_true", help="make everything anew, whatever the folder holds")
    how = parser.add_argument_group("sampling (a generator has the defaults of its authors, or else of its kind, and refuses what it does not take)")
    how.add_argument("--tokens", type=options.positive_int, metavar="N", help="of each image; default: all")
    how.add_argument("--guidance", type=options.finite_float, metavar="G", help="strength; 1: none")
    how.add_argument("--schedule", metavar="NAME", help="of guidance: constant, linear, power_cosine(p), interval(low, high)")
    how.add_argument("--temperature", type=options.finite_float, metavar="T")
    how.add_argument("--top-k", type=options.natural_int, metavar="K")
    how.add_argument("--top-p", type=options.finite_float, metavar="P")
    how.add_argument("--steps", type=options.positive_int, metavar="N")
    how.add_argument("--option", type=assignment, action="append", default=[], metavar="NAME=VALUE", help="any other option of this kind of generator")
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer", metavar="M", help="name, folder, weights file or hub id; default: the one whose name the generator stores")
    group.add_argument("--decoder", type=assignment, action="append", default=[], metavar="NAME=VALUE", help="option of decoders that sample: steps, guidance, solver")
    options.add_model(parser, by_flag=False)
    options.add_json(parser)


def _published() -> str:
    from tok1d.generators.presets import GENERATORS, sampling_line

    width = max(len(p.name) for p in GENERATORS)
    lines = [f"  {p.name:<{width}}  {sampling_line(p)}" for p in GENERATORS]
    return "\n".join(["\npublished generators, and how their authors sample:", *lines, ""])


def assignment(text: str) -> tuple[str, Any]:
    """argparse type: ``name=value``, the value JSON or a word.

    Example:
        >>> assignment("announce=64"), assignment("solver=heun")
        (('announce', 64), ('solver', 'heun'))
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ArgumentTypeError(f"NAME=VALUE is needed, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def run(args: Namespace) -> int:
    if args.output.exists() and not args.output.is_dir():
        raise UsageError(f"-o {args.output}: a folder is needed, a file is there")
    from tok1d.generators.images import load_generator
    from tok1d.generators.samples import begin, finish, make, settings_of, sheet, store, wanted_of

    generator = load_generator(
        args.generator, tokenizer=args.tokenizer, revision=args.revision, accept_license=args.accept_license, progress=not args.quiet
    )
    wanted = wanted_of(generator.condition, args.count, args.seed, [_label(c) for c in args.labels], args.texts)
    sampling = _sampling(args)
    for name in sampling:
        if name not in generator.options:
            raise UsageError(f"{type(generator).__name__} has no option {name}; its options: {', '.join(generator.options)}")
    generator.space.check_tokens(args.tokens)
    tokenizer = _tokenizer(args, generator.space)
    decoder = dict(args.decoder)
    tokenizer._check_options(decoder)
    device = choose_device(args.device)
    settings = settings_of(generator, tokenizer, args.tokens, sampling, decoder)
    record, missing = begin(args.output, settings, wanted, overwrite=args.force)
    if len(missing) < len(wanted) and not args.quiet:
        say(f"{count(len(wanted) - len(missing), 'sample')} of {len(wanted)} are there already and kept")
    generator.to(device)
    progress = Progress(len(missing), "images", quiet=args.quiet or args.json)
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    made = make(generator, tokenizer, missing, tokens=args.tokens, options=sampling, decoder=decoder, batch_size=args.batch_size)
    try:
        for one, picture, seq in made:
            rows.append(store(args.output, one, picture, seq))
            progress.step()
            if args.json:
                print(json.dumps({"output": str(args.output / f"{one.name}.png"), **rows[-1]}), flush=True)
    finally:
        progress.clear()
    seconds = time.monotonic() - start
    finish(args.output, record, wanted, rows, seconds, device)
    sheet(args.output, wanted)
    if not (args.quiet or args.json):
        speed = f", {seconds:.1f} s ({len(rows) / max(seconds, 1e-9):.2f}/s)" if rows else ""
        print(f"{args.output}: {count(len(rows), 'image')} of {settings['tokens']} tokens made{speed}; sheet.png shows them, samples.json says how")
    return 0


def _label(text: str) -> int | str:
    """A class on the command line: digits are its number, whatever the classes are called."""
    return int(text) if text.lstrip("-").isdecimal() else text


def _sampling(args: Namespace) -> dict[str, Any]:
    """Options of :meth:`Generator.generate` that were given."""
    names = ("guidance", "schedule", "temperature", "top_k", "top_p", "steps")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    twice = sorted({name for name, _ in args.option} & {*names, "tokens", "seeds", "label", "text", "n", "prefix", "on_step"})
    if twice:
        raise UsageError(f"--option {twice[0]}: it has a flag of its own or cannot be given here")
    return given | dict(args.option)


def _tokenizer(args: Namespace, space: Any) -> Any:
    """The tokenizer of a generator, loaded; refused if it is not the one it was trained for."""
    args.model = args.tokenizer or space.tokenizer
    if args.tokenizer is None:
        args.revision = None  # that of the generator
    try:
        tokenizer = load_model(args)
    except TokError as error:
        if args.tokenizer:
            raise
        raise TokError(f"this generator was trained for the tokenizer {space.tokenizer!r}, which is not found by its name ({error}): give --tokenizer") from error
    space.matches(tokenizer)
    return tokenizer
