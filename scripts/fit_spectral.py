"""Fit the linear stage of the default tokenizer to photos and save it as a model folder.

    python scripts/fit_spectral.py DATA… --out runs/spectral

It is the starting point of configs/tokenizer/default.yaml (``--model.init_from``). About ten minutes on two cores.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch

from tok1d.data.photos import Photos, index_images
from tok1d.tokenizers.decoders.spectral import SpectralDecoder
from tok1d.tokenizers.encoders.spectral import SpectralEncoder
from tok1d.tokenizers.lengths import TailDrop
from tok1d.tokenizers.quantizers.nested_vq import NestedVQ
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.spectral_fit import fit_spectral


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="folders, .tar shards or images")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dim", type=int, default=24, help="coefficients of a token")
    parser.add_argument("--grid", type=int, default=64, help="lowest frequencies along each axis")
    parser.add_argument("--views", type=int, default=5, help="random crops of each photo")
    parser.add_argument("--area", type=float, nargs=2, default=(0.35, 1.0), help="share of the photo in a crop")
    parser.add_argument("--own-books", type=int, default=32)
    parser.add_argument("--refresh", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(args.seed)

    books = args.own_books + -(-(args.tokens - args.own_books) // args.refresh)
    tokenizer = Tokenizer1D(
        SpectralEncoder(args.tokens, args.dim, args.grid),
        NestedVQ(args.tokens, args.dim, 4096, books),
        SpectralDecoder(args.tokens, args.dim, args.grid),
        TailDrop("log_uniform"),
        name="default",
    )
    photos = Photos(index_images(args.data), 256, tuple(args.area), args.seed)

    def batches():
        order = np.random.default_rng(args.seed).permutation(len(photos) * args.views)
        for chunk in np.array_split(order, len(order) // 64):
            yield torch.stack([photos[int(i) % len(photos), int(i)] for i in chunk]).float() / 255

    errors = fit_spectral(tokenizer, batches(), own_books=args.own_books, refresh=args.refresh, seed=args.seed)
    for k in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        if k <= args.tokens:
            print(f"{k:4d} tokens: {errors[k - 1]:.6f} of the coded coefficients' error left")
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
