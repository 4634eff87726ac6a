"""Heads for tokens of several digits, chosen one after the other by a small causal transformer.

Sub-codes of large vocabularies: https://arxiv.org/abs/2409.04410 (Open-MAGVIT2, 6 + 12 bits). Channels of quantized latents:
https://arxiv.org/abs/2503.16430 (TokenBridge).

Shapes: B rows, N tokens, W width, G digits, V values of the largest digit, w width of the small transformer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.generators.chance import Chance
from tok1d.generators.guidance import guided
from tok1d.generators.heads import TokenHead, zero_linear
from tok1d.generators.sampling import choose
from tok1d.generators.space import TokenSpace
from tok1d.generators.trunk import Trunk
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.quantizers.packing import bits_to_digits, digit_bits, digits_to_bits, pack_digits, unpack_digits


class Factors(TokenHead):
    """Digits of a token in order, each given the state of the trunk and the digits before it.

    Args:
        sizes: values of each digit.
        depth: blocks of the small transformer.
        width: w; that of the trunk if None.
        shared: whether digits share one table and one output layer (values that mean the same in every place).
    """

    def __init__(self, sizes: Sequence[int], depth: int, width: int | None, shared: bool) -> None:
        super().__init__()
        if isinstance(sizes, int) or not 1 <= len(sizes) <= 1024:
            raise ModelError(f"sizes must be 1 to 1024 numbers of values, one a digit, got {sizes!r:.100}")
        for size in sizes:
            check_range("every entry of sizes", size, 2, 2**20)
        check_range("depth", depth, 1, 64)
        if width is not None:
            check_range("width", width, 2, 16384)
        self.sizes, self.depth, self.width, self.shared = list(sizes), depth, width, shared
        self.draws = len(self.sizes)

    def attach(self, width: int, space: TokenSpace) -> None:
        fits = {"ids": math.prod(self.sizes) == space.vocab_size, "bits": sum(digit_bits(self.sizes)) == space.bits}
        if not fits.get(space.kind) or (space.kind == "bits" and any(s & (s - 1) for s in self.sizes)):
            has = f"{space.vocab_size} ids" if space.kind == "ids" else f"{space.bits} bits" if space.kind == "bits" else "latents"
            raise ModelError(
                f"digits of {self.sizes!r:.100} values make {math.prod(self.sizes)} tokens, {space.tokenizer} has {has}. "
                "Choose sizes whose product is the vocabulary (powers of two for bits)"
            )
        self.packed = space.kind == "ids"
        inner = self.width or width
        places = [0] * len(self.sizes) if self.shared else [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self.register_buffer("places", torch.tensor(places, device="cpu"), persistent=False)
        entries = max(self.sizes) if self.shared else sum(self.sizes)
        # Each place has rows of its own at the trunk's input, else swapped digits would look alike there.
        self.into = nn.Embedding(sum(self.sizes), width)
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self.register_buffer("starts", torch.tensor(starts, device="cpu"), persistent=False)
        self.table = nn.Embedding(entries, inner)
        nn.init.trunc_normal_(self.into.weight, std=0.5 * len(self.sizes) ** -0.5)
        nn.init.trunc_normal_(self.table.weight, std=0.5)
        self.from_state = nn.Linear(width, inner)
        self.small = Trunk(inner, self.depth, len(self.sizes), positions="learned")
        outputs = [max(self.sizes)] if self.shared else self.sizes
        self.outs = nn.ModuleList(zero_linear(inner, size) for size in outputs)

    def to_digits(self, data: Tensor) -> Tensor:
        """Tokens, int64 (...) or uint8 (..., d) → int64 (..., G)."""
        return unpack_digits(data, self.sizes) if self.packed else bits_to_digits(data, self.sizes)

    def to_tokens(self, digits: Tensor) -> Tensor:
        """Inverse of :meth:`to_digits`."""
        return pack_digits(digits, self.sizes) if self.packed else digits_to_bits(digits, self.sizes)

    def embed(self, data: Tensor) -> Tensor:
        return self.into(self.to_digits(data) + self.starts).sum(-2)

    def digit_logits(self, states: Tensor, place: int) -> Tensor:
        """States of the small transformer (..., w) at one place → float (..., sizes[place])."""
        out = self.outs[0 if self.shared else place]
        return out(states)[..., : self.sizes[place]]

    def small_states(self, states: Tensor, digits: Tensor) -> Tensor:
        """Float (M, W) states of the trunk, int64 (M, G) digits → float (M, G, w); entry g has seen the digits before g."""
        x = torch.cat([self.from_state(states)[:, None], self.table(digits[:, :-1] + self.places[:-1])], dim=1)
        return self.small(x, causal=True)

    def loss(self, states: Tensor, data: Tensor, chance: Chance) -> Tensor:
        digits = self.to_digits(data).flatten(0, 1)
        inner = self.small_states(states.flatten(0, 1), digits)
        nats = [
            F.cross_entropy(self.digit_logits(inner[:, g], g).float(), digits[:, g], reduction="none") for g in range(len(self.sizes))
        ]
        return torch.stack(nats).sum(0).view(states.shape[:2])

    def sample(
        self,
        states: Tensor,
        uniform: Tensor,
        g: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Tensor:
        rows, many = len(uniform), len(states) // len(uniform)
        cache = self.small.cache(len(states))
        x, digits = self.from_state(states), []
        for place in range(len(self.sizes)):
            inner = self.small(x[:, None], causal=True, cache=cache)[:, 0]
            logits = guided(self.digit_logits(inner, place), rows, g)
            digits.append(choose(logits, uniform[:, place], temperature, top_k, top_p))
            x = self.table(digits[-1] + self.places[place]).repeat(many, 1)
        return self.to_tokens(torch.stack(digits, -1))


class SubCodes(Factors):
    """Sub-codes of an id, such as 64 and 4096 values of 2^18 ids.

    Args:
        sizes: values of each sub-code; their product is the vocabulary. The first is the fastest digit of an id, and comes first.
        depth: blocks of the small transformer.
        width: of it; that of the trunk if None.

    Example:
        >>> head = SubCodes([4, 8], depth=1)
        >>> head.attach(16, TokenSpace(tokens=2, vocab_size=32))
        >>> head.to_digits(torch.tensor([[13, 31]])).tolist()
        [[[1, 3], [3, 7]]]
    """

    def __init__(self, sizes: list[int], depth: int = 2, width: int | None = None) -> None:
        super().__init__(sizes, depth, width, shared=False)


class Channels(Factors):
    """Channels of a latent, most important first, as :class:`tok1d.tokenizers.quantizers.post_training.PerChannel` orders them.

    Levels of all channels share one table and one output layer; places are told apart by learned positions.

    Args:
        bits: of each channel, as that quantizer has them.
        depth, width: as :class:`SubCodes`.
    """

    def __init__(self, bits: list[int], depth: int = 3, width: int | None = None) -> None:
        if isinstance(bits, int) or not all(isinstance(b, int) and 1 <= b <= 12 for b in bits):
            raise ModelError(f"bits must be a list of 1 to 12 for each channel, got {bits!r:.100}")
        super().__init__([2**b for b in bits], depth, width, shared=True)
