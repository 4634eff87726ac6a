"""Published one-stage TiTok weights (VQ and VAE) to our parts and back, one table for both directions.

Weights: yucornetto/tokenizer_titok_{bl64,bl128,sl256}_vq8k_imagenet and …_{ll32,bl64,bl128}_vae_c16_imagenet on the Hub
(``model.safetensors`` + ``config.json``), code: bytedance/1d-tokenizer (Apache-2.0). Sizes are read off the tensor shapes;
heads, which no weight shows, are 64 wide in every release.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tok1d.errors import ModelError
from tok1d.tokenizers.decoders.grid import GridDecoder
from tok1d.tokenizers.encoders.titok import TiTokEncoder
from tok1d.tokenizers.lengths import FixedLength
from tok1d.tokenizers.quantizers.kl import KL
from tok1d.tokenizers.quantizers.vq import VQ
from tok1d.tokenizers.tokenizer import Tokenizer1D

# published name → ours; names without a dot at the end stand for one tensor, "x." for x.weight and x.bias
ENCODER = {
    "latent_tokens": "encoder.latents",
    "encoder.patch_embed.": "encoder.patch_embed.",
    "encoder.conv_out.": "encoder.proj.",
}
DECODER = {
    "decoder.mask_token": "decoder.mask_token",
    "decoder.decoder_embed.": "decoder.embed.",
    "decoder.ffn.0.": "decoder.to_pixels.",
    "decoder.conv_out.": "decoder.smooth.",
}
BOTH = {
    "class_embedding": "class_token",
    "positional_embedding": "positions",
    "latent_token_positional_embedding": "latent_positions",
    "ln_pre.": "transformer.norm_pre.",
    "ln_post.": "transformer.norm_post.",
}
BLOCK = {
    "ln_1.": "norm1.",
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj.": "attn.proj.",
    "ln_2.": "norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
CODEBOOK = {"quantize.embedding.weight": "quantizer.codebook"}

# the same numbers under another shape: convolutions over whole patches and 1×1 are linear layers here
RESHAPED = ("encoder.patch_embed.weight", "encoder.conv_out.weight", "decoder.ffn.0.weight", "decoder.mask_token")

# may stand in a file without a place here: usage statistics of a clustering codebook, not used at inference
IGNORED = ("quantize.embed_prob",)

SUPPORTED = "Supported now: one-stage TiTok (latents projected one by one, pixels from the decoder), VQ or VAE"


def key_map(encoder_depth: int, decoder_depth: int, codebook: bool) -> dict[str, str]:
    """Published key → our key for a whole model."""
    pairs = {**ENCODER, **DECODER, **(CODEBOOK if codebook else {})}
    for side, depth in (("encoder.", encoder_depth), ("decoder.", decoder_depth)):
        pairs |= {side + theirs: side + ours for theirs, ours in BOTH.items()}
        for i in range(depth):
            theirs, ours = f"{side}transformer.{i}.", f"{side}transformer.blocks.{i}."
            pairs |= {theirs + a: ours + b for a, b in BLOCK.items()}
    whole = {}
    for theirs, ours in pairs.items():
        for end in ("weight", "bias") if theirs.endswith(".") else ("",):
            whole[theirs + end] = ours + end
    return whole


def infer(state: dict[str, Tensor], *, l2: bool = False, name: str = "titok") -> dict[str, Any]:
    """Configuration of the Tokenizer1D that published weights belong to.

    Args:
        state: published state dict.
        l2: whether the codebook is compared by cosine, which weights cannot tell; no published one-stage model does.
        name: of the tokenizer.

    Raises:
        ModelError: another family or layout.
    """
    if "decoder.ffn.2.weight" in state:
        raise ModelError(f"these weights have the two-stage (legacy) TiTok layout, which is not supported yet. {SUPPORTED}")
    if "decoder.text_guidance_proj.weight" in state:
        raise ModelError(f"these weights are a text-aware TA-TiTok, which is not supported yet. {SUPPORTED}")
    tokens, encoder_width = _shape(state, "latent_tokens", 2)
    rows, _, patch_size, _ = _shape(state, "encoder.patch_embed.weight", 4)
    latent_dim = _shape(state, "encoder.conv_out.weight", 4)[0]
    decoder_width, code_dim = _shape(state, "decoder.decoder_embed.weight", 2)
    out_patch = math.isqrt(_shape(state, "decoder.ffn.0.weight", 4)[0] // 3)
    in_size = _grid(state, "encoder.positional_embedding") * patch_size
    out_size = _grid(state, "decoder.positional_embedding") * out_patch
    if in_size != out_size or rows != encoder_width:
        raise ModelError(f"the encoder works at {in_size} pixels, the decoder at {out_size}: not a one-stage TiTok. {SUPPORTED}")
    if "quantize.embedding.weight" in state:
        codes = _shape(state, "quantize.embedding.weight", 2)[0]
        quantizer = {"class": _path(VQ), "vocab_size": codes, "dim": code_dim, "l2": l2}
    else:
        quantizer = {"class": _path(KL), "dim": 2 * code_dim}
    sides = {
        "encoder": {"class": _path(TiTokEncoder), "dim": latent_dim, "width": encoder_width, "patch_size": patch_size},
        "decoder": {"class": _path(GridDecoder), "dim": code_dim, "width": decoder_width, "patch_size": out_patch},
    }
    for side, part in sides.items():
        part |= {"tokens": tokens, "depth": _depth(state, side), "image_size": [in_size, in_size]}
    return {
        "_class_name": "Tokenizer1D",
        "name": name,
        "image_size": [in_size, in_size],
        "quantizer": quantizer,
        "lengths": {"class": _path(FixedLength)},
        **sides,
    }


def load_official(source: str | Path | dict[str, Tensor], *, l2: bool | None = None, name: str | None = None) -> Tokenizer1D:
    """Build a tokenizer from published one-stage TiTok weights, in eval mode.

    Args:
        source: a folder with ``model.safetensors`` (``config.json`` beside it is read for ``use_l2_norm``), a
            safetensors file, or a state dict (its float32 tensors are shared, not copied).
        l2: whether the codebook is compared by cosine; None takes ``config.json``, else False.
        name: of the tokenizer; the folder or file by default.

    Raises:
        ModelError: files that cannot be read, another family, missing or unexpected tensors.
    """
    if isinstance(source, dict):
        state, published, found = source, {}, "titok"
    else:
        state, published, found = _read(Path(source))
    state = {key.removeprefix("module."): value for key, value in state.items()}
    config = infer(state, l2=published.get("use_l2_norm") is True if l2 is None else l2, name=name or found)
    with torch.device("meta"):  # random weights of half a billion parameters take longer than reading them
        tokenizer = Tokenizer1D.from_config(config)
    names = key_map(config["encoder"]["depth"], config["decoder"]["depth"], tokenizer.is_discrete)
    missing = sorted(names.keys() - state.keys())
    unexpected = sorted(state.keys() - names.keys() - set(IGNORED))
    if missing or unexpected:
        raise ModelError(
            f"not the weights of a one-stage TiTok: missing {missing[:5]}{' …' * (len(missing) > 5)}, "
            f"unexpected {unexpected[:5]}{' …' * (len(unexpected) > 5)}. {SUPPORTED}"
        )
    wanted = tokenizer.state_dict()
    try:
        ours = {
            mine: (state[theirs].reshape(wanted[mine].shape) if theirs in RESHAPED else state[theirs]).float()
            for theirs, mine in names.items()
        }
        tokenizer.load_state_dict(ours, assign=True)
    except RuntimeError as error:
        raise ModelError(f"tensors of unexpected shape for a one-stage TiTok: {error}") from error
    return tokenizer.eval().requires_grad_(False)


def export_official(tokenizer: Tokenizer1D) -> dict[str, Tensor]:
    """The state dict of a one-stage TiTok under its published names and shapes; the inverse of :func:`load_official`.

    Raises:
        ModelError: parts other than TiTokEncoder, VQ or KL, and GridDecoder.
    """
    encoder, quantizer, decoder = tokenizer.encoder, tokenizer.quantizer, tokenizer.decoder
    if not (isinstance(encoder, TiTokEncoder) and isinstance(quantizer, VQ | KL) and isinstance(decoder, GridDecoder)):
        kinds = " × ".join(type(part).__name__ for part in (encoder, quantizer, decoder))
        raise ModelError(f"only TiTokEncoder × VQ or KL × GridDecoder has a published TiTok layout, got {kinds}")
    for transformer in (encoder.transformer, decoder.transformer):
        width, heads = transformer.norm_pre.normalized_shape[0], transformer.blocks[0].attn.heads
        if heads * 64 != width:
            raise ModelError(f"published TiTok heads are 64 wide, these are {width // heads} wide: readers would assume 64")
    names = key_map(len(encoder.transformer.blocks), len(decoder.transformer.blocks), tokenizer.is_discrete)
    state = tokenizer.state_dict()
    p = encoder.patch_size
    shapes = {"encoder.patch_embed.weight": (-1, 3, p, p), "decoder.mask_token": (1, 1, -1)}
    published = {}
    for theirs, ours in names.items():
        value = state[ours].detach()
        if theirs in RESHAPED:
            value = value.reshape(shapes.get(theirs, (*value.shape, 1, 1)))
        published[theirs] = value
    return published


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """State dict, ``model.vq_model`` of a config.json beside it, and a name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / "model.safetensors" if path.is_dir() else path
    if file.suffix != ".safetensors":
        raise ModelError(f"{file}: pickled weights are not opened. Use the model.safetensors of the published repository")
    config, beside = {}, file.with_name("config.json")
    try:
        state = load_file(file)
        if beside.exists():
            config = json.loads(beside.read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{file}: cannot be loaded ({error}). A published folder holds model.safetensors and config.json") from error
    for key in ("model", "vq_model"):
        config = config.get(key, {}) if isinstance(config, dict) else {}
    return state, config if isinstance(config, dict) else {}, path.stem if file is path else path.name


def _shape(state: dict[str, Tensor], key: str, ndim: int) -> tuple[int, ...]:
    if key not in state:
        raise ModelError(f"{key!r} is missing among {len(state)} tensors: not a TiTok state dict. {SUPPORTED}")
    if state[key].ndim != ndim:
        raise ModelError(f"{key!r} should have {ndim} dimensions, got shape {tuple(state[key].shape)}. {SUPPORTED}")
    return tuple(state[key].shape)


def _grid(state: dict[str, Tensor], key: str) -> int:
    positions = _shape(state, key, 2)[0] - 1
    side = math.isqrt(max(0, positions))
    if side * side != positions or not side:
        raise ModelError(f"{key!r} has {positions} patch positions, which is no square grid. {SUPPORTED}")
    return side


def _depth(state: dict[str, Tensor], side: str) -> int:
    return sum(key.startswith(f"{side}.transformer.") and key.endswith(".ln_1.weight") for key in state)


def _path(part: type) -> str:
    return f"{part.__module__}.{part.__qualname__}"
