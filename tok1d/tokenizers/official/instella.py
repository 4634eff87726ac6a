"""Published Instella-T2I tokenizer (binary latents, 128 × 64 bits) to our parts and back, with its arithmetic to the letter.

Weights: amd/Instella-T2I on the Hub, ``bae/model.safetensors`` (research-only licence). Paper: https://arxiv.org/abs/2506.21022.
Written from a description of the formulas. What the trained weights depend on and new models should not have stays here:

- cosines and sines of neighbouring channels belong together, but the channels that are mixed are half a head apart: two
  different angles meet, which is no rotation and changes lengths;
- a picture spans positions 0..S-1 with its first and last patch, and S is halved with every merge;
- positions are rounded to the precision of the weights before the trigonometry;
- norms are rounded to the input's precision before the weight is multiplied.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import ModelError
from tok1d.tokenizers.decoders.binary import BinaryDecoder
from tok1d.tokenizers.encoders.binary import BinaryEncoder
from tok1d.tokenizers.lengths import FixedLength
from tok1d.tokenizers.official.layout import Layout, Place, Shapes, module_path, shape_of
from tok1d.tokenizers.quantizers.bernoulli import BernoulliBits
from tok1d.tokenizers.rotary import angles, rotary_table, sequence_positions
from tok1d.tokenizers.rotary_blocks import RMSNorm
from tok1d.tokenizers.tokenizer import Tokenizer1D

FAMILY = "Instella-T2I tokenizer"
SIZE_LIMIT = 1024  # pixels; no weight shows it

# published name → ours; a trailing dot stands for .weight and .bias
ENCODER = {
    "encoder.latent_tokens": "encoder.latents",
    "encoder.patch_embedder.": "encoder.patch_embed.",
    "encoder.down_layers.0.conv.": "encoder.merges.0.conv.",
    "encoder.norm_out.weight": "encoder.norm_out.weight",
    "encoder.proj_out.": "encoder.proj.",
}
QUANTIZER = {"quantizer.proj.0.": "quantizer.proj.", "quantizer.embed": "quantizer.embed"}
DECODER = {
    "decoder.mask_tokens": "decoder.mask_token",
    "decoder.input_layer.0.weight": "decoder.norm_in.weight",
    "decoder.input_layer.1.": "decoder.embed.",
    "decoder.up_layers.0.conv.": "decoder.splits.0.conv.",
    "decoder.norm_out.weight": "decoder.norm_out.weight",
    "to_pixel.": "decoder.to_pixels.",
}
BLOCK = {
    "input_layernorm.weight": "norm1.weight",
    "attn.norm_q.weight": "attn.norm_q.weight",
    "attn.norm_k.weight": "attn.norm_k.weight",
    "attn.o_proj.weight": "attn.proj.weight",
    "post_attention_layernorm.weight": "norm2.weight",
    "mlp.down_proj.weight": "mlp.down.weight",
}
IN_A_ROW = {
    "attn.qkv.weight": ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"),
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}


class RoundedNorm(RMSNorm):
    """RMSNorm that rounds to the input's precision before it multiplies by the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


def spanning_turns(
    latents: int, grid: tuple[int, int], axes: tuple[int, int, int], span: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The published angle of every channel: neighbours 2j and 2j + 1 have the same, though j and j + d/2 are mixed.

    Args:
        latents, grid, axes, device: as :func:`tok1d.tokenizers.rotary.centred_turns`.
        span: S; patch i of n sits at i / (n - 1) · (S - 1), and at 0 if n = 1.
        dtype: what positions are rounded to.

    Returns:
        float64 (T, d).
    """
    y, x = (torch.arange(n, dtype=torch.float32, device=device) / max(1, n - 1) * (span - 1) for n in grid)
    positions = sequence_positions(latents, y.double(), x.double())
    return angles(positions.to(dtype).double(), axes).repeat_interleave(2, dim=1)


class InstellaEncoder(BinaryEncoder):
    """BinaryEncoder with the published norms and positions."""

    norm = RoundedNorm

    def table(self, grid: tuple[int, int], merges: int) -> Tensor:
        span, like = self.size_limit // self.patch_size // 2**merges, self.latents
        return rotary_table(spanning_turns, self.tokens, grid, self.axes, span, like.dtype, device=like.device)


class InstellaDecoder(BinaryDecoder):
    """BinaryDecoder with the published norms and positions."""

    norm = RoundedNorm

    def table(self, latents: int, grid: tuple[int, int], merges: int) -> Tensor:
        span, like = self.size_limit // self.patch_size // 2**merges, self.mask_token
        return rotary_table(spanning_turns, latents, grid, self.axes, span, like.dtype, device=like.device)


def instella_config(
    name: str = "instella-t2i",
    *,
    tokens: int = 128,
    bits: int = 64,
    dim: int = 768,
    code_dim: int = 768,
    encoder_width: int = 768,
    encoder_depth: int = 12,
    encoder_heads: int | None = None,
    decoder_width: int = 1024,
    decoder_depth: int = 16,
    decoder_heads: int | None = None,
    patch_size: int = 16,
    out_patch_size: int = 16,
    mlp_ratio: float = 4,
    image_size: int = 512,
) -> dict[str, Any]:
    """``Tokenizer1D.from_config`` data of the published architecture; the defaults are the published sizes.

    Args:
        name: of the tokenizer.
        tokens, bits: of an image, and of a token.
        dim, code_dim: width of latents, and of codes.
        encoder_width, encoder_depth: of the encoder; merging is after two thirds of its blocks.
        decoder_width, decoder_depth: of the decoder; splitting is after half of its blocks.
        encoder_heads, decoder_heads: width // 64 if None.
        patch_size, out_patch_size: of the encoder and the decoder, in pixels.
        mlp_ratio: hidden width of the MLPs over the width.
        image_size: pixels a side of pictures whose size nobody says.
    """
    shared = {"tokens": tokens, "size_limit": SIZE_LIMIT, "mlp_ratio": mlp_ratio}
    return {
        "_class_name": "Tokenizer1D",
        "name": name,
        "image_size": [image_size, image_size],
        "encoder": {
            "class": module_path(InstellaEncoder),
            **shared,
            "dim": dim,
            "width": encoder_width,
            "depth": encoder_depth,
            "heads": encoder_width // 64 if encoder_heads is None else encoder_heads,
            "merge_after": _merge_after(encoder_depth),
            "patch_size": patch_size,
        },
        "quantizer": {"class": module_path(BernoulliBits), "bits": bits, "dim": dim, "code_dim": code_dim},
        "decoder": {
            "class": module_path(InstellaDecoder),
            **shared,
            "dim": code_dim,
            "width": decoder_width,
            "depth": decoder_depth,
            "heads": decoder_width // 64 if decoder_heads is None else decoder_heads,
            "split_after": _split_after(decoder_depth),
            "patch_size": out_patch_size,
            "image_size": image_size,
        },
        "lengths": {"class": module_path(FixedLength)},
    }


def _merge_after(depth: int) -> list[int]:
    return [depth * 2 // 3]  # 8 of 12


def _split_after(depth: int) -> list[int]:
    return [depth // 2]  # 8 of 16


def _recognises(shapes: Shapes) -> bool:
    return {"encoder.down_layers.0.conv.weight", "quantizer.embed", "to_pixel.weight"} <= shapes.keys()


def _config(shapes: Shapes, published: dict[str, Any], name: str) -> dict[str, Any]:
    """Everything but where patches are merged and split, and the size limit, is read off the shapes."""

    def shape(key: str, ndim: int) -> tuple[int, ...]:
        return shape_of(shapes, key, ndim, FAMILY)

    def side(part: str, width: int) -> dict[str, int]:
        block = f"{part}.transformer_blocks.0."
        head = shape(f"{block}attn.norm_q.weight", 1)[0]
        if not head or width % head:
            raise ModelError(f"the {part} of this {FAMILY} is {width} wide, which heads of {head} channels do not divide")
        depth = sum(key.startswith(f"{part}.transformer_blocks.") and key.endswith(".attn.o_proj.weight") for key in shapes)
        return {f"{part}_width": width, f"{part}_depth": depth, f"{part}_heads": width // head}

    _, tokens, encoder_width = shape("encoder.latent_tokens", 3)
    decoder_width = shape("decoder.mask_tokens", 3)[2]
    bits, code_dim = shape("quantizer.embed", 2)
    hidden = shape("encoder.transformer_blocks.0.mlp.gate_proj.weight", 2)[0]
    ratio = hidden / max(1, encoder_width)
    return instella_config(
        name,
        tokens=tokens,
        bits=bits,
        dim=shape("encoder.proj_out.weight", 2)[0],
        code_dim=code_dim,
        patch_size=shape("encoder.patch_embedder.weight", 4)[2],
        out_patch_size=math.isqrt(shape("to_pixel.weight", 2)[0] // 3),
        mlp_ratio=int(ratio) if ratio.is_integer() else ratio,
        **side("encoder", encoder_width),
        **side("decoder", decoder_width),
    )


def _places(config: dict[str, Any]) -> dict[str, Place]:
    places = {}
    for theirs, ours in {**ENCODER, **QUANTIZER, **DECODER}.items():
        for end in ("weight", "bias") if theirs.endswith(".") else ("",):
            places[theirs + end] = Place(ours + end)
    tokens, width, patch = (config["encoder"][key] for key in ("tokens", "width", "patch_size"))
    places["encoder.latent_tokens"] = Place("encoder.latents", shape=(1, tokens, width))
    places["encoder.patch_embedder.weight"] = Place("encoder.patch_embed.weight", shape=(width, 3, patch, patch))
    places["decoder.mask_tokens"] = Place("decoder.mask_token", shape=(1, 1, config["decoder"]["width"]))
    for part in ("encoder", "decoder"):
        width, hidden = config[part]["width"], round(config[part]["width"] * config[part]["mlp_ratio"])
        rows = {"attn.qkv.weight": width, "mlp.gate_up.weight": hidden}
        for i in range(config[part]["depth"]):
            theirs, ours = f"{part}.transformer_blocks.{i}.", f"{part}.blocks.{i}."
            places |= {theirs + a: Place(ours + b) for a, b in BLOCK.items()}
            for whole, pieces in IN_A_ROW.items():
                step = rows[whole]
                places |= {theirs + a: Place(ours + whole, rows=(j * step, (j + 1) * step)) for j, a in enumerate(pieces)}
    return places


def _exports(tokenizer: Tokenizer1D) -> None:
    encoder, quantizer, decoder = tokenizer.encoder, tokenizer.quantizer, tokenizer.decoder
    if not (isinstance(encoder, InstellaEncoder) and isinstance(quantizer, BernoulliBits) and isinstance(decoder, InstellaDecoder)):
        kinds = " × ".join(type(part).__name__ for part in (encoder, quantizer, decoder))
        raise ModelError(
            f"only InstellaEncoder × BernoulliBits × InstellaDecoder has the published layout of the {FAMILY}, got {kinds}: "
            "other models have other positions, and readers would decode noise"
        )
    readers_assume = {
        "merge_after": (list(encoder.merge_after), _merge_after(len(encoder.blocks))),
        "split_after": (list(decoder.split_after), _split_after(len(decoder.blocks))),
        "size_limit of the encoder": (encoder.size_limit, SIZE_LIMIT),
        "size_limit of the decoder": (decoder.size_limit, SIZE_LIMIT),
        "mlp_ratio of the decoder": (decoder.config["mlp_ratio"], encoder.config["mlp_ratio"]),
    }
    for what, (ours, assumed) in readers_assume.items():
        if ours != assumed:
            raise ModelError(f"the published layout of the {FAMILY} does not tell {what}: readers assume {assumed}, here it is {ours}")


INSTELLA = Layout("instella", _recognises, _config, _places, _exports)
