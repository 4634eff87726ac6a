"""Seconds of whole `tok` processes beside a bare `import torch`, and where the time above it goes.

    python -m benchmarks.startup                      # with the shipped model and photo, 7 rounds
    python -m benchmarks.startup --model runs/spectral --rounds 3

Commands take turns, so that a busy machine disturbs all alike; medians are reported. The steps are measured inside a
process that does what `tok encode` does. Results: benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from PIL import Image

from benchmarks.record import RESULTS, ROOT, Finished, run, save, tok_command

# What `tok encode PHOTO --tokens K` does, with a clock after each step. Runs in a process of its own.
STEPS = """
import json, sys, time
start = last = time.perf_counter()
steps = {}
def step(name):
    global last
    now = time.perf_counter()
    steps[name], last = now - last, now
photo, tokens, model_name, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
import torch
step("import torch")
from tok1d.cli.main import build_parser
build_parser()
step("parse the command line")
from tok1d.hub import load
from tok1d.image_io import fit, read_uint8
from tok1d import tokfile
import tok1d.tokenizers.tokenizer
step("import tok1d")
model = load(model_name)
step("load the model")
pixels = read_uint8(photo)
step("read the photo")
with torch.inference_mode():
    x, geometry = fit(pixels, model.image_size, "resize")
    step("resize")
    seq = model.encode(x, tokens)
step("encode (model work, first call)")
tokfile.save(seq, out)
step("write the .tok file")
spent = time.perf_counter()
again = []
for _ in range(5):
    t = time.perf_counter(); model.encode(x, tokens); again.append(time.perf_counter() - t)
print(json.dumps({"steps": steps, "again": sorted(again)[2], "not_counted": time.perf_counter() - spent}))
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--photo", type=Path, default=ROOT / "tok1d" / "assets" / "demo.jpg")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        out, large = str(Path(folder) / "photo.tok"), Path(folder) / "large.jpg"
        with Image.open(args.photo) as photo:
            photo.convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC).save(large, quality=90)
        options = ["--tokens", str(args.tokens), "--model", args.model, "-f", "-q", "-o"]
        tok = tok_command()
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "tok --help": [*tok, "--help"],
            "tok --version": [*tok, "--version"],
            "import torch": [sys.executable, "-c", "import torch"],
            f"tok encode photo --tokens {args.tokens}": [*tok, "encode", str(args.photo), *options, out],
            f"tok encode photo-12-megapixels --tokens {args.tokens}": [*tok, "encode", str(large), *options, f"{folder}/large.tok"],
            f"tok info photo-{args.tokens}.tok": [*tok, "info", out],
            f"tok decode photo-{args.tokens}.tok": [*tok, "decode", out, "--model", args.model, "-o", f"{folder}/photo.png", "-f", "-q"],
        }
        runs: dict[str, list[Finished]] = {name: [] for name in commands}
        steps: list[dict[str, float]] = []
        again: list[float] = []
        inside = [sys.executable, "-c", STEPS, str(args.photo), str(args.tokens), args.model, out]
        for number in range(args.rounds + 1):  # the first round fills the disk cache and is not counted
            for name, command in commands.items():
                done = run(command)
                if number:
                    runs[name].append(done)
            done = run(inside)
            if number:
                report = json.loads(done.output)
                ends = done.seconds - report["not_counted"] - sum(report["steps"].values())
                steps.append({"start and end of Python": ends, **report["steps"]})
                again.append(report["again"])

    median = {name: round(statistics.median(r.seconds for r in done), 3) for name, done in runs.items()}
    encode_name = f"tok encode photo --tokens {args.tokens}"
    body = {
        "protocol": f"Whole processes, {args.rounds} rounds in turns, medians; the breakdown is of a process of its own",
        "model": args.model if args.model == "default" else "another than default",
        "commands": {
            name: {
                "median": median[name],
                "least": round(min(r.seconds for r in done), 3),
                "most": round(max(r.seconds for r in done), 3),
                "cpu_median": round(statistics.median(r.cpu_seconds for r in done), 3),
            }
            for name, done in runs.items()
        },
        "above_import_torch": round(median[encode_name] - median["import torch"], 3),
        "steps": {name: round(statistics.median(s[name] for s in steps), 4) for name in steps[0]},
        "encode_again": round(statistics.median(again), 4),
    }
    for name, seconds in (median | {f"{encode_name}, above import torch": body["above_import_torch"]} | {f"  {k}": v for k, v in body["steps"].items()}).items():
        print(f"{seconds:8.3f} s  {name}")
    print(save("startup", body, folder=args.results))


if __name__ == "__main__":
    main()
