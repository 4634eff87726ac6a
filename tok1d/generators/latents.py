"""Tokens as numbers: what a flow makes, back to tokens or pictures, and the scale it works in.

The latents of a continuous tokenizer (KL) are its tokens. Those of a discrete one are the codes of its ids
(``Quantizer.ids_to_codes``; ``tok tokenize --what latents``), and what a flow makes of them is brought back to the nearest ids by
``Quantizer.codes_to_ids``. Or they are what its encoder makes (``--what encoder``), and the quantizer makes tokens of them as it
does of a picture's: the choice for residual quantizers, whose later codes are what earlier ones missed, and close to noise.

Shapes: B rows, n tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tok1d.errors import TokenError
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.quantizers.common import sum_over_ranks
from tok1d.tokens import TokenSequence

if TYPE_CHECKING:
    from tok1d.tokenizers.tokenizer import Tokenizer1D


@dataclass(frozen=True)
class Latents:
    """A batch of generated latents.

    Attributes:
        data: float32 (B, n, C), in the scale of the tokenizer.
        space: of the generator that made them.
    """

    data: Tensor
    space: TokenSpace

    @property
    def shape(self) -> tuple[int, int]:
        """(B, n)."""
        return self.data.shape[0], self.data.shape[1]

    @torch.no_grad()
    def tokens(self, tokenizer: Tokenizer1D) -> TokenSequence:
        """The tokens of a discrete tokenizer: what its quantizer makes of latents from before it, or else the nearest to the codes.

        Raises:
            TokenError: it is continuous, or not the one these were made for.
        """
        self.space.matches(tokenizer)
        if not tokenizer.is_discrete:
            raise TokenError(f"{tokenizer.name} has a continuous bottleneck and no token ids; ask for images()")
        latents = self.data.to(tokenizer.device)
        if self.space.before:
            found = tokenizer.quantizer(latents)
            return TokenSpace.of(tokenizer).sequence(found.ids if found.bits is None else found.bits)
        if tokenizer.quantizer.whole:
            raise TokenError(f"codes of {tokenizer.name} are sums over its tokens and have no ids one by one; ask for images()")
        return TokenSpace.of(tokenizer).sequence(tokenizer.quantizer.codes_to_ids(latents))

    @torch.inference_mode()
    def images(self, tokenizer: Tokenizer1D, **options: Any) -> Tensor:
        """Float32 (B, 3, H, W) in [0, 1]; through the nearest tokens where there are any.

        Args:
            tokenizer: the one these were made for.
            options: of its decoder.

        Raises:
            TokenError: another tokenizer, or an option its decoder does not have.
        """
        self.space.matches(tokenizer)
        codes = self.data.to(tokenizer.device)
        if self.space.before:
            codes = tokenizer.quantizer(codes).q
        elif tokenizer.is_discrete and not tokenizer.quantizer.whole:
            codes = tokenizer.quantizer.ids_to_codes(tokenizer.quantizer.codes_to_ids(codes))
        return tokenizer.decode_latents(codes, **options).float().clamp(0, 1)


class Scale(nn.Module):
    """Mean and deviation of each channel, measured: of the first batches of training, or of given ones.

    Flows start from noise of deviation 1, so what they make has to have about that.

    Args:
        channels: C.
        batches: how many training batches are measured; 0: none, the scale stays as it is.

    Example:
        >>> scale = Scale(2)
        >>> scale.measure([torch.tensor([[[0.0, 5.0], [4.0, 9.0]]])])
        >>> scale.mean.tolist(), scale.std.tolist()
        ([2.0, 7.0], [2.0, 2.0])
    """

    def __init__(self, channels: int, batches: int = 100) -> None:
        super().__init__()
        check_range("batches", batches, 0, 2**31)
        self.batches = batches
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("values", torch.zeros((), dtype=torch.int64))  # measured so far, of one channel
        self.register_buffer("measured", torch.zeros((), dtype=torch.int64))  # batches
        self._done = batches == 0

    def forward(self, x: Tensor) -> Tensor:
        """Float (B, n, C) latents → float32 of mean 0 and deviation 1."""
        return (x.float() - self.mean) / self.unit

    def inverse(self, x: Tensor) -> Tensor:
        """Back to the scale of the tokenizer."""
        return x * self.unit + self.mean

    @property
    def unit(self) -> Tensor:
        """float32 (C,), what becomes 1: the deviations, but 1 for channels that are constant."""
        return torch.where(self.std > 1e-6, self.std, torch.ones_like(self.std))

    @torch.no_grad()
    def learn(self, x: Tensor, kept: Tensor | None = None) -> None:
        """Measure a training batch, of all processes together, unless enough have been.

        Args:
            x: float (B, n, C).
            kept: bool (B, n), tokens that count; None: all.
        """
        if self._done:
            return
        if int(self.measured) >= self.batches:
            self._done = True
            return
        self._add(x, kept)

    @torch.no_grad()
    def measure(self, data: Iterable[Tensor]) -> None:
        """Measure given latents (B, n, C) instead of those of training.

        Raises:
            TokenError: there are none.
        """
        self.values.zero_(), self.measured.zero_()
        for x in data:
            self._add(x, None)
        if not int(self.values):
            raise TokenError("no latents to measure the scale of")
        self.measured.fill_(max(self.batches, 1))
        self._done = True

    def _add(self, x: Tensor, kept: Tensor | None) -> None:
        x = x.to(self.mean.device).flatten(0, 1).double()
        weight = torch.ones_like(x[:, :1]) if kept is None else kept.flatten()[:, None].double()
        sums = sum_over_ranks(torch.stack([weight.expand_as(x).sum(0), (x * weight).sum(0)]))
        count = sums[0].clamp(min=1)
        mean = sums[1] / count
        spread = sum_over_ranks(((x - mean).square() * weight).sum(0))
        # Two parts to one: the deviation of each, and that of their means (Chan et al. 1983)
        before, after = self.values.double(), self.values + sums[0]
        move = mean - self.mean.double()
        share = sums[0] / after.clamp(min=1)
        spread = spread + self.std.double().square() * before + move.square() * before * share
        self.mean.copy_(self.mean + move * share)
        self.std.copy_((spread / after.clamp(min=1)).sqrt())
        self.values += sums[0, 0].long()
        self.measured += 1
