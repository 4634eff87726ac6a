"""Whether an encoder, a quantizer and a decoder go together; what does not is refused before the first image.

Widths, numbers of tokens and image sizes must agree. A part of your own that does not say how many tokens it takes or
what image size it was made for is not asked.
"""

from __future__ import annotations

from tok1d.errors import ModelError
from tok1d.tokenizers.part import Decoder, Encoder, Part, Quantizer


def check_parts(encoder: Encoder, quantizer: Quantizer, decoder: Decoder, image_size: tuple[int, int]) -> None:
    """Refuse parts that would fail at the first image.

    Args:
        image_size: (height, width) of the tokenizer.

    Raises:
        ModelError: says what does not agree, and what to change.
    """
    if encoder.dim != quantizer.dim:
        raise ModelError(
            f"the encoder makes latents of width {encoder.dim}, the quantizer takes {quantizer.dim}. "
            f"Set dim of {_name(encoder)} to {quantizer.dim}"
        )
    if getattr(decoder, "dim", quantizer.code_dim) != quantizer.code_dim:
        raise ModelError(
            f"the quantizer makes codes of width {quantizer.code_dim}, the decoder takes {decoder.dim}. "
            f"Set dim of {_name(decoder)} to {quantizer.code_dim}"
        )
    made = quantizer.tokens_made(encoder.tokens)
    for part, comes, what in (
        (quantizer, made, "tokens"),
        (decoder, encoder.tokens if quantizer.whole else made, "codes"),
    ):
        most = getattr(part, "tokens", comes)
        if most < comes:
            raise ModelError(
                f"{_name(encoder)} makes {encoder.tokens} latents, which become {comes} {what}, but {_name(part)} takes at most "
                f"{most}. Set its tokens (or image size, which makes a grid of so many cells) to fit"
            )
    for part in (encoder, decoder):
        size = part.config.get("image_size") if isinstance(getattr(part, "config", None), dict) else None
        size = [size, size] if isinstance(size, int) else size
        if size is not None and list(size) != list(image_size):
            raise ModelError(
                f"{_name(part)} was made for images of {size[0]}×{size[1]} (height×width), the tokenizer for "
                f"{image_size[0]}×{image_size[1]}. Give both the same image_size"
            )
    step, most = encoder.size_step, encoder.size_limit
    if step and any(side % step or side > most for side in image_size):
        raise ModelError(
            f"{_name(encoder)} takes sides that are multiples of {step} up to {most} pixels, the tokenizer has "
            f"image_size {list(image_size)}. Choose such a size"
        )


def _name(part: Part) -> str:
    return type(part).__name__
