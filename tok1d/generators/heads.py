"""What turns states of a trunk into tokens and tokens into its input: the contract, and one softmax over all ids.

The other heads: independent and masked bits (:mod:`tok1d.generators.heads_bits`), sub-codes and channels one after the other
(:mod:`tok1d.generators.heads_factors`), features of the codes that ids stand for (:mod:`tok1d.generators.heads_codes`).

Shapes: B rows, N tokens, W width, a token is () for ids or (d,) for bits.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.generators.chance import Chance
from tok1d.generators.guidance import guided
from tok1d.generators.sampling import choose
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.part import Part

MAX_SOFTMAX = 2**20


class TokenHead(Part):
    """States ⇄ tokens.

    Attributes:
        draws: uniform numbers that sampling one token takes.
        filters: whether top_k and top_p mean anything.
    """

    draws: int = 1
    filters: bool = True

    @abstractmethod
    def attach(self, width: int, space: TokenSpace) -> None:
        """Make the parameters; a generator calls this once.

        Raises:
            ModelError: the head cannot make tokens of this space.
        """

    @abstractmethod
    def embed(self, data: Tensor) -> Tensor:
        """Tokens (B, n, ...) → float (B, n, W), input of the trunk."""

    def at(self, places: int | Tensor) -> Any:
        """What embeds, judges and samples the tokens at some places of a row; else they are its first ones.

        Args:
            places: the one they all are; or int64 (B, n), in any order.

        Returns:
            This head, where all places are alike, or an object with its methods ``embed``, ``loss`` and ``sample``.
        """
        return self

    def corrupt(self, data: Tensor, chance: Chance) -> Tensor:
        """Tokens as training shows them to the trunk; targets stay clean."""
        return data

    @abstractmethod
    def loss(self, states: Tensor, data: Tensor, chance: Chance) -> Tensor:
        """Float (B, N, W) states, tokens (B, N, ...) → float32 (B, N), nats of each token (or an unbiased estimate)."""

    @abstractmethod
    def sample(
        self,
        states: Tensor,
        uniform: Tensor,
        g: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Tensor:
        """Choose one token a row.

        Args:
            states: float (B, W), or (2B, W): with the condition, then without.
            uniform: float64 (B, draws) in [0, 1).
            g: strength of guidance, for 2B states.
            temperature, top_k, top_p: see :mod:`tok1d.generators.sampling`.

        Returns:
            Tokens (B, ...).
        """


class Softmax(TokenHead):
    """One logit for each id.

    Example:
        >>> import torch
        >>> head = Softmax()
        >>> head.attach(8, TokenSpace(tokens=4, vocab_size=16))
        >>> head.loss(torch.randn(1, 4, 8), torch.zeros(1, 4, dtype=torch.int64), Chance(1)).exp().round().tolist()
        [[16.0, 16.0, 16.0, 16.0]]
    """

    def __init__(self) -> None:
        super().__init__()

    def attach(self, width: int, space: TokenSpace) -> None:
        if space.kind != "ids" or space.vocab_size > MAX_SOFTMAX:
            many = f"{space.vocab_size} ids" if space.kind == "ids" else space.kind
            raise ModelError(f"a softmax head has a logit for each of up to {MAX_SOFTMAX} ids, {space.tokenizer} has {many}. Take SubCodes or Bits")
        self.table = nn.Embedding(space.vocab_size, width)
        nn.init.trunc_normal_(self.table.weight, std=0.5)
        self.out = zero_linear(width, space.vocab_size)

    def embed(self, data: Tensor) -> Tensor:
        return self.table(data)

    def logits(self, states: Tensor) -> Tensor:
        """Float (..., W) → float (..., vocabulary)."""
        return self.out(states)

    def loss(self, states: Tensor, data: Tensor, chance: Chance) -> Tensor:
        return F.cross_entropy(self.logits(states).flatten(0, 1).float(), data.flatten(), reduction="none").view(data.shape)

    def sample(
        self,
        states: Tensor,
        uniform: Tensor,
        g: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Tensor:
        logits = guided(self.logits(states), len(uniform), g)
        return choose(logits, uniform[:, 0], temperature, top_k, top_p)


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer that returns 0 until it has learned: every token equally likely, and no gradient of size one into a new trunk."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
