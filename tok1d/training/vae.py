"""Put the weights of a frozen VAE (diffusers' AutoencoderKL) into the two halves that a tokenizer holds of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from tok1d import hub
from tok1d.errors import ModelError, TokError
from tok1d.sources import CONFIG, OUR_WEIGHTS
from tok1d.tokenizers.official.read import Published, read, read_config
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.tokenizers.vae import LatentDecoder, LatentEncoder


def load_vae(tokenizer: Tokenizer1D, source: str) -> None:
    """Copy the weights in place, into every half that the parts hold.

    Args:
        tokenizer: whose parts have ``vae_channels``.
        source: folder or file of an AutoencoderKL in diffusers' layout, or its id on the hub.

    Raises:
        ModelError: it cannot be read, is another VAE than the parts describe, or the parts hold none.
    """
    halves = {name: m for name, m in tokenizer.named_modules() if isinstance(m, LatentEncoder | LatentDecoder) and not m.identity}
    if not halves:
        raise ModelError(f"vae {source}: {tokenizer.name} works on pixels (vae_channels: null); leave vae out, or set vae_channels")
    try:
        published = _read(hub.find(source).path)
    except TokError as error:
        raise ModelError(f"vae {source}: cannot be loaded: {error}") from error
    for name, half in halves.items():
        _check_scale(source, published, name, half)
        wanted = half.state_dict()
        odd = [k for k, v in wanted.items() if published.shapes.get(k) != tuple(v.shape)]
        if odd:
            there = published.shapes.get(odd[0], "missing")
            raise ModelError(
                f"vae {source}: {odd[0]} is {there} there and {tuple(wanted[odd[0]].shape)} in {name}. Give the parts the vae_channels, "
                "vae_layers and latent_channels of that VAE (block_out_channels, layers_per_block, latent_channels in its config.json)"
            )
        half.load_state_dict({k: published.state[k] for k in wanted})


def _read(path: Path) -> Published:
    """A file, or diffusers' folder, whose file is named as those of our own models."""
    if not (path / OUR_WEIGHTS).is_file():
        return read(path)
    return replace(read(path / OUR_WEIGHTS), config=read_config(path / CONFIG) if (path / CONFIG).is_file() else {})


def _check_scale(source: str, published: Published, name: str, half: LatentEncoder | LatentDecoder) -> None:
    scale = published.config.get("scaling_factor")
    if isinstance(scale, int | float) and not math.isclose(scale, half.scaling_factor, rel_tol=1e-6):
        raise ModelError(
            f"vae {source}: its latents are multiplied by {scale}, those of {name} by {half.scaling_factor}: "
            f"set scaling_factor: {scale} in encoder and decoder"
        )
