"""What a tokenizer checks where people hand things in: images, numbers of tokens, sequences, options, sizes and seeds.

Shapes: B images, n tokens, d bits of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tok1d.errors import ImageError, TokenError
from tok1d.tokenizers.part import Decoder, Encoder
from tok1d.tokens import TokenSequence

if TYPE_CHECKING:
    from tok1d.tokenizers.budget import Auto


class Border:
    """The checks of :class:`tok1d.tokenizers.tokenizer.Tokenizer1D`, which has what they look at."""

    name: str
    image_size: tuple[int, int]
    encoder: Encoder
    decoder: Decoder
    is_nested: bool
    any_size: bool
    max_tokens: int
    vocab_size: int
    bits_per_token: int
    token_lengths: list[int]
    model_id: int

    def _check_images(self, images: Tensor) -> Tensor:
        if images.ndim == 3:
            images = images[None]
        if images.ndim != 4 or images.shape[1] != 3:
            raise ImageError(f"images must be (B, 3, H, W) or (3, H, W), got {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            return images
        if not images.is_floating_point():
            raise ImageError(f"images must be float in [0, 1] or uint8, got {images.dtype}")
        low, high = torch.aminmax(images) if images.numel() else (torch.tensor(0.0), torch.tensor(0.0))
        if not (low >= -0.01 and high <= 1.01):  # also False for NaN
            raise ImageError(
                f"images must be finite and in [0, 1], got values from {low:.3g} to {high:.3g}. "
                "Divide uint8-like values by 255, map [-1, 1] by (x + 1) / 2"
            )
        return images

    def _check_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options that are given, all of which the decoder must have."""
        given = {name: value for name, value in options.items() if value is not None}
        for name in given:
            if name not in self.decoder.options:
                known = ", ".join(self.decoder.options) or "none"
                raise TokenError(f"the decoder of {self.name} ({type(self.decoder).__name__}) has no option {name!r}; its options: {known}")
        return given

    def _working_size(self, size: Sequence[int], policy: str) -> tuple[int, int]:
        """The size images of ``size`` are encoded at."""
        step, most = self.encoder.size_step, self.encoder.size_limit
        if policy != "none" or not self.any_size or tuple(size) == self.image_size:
            return self.image_size
        if any(n % step or not 0 < n <= most for n in size):
            raise ImageError(
                f"{self.name} takes sides that are multiples of {step} up to {most} pixels, got {size[0]}×{size[1]} (height×width). "
                f'Choose --resize, --crop, --pad or --tile (in Python: policy="resize"), which bring it to {self.image_size[0]}×{self.image_size[1]}'
            )
        return int(size[0]), int(size[1])

    def _sizes(self, seq: TokenSequence, size: tuple[int, int] | None) -> list[tuple[int, int] | None]:
        """What every row is decoded at; None: the decoder's own size."""
        if size is not None:
            self._check_options({"size": size})
            if seq.geometry is not None and any(g.policy != "none" for g in seq.geometry):
                raise TokenError("size= is for tokens of images that were not resized, cropped, padded or tiled: their own size is restored")
            return [(int(size[0]), int(size[1]))] * len(seq)
        if seq.geometry is None or not self.any_size:
            return [None] * len(seq)
        return [self._working_size((g.height, g.width), g.policy) for g in seq.geometry for _ in range(g.tiles)]

    def _as_sequence(self, data: Tensor) -> TokenSequence:
        """Bare ids or bits."""
        if data.dtype == torch.uint8 and data.ndim == 3:
            return TokenSequence(None, self.vocab_size, bits=data)
        return TokenSequence(data, self.vocab_size)

    def _check_tokens(self, tokens: int) -> int:
        if tokens not in self.token_lengths:
            if not self.is_nested:
                raise TokenError(
                    f"{self.name} makes exactly {self.max_tokens} tokens, got tokens={tokens}. "
                    f"Use {self.max_tokens}, or a nested model: tok models --filter nested"
                )
            raise TokenError(f"{self.name} keeps 1 to {self.max_tokens} tokens, got tokens={tokens}")
        return tokens

    def _check_word(self, tokens: str) -> Auto:
        from tok1d.tokenizers.budget import Auto

        if tokens != "auto":
            raise TokenError(f'tokens must be a number, "auto" or a Budget, got {tokens!r:.100}')
        return Auto()

    def _check_sequence(self, seq: TokenSequence) -> None:
        assert seq.lengths is not None
        if seq.vocab_size != self.vocab_size:
            raise TokenError(
                f"these tokens have a vocabulary of {seq.vocab_size}, {self.name} has {self.vocab_size}: another model made them"
            )
        if seq.model_id and seq.model_id != self.model_id:
            raise TokenError(
                f"these tokens were made by model {seq.model_id:016x}, this is {self.name} {self.model_id:016x}. "
                "Decode with the model that made them"
            )
        for n in set(seq.lengths.tolist()):
            self._check_tokens(n)
        if seq.ids is not None and seq.ids.numel():
            if self.vocab_size > 2**62:
                raise TokenError(f"{self.name} has codes of {self.bits_per_token} bits: give bits, uint8 (B, n, {self.bits_per_token}), not ids")
            low, high = int(seq.ids.min()), int(seq.ids.max())
            if low < 0 or high >= self.vocab_size:
                raise TokenError(f"ids must be in [0, {self.vocab_size}), got {low}..{high}")
        if seq.bits is not None:
            if self.vocab_size <= 2**62:
                raise TokenError(f"{self.name} has ids below {self.vocab_size}, not bits: give int64 ids (B, n)")
            if seq.bits.shape[2] != self.bits_per_token or (seq.bits.numel() and int(seq.bits.max()) > 1):
                raise TokenError(f"{self.name} has bits (B, n, {self.bits_per_token}) of 0 and 1, got {tuple(seq.bits.shape)} up to {seq.bits.max()}")


def per_row(seeds: int | Sequence[int] | Tensor | None, rows: int) -> Tensor | None:
    """int64 (rows,), one seed a row."""
    if seeds is None:
        return None
    values = [seeds] * rows if isinstance(seeds, int) else [int(s) for s in seeds]
    if len(values) != rows or not all(0 <= s < 2**63 for s in values):
        raise TokenError(f"seeds must be one integer in [0, 2^63), or one for each of the {rows} images (tiles count), got {seeds!r:.100}")
    return torch.tensor(values, dtype=torch.int64)
