"""The shipped default beside image codecs at equal file bytes and a resize, on photos, text and faces: `tok eval`, end to end.

Four sets of validation data (shards as in docs/results.md): free and research photos by the centre-crop view, 256 × 256 windows of
street scenes around legible words at native resolution, portraits with landmarks found by YuNet. 132, 228 and 420 bytes are the whole
.tok files of 64, 128 and 256 tokens; codecs may use as many with their whole files, over size and quality. Two more budgets make
curves of five points, enough for a BD-rate: between those where files may be so small, above where they cannot (AVIF, JPEG).

    python -m benchmarks.full_evaluation DATA --images 48      # DATA holds the shards; a stopped run goes on where it stopped
    python -m benchmarks.full_evaluation DATA --images 4 --sets faces --systems default,webp --out /tmp/try --results /tmp/try
    python -m benchmarks.evaluation_tables                     # docs/evaluation.md from the summaries

Summaries are copied to RESULTS/SET-SYSTEM.json, a page a set is written to RESULTS/SET.html.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

from benchmarks.record import RESULTS, say
from tok1d.cli.main import main as tok
from tok1d.eval.manifest import Manifest, Sample, word

TOKENS = "1,8,32,64,128,256"
SMALL, LARGE = "132,180,228,320,420", "330,420,520,640,800"
SYSTEMS = {
    "default": ["run", "default", "--tokens", TOKENS], "webp": ["codec", "webp", "--budgets", SMALL], "jxl": ["codec", "jpegxl", "--budgets", SMALL],
    "jpeg": ["codec", "jpeg", "--budgets", LARGE], "resize": ["codec", "resize", "--sides", "32,64,128,256"], "avif": ["codec", "avif", "--budgets", LARGE],
}  # fmt: skip
PHOTOS = "pixels,lpips_vgg,lpips_alex,codes,features"
SETS = {"photos-free": PHOTOS, "photos-research": PHOTOS, "text": "pixels,text", "faces": "pixels,faces"}
SIDE = 256


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the validation shards")
    parser.add_argument("--images", type=int, default=24, help="of each set (default: 24)")
    parser.add_argument("--out", type=Path, help="rows and states (default: runs/evaluation-IMAGES)")
    parser.add_argument("--results", type=Path, default=RESULTS / "evaluation", help=f"summaries and pages (default: {RESULTS.name}/evaluation)")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--sets", default=",".join(SETS), help=f"of {', '.join(SETS)}")
    parser.add_argument("--workers", type=int, default=2, help="processes that search codecs (default: 2)")
    parser.add_argument("--gallery", type=int, default=4, help="pictures in the pages (default: 4)")
    args = parser.parse_args(argv)
    out = args.out or Path("runs") / f"evaluation-{args.images}"
    names, systems = args.sets.split(","), args.systems.split(",")
    for wanted, known in ((names, SETS), (systems, SYSTEMS)):
        if set(wanted) - set(known):
            parser.error(f"{', '.join(sorted(set(wanted) - set(known)))}: there are {', '.join(known)}")
    manifests = {name: make(args.data, out / "data", name) for name in names}
    args.results.mkdir(parents=True, exist_ok=True)
    for system in systems:
        for name in names:
            folder = out / name / system
            measure(system, manifests[name], args.images, SETS[name], folder, args.workers)
            shutil.copy(folder / "summary.json", args.results / f"{name}-{system}.json")
            say(f"{args.results / f'{name}-{system}.json'}")
    for name in names:
        page = args.results / f"{name}.html"
        done = [str(out / name / s) for s in SYSTEMS if (out / name / s / "summary.json").is_file()]
        if tok(["report", *done, "-o", str(page), "--no-png", "--gallery", str(args.gallery)]) == 0:
            say(f"{page}: {page.stat().st_size / 2**20:.2f} MiB")


def measure(system: str, manifest: Path, images: int, measures: str, out: Path, workers: int) -> None:
    """One system on one set; what an earlier call finished is not done again.

    Raises:
        SystemExit: it failed, or another run lies in its folder.
    """
    verb, name, *flags = SYSTEMS[system]
    flags += ["--workers", str(workers)] if "--budgets" in flags else []
    common = ["--images", str(images), "--measures", measures, "-o", str(out), "--batch-size", "8"]
    path = out / "summary.json"
    before = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)  # made again from what lies there; an old one must not be taken for it
    code = tok(["eval", verb, name, str(manifest), *flags, *common])
    if not path.is_file():
        if before:
            path.write_bytes(before)
        raise SystemExit(f"{out} failed with exit code {code}")
    made = json.loads(path.read_bytes())
    if before and {**json.loads(before), "provenance": 0} == {**made, "provenance": 0}:  # done earlier: that go's date and speed stay
        path.write_bytes(before)
    say(f"{out}: {made['provenance']['seconds']:.0f} s in this go")


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
        if tok(["eval", "import", "shards", str(data / "text-scenes-00000.tar"), "-o", str(scenes), "-q"]):
            raise SystemExit("the street scenes could not be imported")
        windows(Manifest.load(scenes), out / "windows").write(path)
    else:
        whole = Manifest.load(data / "faces-00000.tar")
        plain = out / "faces-plain.jsonl"
        replace(whole, name="faces, keys 651 and up", samples=whole.samples[650:]).write(plain)
        if tok(["eval", "annotate", "faces", str(plain), "-o", str(path), "-q"]):
            raise SystemExit("no landmarks could be found")
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
