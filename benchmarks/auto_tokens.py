"""What a halting head is worth: how far its PSNR is off, and the tokens it chooses beside those that a search finds.

    python -m benchmarks.auto_tokens default photos-free-val-00000.tar --images 48

A search (``Budget``) decodes each image nine times and meets the target; the head decodes nothing. ``one_length`` is what
the same mean number of tokens gives when every image gets the same. Seconds are those of the processor, one thread.
Results: benchmarks/results/auto_tokens.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import PROTOCOL, TOKEN_STEPS, Row, ViewSet
from benchmarks.record import RESULTS, save, say
from tok1d import load
from tok1d.tokenizers.budget import Auto, Budget
from tok1d.tokenizers.halting import head_of
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.tokens import TokenSequence

BATCH = 16


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name, folder or hub id of a model with a halting head that predicts PSNR")
    parser.add_argument("data", help="shard or folder")
    parser.add_argument("--images", type=int, metavar="N", help="evenly spaced images; default: all")
    parser.add_argument("--targets", default="18,20,22", help="dB; default: 18,20,22")
    parser.add_argument("--repeat", type=int, default=15, help="timed encodes; default: 15")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    model = load(args.model)
    if head_of(model).metric != "psnr":
        parser.error(f"the head of {model.name} predicts {head_of(model).metric}, not psnr")
    views = ViewSet(args.data, args.images)
    images = torch.stack([view.pixels for view in views])
    seq = TokenSequence.stack([model.encode(part) for part in images.split(BATCH)])
    curve = [k for k in TOKEN_STEPS if k <= model.max_tokens]
    body: Row = {
        "protocol": PROTOCOL["id"],
        "psnr": "of the decoded picture in float, at the model's size",
        "seconds": "processor time of one image at a time, median",
        "model": {
            "name": model.name,
            "id": f"{model.model_id:016x}",
            "head": model.halting.to_config(),
            "head_parameters": sum(p.numel() for p in model.halting.parameters()),
        },
        "data": views.describe(),
        "prediction": prediction(model, images, seq, curve),
        "targets": [at_target(model, images, seq, float(t)) for t in args.targets.split(",")],
        "time": times(model, images, args.repeat),
    }
    print(save("auto_tokens", body, threads=1, folder=args.results))


@torch.inference_mode()
def psnr(model: Tokenizer1D, images: Tensor, seq: TokenSequence, lengths: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) and tokens in full, int64 (B,) lengths → dB (B,)."""
    found = []
    for rows in torch.arange(len(images)).split(BATCH):
        k = lengths[rows]
        out = model.decode_latents(model.codes_of(seq.data[rows, : int(k.max())], k), k).float().clamp(0, 1)
        found.append(-10 * (out - images[rows] / 255).square().mean((1, 2, 3)).log10())
    return torch.cat(found)


@torch.inference_mode()
def prediction(model: Tokenizer1D, images: Tensor, seq: TokenSequence, curve: list[int]) -> Row:
    """Mean absolute error and bias in dB, at each number of tokens and over all; beside it, the best that one curve could do."""
    head = head_of(model)
    assert seq.lengths is not None
    said = head.quality_of(head(model.codes_of(seq.data, seq.lengths)))
    rows, off, spread = [], [], []
    for k in curve:
        measured = psnr(model, images, seq, torch.full((len(images),), k))
        off.append(said[:, k - 1] - measured)
        spread.append(measured - measured.median())
        rows.append({"tokens": k, "psnr": rounded(measured.mean()), "error": rounded(off[-1].abs().mean()), "bias": rounded(off[-1].mean())})
        say(f"{k:4d} tokens: {rows[-1]}")
    every, plain = torch.cat(off), torch.cat(spread)
    return {
        "mean_absolute_error_db": rounded(every.abs().mean()),
        "bias_db": rounded(every.mean()),
        "one_curve_for_all_db": rounded(plain.abs().mean()),
        "by_tokens": rows,
    }


def at_target(model: Tokenizer1D, images: Tensor, seq: TokenSequence, target: float) -> Row:
    """Tokens chosen and quality got, by prediction, by search, and with one length for every image."""
    searched = Budget(psnr=target).search(model, images, seq)
    chosen = Auto(target).search(model, None, seq)
    here, there = (torch.tensor(r.tokens) for r in (chosen, searched))
    got = psnr(model, images, seq, here)
    one = torch.full_like(here, int(here.float().mean().round()))
    can = torch.tensor(searched.reached)  # where the target can be reached at all
    row = {
        "target_db": target,
        "reachable": int(can.sum()),
        "search": quality(there, torch.tensor(searched.psnr), target, can),
        "auto": quality(here, got, target, can),
        "one_length": quality(one, psnr(model, images, seq, one), target, can),
        "tokens_apart": rounded((here - there).abs().float().mean()),
        "octaves_apart": rounded((here.log2() - there.log2()).abs().mean()),
        "correlation_of_log_tokens": rounded(torch.corrcoef(torch.stack([here.log2(), there.log2()]))[0, 1]),
        "predicted_unreachable": chosen.reached.count(False),
        "truly_unreachable": int((~can).sum()),
    }
    say(str(row))
    return row


def quality(tokens: Tensor, found: Tensor, target: float, can: Tensor) -> Row:
    """Mean tokens over all images; how near the target the images come that can reach it."""
    off = found[can] - target
    return {
        "mean_tokens": rounded(tokens.float().mean()),
        "median_tokens": int(tokens.median()),
        "mean_psnr": rounded(found.mean()),
        "db_from_target": rounded(off.abs().mean()),
        "share_reached": rounded((off >= 0).float().mean()),
    }


def times(model: Tokenizer1D, images: Tensor, repeat: int) -> Row:
    """Seconds of one encode without and with the head, interleaved, and of one search."""
    ways: dict[str, Callable[[Tensor], object]] = {
        "encode": lambda x: model.encode(x),
        "encode_auto": lambda x: model.encode(x, tokens=Auto(15.0)),
        "head": lambda x: Auto(15.0).search(model, None, given),
    }
    given = model.encode(images[:1])
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(-1, repeat):  # the first round is not counted
        for name, way in ways.items():
            start = time.process_time()
            way(images[i % len(images)][None])
            if i >= 0:
                spent[name].append(time.process_time() - start)
    start = time.process_time()
    Budget(psnr=20.0).search(model, images[:1], given)
    return {name: round(statistics.median(values), 5) for name, values in spent.items()} | {"search": round(time.process_time() - start, 3)}


def rounded(value: Tensor) -> float:
    return round(float(value), 3)


if __name__ == "__main__":
    main()
