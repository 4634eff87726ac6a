"""Every encoder × quantizer × decoder × length rule at tiny size: constructor arguments, what does not go together, and why.

Parts are found by walking the package, so a new one without a row here fails a test that says so.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import pkgutil
import random
from typing import Any, NamedTuple

import tok1d.tokenizers
from tok1d.tokenizers.lengths import LengthRule
from tok1d.tokenizers.part import Decoder, Encoder, Part, Quantizer, build_part

# What a tokenizer is at this size: 4 latents of a 32 × 32 image. Widths follow the quantizer (see ``config``).
IMAGE, LATENTS = 32, 4
VIT = {"tokens": LATENTS, "width": 32, "depth": 1, "heads": 2, "patch_size": 16, "image_size": IMAGE, "mlp_ratio": 2}
CONV = {"width": 8, "multipliers": [1, 1, 1, 1, 1], "depth": 1, "groups": 2, "image_size": IMAGE}
FLOW = {"tokens": LATENTS, "width": 32, "depth": 1, "heads": 2, "patch_size": 16, "image_size": IMAGE}
ROTARY = {"tokens": LATENTS, "width": 32, "depth": 2, "heads": 1, "patch_size": 8, "size_limit": 64, "mlp_ratio": 2}
SPECTRAL = {"tokens": LATENTS, "grid": 8, "image_size": [IMAGE, IMAGE]}

# Rows: class name, or class name and a variant → constructor arguments; encoders and decoders without ``dim``.
ENCODERS: dict[str, dict[str, Any]] = {
    "TiTokEncoder": VIT,
    "SpectralEncoder": SPECTRAL,
    "VQGANEncoder": CONV,
    "FlexTokEncoder": FLOW,
    "BinaryEncoder": {**ROTARY, "merge_after": [1]},
}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "VQ": {"vocab_size": 40, "dim": 6},
    "VQ averages": {"vocab_size": 40, "dim": 6, "l2": True, "ema": True, "dead_code_threshold": 0.5},
    "NestedVQ": {"tokens": LATENTS, "dim": 6, "vocab_size": 20, "books": 2},
    "FSQ": {"levels": [5, 4, 3]},
    "SimVQ": {"vocab_size": 40, "dim": 6},
    "IBQ": {"vocab_size": 40, "dim": 6},
    "LFQ": {"bits": 10},
    "LFQ 64": {"bits": 64},
    "BSQ": {"bits": 12},
    "GroupedLFQ": {"groups": 2, "group_bits": 4},
    "GroupedLFQ 96": {"groups": 12, "group_bits": 8},
    "DualVQ": {"vocab_size": 40, "semantic_dim": 3, "pixel_dim": 4},
    "ResidualVQ": {"codes": 6, "dim": 5, "stages": 3},
    "ResidualVQ 64": {"codes": 16, "dim": 5, "stages": 16, "stage_dropout": 0.3},
    "GrowingScaleVQ": {"vocab_size": 40, "dim": 6, "scales": [1, 2, LATENTS], "phi": 0.5},
    "LeechShell": {},
    "KL": {"dim": 12},
    "PerChannel": {"channels": 4, "bits": 3},
    "PerChannel 72": {"channels": 12, "bits": 6, "posterior": True},
    "BernoulliBits": {"bits": 10, "dim": 8, "code_dim": 12},
    "BernoulliBits 70": {"bits": 70, "dim": 8, "code_dim": 72},
}
DECODERS: dict[str, dict[str, Any]] = {
    "GridDecoder": VIT,
    "TextGridDecoder": {**VIT, "text_tokens": 3, "text_dim": 8},
    "SpectralDecoder": {**SPECTRAL, "widths": [8] * 5, "blocks": [1] * 5, "condition": 8},
    "VQGANDecoder": CONV,
    "GenerativeDecoder": {**VIT, "channels": [16, 8, 8, 8, 8], "blocks": 1, "noise_channels": 4},
    "RectifiedFlowDecoder": {**FLOW, "steps": 2},
    "BinaryDecoder": {**ROTARY, "split_after": [1], "image_size": IMAGE},
}
LENGTHS: dict[str, dict[str, Any]] = {
    "FixedLength": {},
    "TailDrop uniform": {"distribution": "uniform"},
    "TailDrop powers_of_two": {"distribution": "powers_of_two", "per_sample": False},
    "TailDrop log_uniform": {"distribution": "log_uniform", "full": 0.2},
    "NormalDrop": {"mean": 2.0, "sd": 1.0},
    "ZipfDrop": {"exponent": 1.5, "per_sample": False},
}
TABLES = {Encoder: ENCODERS, Quantizer: QUANTIZERS, Decoder: DECODERS, LengthRule: LENGTHS}


class Mix(NamedTuple):
    """Names of rows."""

    encoder: str
    quantizer: str
    decoder: str
    lengths: str


@functools.cache
def discover(kind: type[Part]) -> dict[str, type[Part]]:
    """Every class of the package that can stand in a slot, by name; published layouts (``official``) are not for new models."""
    modules = [m.name for m in pkgutil.walk_packages(tok1d.tokenizers.__path__, "tok1d.tokenizers.")]
    modules = [name for name in modules if not name.startswith("tok1d.tokenizers.official")]
    for name in modules:
        importlib.import_module(name)
    found, left = {}, [kind]
    while left:
        cls = left.pop()
        left += cls.__subclasses__()
        abstract = any(getattr(getattr(cls, name, None), "__isabstractmethod__", False) for name in dir(cls))
        if cls.__module__ in modules and not abstract:
            found[cls.__name__] = cls
    return found


def config(mix: Mix) -> dict[str, Any]:
    """The configuration of a tokenizer, widths following the quantizer."""
    rows = {kind: _row(kind, name) for kind, name in zip(TABLES, mix)}
    dim, code_dim = _widths(mix.quantizer)
    return {
        "_class_name": "Tokenizer1D",
        "name": "mix",
        "image_size": [IMAGE, IMAGE],
        "encoder": {**rows[Encoder], "dim": dim},
        "quantizer": rows[Quantizer],
        "decoder": {**rows[Decoder], "dim": code_dim},
        "lengths": rows[LengthRule],
    }


def _row(kind: type[Part], name: str) -> dict[str, Any]:
    cls = discover(kind)[name.split()[0]]
    return {"class": f"{cls.__module__}.{cls.__qualname__}", **TABLES[kind][name]}


def refused(mix: Mix) -> str | None:
    """What the ModelError says (a regular expression) when these parts are put together; None for those that must work."""
    encoder, decoder = mix.encoder == "SpectralEncoder", mix.decoder == "SpectralDecoder"
    dim, code_dim = _widths(mix.quantizer)
    # each coefficient of a small grid belongs to one token; 64 bits of each of 4 tokens are more than there are
    if (encoder and LATENTS * dim > 3 * SPECTRAL["grid"] ** 2) or (decoder and LATENTS * code_dim > 3 * SPECTRAL["grid"] ** 2):
        return f"{LATENTS} tokens of [0-9]+ coefficients do not fit .*; use a larger grid"
    return None


@functools.cache
def _widths(quantizer: str) -> tuple[int, int]:
    """Width of latents and of codes."""
    built = build_part(_row(Quantizer, quantizer), Quantizer)
    return built.dim, built.code_dim


def product() -> list[Mix]:
    return [Mix(*names) for names in itertools.product(*TABLES.values())]


def covering(seed: int = 0) -> list[Mix]:
    """A seeded choice of combinations that work, in which any two parts of different kinds meet at least once."""
    allowed = [mix for mix in product() if not refused(mix)]
    random.Random(seed).shuffle(allowed)
    missing = {pair for mix in allowed for pair in pairs(mix)}
    with_pair: dict[tuple, list[Mix]] = {}
    for mix in allowed:
        for pair in pairs(mix):
            with_pair.setdefault(pair, []).append(mix)
    chosen = []
    for pair in sorted(missing, key=lambda p: (len(with_pair[p]), p)):  # those with least choice first
        if pair in missing:
            best = max(with_pair[pair], key=lambda mix: len(missing & pairs(mix)))
            chosen.append(best)
            missing -= pairs(best)
    return chosen


def pairs(mix: Mix) -> set[tuple]:
    """Every two parts of a combination, with their slots."""
    return set(itertools.combinations(zip(mix._fields, mix), 2))
