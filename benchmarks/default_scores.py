"""PSNR and LPIPS of a nested tokenizer at every number of tokens, with what the tokens cost and how they are used.

    python -m benchmarks.default_scores default photos-free-val-00000.tar photos-research-val-00000.tar --images 128

Beside the powers of two it measures the numbers of tokens whose whole .tok file (header and checksum counted) has the
size of the budgets that the image codecs get. Results: benchmarks/results/default_scores.json.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.measure import (
    BUDGETS,
    PROTOCOL,
    TOKEN_STEPS,
    Cache,
    Rendered,
    Row,
    View,
    ViewSet,
    measure,
    point,
    to_bytes,
)
from benchmarks.record import CACHE, RESULTS, save, say
from tok1d import load
from tok1d.eval.perceptual import Perceptual
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.tokens import TokenSequence


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name, folder or hub id")
    parser.add_argument("data", nargs="+", help="shards or folders; each is a set of its own")
    parser.add_argument("--images", type=int, metavar="N", help="evenly spaced images of each set; default: all")
    parser.add_argument("--tokens", help="default: 1,2,4,…,256")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)

    model = load(args.model)
    given = map(int, args.tokens.split(",")) if args.tokens else [k for k in TOKEN_STEPS if k <= model.max_tokens]
    extra = [k for b in BUDGETS if (k := file_budget_tokens(model, b))]
    tokens = sorted({*given, *extra})
    lpips = Perceptual("vgg")
    cache = Cache(args.cache / f"default_scores-{model.model_id:016x}.jsonl")
    sets = [score_set(model, ViewSet(path, args.images), tokens, cache, lpips) for path in args.data]
    body: Row = {
        "protocol": PROTOCOL,
        "seed": 0,
        "model": {"name": model.name, "id": f"{model.model_id:016x}", "bits_per_token": model.bits_per_token, "tokens": model.max_tokens},
        "sets": sets,
    }
    print(save("default_scores", body, threads=torch.get_num_threads(), folder=args.results))


def file_size(model: Tokenizer1D, tokens: int) -> int:
    """Bytes of the .tok file of one image with that many tokens: header, payload, checksum."""
    from tok1d.tokfile import pack

    return len(pack(TokenSequence(torch.zeros(1, tokens, dtype=torch.int64), vocab_size=model.vocab_size)))


def file_budget_tokens(model: Tokenizer1D, budget: int) -> int:
    """The most tokens whose .tok file has at most ``budget`` bytes; 0 if not even one token fits."""
    return max((k for k in range(1, model.max_tokens + 1) if file_size(model, k) <= budget), default=0)


def encode_all(model: Tokenizer1D, views: ViewSet, batch: int = 16) -> TokenSequence:
    """All tokens of every view, ids (V, N)."""
    parts = []
    for start in range(0, len(views), batch):
        pixels = torch.stack([views[i].pixels for i in range(start, min(start + batch, len(views)))])
        parts.append(model.encode(pixels))
    return TokenSequence.stack(parts)


def score_set(model: Tokenizer1D, views: ViewSet, tokens: list[int], cache: Cache, lpips: Perceptual) -> Row:
    """The curve of one set of images."""
    say(f"{views.name}: encoding {len(views)} images")
    encoded = encode_all(model, views)

    def render(index: int, view: View, missing: list[str]) -> dict[str, Rendered | None]:
        return {c: Rendered(to_bytes(model.decode(encoded[index, : int(c)])[0])) for c in missing}

    rows = measure(views, [str(k) for k in tokens], render, cache, lpips)
    curve = []
    for k in tokens:
        bits = k * model.bits_per_token
        size = {"tokens": k, "bits": bits, "payload_bytes": -(-bits // 8), "file_bytes": file_size(model, k)}
        curve.append(size | point([r[str(k)] for r in rows]))
    rising = all(a["psnr"]["mean"] < b["psnr"]["mean"] and a["lpips"]["mean"] > b["lpips"]["mean"] for a, b in pairwise(curve))
    for p in curve:
        print(f"{views.name} {p['tokens']:4d} tokens {p['payload_bytes']:4d} bytes  {p['psnr']['mean']:6.2f} dB  LPIPS {p['lpips']['mean']:.3f}")
    return views.describe() | {"monotone": rising, "curve": curve, "ids": id_statistics(model, encoded)}


def id_statistics(model: Tokenizer1D, seq: TokenSequence) -> Row:
    """What the ids of this set say by themselves; benchmarks/codebook_usage.py has the samples to say more."""
    ids = seq.data
    counts = [torch.bincount(column, minlength=model.vocab_size).float() for column in ids.T]
    entropy = [-(p[p > 0] * p[p > 0].log2()).sum().item() for p in (c / c.sum() for c in counts)]
    return {
        "vocab_size": model.vocab_size,
        "used_at_some_position": round(torch.stack(counts).sum(0).gt(0).float().mean().item(), 4),
        "entropy_bits_mean": round(sum(entropy) / len(entropy), 3),
        "entropy_bits_possible": round(min(model.bits_per_token, torch.tensor(float(len(ids))).log2().item()), 3),
    }


if __name__ == "__main__":
    main()
