"""``tok eval generate``: how good the samples of a generator are."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from tok1d.cli import options
from tok1d.cli.runtime import Progress, choose_device, say

EPILOG = """examples:
  tok generate models/flowers --class all -n 50 -o samples/
  tok eval generate samples/ photos/val --train photos/train
  tok export runs/flowers models/flowers --scores samples/scores.json -f
"""


def add_parser(sub: Any) -> None:
    """The verb, with those of ``tok eval``."""
    parser = options.add_verb(sub, "generate", run, "measure generated images: Fréchet distance, precision and recall, class accuracy", EPILOG)
    parser.add_argument("samples", type=Path, help="folder of tok generate, or of images")
    parser.add_argument("data", nargs="+", type=Path, help="real images: folders, tar shards or a manifest, seen as centre crops")
    parser.add_argument("--train", nargs="+", type=Path, default=[], metavar="DATA", help="labelled images that a linear classifier is fitted on, for class accuracy")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="JSON; default: scores.json in the folder of samples")
    parser.add_argument("--cache", type=Path, default=Path("eval/features"), metavar="FOLDER", help="of the features of real images; default: eval/features")
    parser.add_argument("--images", type=options.positive_int, metavar="N", help="evenly spaced real images; default: all")
    parser.add_argument("--readers", type=options.positive_int, default=2, help="threads that read images; default: 2")
    parser.add_argument("--batch-size", type=options.positive_int, default=16, metavar="B", help="images at once; default: 16")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: auto")
    group = parser.add_argument_group("network of the features")
    group.add_argument("--feature-net", default="", metavar="TIMM", help="default: EfficientNet-Lite0, which works offline where its weights are installed")
    group.add_argument("--feature-weights", type=Path, metavar="FILE")
    group.add_argument("--fid-weights", type=Path, metavar="FILE", help="Inception of torch-fidelity: FID")
    group.add_argument("--fid-profile", choices=("tf", "clean", "tm"), default="tf", help="resize of FID; default: tf")
    options.add_json(parser)


def run(args: Namespace) -> int:
    from tok1d.cli.measuring import shown
    from tok1d.disk import atomic_write
    from tok1d.eval.choose import Nets, feature_net
    from tok1d.eval.generation import evaluate_samples

    nets = Nets(choose_device(args.device), args.feature_net, args.feature_weights, args.fid_weights, args.fid_profile)
    bar = Progress(2, "images", quiet=args.quiet or args.json)
    try:
        found = evaluate_samples(
            args.samples, args.data, feature_net("fid" if args.fid_weights else "features", nets), train=args.train, cache=args.cache,
            images=args.images, batch_size=args.batch_size, readers=args.readers, progress=shown(bar),
        )  # fmt: skip
    finally:
        bar.clear()
    out = args.output or args.samples / "scores.json"
    atomic_write(out, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    broken = found["reference"]["broken"]
    if broken:
        say(f"{len(broken)} real images could not be read and are left out: {broken[0][0]} ({broken[0][1]})" + (" …" if len(broken) > 1 else ""))
    if args.json:
        print(json.dumps({"output": str(out), **found}))
    elif not args.quiet:
        values = {k: v["mean"] if isinstance(v, dict) else v for k, v in found["results"].items()}
        print(f"{args.samples}: {', '.join(f'{name} {value:.4g}' for name, value in values.items())}; {out}")
    return 0
