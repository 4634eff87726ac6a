"""Images/s of TiTok encode and decode: tok1d against a plain reference, as ratios of one run.

The reference (titok_reference.py) is the published architecture done the way the published code runs it. Both run in
float32 on the same (random) weights, take turns, and must find the same ids and pictures.

    python -m benchmarks.titok_speed                        # two-stage B-64 and one-stage B at batch 1 and 8
    python -m benchmarks.titok_speed --quick --models S     # seconds, to see that it works
    python -m benchmarks.titok_speed --clock cpu --threads 1  # on a machine that does other things too

L32, B64 and S128 are the published two-stage models, with pixel decoder; BL64, BL128 and SL256 published one-stage ones;
S, B and L have one stage, encoder and decoder of that size, and as many tokens as the two-stage model of that size.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import titok_reference
from benchmarks.titok_reference import Reference
from tok1d import __version__
from tok1d.tokenizers.official.layout import export_state
from tok1d.tokenizers.official.titok import TITOK, TITOK_LEGACY, legacy_config, titok_config
from tok1d.tokenizers.tokenizer import Tokenizer1D

WIDTHS = {"S": (512, 8), "B": (768, 12), "L": (1024, 24)}
MODELS = {  # encoder, decoder, tokens, stages
    "L32": ("L", "L", 32, 2),
    "B64": ("B", "B", 64, 2),
    "S128": ("S", "S", 128, 2),
    "S": ("S", "S", 128, 1),
    "B": ("B", "B", 64, 1),
    "L": ("L", "L", 32, 1),
    "BL64": ("B", "L", 64, 1),
    "BL128": ("B", "L", 128, 1),
    "SL256": ("S", "L", 256, 1),
}
CODES = {1: (8192, 64), 2: (4096, 12)}  # vocabulary and width of the codes by number of stages
PIXEL = (128, (1, 1, 2, 2, 4))
SIDE = 256
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RESULTS = Path(__file__).with_name("results") / "titok_speed.json"


def build(name: str) -> tuple[Tokenizer1D, Reference]:
    """Ours with random weights that use many codes, and the reference on the very same tensors."""
    encoder, decoder, tokens, stages = MODELS[name]
    codes, dim = CODES[stages]
    sizes = {"encoder": WIDTHS[encoder], "decoder": WIDTHS[decoder], "tokens": tokens, "vocab_size": codes, "dim": dim}
    pixel = {"pixel_width": PIXEL[0], "pixel_multipliers": PIXEL[1]}
    config = legacy_config(name, **sizes, **pixel) if stages == 2 else titok_config(name, **sizes)
    torch.manual_seed(0)
    ours = Tokenizer1D.from_config(config).eval().requires_grad_(False)
    with torch.no_grad():
        z = ours.encode_latents(torch.rand(2, 3, SIDE, SIDE)).flatten(0, 1)
        ours.quantizer.codebook.normal_().mul_(z.std(0)).add_(z.mean(0))
    with torch.device("meta"):
        reference = Reference(WIDTHS[encoder], WIDTHS[decoder], tokens, codes, dim, SIDE, pixel=PIXEL if stages == 2 else None)
    reference.load_state_dict(export_state(TITOK_LEGACY if stages == 2 else TITOK, ours), assign=True)
    return ours, reference.eval().requires_grad_(False)


def take_turns(one: Callable, other: Callable, seconds: float, least: int, clock: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Seconds of each call of two functions, called alternately."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    one(), other()
    while time.perf_counter() < end or len(times[0]) < least:
        order = ((one, times[0]), (other, times[1]))
        for call, spent in order if len(times[0]) % 2 else reversed(order):
            start = clock()
            call()
            spent.append(clock() - start)
    return times


@torch.inference_mode()
def measure(name: str, batches: list[int], seconds: float, least: int, clock: str) -> list[dict]:
    ours, reference = build(name)
    images = torch.rand(max(batches), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    rows = []
    for batch in batches:
        x = images[:batch]
        encode = lambda x=x: ours.quantizer(ours.encode_latents(x)).ids  # noqa: E731
        ids, theirs = encode(), reference.encode(x)
        if not torch.equal(ids, theirs):
            raise SystemExit(f"{name}: ids differ in {int((ids != theirs).sum())} of {ids.numel()} places")
        decode = lambda ids=ids: ours.decode_latents(ours.quantizer.ids_to_codes(ids)).clamp(0, 1)  # noqa: E731
        error = (decode() - reference.decode(ids)).abs().max().item()
        if not error < 1e-3:
            raise SystemExit(f"{name}: pictures differ by {error:.2g}")
        encoding = take_turns(encode, lambda x=x: reference.encode(x), seconds, least, CLOCKS[clock])
        decoding = take_turns(decode, lambda ids=ids: reference.decode(ids), seconds, least, CLOCKS[clock])
        both = [[e + d for e, d in zip(*pair, strict=False)] for pair in zip(encoding, decoding, strict=True)]
        for verb, (mine, his) in (("encode", encoding), ("decode", decoding), ("both", both)):
            a, b = statistics.median(mine), statistics.median(his)
            ratio = statistics.median(q / p for p, q in zip(mine, his, strict=True))  # of neighbours in time
            row = {"model": name, "batch": batch, "verb": verb, "calls": len(mine), "tok1d_images_per_s": round(batch / a, 3)}
            row |= {"reference_images_per_s": round(batch / b, 3), "ratio": round(ratio, 3)}
            row |= {"ratio_of_fastest": round(min(his) / min(mine), 3), "distinct_ids": len(ids.unique())}
            rows.append(row)
            speeds = f"{batch / a:8.2f} img/s  {batch / b:8.2f} img/s"
            print(f"{name:6} batch {batch:2} {verb}  {speeds}  × {ratio:.3f}  × {min(his) / min(mine):.3f}", flush=True)
    return rows


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="B64,B", help=f"comma-separated, of {', '.join(MODELS)} (default: B64,B)")
    parser.add_argument("--batches", default="1,8", help="comma-separated (default: 1,8)")
    parser.add_argument("--seconds", type=float, default=60, help="for encode and for decode of a batch size (default: 60)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor seconds of this process")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pad-inside", action="store_true", help="kinder than published: the reference pads inside convolutions")
    parser.add_argument("--quick", action="store_true", help="two calls a row; shows that it works, measures little")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    args = parser.parse_args(argv)
    models, batches = args.models.split(","), [int(b) for b in args.batches.split(",")]
    if unknown := [m for m in models if m not in MODELS]:
        parser.error(f"unknown model {unknown[0]!r}; choose of {', '.join(MODELS)}")
    torch.set_num_threads(args.threads)
    titok_reference.PAD_INSIDE = args.pad_inside
    print("model  batch    verb        tok1d      reference      ratio: median, of the fastest calls")
    least, seconds = (2, 0.0) if args.quick else (3, args.seconds)
    rows = [row for m in models for row in measure(m, batches, seconds, least, args.clock)]
    report = {
        "benchmark": "titok_speed",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "clock": args.clock,
        "reference_pads_inside": args.pad_inside,
        "torch": torch.__version__,
        "tok1d": __version__,
        "dtype": "float32",
        "quick": args.quick,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
