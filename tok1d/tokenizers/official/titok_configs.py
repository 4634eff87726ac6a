"""Configurations of the published TiTok family from plain sizes: one stage, two stages (One-D-Piece too), TA-TiTok."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tok1d.tokenizers.decoders.grid import GridDecoder, TextGridDecoder
from tok1d.tokenizers.encoders.titok import TiTokEncoder
from tok1d.tokenizers.lengths import FixedLength, TailDrop
from tok1d.tokenizers.official.layout import module_path
from tok1d.tokenizers.official.titok_legacy import LegacyTiTokEncoder, ProxyCodeDecoder
from tok1d.tokenizers.quantizers.kl import KL
from tok1d.tokenizers.quantizers.vq import VQ


def titok_config(
    name: str = "titok",
    *,
    encoder: tuple[int, int] = (768, 12),
    decoder: tuple[int, int] = (1024, 24),
    tokens: int = 64,
    vocab_size: int = 8192,
    dim: int = 64,
    l2: bool = False,
    image_size: int = 256,
    patch_size: int = 16,
    decoder_patch_size: int | None = None,
) -> dict[str, Any]:
    """Configuration of a one-stage TiTok; the defaults are BL-64.

    Args:
        name: of the tokenizer.
        encoder, decoder: (width, depth) of the transformers; heads are 64 wide.
        tokens: latents of an image.
        vocab_size: codes; 0 for a variational bottleneck (VAE).
        dim: width of a code.
        l2: compare codes by cosine.
        image_size, patch_size: pixels; ``decoder_patch_size`` is the same as the encoder's if None.
    """
    quantizer = {"class": module_path(VQ), "vocab_size": vocab_size, "dim": dim, "l2": l2}
    if not vocab_size:
        quantizer = {"class": module_path(KL), "dim": 2 * dim}
    common = {"tokens": tokens, "image_size": [image_size, image_size]}
    sides = {
        "encoder": {"class": module_path(TiTokEncoder), "dim": dim if vocab_size else 2 * dim, "patch_size": patch_size},
        "decoder": {"class": module_path(GridDecoder), "dim": dim, "patch_size": decoder_patch_size or patch_size},
    }
    for side, (width, depth) in (("encoder", encoder), ("decoder", decoder)):
        sides[side] |= {**common, "width": width, "depth": depth}
    return {
        "_class_name": "Tokenizer1D",
        "name": name,
        "image_size": [image_size, image_size],
        "quantizer": quantizer,
        "lengths": {"class": module_path(FixedLength)},
        **sides,
    }


def tatitok_config(name: str = "tatitok", *, text_tokens: int = 77, text_dim: int = 768, **sizes: Any) -> dict[str, Any]:
    """Configuration of a TA-TiTok; ``sizes`` as :func:`titok_config`, the defaults are BL-64 VQ.

    Args:
        name: of the tokenizer.
        text_tokens, text_dim: number and width of the text vectors.
    """
    config = titok_config(name, **sizes)
    config["decoder"] |= {"class": module_path(TextGridDecoder), "text_tokens": text_tokens, "text_dim": text_dim}
    return config


def legacy_config(
    name: str = "titok-legacy",
    *,
    vocab_size: int = 4096,
    dim: int = 12,
    l2: bool = True,
    nested: bool = False,
    pixels: bool = True,
    proxy_codes: int = 1024,
    proxy_dim: int = 256,
    pixel_width: int = 128,
    pixel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
    pixel_depth: int = 2,
    **sizes: Any,
) -> dict[str, Any]:
    """Configuration of a two-stage TiTok or One-D-Piece; other ``sizes`` as :func:`titok_config`.

    Args:
        name: of the tokenizer.
        vocab_size, dim, l2: of the codebook.
        nested: any prefix of the tokens decodes (One-D-Piece).
        pixels: whether there is a pixel decoder (stage 2).
        proxy_codes, proxy_dim, pixel_width, pixel_multipliers, pixel_depth: as
            :class:`tok1d.tokenizers.official.titok_legacy.ProxyCodeDecoder`.
    """
    config = titok_config(name, vocab_size=vocab_size, dim=dim, l2=l2, **sizes)
    config["encoder"]["class"] = module_path(LegacyTiTokEncoder)
    config["decoder"] |= {"class": module_path(ProxyCodeDecoder), "proxy_codes": proxy_codes, "pixels": pixels}
    if pixels:
        config["decoder"] |= {"proxy_dim": proxy_dim, "pixel_width": pixel_width, "pixel_depth": pixel_depth}
        config["decoder"]["pixel_multipliers"] = list(pixel_multipliers)
    if nested:
        config["lengths"] = {"class": module_path(TailDrop), "distribution": "uniform", "per_sample": False}
    return config
