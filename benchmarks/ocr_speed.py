"""Words read per second: crops pooled across images in fixed width buckets, beside EasyOCR's own ``recognize`` per image.

Both read the same crops with the same weights on the same threads, in turns, so that a busy machine slows both. EasyOCR runs
as its users have it (dynamic int8 on a CPU) and in float32, which is what the pooled reader computes in. Memory is that of
whole processes over few and many crops.

    python -m benchmarks.ocr_speed --words text-words-00000.tar      # crops KEY.webp + KEY.json {"text"} of a tar
    python -m benchmarks.ocr_speed --crops 60                        # drawn words

Results: benchmarks/results/ocr_speed.json.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, run, save, say

Words = list[tuple[str, np.ndarray]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=Path, help="tar of crops; without it words are drawn")
    parser.add_argument("--crops", type=int, default=1000, help="at most")
    parser.add_argument("--rounds", type=int, default=5, help="the crops are shared among this many turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only-pooled", type=int, metavar="TIMES", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    import torch

    from tok1d.eval.ocr import EasyOCR, WordPool
    from tok1d.eval.text import text_scores

    torch.set_num_threads(args.threads)
    words = from_tar(args.words, args.crops) if args.words else drawn(args.crops)
    ours = EasyOCR()

    def pooled(part: Words) -> list[str]:
        pool: WordPool[int] = WordPool(ours)
        return [r.text for crop in part for r in pool.add(0, crop[1])] + [r.text for r in pool.flush()]

    if args.only_pooled:
        print(len(pooled(words * args.only_pooled)))
        return

    readers: dict[str, Any] = {"pooled": pooled}
    for name, quantize in (("easyocr_int8", True), ("easyocr_float32", False)):
        readers[name] = by_image(quantize)
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    read: dict[str, list[str]] = {name: [] for name in readers}
    parts = [words[i :: args.rounds] for i in range(args.rounds)]
    for reader in readers.values():
        reader(words[:4])
    for number, part in enumerate(parts):
        for name, reader in readers.items():
            start = time.perf_counter()
            read[name] += reader(part)
            seconds[name].append(time.perf_counter() - start)
        say(f"turn {number + 1} of {args.rounds}: " + ", ".join(f"{n} {len(part) / s[-1]:.1f}/s" for n, s in seconds.items()))
    truths = [text for part in parts for text, _ in part]
    rows = {}
    for name in readers:
        rows[name] = {
            "crops_per_second": round(len(truths) / sum(seconds[name]), 2),
            **{f"{s}_{v}": float(text_scores(truths, read[name], s, v).nanmean()) for s in ("acc", "ned") for v in ("raw", "caseless", "alnum")},
        }
        print(f"{name:16s} {rows[name]['crops_per_second']:7.1f} crops/s  T-ACC {rows[name]['acc_raw']:.3f}  T-NED {rows[name]['ned_raw']:.3f}")
    ratios = {
        name: {
            "of_totals": round(sum(seconds[name]) / sum(seconds["pooled"]), 2),
            "median_of_turns": round(statistics.median(a / b for a, b in zip(seconds[name], seconds["pooled"])), 2),
        }
        for name in readers
        if name != "pooled"
    }
    memory = {}
    for times in (1, 4):
        source = ["--words", str(args.words)] if args.words else []
        done = run([sys.executable, "-m", "benchmarks.ocr_speed", *source, "--crops", str(args.crops), "--threads", str(args.threads), "--only-pooled", str(times)])
        memory[str(int(done.output))] = round(done.peak_mib, 1)
    for name, ratio in ratios.items():
        print(f"pooled is {ratio['of_totals']} × {name} (median of turns {ratio['median_of_turns']})")
    print(f"peak MiB of the pooled process by crops: {memory}")
    body = {
        "protocol": f"{len(truths)} crops in {args.rounds} turns, each reader in every turn; EasyOCR with its second pass for low confidence, as it is by default",
        "crops": "word crops of a tar" if args.words else "drawn words",
        "recogniser": ours.id,
        "readers": rows,
        "ratios": ratios,
        "peak_mib_by_crops": memory,
    }
    print(save("ocr_speed", body, threads=args.threads, folder=args.results))


def by_image(quantize: bool) -> Any:
    """EasyOCR's own path: one ``recognize`` an image, with the box of its word."""
    import easyocr

    from tok1d.eval.ocr import find_weights

    folder = str(find_weights(None, Path(easyocr.config.MODULE_PATH) / "model").parent)
    reader = easyocr.Reader(
        ["en"], gpu=False, model_storage_directory=folder, user_network_directory=folder, download_enabled=False, detector=False, verbose=False, quantize=quantize
    )

    def read(part: Words) -> list[str]:
        boxes = [[[0, crop.shape[1], 0, crop.shape[0]]] for _, crop in part]
        return [reader.recognize(np.ascontiguousarray(crop[:, :, ::-1]), box, [])[0][1].strip() for (_, crop), box in zip(part, boxes)]

    return read


def from_tar(path: Path, count: int) -> Words:
    """Truth and uint8 (h, w, 3) of the first ``count`` crops by name."""
    from PIL import Image

    with tarfile.open(path) as tar:
        names = sorted(n for n in tar.getnames() if n.endswith((".webp", ".png", ".jpg")))[:count]
        texts = [json.load(tar.extractfile(f"{n.rpartition('.')[0]}.json"))["text"] for n in names]  # type: ignore[arg-type]
        return [(t, np.asarray(Image.open(io.BytesIO(tar.extractfile(n).read())).convert("RGB"))) for t, n in zip(texts, names)]  # type: ignore[union-attr]


def drawn(count: int, seed: int = 0) -> Words:
    """Words in Pillow's own font, 10 to 40 pixels high, dark on light with noise."""
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(seed)
    letters = list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
    words = []
    for _ in range(count):
        text = "".join(rng.choice(letters, rng.integers(2, 11)))
        font = ImageFont.load_default(int(rng.integers(10, 40)))
        box = font.getbbox(text)
        picture = Image.new("RGB", (int(box[2]) + 8, int(box[3]) + 8), tuple(rng.integers(180, 256, 3).tolist()))
        ImageDraw.Draw(picture).text((4, 4), text, tuple(rng.integers(0, 80, 3).tolist()), font)
        pixels = np.asarray(picture) + rng.normal(0, 6, (picture.height, picture.width, 1))
        words.append((text, pixels.round().clip(0, 255).astype(np.uint8)))
    return words


if __name__ == "__main__":
    main()
