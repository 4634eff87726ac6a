"""``tok eval``: measure tokenizers, codecs and folders of reconstructions; compare runs; reference statistics; manifests."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tok1d.cli import options
from tok1d.cli.evaluate_samples import add_parser as add_generate
from tok1d.cli.measuring import codecs_and_data, manifest_of, measure, networks, say_manifest, shown
from tok1d.cli.runtime import Progress, count, say
from tok1d.errors import UsageError

if TYPE_CHECKING:
    from tok1d.eval.systems import System

# `tok eval MODEL DATA` is short for `tok eval run MODEL DATA`
VERBS = ("run", "score", "codec", "generate", "stats", "compare", "import", "export", "annotate", "synthetic")
# keys of tok1d.eval.importers.KINDS, which imports too much for a parser
SETS = ("tokbench", "icdar", "totaltext", "textocr", "cord", "sroie", "docvqa", "infographicvqa", "wflw", "shards", "folder")
EPILOG = """A protocol freezes the view: recon256-v1 (centre crop), fit256-v1 (whole image on black), tokbench256-v1; also 512 and 1024.
Data are folders, tar shards or manifests (.jsonl, .parquet). A run that was stopped goes on when it is started again;
torchrun shares it among processes.

examples:
  tok eval default photos/ --tokens 1,8,32,128,256 -o results/default
  tok eval codec jpeg webp avif jpegxl photos/ --budgets 96,192,384 -o results
  tok eval score reconstructions/ photos/ -o results/theirs
  tok eval compare results/default results/theirs
  tok report results/* -o report.html
"""


class AnyOrder(options.Parser):
    """Takes what is not a flag before, between and after flags."""

    _inside = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._inside:  # argparse's own two passes
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False


def add_parsers(verbs: Any) -> None:
    parser = verbs.add_parser("eval", help="measure tokenizers, codecs and folders; compare runs", description="Measure and compare.", epilog=EPILOG)
    sub = parser.add_subparsers(metavar="what", dest="what", required=True, parser_class=AnyOrder)
    parser.verbs = sub

    run = options.add_verb(sub, "run", run_model, "measure a model at several numbers of tokens", EPILOG)
    run.add_argument("model", help="name (tok models), folder, file, or hub id owner/name")
    run.add_argument("data", nargs="+", type=Path, help="folders, tar shards, or one manifest")
    run.add_argument("--tokens", type=options.int_list, metavar="K,K,…", help="default: powers of two up to all")
    options.add_model(run, by_flag=False)
    _add_decoding(run)
    _add_run(run)

    score = options.add_verb(sub, "score", run_score, "measure reconstructions that were made elsewhere: a folder of files named as the images")
    score.add_argument("folder", type=Path, help="reconstructions at the size of the protocol's view, <id>.png")
    score.add_argument("data", nargs="+", type=Path, help="the originals")
    score.add_argument("--bytes", type=Path, metavar="JSON", help="{id: bytes} of what each reconstruction cost")
    _add_run(score)

    codec = options.add_verb(sub, "codec", run_codec, "measure JPEG, WebP, AVIF, JPEG XL with the bytes of real files, or a plain resize")
    codec.add_argument("what_and_data", nargs="+", metavar="CODEC … DATA …", help="jpeg, webp, avif, jpegxl, resize; and folders, shards or a manifest")
    codec.add_argument("--codecs", type=_names, metavar="C,C,…", help="the codecs; then everything else is data, whatever its name")
    codec.add_argument("--qualities", type=options.int_list, metavar="Q,Q,…", help="default: 5,15,30,50,70,90 unless --budgets")
    codec.add_argument("--budgets", type=options.int_list, metavar="BYTES,…", help="the best picture within each, over size and quality")
    codec.add_argument("--sides", type=options.int_list, metavar="PX,…", help="shrink to these sides first; the sides of resize")
    codec.add_argument("--downscale", type=options.int_list, metavar="N,N,…", help="shrink the view by these factors first; 1 keeps its size")
    codec.add_argument("--workers", type=options.positive_int, default=2, help="processes that search budgets; default: 2")
    _add_run(codec)

    add_generate(sub)

    stats = options.add_verb(sub, "stats", run_stats, "make reference statistics of real images for --reference, once")
    stats.add_argument("data", nargs="+", type=Path)
    stats.add_argument("-o", "--output", type=Path, default=Path("reference"), metavar="FOLDER", help="default: reference/")
    _add_data(stats)
    _add_nets(stats)

    compare = options.add_verb(sub, "compare", run_compare, "paired differences and BD-rate of two runs on the same images")
    compare.add_argument("a", type=Path, help="folder of a run, or a summary.json alone (no rows: no paired differences)")
    compare.add_argument("b", type=Path)
    compare.add_argument("--match", choices=("rate", "bytes", "none"), default="rate", help="pair rates of one name, of about the same bytes, or none (curves alone); default: rate")
    options.add_json(compare)

    imported = options.add_verb(sub, "import", run_import, "turn the annotations of a data set into a manifest")
    imported.add_argument("kind", choices=SETS)
    imported.add_argument("source", type=Path, help="its folder, annotation file or shard")
    imported.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="manifest: .jsonl or .parquet")
    imported.add_argument("--images", dest="image_folder", type=Path, metavar="FOLDER", help="where the images lie, if not beside the annotations")

    export = options.add_verb(sub, "export", run_export, "write a manifest in TokBench's layout, for TokBench's own scripts")
    export.add_argument("data", nargs="+", type=Path, help="a manifest; the sizes of its images must be known")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    export.add_argument("--copy", action="store_true", help="copy the images, too")

    annotate = options.add_verb(sub, "annotate", run_annotate, "find faces (YuNet) in images of your own, or keep the words a recogniser reads right")
    annotate.add_argument("what_kind", choices=("faces", "refine"), metavar="faces|refine")
    annotate.add_argument("data", nargs="+", type=Path)
    annotate.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="manifest: .jsonl or .parquet")
    _add_nets(annotate)

    synthetic = options.add_verb(sub, "synthetic", run_synthetic, "write a set of rendered words or drawn faces with exact ground truth")
    synthetic.add_argument("kind", choices=("text", "faces"))
    synthetic.add_argument("output", type=Path, metavar="FOLDER")
    synthetic.add_argument("--count", type=options.positive_int, default=200, help="images; default: 200")
    synthetic.add_argument("--size", type=options.positive_int, default=256, help="pixels; default: 256")
    synthetic.add_argument("--seed", type=options.natural_int, default=0)


def _add_data(parser: options.Parser) -> None:
    parser.add_argument("--protocol", default="recon256-v1", metavar="ID", help="default: recon256-v1")
    parser.add_argument("--images", type=options.positive_int, metavar="N", help="evenly spaced images of the data; default: all")
    parser.add_argument("--readers", type=options.positive_int, default=2, help="threads that read images; default: 2")


def _add_run(parser: options.Parser) -> None:
    _add_data(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="of rows, states and summary.json; default: eval/NAME")
    parser.add_argument("--restart", action="store_true", help="forget what the folder holds")
    parser.add_argument("--measures", metavar="M,M,…", help="pixels, lpips_vgg, lpips_alex, dists, codes, features, fid, text, faces; default: what the data allow")
    _add_nets(parser)
    options.add_json(parser)


def _add_decoding(parser: options.Parser) -> None:
    group = parser.add_argument_group("decoders that sample")
    group.add_argument("--steps", type=options.positive_int, metavar="N")
    group.add_argument("--guidance", type=options.finite_float, metavar="G")
    group.add_argument("--solver", metavar="NAME")
    group.add_argument("--seed", type=options.natural_int, metavar="S")


def _add_nets(parser: options.Parser) -> None:
    group = parser.add_argument_group("networks (defaults work offline where their weight packages are installed)")
    group.add_argument("--feature-net", default="", metavar="TIMM", help="of features; default: EfficientNet-Lite0")
    group.add_argument("--feature-weights", type=Path, metavar="FILE")
    group.add_argument("--fid-weights", type=Path, metavar="FILE", help="Inception of torch-fidelity, for fid")
    group.add_argument("--fid-profile", choices=("tf", "clean", "tm"), default="tf", help="resize of fid; default: tf")
    group.add_argument("--reference", type=Path, metavar="FILE", help="statistics of the real side (tok eval stats)")
    group.add_argument("--ocr", choices=("easyocr", "doctr-parseq"), default="easyocr")
    group.add_argument("--ocr-weights", type=Path, metavar="PATH")
    group.add_argument("--face", choices=("sface", "insightface"), default="sface", help="insightface weights are for research only")
    group.add_argument("--face-weights", type=Path, metavar="PATH")
    if not any("--device" in a.option_strings for a in parser._actions):
        group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: auto")
        group.add_argument("--accept-license", action="store_true", help="of weights for research only")
    if not any("--batch-size" in a.option_strings for a in parser._actions):
        group.add_argument("--batch-size", type=options.positive_int, default=16, metavar="B", help="images at once; default: 16")


# the verbs -------------------------------------------------------------------------------------------------------


def run_model(args: Namespace) -> int:
    from tok1d.cli.runtime import load_model
    from tok1d.eval.systems import TokenizerSystem

    model = load_model(args)
    given = {"steps": args.steps, "guidance": args.guidance, "solver": args.solver, "seeds": args.seed}
    system = TokenizerSystem(model, args.tokens, {k: v for k, v in given.items() if v is not None})
    return measure(args, system, args.data, args.output or Path("eval") / model.name)


def run_score(args: Namespace) -> int:
    from tok1d.eval.systems import FolderSystem

    system = FolderSystem(args.folder, args.bytes)
    if system.lossy:
        say(f"{count(system.lossy, 'file')} in {args.folder} are lossy: what their codec lost counts as the system's")
    return measure(args, system, args.data, args.output or Path("eval") / system.name)


def run_codec(args: Namespace) -> int:
    from tok1d.eval.protocol import protocol
    from tok1d.eval.systems import CodecSystem, ResizeSystem

    names, data = codecs_and_data(args.what_and_data, args.codecs)
    if args.qualities and args.budgets:
        raise UsageError("--qualities and --budgets exclude each other: a budget searches quality")
    if args.sides and args.downscale:
        raise UsageError("--sides and --downscale exclude each other: both say how small a picture is coded")
    if args.budgets and (args.sides or args.downscale) and "resize" not in names:
        raise UsageError("--budgets excludes --sides and --downscale: a budget searches the size, too")
    whole = protocol(args.protocol).size
    sides = args.sides or [max(1, whole // n) for n in args.downscale or ()]
    qualities = args.qualities or ([] if args.budgets else [5, 15, 30, 50, 70, 90])
    systems: list[System] = []
    for name in names:
        if name == "resize":
            systems.append(ResizeSystem(sides or (32, 64, 128, 256)))
        elif args.budgets:
            systems.append(CodecSystem(name, budgets=args.budgets, workers=args.workers))
        else:
            systems += [CodecSystem(name, qualities, None if side == whole else side) for side in (sides or [whole])]
    base = args.output or Path("eval")
    return max(measure(args, s, data, base if len(systems) == 1 and args.output else base / s.name.replace("@", "-")) for s in systems)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def run_stats(args: Namespace) -> int:
    from tok1d.eval.choose import feature_net
    from tok1d.eval.protocol import protocol
    from tok1d.eval.stats import make_reference

    nets, manifest = networks(args), manifest_of(args.data, args.images)
    net = feature_net("fid" if args.fid_weights else "features", nets)
    bar = Progress(len(manifest), "images", quiet=args.quiet)
    path = make_reference(manifest, protocol(args.protocol), net, args.output, batch_size=args.batch_size, readers=args.readers, progress=shown(bar))
    bar.clear()
    print(path)
    return 0


def run_compare(args: Namespace) -> int:
    from tok1d.eval.compare import compare

    found = compare(args.a, args.b, match=args.match)
    if args.json:
        print(json.dumps(found))
        return 0
    for note in () if args.quiet else found["notes"]:
        say(note)
    if any(pair["differences"] for pair in found["pairs"]):
        print(f"differences are {args.b} - {args.a}, mean (95 % interval over images)")
    for pair in found["pairs"]:
        if pair["differences"]:
            print(f"\n{pair['a']} and {pair['b']}")
        for column, d in pair["differences"].items():
            print(f"  {column:<14} {d['mean']:+.4g} ({d['low']:+.4g} to {d['high']:+.4g}), larger on {d['larger']:.0%} of {d['n']}")
    print("\nBD-rate")
    for name, d in found["bd_rate"].items():
        print(f"  {name:<28} {d['percent']:+.1f} %" if d["percent"] is not None else f"  {name:<28} not comparable: {d['reason']}")
    return 0


def run_import(args: Namespace) -> int:
    from tok1d.eval.importers import import_manifest

    manifest = import_manifest(args.kind, args.source, args.image_folder)
    manifest.write(args.output)
    say_manifest(args, manifest)
    return 0


def run_export(args: Namespace) -> int:
    from tok1d.eval.importers import export_tokbench

    for path in export_tokbench(manifest_of(args.data, None), args.output, images=args.copy):
        if not args.quiet:
            print(path)
    return 0


def run_annotate(args: Namespace) -> int:
    manifest = manifest_of(args.data, None)
    if args.what_kind == "faces":
        from tok1d.eval.face_nets import annotate_faces

        made = annotate_faces(manifest)
    else:
        from tok1d.eval.ocr import EasyOCR, ParseqOCR
        from tok1d.eval.words import refine

        recogniser = (EasyOCR if args.ocr == "easyocr" else ParseqOCR)(args.ocr_weights, networks(args).device)
        refined = refine(manifest, recogniser)
        say(", ".join(f"{n} {status}" for status, n in refined.counts.items()))
        made = refined.manifest
    made.write(args.output)
    say_manifest(args, made)
    return 0


def run_synthetic(args: Namespace) -> int:
    from tok1d.eval.synthetic import write_set

    manifest = write_set(args.kind, args.output, args.count, args.size, args.seed)
    if not args.quiet:
        print(f"{args.output / 'manifest.jsonl'}: {count(len(manifest), 'image')}")
    return 0
