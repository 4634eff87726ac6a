"""FlexTok's published weights to our parts and back.

Weights: EPFL-VILAB/flextok_{d12_d12_in1k,d18_d18_in1k,d18_d28_in1k,d18_d28_dfn} on the Hub (``model.safetensors``, VAE
included, and ``config.json``), for research only; code: apple/ml-flextok. Sizes are read off the tensors. What tensors do not
show comes from the published configuration (:mod:`tok1d.tokenizers.official.flextok_config`), or from plain settings of the
same names, and without either is what :data:`DEFAULTS` says.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tok1d.errors import ModelError
from tok1d.tokenizers.decoders.flow import RectifiedFlowDecoder
from tok1d.tokenizers.encoders.flextok import FlexTokEncoder
from tok1d.tokenizers.lengths import TailDrop
from tok1d.tokenizers.official.flextok_config import settings
from tok1d.tokenizers.official.layout import Layout, Place, Shapes, module_path, shape_of
from tok1d.tokenizers.quantizers.fsq import FSQ
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.tokenizers.vae import PUBLISHED_CHANNELS, vae_names

LEVELS = [8, 8, 8, 5, 5, 5]
# Of files that come without a configuration; infer() warns of the two that pictures are wrong without.
DEFAULTS: dict[str, Any] = {
    "scaling_factor": 1.0,
    "max_timestep": 1.0,
    "levels": LEVELS,
    "lengths": "powers_of_two",
    "null_prob": 0.1,
    "noise": "uniform",
    "mode_scale": 0.25,
    "stratified": False,
    "encoder_head_dim": 64,
    "decoder_head_dim": 64,
    "posterior": "mean",
    "guidance": None,
}
SIDES = {"encoder": "encoder.module_dict.enc_", "decoder": "decoder.module_dict.dec_"}
HEAD_DIM = 64


def flextok_config(
    encoder_depth: int = 12,
    decoder_depth: int = 12,
    latent_channels: int = 16,
    *,
    tokens: int = 256,
    image_size: int = 256,
    encoder_width: int | None = None,
    decoder_width: int | None = None,
    patch_size: int = 16,
    vae_channels: Sequence[int] = PUBLISHED_CHANNELS,
    vae_layers: int = 2,
    name: str = "flextok",
    **extra: Any,
) -> dict[str, Any]:
    """``Tokenizer1D.from_config`` data of a FlexTok of any size.

    Args:
        encoder_depth, decoder_depth: blocks; published pairs are 12-12, 18-18 and 18-28.
        latent_channels: of the VAE, published 4, 8 and 16.
        tokens, image_size, patch_size, vae_channels, vae_layers: as the parts have them.
        encoder_width, decoder_width: 64 × depth if None, as published.
        name: of the tokenizer.
        extra: overrides of :data:`DEFAULTS`; a ``guidance`` of None is 15 for decoders up to 12 blocks, else 7.5.

    Raises:
        ModelError: an override that does not exist.
    """
    if unknown := extra.keys() - DEFAULTS.keys():
        raise ModelError(f"flextok_config has no setting {sorted(unknown)[0]!r}; there are {', '.join(DEFAULTS)}")
    given = {**DEFAULTS, **extra}
    enc_width = 64 * encoder_depth if encoder_width is None else encoder_width
    dec_width = 64 * decoder_depth if decoder_width is None else decoder_width
    shared = {
        "tokens": tokens,
        "dim": len(given["levels"]),
        "patch_size": patch_size,
        "image_size": [image_size, image_size],
        "vae_channels": list(vae_channels),
        "vae_layers": vae_layers,
        "latent_channels": latent_channels,
        "scaling_factor": given["scaling_factor"],
    }
    flow = {key: given[key] for key in ("max_timestep", "null_prob", "noise", "mode_scale", "stratified")}
    guidance = given["guidance"] or (15.0 if decoder_depth <= 12 else 7.5)
    return {
        "_class_name": "Tokenizer1D",
        "name": name,
        "image_size": [image_size, image_size],
        "encoder": {
            "class": module_path(FlexTokEncoder),
            **shared,
            "width": enc_width,
            "depth": encoder_depth,
            "heads": _heads(enc_width, given["encoder_head_dim"]),
            "posterior": given["posterior"],
        },
        "quantizer": {"class": module_path(FSQ), "levels": list(given["levels"])},
        "decoder": {
            "class": module_path(RectifiedFlowDecoder),
            **shared,
            "width": dec_width,
            "depth": decoder_depth,
            "heads": _heads(dec_width, given["decoder_head_dim"]),
            "guidance": guidance,
            **flow,
        },
        "lengths": {"class": module_path(TailDrop), "distribution": given["lengths"]},
    }


def recognises(shapes: Shapes) -> bool:
    """Whether a state dict has the registers and the flow decoder of FlexTok."""
    return all(key in shapes for key in (f"{SIDES['encoder']}register_module.registers", f"{SIDES['decoder']}noise_patch_emb.patch_proj.weight"))


def infer(shapes: Shapes, published: Mapping[str, Any], name: str = "flextok") -> dict[str, Any]:
    """Our configuration of published tensors.

    Args:
        shapes: of the state dict.
        published: content of config.json with its trees, a safetensors header under ``__metadata__``, or plain settings
            named as :data:`DEFAULTS`; {} if there is nothing.
        name: of the tokenizer.

    Raises:
        ModelError: shapes that contradict each other or the configuration; a configuration of something else.
    """
    enc, dec, vae = SIDES["encoder"], SIDES["decoder"], "vae.vae."
    tokens, enc_width = shape_of(shapes, f"{enc}register_module.registers", 2, "FlexTok")
    dec_width, columns = shape_of(shapes, f"{dec}noise_patch_emb.patch_proj.weight", 2, "FlexTok")
    rows, cols = shape_of(shapes, f"{dec}patches_posemb_module.posembs", 4, "FlexTok")[2:]
    dim = shape_of(shapes, f"{enc}to_latents.proj.weight", 2, "FlexTok")[0]
    channels = shape_of(shapes, f"{vae}post_quant_conv.weight", 4, "FlexTok")[0]
    levels = _count(shapes, f"{vae}encoder.down_blocks.")
    vae_channels = [shape_of(shapes, f"{vae}encoder.down_blocks.{i}.resnets.0.conv1.weight", 4, "FlexTok")[0] for i in range(levels)]
    patch = math.isqrt(columns // channels)
    if rows != cols or patch * patch * channels != columns or not vae_channels:
        raise ModelError(f"a FlexTok has square grids and patches, these are {rows} × {cols} and {columns} numbers of {channels} channels")
    patch_size = patch * 2 ** (levels - 1)
    plain = {key: published[key] for key in DEFAULTS if key in published}
    found = {**settings(published), **plain}
    if guessed := [key for key in ("scaling_factor", "max_timestep") if key not in found]:
        values = " and ".join(f"{key} {DEFAULTS[key]}" for key in guessed)
        warnings.warn(f"{name}: no configuration says its {values}, which is a guess; with others its pictures are wrong", stacklevel=2)
    if len(found.get("levels", LEVELS)) != dim:
        raise ModelError(f"the weights have {dim} numbers a token, the levels {found.get('levels', LEVELS)} need another many: pass levels=[...]")
    return flextok_config(
        _count(shapes, f"{enc}transformer.blocks."),
        _count(shapes, f"{dec}transformer.blocks."),
        channels,
        tokens=tokens,
        image_size=rows * patch_size,
        encoder_width=enc_width,
        decoder_width=dec_width,
        patch_size=patch_size,
        vae_channels=vae_channels,
        vae_layers=_count(shapes, f"{vae}encoder.down_blocks.0.resnets."),
        name=name,
        **found,
    )


def places(config: dict[str, Any]) -> dict[str, Place]:
    """Place of every published tensor."""
    table: dict[str, Place] = {}

    def linear(theirs: str, ours: str) -> None:
        table.update({f"{theirs}.{kind}": Place(f"{ours}.{kind}") for kind in ("weight", "bias")})

    for side, (prefix, net) in {"encoder": (SIDES["encoder"], "encoder."), "decoder": (SIDES["decoder"], "decoder.net.")}.items():
        width = config[side]["width"]
        hidden = 8 * width // 3
        for i in range(config[side]["depth"]):
            theirs, ours = f"{prefix}transformer.blocks.{i}.", f"{net}blocks.{i}."
            for j, name in enumerate(("wq", "wk", "wv")):
                table[f"{theirs}attn.{name}.weight"] = Place(f"{ours}attn.qkv.weight", rows=(j * width, (j + 1) * width))
            table[f"{theirs}attn.proj.weight"] = Place(f"{ours}attn.proj.weight")
            table[f"{theirs}mlp.fc1.weight"] = Place(f"{ours}mlp.fc1.weight", rows=(0, hidden))
            table[f"{theirs}mlp.fc3.weight"] = Place(f"{ours}mlp.fc1.weight", rows=(hidden, 2 * hidden))
            table[f"{theirs}mlp.fc2.weight"] = Place(f"{ours}mlp.fc2.weight")
            if side == "decoder":
                linear(f"{theirs}adaLN_modulation.1", f"{ours}modulation")
        for half in vae_names(config[side]["vae_channels"], config[side]["vae_layers"], side):
            table[f"vae.vae.{half}"] = Place(f"{side}.vae.{half}")

    enc, dec, net = SIDES["encoder"], SIDES["decoder"], "decoder.net."
    linear(f"{enc}patch_emb.patch_proj", "encoder.patch_embed")
    linear(f"{enc}to_latents.proj", "encoder.head")
    linear(f"{dec}from_latents.proj", f"{net}embed")
    linear(f"{dec}noise_patch_emb.patch_proj", f"{net}patch_embed")
    linear(f"{dec}time_embedder.mlp.0", f"{net}time.fc1")
    linear(f"{dec}time_embedder.mlp.2", f"{net}time.fc2")
    linear(f"{dec}to_patches.adaLN_modulation.1", f"{net}final_modulation")
    linear(f"{dec}to_patches.proj", f"{net}head")
    grid = config["image_size"][0] // config["encoder"]["patch_size"]
    width, tokens = config["decoder"]["width"], config["decoder"]["tokens"]
    table |= {
        f"{enc}posemb_module.posembs": Place("encoder.positions", shape=(1, config["encoder"]["width"], grid, grid)),
        f"{enc}register_module.registers": Place("encoder.registers"),
        f"{dec}patches_posemb_module.posembs": Place(f"{net}positions", shape=(1, width, grid, grid)),
        f"{dec}registers_posemb_module.posembs": Place(f"{net}token_positions", shape=(1, 1, width, tokens)),
        f"{dec}nested_dropout.dropout_mask_token": Place(f"{net}dropped"),
        f"{dec}latent_dropout.nullcond": Place(f"{net}null"),
    }
    return table


def exports(tokenizer: Tokenizer1D) -> None:
    """Refuse tokenizers the published layout cannot hold.

    Raises:
        ModelError: other parts, another VAE on either side, none, or heads that are not 64 wide.
    """
    parts = (tokenizer.encoder, tokenizer.quantizer, tokenizer.decoder)
    if not all(type(part) is kind for part, kind in zip(parts, (FlexTokEncoder, FSQ, RectifiedFlowDecoder))):
        kinds = " × ".join(type(part).__name__ for part in parts)
        raise ModelError(f"only FlexTokEncoder × FSQ × RectifiedFlowDecoder has FlexTok's published layout, got {kinds}")
    encoder, decoder = tokenizer.encoder.config, tokenizer.decoder.config
    if encoder["vae_channels"] is None or decoder["vae_encoder"]:
        raise ModelError("FlexTok's published layout holds one VAE: the encoder needs its half, and the decoder no copy of that")
    shared = ("tokens", "patch_size", "image_size", "vae_channels", "vae_layers", "latent_channels", "scaling_factor")
    if differ := [key for key in shared if encoder[key] != decoder[key]]:
        raise ModelError(f"FlexTok's encoder and decoder have the same {differ[0]}, these have {encoder[differ[0]]} and {decoder[differ[0]]}")
    if tokenizer.image_size[0] != tokenizer.image_size[1]:
        raise ModelError(f"FlexTok's images are square, these are {tokenizer.image_size[0]} × {tokenizer.image_size[1]}")
    for part in (encoder, decoder):
        if part["heads"] not in (None, part["width"] // HEAD_DIM):
            raise ModelError(f"published FlexTok heads are {HEAD_DIM} wide, these are {part['width'] // part['heads']} wide: readers would assume {HEAD_DIM}")


def _heads(width: int, head_dim: int) -> int:
    if head_dim < 1 or width % head_dim:
        raise ModelError(f"width {width} cannot be split into heads {head_dim} wide")
    return width // head_dim


def _count(shapes: Mapping[str, Any] | Mapping[str, Tensor], prefix: str) -> int:
    """Number of different indices that follow a prefix."""
    return len({key[len(prefix) :].partition(".")[0] for key in shapes if key.startswith(prefix)})


FLEXTOK = Layout("flextok", recognises, infer, places, exports)
