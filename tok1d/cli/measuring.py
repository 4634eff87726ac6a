"""What the verbs of ``tok eval`` share: the manifest and networks that flags ask for, one measured system, and its table."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tok1d.cli.runtime import Progress, count, say
from tok1d.errors import UsageError

if TYPE_CHECKING:
    from tok1d.eval.choose import Nets
    from tok1d.eval.manifest import Manifest
    from tok1d.eval.systems import System


def measure(args: Namespace, system: System, data: list[Path], out: Path) -> int:
    from tok1d.eval.choose import choose
    from tok1d.eval.protocol import protocol
    from tok1d.eval.run import evaluate

    rule, manifest = protocol(args.protocol), manifest_of(data, args.images)
    measures, skipped = choose(args.measures.split(",") if args.measures else None, manifest, rule, networks(args))
    for name, why in skipped.items():
        say(f"{name} is skipped: {why}")
    bar = Progress(len(manifest), "chunks", quiet=args.quiet)
    summary = evaluate(
        system, manifest, rule, measures, out, batch_size=args.batch_size, readers=args.readers, restart=args.restart, progress=shown(bar)
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


def networks(args: Namespace) -> Nets:
    from tok1d.cli.runtime import choose_device
    from tok1d.eval.choose import Nets

    return Nets(
        device=choose_device(args.device), feature_net=args.feature_net, feature_weights=args.feature_weights, fid_weights=args.fid_weights,
        fid_profile=args.fid_profile, ocr=args.ocr, ocr_weights=args.ocr_weights, face=args.face, face_weights=args.face_weights,
        accept_license=args.accept_license, reference=args.reference,
    )  # fmt: skip


def codecs_and_data(given: list[str], chosen: list[str] | None) -> tuple[list[str], list[Path]]:
    """Which words name codecs and which data; what could be either is refused.

    Raises:
        UsageError: no codec, no data, an unknown codec, or a word that is both.
    """
    from tok1d.eval.codecs import OPTIONS

    known = {**{name: name for name in OPTIONS}, "jpg": "jpeg", "jpegxl": "jxl", "resize": "resize"}
    names = given if chosen is None else chosen
    found = [known[n.lower()] for n in names if n.lower() in known]
    unknown = [n for n in names if n.lower() not in known]
    if chosen is not None and unknown:
        raise UsageError(f"unknown codecs {', '.join(unknown)}; there are {', '.join(known)}")
    data = [Path(n) for n in (unknown if chosen is None else given)]
    both = [n for n in names if n.lower() in known and Path(n).exists()] if chosen is None else []
    if both:
        raise UsageError(f"{both[0]} is a codec and lies here as data; write ./{both[0]} for the data, or name the codecs with --codecs")
    if not found or not data:
        raise UsageError(f"give codecs ({', '.join(known)}) and data, got {' '.join(given)}")
    return list(dict.fromkeys(found)), data


def manifest_of(data: list[Path], images: int | None) -> Manifest:
    from tok1d.eval.manifest import Manifest, of_images

    manifests = [p for p in data if p.suffix in (".jsonl", ".parquet")]
    if manifests and len(data) > 1:
        raise UsageError(f"give one manifest, or images only; got {', '.join(map(str, data))}")
    whole = Manifest.load(data[0]) if len(data) == 1 else of_images(data, "+".join(p.name for p in data))
    return whole.choose(images)


def shown(bar: Progress) -> Any:
    def show(done: int, total: int) -> None:
        bar.total, bar.done = total, done - 1
        bar.step()

    return show


def say_manifest(args: Namespace, manifest: Manifest) -> None:
    for note in () if args.quiet else manifest.notes:
        say(note)
    words, faces = (sum(len(getattr(s, kind)) for s in manifest.samples) for kind in ("words", "faces"))
    if not args.quiet:
        print(f"{args.output}: {count(len(manifest), 'image')}, {count(words, 'word')}, {count(faces, 'face')}, hash {manifest.hash}")
