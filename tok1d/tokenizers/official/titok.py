"""Published weights of the TiTok family to our parts and back: TiTok (one and two stages), One-D-Piece, TA-TiTok.

On the Hub: yucornetto/tokenizer_titok_* and fun-research/TiTok (code bytedance/1d-tokenizer), turkeyju/tokenizer_tatitok_*
(same code), turing-motors/One-D-Piece-* (code turingmotors/One-D-Piece); all code Apache-2.0. Sizes are read off the tensor
shapes; heads, which no weight shows, are 64 wide in every release, and so is what a configuration does not say by default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tok1d.errors import ModelError
from tok1d.tokenizers.decoders.grid import GridDecoder, TextGridDecoder
from tok1d.tokenizers.encoders.titok import TiTokEncoder
from tok1d.tokenizers.official.layout import Layout, Place, Shapes, module_path, shape_of
from tok1d.tokenizers.official.maskgit_vqgan import (
    MASKGIT_VQGAN,
    branch,
    decoder_places,
    decoder_sizes,
    maskgit_vqgan_config,
)
from tok1d.tokenizers.official.titok_configs import legacy_config, tatitok_config, titok_config
from tok1d.tokenizers.official.titok_legacy import LegacyTiTokEncoder, ProxyCodeDecoder
from tok1d.tokenizers.quantizers.kl import KL
from tok1d.tokenizers.quantizers.vq import VQ
from tok1d.tokenizers.tokenizer import Tokenizer1D

__all__ = ["LAYOUTS", "legacy_config", "maskgit_vqgan_config", "tatitok_config", "titok_config"]

FAMILY = "TiTok"

# published name → ours; a name that ends with a dot stands for its weight and bias
ENCODER = {
    "latent_tokens": "encoder.latents",
    "encoder.patch_embed.": "encoder.patch_embed.",
    "encoder.conv_out.": "encoder.proj.",
}
DECODER = {"decoder.mask_token": "decoder.mask_token", "decoder.decoder_embed.": "decoder.embed."}
PIXEL_HEAD = {"decoder.ffn.0.": "decoder.to_pixels.", "decoder.conv_out.": "decoder.smooth."}
PROXY_HEAD = {"decoder.ffn.0.": "decoder.hidden.", "decoder.ffn.2.": "decoder.to_logits."}
TEXT = {
    "decoder.text_guidance_proj.": "decoder.text_embed.",
    "decoder.text_guidance_positional_embedding": "decoder.text_positions",
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


# published shapes → configuration ------------------------------------------------------------------------------------


def _sizes(shapes: Shapes) -> dict[str, Any]:
    """The arguments of :func:`titok_config` that every state dict of the family shows."""
    tokens, encoder_width = shape_of(shapes, "latent_tokens", 2, FAMILY)
    patch_size = shape_of(shapes, "encoder.patch_embed.weight", 4, FAMILY)[2]
    decoder_width, dim = shape_of(shapes, "decoder.decoder_embed.weight", 2, FAMILY)
    image_size = _grid(shapes, "encoder") * patch_size
    decoder_patch_size, left = divmod(image_size, _grid(shapes, "decoder"))
    if left or not patch_size:
        raise ModelError(f"the encoder works at {image_size} pixels, the decoder on {_grid(shapes, 'decoder')}² patches: not a {FAMILY}")
    codes = 0
    if "quantize.embedding.weight" in shapes:
        codes = shape_of(shapes, "quantize.embedding.weight", 2, FAMILY)[0]
    return {
        "encoder": (encoder_width, _depth(shapes, "encoder")),
        "decoder": (decoder_width, _depth(shapes, "decoder")),
        "tokens": tokens,
        "vocab_size": codes,
        "dim": dim,
        "image_size": image_size,
        "patch_size": patch_size,
        "decoder_patch_size": decoder_patch_size,
    }


def _grid(shapes: Shapes, side: str) -> int:
    positions = shape_of(shapes, f"{side}.positional_embedding", 2, FAMILY)[0] - 1
    rows = math.isqrt(max(0, positions))
    if rows * rows != positions or not rows:
        raise ModelError(f"'{side}.positional_embedding' has {positions} patch positions, which is no square grid")
    return rows


def _depth(shapes: Shapes, side: str) -> int:
    return sum(key.startswith(f"{side}.transformer.") and key.endswith(".ln_1.weight") for key in shapes)


def _vq_model(published: dict[str, Any]) -> dict[str, Any]:
    """The part of a published configuration tree that describes the tokenizer."""
    return branch(published, "model", "vq_model") or branch(published, "vq_model")


def _l2(published: dict[str, Any], default: bool) -> bool:
    l2 = _vq_model(published).get("use_l2_norm", default)
    return l2 if isinstance(l2, bool) else default


def _titok(shapes: Shapes, published: dict[str, Any], name: str) -> dict[str, Any]:
    return titok_config(name, l2=_l2(published, False), **_sizes(shapes))


def _tatitok(shapes: Shapes, published: dict[str, Any], name: str) -> dict[str, Any]:
    text_tokens = shape_of(shapes, "decoder.text_guidance_positional_embedding", 2, FAMILY)[0]
    text_dim = shape_of(shapes, "decoder.text_guidance_proj.weight", 2, FAMILY)[1]
    return tatitok_config(name, l2=_l2(published, False), text_tokens=text_tokens, text_dim=text_dim, **_sizes(shapes))


def _legacy(shapes: Shapes, published: dict[str, Any], name: str) -> dict[str, Any]:
    sizes = _sizes(shapes)
    if not sizes["vocab_size"]:
        raise ModelError(f"'quantize.embedding.weight' is missing among {len(shapes)} tensors: two-stage TiTok has a codebook")
    strict = _vq_model(published).get("strict_length_assertion") is not False
    nested = not strict or sizes["tokens"] == 256 or "one-d-piece" in name.lower().replace("_", "-")
    sizes["proxy_codes"] = shape_of(shapes, "decoder.ffn.2.weight", 4, FAMILY)[0]
    sizes["pixels"] = "pixel_quantize.embedding.weight" in shapes
    if sizes["pixels"]:
        pixel = decoder_sizes(shapes, "pixel_decoder.")
        sizes["proxy_dim"] = pixel.pop("dim")
        sizes |= {f"pixel_{key}": value for key, value in pixel.items()}
    return legacy_config(name, l2=_l2(published, True), nested=nested, **sizes)


# configuration → places, and back ------------------------------------------------------------------------------------


def _places(config: dict[str, Any], head: dict[str, str]) -> dict[str, Place]:
    encoder, decoder = config["encoder"], config["decoder"]
    pairs = {**ENCODER, **DECODER, **head}
    for side, part in (("encoder.", encoder), ("decoder.", decoder)):
        pairs |= {side + theirs: side + ours for theirs, ours in BOTH.items()}
        for i in range(part["depth"]):
            theirs, ours = f"{side}transformer.{i}.", f"{side}transformer.blocks.{i}."
            pairs |= {theirs + a: ours + b for a, b in BLOCK.items()}
    places = {}
    for theirs, ours in pairs.items():
        for end in ("weight", "bias") if theirs.endswith(".") else ("",):
            places[theirs + end] = Place(ours + end)
    # the same numbers in another shape: convolutions over whole patches and of 1×1 are linear layers here
    p, width, decoder_width = encoder["patch_size"], encoder["width"], decoder["width"]
    shapes = {
        "encoder.patch_embed.weight": (width, 3, p, p),
        "encoder.conv_out.weight": (encoder["dim"], width, 1, 1),
        "decoder.mask_token": (1, 1, decoder_width),
        "decoder.ffn.0.weight": (3 * decoder["patch_size"] ** 2, decoder_width, 1, 1),
    }
    if head is PROXY_HEAD:
        shapes["decoder.ffn.0.weight"] = (2 * decoder_width, decoder_width, 1, 1)
        shapes["decoder.ffn.2.weight"] = (decoder["proxy_codes"], 2 * decoder_width, 1, 1)
    places |= {key: Place(places[key].name, shape) for key, shape in shapes.items()}
    if config["quantizer"]["class"] == module_path(VQ):
        places["quantize.embedding.weight"] = Place("quantizer.codebook")
    return places


def _legacy_places(config: dict[str, Any]) -> dict[str, Place]:
    places, decoder = _places(config, PROXY_HEAD), config["decoder"]
    if not decoder["pixels"]:
        return places
    sizes = {"multipliers": decoder["pixel_multipliers"], "depth": decoder["pixel_depth"]}
    places["pixel_quantize.embedding.weight"] = Place("decoder.proxy_codebook")
    return places | decoder_places(sizes, "pixel_decoder.", "decoder.pixels.")


def _exports(tokenizer: Tokenizer1D, layout: str, encoder: type, quantizers: tuple[type, ...], decoder: type) -> None:
    parts = (tokenizer.encoder, tokenizer.quantizer, tokenizer.decoder)
    if type(parts[0]) is not encoder or type(parts[1]) not in quantizers or type(parts[2]) is not decoder:
        wanted = f"{encoder.__name__} × {' or '.join(q.__name__ for q in quantizers)} × {decoder.__name__}"
        raise ModelError(f"the {layout} layout is that of {wanted}, got {' × '.join(type(part).__name__ for part in parts)}")
    for side in (tokenizer.encoder, tokenizer.decoder):
        width, heads = side.transformer.norm_pre.normalized_shape[0], side.transformer.blocks[0].attn.heads
        if heads * 64 != width:
            raise ModelError(f"published TiTok heads are 64 wide, these are {width // heads} wide: readers would assume 64")
        if side.config["mlp_ratio"] != 4:
            raise ModelError(f"published TiTok has an mlp_ratio of 4, this has {side.config['mlp_ratio']}")
    height, width = tokenizer.image_size
    if height != width or tokenizer.encoder.tokens != tokenizer.decoder.tokens:
        raise ModelError(
            "published TiTok works on square images and decodes the tokens it encodes, this one works on "
            f"{height} × {width}, makes {tokenizer.encoder.tokens} and takes {tokenizer.decoder.tokens}"
        )


def _legacy_exports(tokenizer: Tokenizer1D) -> None:
    _exports(tokenizer, "titok-legacy", LegacyTiTokEncoder, (VQ,), ProxyCodeDecoder)
    config = tokenizer.decoder.config
    if config["pixels"] and (not config["soft"] or config["pixel_groups"] != 32 or config["pixel_shortcut"] != "output"):
        raise ModelError(
            'published two-stage TiTok mixes its proxy codes (soft=True), in a pixel decoder of 32 groups with shortcut="output"; '
            "this one does not, readers would compute something else. Export stage-1 weights before add_pixels()"
        )


def _recognises(*wanted: str, without: Sequence[str] = ()) -> Any:
    wanted = ("latent_tokens", "encoder.patch_embed.weight", "decoder.ffn.0.weight", *wanted)
    return lambda shapes: all(key in shapes for key in wanted) and not any(key in shapes for key in without)


# usage statistics of a clustering codebook, which inference has no use for
EMBED_PROB = ("quantize.embed_prob",)

TITOK = Layout(
    name="titok",
    recognises=_recognises(without=("decoder.ffn.2.weight", "decoder.text_guidance_proj.weight")),
    config=_titok,
    places=lambda config: _places(config, PIXEL_HEAD),
    exports=lambda tokenizer: _exports(tokenizer, "titok", TiTokEncoder, (VQ, KL), GridDecoder),
    ignored=EMBED_PROB,
)
TITOK_LEGACY = Layout(
    name="titok-legacy",
    recognises=_recognises("decoder.ffn.2.weight"),
    config=_legacy,
    places=_legacy_places,
    exports=_legacy_exports,
    ignored=EMBED_PROB,
)
TATITOK = Layout(
    name="tatitok",
    recognises=_recognises("decoder.text_guidance_proj.weight"),
    config=_tatitok,
    places=lambda config: _places(config, PIXEL_HEAD | TEXT),
    exports=lambda tokenizer: _exports(tokenizer, "tatitok", TiTokEncoder, (VQ, KL), TextGridDecoder),
    ignored=EMBED_PROB,
)
LAYOUTS = (TITOK, TITOK_LEGACY, TATITOK, MASKGIT_VQGAN)
