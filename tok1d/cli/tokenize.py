"""``tok tokenize``: a data set through a frozen tokenizer, once, into shards that training reads."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from tok1d.cli import options
from tok1d.cli.encode import add_budget, budget_of, check_budget
from tok1d.cli.runtime import Progress, load_model, say
from tok1d.errors import UsageError

EPILOG = """A killed run goes on where it stopped when it is asked for the same; torchrun shares the shards among processes.

examples:
  tok tokenize train/ -m default -o shards/ --views flip       for tok fit with tok1d.data.tokens.TokenData
  tok tokenize shards-0*.tar -m titok-l-32 -o codes/ --views 8  targets of a teacher, for PhotoData(targets: codes/)
  tok tokenize photos/ -m flextok-d12-d12 -o vae/ --what vae    latents of its frozen VAE
  tok tokenize train/ -o shards/ --tokens auto --quality 20    rows of several lengths, as tok encode has them
"""


def add_parsers(verbs: Any) -> None:
    parser = options.add_verb(verbs, "tokenize", run, "turn a data set into token shards for training", EPILOG)
    parser.add_argument("data", nargs="+", metavar="DATA", help="folders (class folders, imagefolder), .tar shards, manifests or images")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder of the shards")
    parser.add_argument("-m", "--model", default="default", metavar="M", help="name (tok models), folder, weights file, or hub id; default: default")
    parser.add_argument("--views", default="centre", metavar="V", help="centre, flip (centre and mirrored), ten-crop, or a number of random crops; default: centre")
    parser.add_argument("--what", choices=("ids", "latents", "encoder", "vae"), default="ids", help="ids (or bits), what the decoder takes, what the quantizer takes, or latents of the encoder's VAE")
    parser.add_argument("--area", type=options.positive_float, nargs=2, default=(0.35, 1.0), metavar=("LOW", "HIGH"), help="share of the largest square in random crops")
    parser.add_argument("--seed", type=options.natural_int, default=0, metavar="S", help="of random crops; default: 0")
    parser.add_argument("--classes", metavar="FILE", help="JSON list of class names in the order of their numbers; default: class folders, sorted")
    parser.add_argument("--per-shard", type=options.positive_int, default=1024, metavar="N", help="images of a shard; default: 1024")
    add_budget(parser)
    options.add_model(parser, by_flag=False)
    parser.add_argument("--readers", type=options.positive_int, default=2, metavar="N", help="threads that decode images; default: 2")
    options.add_json(parser)


def run(args: Namespace) -> int:
    from tok1d.data.index import index_images

    if args.output.exists() and not args.output.is_dir():
        raise UsageError(f"-o {args.output}: a folder is needed, a file is there")
    check_budget(args)
    samples = index_images(args.data)  # a wrong path is said before the model is loaded
    model = load_model(args)

    from tok1d.data.facts import read_classes
    from tok1d.data.tokenise import plan, tokenise
    from tok1d.eval.run import Rank

    rank = Rank.of_environment()
    head = plan(
        model, samples, what=args.what, views=args.views, area=tuple(args.area), seed=args.seed, per_shard=args.per_shard,
        classes=read_classes(args.classes), tokens=budget_of(args) or args.tokens,
    )  # fmt: skip
    progress = Progress(len(range(rank.index, head.shards, rank.count)) * head.per_shard, "images", quiet=args.quiet or args.json)
    try:
        made = tokenise(
            model, samples, args.output, head, batch_size=args.batch_size, readers=args.readers, rank=rank.index, ranks=rank.count,
            progress=lambda _: progress.step(),
        )  # fmt: skip
    finally:
        progress.clear()
    if made.broken:
        named = ", ".join(f"{key} ({reason})" for key, reason in made.broken[:3])
        say(f"{len(made.broken)} images could not be read and have no tokens: {named}" + (" …" if len(made.broken) > 3 else ""))
    if made.unfinished:
        say(f"{made.unfinished} of {head.shards} shards are left to other processes")
    if made.missed:
        say(f"{made.missed} of {len(made.lengths)} views miss the target and keep all tokens they may")
    row = {
        "output": str(args.output), "kind": head.kind, "shape": head.shape, "views": len(head.views), "images": made.images, "broken": len(made.broken),
        "shards": made.shards, "kept_shards": made.kept, "model": model.name, "model_id": f"{model.model_id:016x}",
    }  # fmt: skip
    lengths = sorted(made.lengths)
    if lengths:
        row |= {"least_tokens": lengths[0], "mean_tokens": sum(lengths) / len(lengths), "most_tokens": lengths[-1]}
    if args.json:
        print(json.dumps(row))
    elif not args.quiet:
        kept = f", {made.kept} shards were there already" if made.kept else ""
        counts = f", {lengths[0]} to {lengths[-1]} tokens, {row['mean_tokens']:.1f} on average" if lengths else ""
        print(f"{args.output}: {made.images} images × {len(head.views)} views of {model.name}, {head.kind} {tuple(head.shape)}{counts}, {made.shards} shards{kept}")
    return 0
