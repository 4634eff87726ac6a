"""Published MaskGIT-VQGAN weights to our parts and back: the teacher of two-stage TiTok and the tokenizer of RAR.

Weights: ``maskgit-vqgan-imagenet-f16-256.bin`` of fun-research/TiTok; code: bytedance/1d-tokenizer (Apache-2.0). The layout
of its decoder also stands inside two-stage TiTok files, as ``pixel_decoder``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tok1d.errors import ModelError
from tok1d.tokenizers.decoders.vqgan import VQGANDecoder
from tok1d.tokenizers.encoders.vqgan import VQGANEncoder
from tok1d.tokenizers.lengths import FixedLength
from tok1d.tokenizers.official.layout import Layout, Place, Shapes, module_path, shape_of
from tok1d.tokenizers.quantizers.vq import VQ
from tok1d.tokenizers.tokenizer import Tokenizer1D

FAMILY = "maskgit-vqgan"


def maskgit_vqgan_config(
    name: str = "maskgit-vqgan",
    *,
    vocab_size: int = 1024,
    dim: int = 256,
    width: int = 128,
    multipliers: Sequence[int] = (1, 1, 2, 2, 4),
    depth: int = 2,
    image_size: int = 256,
) -> dict[str, Any]:
    """Configuration of a published MaskGIT-VQGAN of these sizes; the defaults are the one release.

    Args:
        name: of the tokenizer.
        vocab_size, dim: of its codebook.
        width, multipliers, depth, image_size: as :class:`tok1d.tokenizers.encoders.vqgan.VQGANEncoder`.
    """
    sizes = {"dim": dim, "width": width, "multipliers": list(multipliers), "depth": depth}
    sizes |= {"image_size": [image_size, image_size], "shortcut": "output"}
    return {
        "_class_name": "Tokenizer1D",
        "name": name,
        "image_size": [image_size, image_size],
        "encoder": {"class": module_path(VQGANEncoder), **sizes},
        "quantizer": {"class": module_path(VQ), "vocab_size": vocab_size, "dim": dim},
        "decoder": {"class": module_path(VQGANDecoder), **sizes},
        "lengths": {"class": module_path(FixedLength)},
    }


def decoder_sizes(shapes: Shapes, prefix: str = "decoder.") -> dict[str, Any]:
    """``dim``, ``width``, ``multipliers`` and ``depth`` of the VQGAN decoder whose names start with ``prefix``."""
    dim = shape_of(shapes, f"{prefix}conv_in.weight", 4, FAMILY)[1]
    levels = _count(shapes, prefix + "up.{}.block.0.conv1.weight")
    depth = _count(shapes, prefix + "up.0.block.{}.conv1.weight")
    widths = [shape_of(shapes, f"{prefix}up.{level}.block.0.conv2.weight", 4, FAMILY)[0] for level in range(levels)]
    width = math.gcd(*widths)
    if not width or not depth:
        raise ModelError(f"'{prefix}up.0.block.0.conv1.weight' is missing among {len(shapes)} tensors: not a {FAMILY} state dict")
    return {"dim": dim, "width": width, "multipliers": [w // width for w in widths], "depth": depth}


def crop_size(published: dict[str, Any]) -> int | None:
    """Image side that a published configuration tells, if it does."""
    for tree in (branch(published, "dataset", "preprocessing"), published):
        size = tree.get("crop_size")
        if isinstance(size, int) and not isinstance(size, bool):
            return size
    return None


def decoder_places(sizes: Mapping[str, Any], theirs: str = "decoder.", ours: str = "decoder.") -> dict[str, Place]:
    """Places of a VQGAN decoder of these ``multipliers`` and ``depth``; the names in it are the same on both sides."""
    multipliers, depth = sizes["multipliers"], sizes["depth"]
    last = len(multipliers) - 1
    names = [*_ends("conv_in"), *_ends("norm_out"), *_ends("conv_out")]
    for level, multiplier in enumerate(multipliers):
        before = multipliers[min(level + 1, last)]
        names += _blocks(f"up.{level}.block.", depth, changes=before != multiplier)
        names += _ends(f"up.{level}.upsample_conv") if level else []
    names += _blocks("mid.", depth, changes=False)
    return {theirs + name: Place(ours + name) for name in names}


def soft_code(quantizer: VQ, z: Tensor, temperature: float = 1.0) -> Tensor:
    """How near every code is, a soft target for distillation: softmax of minus the squared distance over temperature.

    Args:
        quantizer: of the MaskGIT-VQGAN.
        z: float (B, N, D) latents.
        temperature: positive.

    Returns:
        float32 (B, N, K), rows sum to 1.
    """
    z, codebook = z.float(), quantizer.codebook.float()
    scores = 2 * z @ codebook.T - codebook.square().sum(-1)  # |z|² is the same for every code, softmax drops it
    return (scores / temperature).softmax(-1)


def _config(shapes: Shapes, published: dict[str, Any], name: str) -> dict[str, Any]:
    sizes = decoder_sizes(shapes)
    unit, first = sizes["width"], shape_of(shapes, "encoder.conv_in.weight", 4, FAMILY)[0]
    if not first or unit % first:
        raise ModelError(f"the encoder starts with {first} channels, the decoder has multiples of {unit}: not a {FAMILY}")
    sizes |= {"width": first, "multipliers": [m * unit // first for m in sizes["multipliers"]]}
    codes = shape_of(shapes, "quantize.embedding.weight", 2, FAMILY)[0]
    return maskgit_vqgan_config(name, vocab_size=codes, image_size=crop_size(published) or 256, **sizes)


def _places(config: dict[str, Any]) -> dict[str, Place]:
    multipliers, depth = config["encoder"]["multipliers"], config["encoder"]["depth"]
    names = ["conv_in.weight", *_ends("norm_out"), *_ends("conv_out")]
    for level, multiplier in enumerate(multipliers):
        before = multipliers[level - 1] if level else 1
        names += _blocks(f"down.{level}.block.", depth, changes=before != multiplier)
    names += _blocks("mid.", depth, changes=False)
    places = {f"encoder.{name}": Place(f"encoder.{name}") for name in names}
    places |= decoder_places(config["decoder"])
    return places | {"quantize.embedding.weight": Place("quantizer.codebook")}


def _exports(tokenizer: Tokenizer1D) -> None:
    encoder, quantizer, decoder = tokenizer.encoder, tokenizer.quantizer, tokenizer.decoder
    kinds = " × ".join(type(part).__name__ for part in (encoder, quantizer, decoder))
    if kinds != "VQGANEncoder × VQ × VQGANDecoder":
        raise ModelError(f"the {FAMILY} layout is that of VQGANEncoder × VQ × VQGANDecoder, got {kinds}")
    if quantizer.l2:
        raise ModelError(f"the codes of a {FAMILY} are compared by distance, these by cosine (l2)")
    for part in (encoder, decoder):
        if part.config["shortcut"] != "output" or part.config["groups"] != 32:
            raise ModelError(
                f'a {FAMILY} has shortcut="output" and 32 groups, '
                f"got {part.config['shortcut']!r} and {part.config['groups']}: readers would compute something else"
            )
    if any(encoder.config[key] != decoder.config[key] for key in ("width", "multipliers", "depth")):
        raise ModelError(f"encoder and decoder of a {FAMILY} have the same width, multipliers and depth; these differ")


def _blocks(prefix: str, depth: int, *, changes: bool) -> list[str]:
    """Names in ``depth`` residual blocks; ``changes``: the first one changes the width."""
    names = []
    for i in range(depth):
        names += [*_ends(f"{prefix}{i}.norm1"), *_ends(f"{prefix}{i}.norm2")]
        names += [f"{prefix}{i}.conv1.weight", f"{prefix}{i}.conv2.weight"]
    return names + ([f"{prefix}0.nin_shortcut.weight"] if changes else [])


def _ends(name: str) -> list[str]:
    return [f"{name}.weight", f"{name}.bias"]


def _count(shapes: Shapes, pattern: str) -> int:
    return next(i for i in range(len(shapes) + 1) if pattern.format(i) not in shapes)


def branch(tree: Any, *names: str) -> dict[str, Any]:
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


MASKGIT_VQGAN = Layout(
    name=FAMILY,
    recognises=lambda shapes: {"encoder.down.0.block.0.conv1.weight", "decoder.mid.0.norm1.weight"} <= shapes.keys(),
    config=_config,
    places=_places,
    exports=_exports,
)
