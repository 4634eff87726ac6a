"""How much of its codebooks a tokenizer uses: per-position entropy and the share of codes seen, over many crops.

    python -m benchmarks.codebook_usage default photos-free-val-00000.tar photos-research-val-00000.tar --views 24

A code that was not seen may only have lacked the chance: with n draws from K equally likely codes, 1 - (1 - 1/K)^n of
them show up. That bound stands beside every share. Results: benchmarks/results/codebook_usage.json.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Row
from benchmarks.record import RESULTS, save, say
from tok1d import load
from tok1d.data.photos import Photos, index_images


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name, folder or hub id")
    parser.add_argument("data", nargs="+", help="shards or folders")
    parser.add_argument("--views", type=int, default=24, help="random crops of each photo")
    parser.add_argument("--area", type=float, nargs=2, default=(0.1, 1.0), help="share of the photo in a crop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)

    model = load(args.model)
    photos = Photos(index_images(args.data), model.image_size[0], tuple(args.area), args.seed)
    draws = [(i, i * args.views + v) for i in range(len(photos)) for v in range(args.views)]
    ids = []
    for start in range(0, len(draws), args.batch_size):
        ids.append(model.encode(torch.stack([photos[d]["image"] for d in draws[start : start + args.batch_size]])).data)
        if start // args.batch_size % 20 == 0:
            say(f"{start} of {len(draws)} crops")
    book = getattr(model.quantizer, "book", torch.zeros(model.max_tokens, dtype=torch.int64))
    body = {
        "model": {"name": model.name, "id": f"{model.model_id:016x}"},
        "seed": args.seed,
        "protocol": f"{args.views} random crops of {args.area[0]:g} to {args.area[1]:g} of the area of each of {len(photos)} photos",
    } | usage(torch.cat(ids), model.vocab_size, book)
    print(f"{body['codes_used']:.1%} of the codes of {len(body['books'])} codebooks seen; with equally likely codes: {body['codes_expected']:.1%}")
    print(f"entropy {body['entropy_bits']['mean']:.2f} of {math.log2(model.vocab_size):.0f} bits a token")
    print(save("codebook_usage", body, threads=torch.get_num_threads(), folder=args.results))


def usage(ids: Tensor, vocab_size: int, book: Tensor) -> Row:
    """Statistics of ids.

    Args:
        ids: int64 (M, N) of M samples.
        vocab_size: K.
        book: int64 (N,), which codebook each position uses.

    Returns:
        ``samples``, ``codes_used`` and ``codes_expected`` over all codebooks together, ``books`` (the same of each, in
        order) and ``entropy_bits`` by position: the plug-in estimate plus Miller and Madow's correction of its bias.
    """
    samples = len(ids)
    books = []
    for b in book.unique().tolist():
        seen = torch.bincount(ids[:, book == b].flatten(), minlength=vocab_size)
        draws = int(seen.sum())
        books.append({"used": round(seen.gt(0).float().mean().item(), 4), "expected": round(1 - (1 - 1 / vocab_size) ** draws, 4)})
    entropy = []
    for column in ids.T:
        p = torch.bincount(column, minlength=vocab_size).double() / samples
        p = p[p > 0]
        bits = -(p * p.log2()).sum().item() + (len(p) - 1) / (2 * samples * math.log(2))
        entropy.append(round(min(bits, math.log2(vocab_size)), 3))
    return {
        "samples": samples,
        "codes_used": round(sum(b["used"] for b in books) / len(books), 4),
        "codes_expected": round(sum(b["expected"] for b in books) / len(books), 4),
        "books": books,
        "entropy_bits": {
            "mean": round(sum(entropy) / len(entropy), 3),
            "lowest": min(entropy),
            "highest": max(entropy),
            "by_position": entropy,
        },
    }


if __name__ == "__main__":
    main()
