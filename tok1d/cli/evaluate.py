"""``tok eval``: measure tokenizers, codecs and folders of reconstructions; compare runs; reference statistics; manifests."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tok1d.cli import options
from tok1d.cli.runtime import Progress, count, say
from tok1d.errors import UsageError

if TYPE_CHECKING:
    from tok1d.eval.choose import Nets
    from tok1d.eval.manifest import Manifest
    from tok1d.eval.systems import System

# `tok eval MODEL DATA` is short for `tok eval run MODEL DATA`
VERBS = ("run", "score", "codec", "stats", "compare", "import", "annotate", "synthetic")
EPILOG = """A protocol freezes the view: recon256-v1 (centre crop), fit256-v1 (whole image on black), tokbench256-v1; also 512 and 1024.
Data are folders, tar shards or manifests (.jsonl, .parquet). A run that was stopped goes on when it is started again;
torchrun shares it among processes.

examples:
  tok eval default photos/ --tokens 1,8,32,128,256 -o results/default
  tok eval codec webp jpeg photos/ --budgets 96,192,384 -o results
  tok eval score reconstructions/ photos/ -o results/theirs
  tok eval compare results/default results/theirs
  tok report results/* -o report.html
"""


def add_parsers(verbs: Any) -> None:
    parser = verbs.add_parser("eval", help="measure tokenizers, codecs and folders; compare runs", description="Measure and compare.", epilog=EPILOG)
    sub = parser.add_subparsers(metavar="what", dest="what", required=True, parser_class=options.Parser)
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
    codec.add_argument("codecs", nargs="+", metavar="CODEC … DATA …", help="jpeg, webp, avif, jxl, resize; then folders, shards or a manifest")
    codec.add_argument("--qualities", type=options.int_list, metavar="Q,Q,…", help="default: 5,15,30,50,70,90 unless --budgets")
    codec.add_argument("--budgets", type=options.int_list, metavar="BYTES,…", help="the best picture within each, over size and quality")
    codec.add_argument("--sides", type=options.int_list, metavar="PX,…", help="shrink to these sides first; the sides of resize")
    codec.add_argument("--workers", type=options.positive_int, default=2, help="processes that search budgets; default: 2")
    _add_run(codec)

    stats = options.add_verb(sub, "stats", run_stats, "make reference statistics of real images for --reference, once")
    stats.add_argument("data", nargs="+", type=Path)
    stats.add_argument("-o", "--output", type=Path, default=Path("reference"), metavar="FOLDER", help="default: reference/")
    _add_data(stats)
    _add_nets(stats)

    compare = options.add_verb(sub, "compare", run_compare, "paired differences and BD-rate of two runs on the same images")
    compare.add_argument("a", type=Path)
    compare.add_argument("b", type=Path)
    compare.add_argument("--match", choices=("rate", "bytes"), default="rate", help="pair rates of one name, or of about the same bytes; default: rate")
    options.add_json(compare)

    imported = options.add_verb(sub, "import", run_import, "turn the annotations of a data set into a manifest")
    imported.add_argument("kind", choices=("tokbench", "icdar", "wflw", "shards", "folder"))
    imported.add_argument("source", type=Path, help="its folder, annotation file or shard")
    imported.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="manifest: .jsonl or .parquet")
    imported.add_argument("--images", dest="image_folder", type=Path, metavar="FOLDER", help="where the images lie, if not beside the annotations")

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
    return _measure(args, system, args.data, args.output or Path("eval") / model.name)


def run_score(args: Namespace) -> int:
    from tok1d.eval.systems import FolderSystem

    system = FolderSystem(args.folder, args.bytes)
    if system.lossy:
        say(f"{count(system.lossy, 'file')} in {args.folder} are lossy: what their codec lost counts as the system's")
    return _measure(args, system, args.data, args.output or Path("eval") / system.name)


def run_codec(args: Namespace) -> int:
    from tok1d.eval.codecs import OPTIONS
    from tok1d.eval.systems import CodecSystem, ResizeSystem

    known = {**dict.fromkeys(OPTIONS, "codec"), "jpegxl": "codec", "resize": "resize"}
    names = [c for c in args.codecs if c.lower() in known]
    data = [Path(c) for c in args.codecs if c.lower() not in known]
    if not names or not data:
        raise UsageError(f"give codecs ({', '.join(known)}) and then data, got {' '.join(args.codecs)}")
    if args.qualities and args.budgets:
        raise UsageError("--qualities and --budgets exclude each other: a budget searches quality")
    qualities = args.qualities or ([] if args.budgets else [5, 15, 30, 50, 70, 90])
    systems: list[System] = []
    for name in (n.lower().replace("jpegxl", "jxl") for n in names):
        if name == "resize":
            systems.append(ResizeSystem(args.sides or (32, 64, 128, 256)))
        elif args.budgets:
            systems.append(CodecSystem(name, budgets=args.budgets, workers=args.workers))
        else:
            systems += [CodecSystem(name, qualities, side) for side in (args.sides or [None])]
    base = args.output or Path("eval")
    return max(_measure(args, s, data, base if len(systems) == 1 and args.output else base / s.name.replace("@", "-")) for s in systems)


def run_stats(args: Namespace) -> int:
    from tok1d.eval.choose import feature_net
    from tok1d.eval.protocol import protocol
    from tok1d.eval.stats import make_reference

    nets, manifest = _nets(args), _manifest(args.data, args.images)
    net = feature_net("fid" if args.fid_weights else "features", nets)
    bar = Progress(len(manifest), "images", quiet=args.quiet)
    path = make_reference(manifest, protocol(args.protocol), net, args.output, batch_size=args.batch_size, readers=args.readers, progress=_show(bar))
    bar.clear()
    print(path)
    return 0


def run_compare(args: Namespace) -> int:
    from tok1d.eval.compare import compare

    found = compare(args.a, args.b, match=args.match)
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"differences are {args.b} - {args.a}, mean (95 % interval over images)")
    for pair in found["pairs"]:
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
    _said(args, manifest)
    return 0


def run_annotate(args: Namespace) -> int:
    manifest = _manifest(args.data, None)
    if args.what_kind == "faces":
        from tok1d.eval.face_nets import annotate_faces

        made = annotate_faces(manifest)
    else:
        from tok1d.eval.ocr import EasyOCR, ParseqOCR
        from tok1d.eval.words import refine

        recogniser = (EasyOCR if args.ocr == "easyocr" else ParseqOCR)(args.ocr_weights, _nets(args).device)
        refined = refine(manifest, recogniser)
        say(", ".join(f"{n} {status}" for status, n in refined.counts.items()))
        made = refined.manifest
    made.write(args.output)
    _said(args, made)
    return 0


def run_synthetic(args: Namespace) -> int:
    from tok1d.eval.synthetic import write_set

    manifest = write_set(args.kind, args.output, args.count, args.size, args.seed)
    if not args.quiet:
        print(f"{args.output / 'manifest.jsonl'}: {count(len(manifest), 'image')}")
    return 0


# shared ----------------------------------------------------------------------------------------------------------


def _measure(args: Namespace, system: System, data: list[Path], out: Path) -> int:
    from tok1d.eval.choose import choose
    from tok1d.eval.protocol import protocol
    from tok1d.eval.run import evaluate

    rule, manifest = protocol(args.protocol), _manifest(data, args.images)
    measures, skipped = choose(args.measures.split(",") if args.measures else None, manifest, rule, _nets(args))
    for name, why in skipped.items():
        say(f"{name} is skipped: {why}")
    bar = Progress(len(manifest), "chunks", quiet=args.quiet)
    summary = evaluate(
        system, manifest, rule, measures, out, batch_size=args.batch_size, readers=args.readers, restart=args.restart, progress=_show(bar)
    )
    bar.clear()
    if summary is None:
        say(f"this rank is done; the last one writes {out / 'summary.json'}")
        return 0
    if args.json:
        print(json.dumps({"output": str(out), "skipped": skipped, **summary}))
        return 0
    if not args.quiet:
        print(table(summary))
        print(f"{out / 'summary.json'}")
    return 0 if all(r["ok"] for r in summary["rates"]) else 1


def table(summary: dict[str, Any]) -> str:
    """A line a rate: how many images, bytes, and the means of what was measured."""
    asked = summary["conditions"]
    lines = [f"{asked['system']['name']} on {asked['data']['name']} ({asked['data']['images']} images), {asked['protocol']['id']}"]
    columns = ["file_bytes", "bytes", *(c for c in ("psnr", "ssim", "ms_ssim", "lpips_vgg", "lpips_alex", "dists") if any(c in r["metrics"] for r in summary["rates"]))]
    rows = [["rate", "ok", *columns]]
    for rate in summary["rates"]:
        cells = [f"{rate['metrics'][c]['mean']:.4g}" if c in rate["metrics"] else "-" for c in columns]
        extra = []
        for name, found in rate.get("measures", {}).items():
            if name.startswith("features"):
                extra += [f"{k} {v:.4g}" for k, v in found.items() if k.startswith(("fd_", "fid"))]
            elif name == "text" and "all" in found:
                extra.append(f"T-ACC {_mean(found['all']['t_acc_raw'], '.1%')} T-NED {_mean(found['all']['t_ned_raw'], '.1%')} of {found['all']['n']} words")
            elif name == "faces" and "f_sim" in found:
                extra.append(f"F-Sim {_mean(found['f_sim'], '.3f')} of {found['n']} faces")
        rows.append([rate["rate"], f"{rate['ok']}/{rate['images']}", *cells, *extra])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(lines + ["  " + "  ".join(c.rjust(w) for c, w in zip(row, widths)) + "".join(f"  {e}" for e in row[len(widths) :]) for row in rows])


def _mean(binned: dict[str, Any], form: str) -> str:
    """Over all bins; ``-`` where nothing was measured."""
    mean = binned["micro"]["mean"]
    return "-" if mean is None else format(mean, form)


def _nets(args: Namespace) -> Nets:
    from tok1d.cli.runtime import choose_device
    from tok1d.eval.choose import Nets

    return Nets(
        device=choose_device(args.device), feature_net=args.feature_net, feature_weights=args.feature_weights, fid_weights=args.fid_weights,
        fid_profile=args.fid_profile, ocr=args.ocr, ocr_weights=args.ocr_weights, face=args.face, face_weights=args.face_weights,
        accept_license=args.accept_license, reference=args.reference,
    )  # fmt: skip


def _manifest(data: list[Path], images: int | None) -> Manifest:
    from tok1d.eval.manifest import Manifest, of_images

    manifests = [p for p in data if p.suffix in (".jsonl", ".parquet")]
    if manifests and len(data) > 1:
        raise UsageError(f"give one manifest, or images only; got {', '.join(map(str, data))}")
    whole = Manifest.load(data[0]) if len(data) == 1 else of_images(data, "+".join(p.name for p in data))
    return whole.choose(images)


def _show(bar: Progress) -> Any:
    def show(done: int, total: int) -> None:
        bar.total, bar.done = total, done - 1
        bar.step()

    return show


def _said(args: Namespace, manifest: Manifest) -> None:
    for note in () if args.quiet else manifest.notes:
        say(note)
    words, faces = (sum(len(getattr(s, kind)) for s in manifest.samples) for kind in ("words", "faces"))
    if not args.quiet:
        print(f"{args.output}: {count(len(manifest), 'image')}, {count(words, 'word')}, {count(faces, 'face')}, hash {manifest.hash}")
