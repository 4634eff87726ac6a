"""Fit the linear stage of a spectral tokenizer to photos and save it as a model folder.

    python scripts/fit_spectral.py DATA… --out runs/spectral

It is where configs/tokenizer/default.yaml starts (``init_from``). The parts are those of a configuration, so that another
one is ``--config NAME``; without DATA its training data are used. About ten minutes for the default on two cores.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.utils.data import Dataset

from tok1d.data.drawn import DrawnImages
from tok1d.data.photos import Photos, index_images
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.fit import find_config
from tok1d.training.spectral_fit import fit_spectral


def build(settings: dict[str, Any]) -> Tokenizer1D:
    """The tokenizer of a ``tok fit`` configuration, untrained."""
    parts = dict(settings["model"]["init_args"]["tokenizer"]["init_args"])
    for slot in ("encoder", "quantizer", "decoder", "lengths"):
        parts[slot] = {"class": parts[slot]["class_path"], **parts[slot].get("init_args", {})}
    return Tokenizer1D.from_config({"_class_name": "Tokenizer1D", **parts})


def images(data: list[str], settings: dict[str, Any], area: tuple[float, float], seed: int) -> Dataset:
    """Random crops of the given photos, or the training images of the configuration."""
    chosen = settings["data"]["init_args"]
    if not data and settings["data"]["class_path"].endswith("DrawnData"):
        return DrawnImages(chosen["images"], chosen["size"], seed)
    return Photos(index_images(data or chosen["train"]), chosen["size"], area, seed)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", help="folders, .tar shards or images (default: those of the configuration)")
    parser.add_argument("--config", default="tokenizer/default", help="YAML file or name of a configuration with spectral parts")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--views", type=int, default=5, help="random crops of each photo")
    parser.add_argument("--area", type=float, nargs=2, default=(0.35, 1.0), help="share of the photo in a crop")
    parser.add_argument("--own-books", type=int, default=32, help="tokens with a codebook each; later ones share")
    parser.add_argument("--refresh", type=int, default=32, help="tokens that share one book")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    settings = yaml.safe_load(Path(find_config(args.config)).read_text())
    torch.manual_seed(args.seed)
    tokenizer = build(settings)
    pictures = images(args.data, settings, tuple(args.area), args.seed)

    def batches() -> Iterator[Tensor]:
        order = np.random.default_rng(args.seed).permutation(len(pictures) * args.views)
        for chunk in np.array_split(order, max(1, len(order) // 64)):
            yield torch.stack([pictures[int(i) % len(pictures), int(i)]["image"] for i in chunk]).float() / 255

    errors = fit_spectral(tokenizer, batches(), own_books=args.own_books, refresh=args.refresh, seed=args.seed)
    for k in (2**i for i in range(len(errors).bit_length())):
        if k <= len(errors):
            print(f"{k:4d} tokens: {errors[k - 1]:.6f} of the coded coefficients' error left")
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
