"""The shipped default beside image codecs at equal file bytes and a resize, on photos, text and faces: `tok eval`, end to end.

Four sets of validation data (shards as in docs/results.md): free and research photos by the centre-crop view, 256 × 256 windows
of street scenes around legible words at native resolution, portraits with landmarks found by YuNet. Budgets are the whole .tok files of 64, 128 and 256
tokens; codecs may use as many bytes with their whole files, over size and quality.

    python -m benchmarks.full_evaluation DATA --out runs/evaluation            # DATA holds the shards; a stopped run goes on
    tok report runs/evaluation/*/* -o report.html                              # the pages, one a set

Summaries are copied to benchmarks/results/evaluation/SET-SYSTEM.json.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from benchmarks.record import RESULTS, say
from tok1d.cli.main import main as tok
from tok1d.eval.manifest import Manifest, Sample, word

BUDGETS = "132,228,420"  # bytes of the .tok files of 64, 128 and 256 tokens
TOKENS = "1,8,32,64,128,256"
SYSTEMS = {"default": [], "webp": [], "jpeg": [], "resize": ["--sides", "32,64,128,256"], "avif": []}
PIXELS = "pixels,lpips_vgg,lpips_alex,codes,features"
SIDE = 256


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the validation shards")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"))
    parser.add_argument("--images", type=int, default=24, help="of each set (default: 24)")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--workers", type=int, default=2, help="processes that search codecs (default: 2)")
    args = parser.parse_args(argv)
    sets = {name: make(args.data, args.out / "data", name) for name in ("photos-free", "photos-research", "text", "faces")}
    for system in args.systems.split(","):
        for name, manifest in sets.items():
            measures = {"text": "pixels,text", "faces": "pixels,faces"}.get(name, PIXELS)
            out = args.out / name / system
            common = [str(manifest), "--images", str(args.images), "--measures", measures, "-o", str(out), "--batch-size", "8"]
            if system == "default":
                code = tok(["eval", "run", "default", *common, "--tokens", TOKENS])
            else:
                budgets = SYSTEMS[system] or ["--budgets", BUDGETS, "--workers", str(args.workers)]
                code = tok(["eval", "codec", system, *common, *budgets])
            if not (out / "summary.json").is_file():
                raise SystemExit(f"{name} {system} failed with exit code {code}")
            kept = RESULTS / "evaluation" / f"{name}-{system}.json"
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(out / "summary.json", kept)
            say(f"{kept}")


def make(data: Path, out: Path, name: str) -> Path:
    """The manifest of a set, made once."""
    path = out / f"{name}.jsonl"
    if path.is_file():
        return path
    out.mkdir(parents=True, exist_ok=True)
    if name.startswith("photos"):
        Manifest.load(data / f"{name}-val-00000.tar").write(path)
    elif name == "text":
        scenes = out / "scenes.jsonl"
        assert tok(["eval", "import", "shards", str(data / "text-scenes-00000.tar"), "-o", str(scenes), "-q"]) == 0
        windows(Manifest.load(scenes), out / "windows").write(path)
    else:
        whole = Manifest.load(data / "faces-00000.tar")
        plain = out / "faces-plain.jsonl"
        replace(whole, name="faces, keys 651 and up", samples=whole.samples[650:]).write(plain)
        assert tok(["eval", "annotate", "faces", str(plain), "-o", str(path), "-q"]) == 0
    return path


def windows(scenes: Manifest, folder: Path) -> Manifest:
    """256 × 256 windows at native resolution, one a scene of keys 151 and up: around its largest word, with all words inside it."""
    from tok1d.image_io import write

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for sample in scenes.samples[150:]:
        fits = [w for w in sample.words if max(w.box[2] - w.box[0], w.box[3] - w.box[1]) <= SIDE - 8]
        if not fits:
            continue
        image = scenes.read(sample)
        largest = max(fits, key=lambda w: (w.scale, w.value))
        left, top = (
            int(min(max(0, (largest.box[i] + largest.box[i + 2] - SIDE) // 2), full - SIDE)) for i, full in ((0, image.shape[2]), (1, image.shape[1]))
        )
        words = []
        for w in sample.words:
            x0, y0, x1, y1 = w.box[0] - left, w.box[1] - top, w.box[2] - left, w.box[3] - top
            if x0 >= 0 and y0 >= 0 and x1 <= SIDE and y1 <= SIDE:
                poly = None if w.poly is None else [(x - left, y - top) for x, y in w.poly]
                words.append(word((x0, y0, x1, y1), w.value, SIDE, SIDE, poly))
        key = Path(sample.id).name
        write(folder / f"{key}.png", image[:, top : top + SIDE, left : left + SIDE].float() / 255)
        made.append(Sample(key, f"{key}.png", SIDE, SIDE, words=tuple(words), group="street scenes"))
    return Manifest("text windows, keys 151 and up", folder, tuple(made), licence=scenes.licence)


if __name__ == "__main__":
    main()
