"""Codes: a head that knows what ids mean, by the codes they stand for (:mod:`tok1d.generators.codes`).

Shapes: B rows, n of N tokens, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tok1d.generators.chance import Chance
from tok1d.generators.codes import Places, WithCodes
from tok1d.generators.guidance import guided
from tok1d.generators.heads import TokenHead
from tok1d.generators.sampling import choose
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.quantizers.code_books import CodeBooks

if TYPE_CHECKING:
    from tok1d.tokenizers.tokenizer import Tokenizer1D


class Codes(WithCodes, TokenHead):
    """Logits by features of codes, inputs made of codes.

    For tokenizers with codebooks, above all nested ones, whose tokens have one each: a :class:`tok1d.generators.heads.Softmax` has
    one table of ids for all of them.

    Args:
        features, hidden, books, dim: see :class:`tok1d.generators.codes.WithCodes`; configurations leave the last two out.

    Example:
        >>> import tok1d
        >>> from tok1d.generators.ar import AutoregressiveGenerator
        >>> from tok1d.generators.condition import ClassCondition
        >>> tokenizer = tok1d.load("default")
        >>> space = TokenSpace.of(tokenizer).first(8)
        >>> model = AutoregressiveGenerator(space, ClassCondition(3), 32, 1, 2, head=Codes.of(tokenizer, tokens=8))
        >>> model.generate(2, label=1, seeds=7).shape
        (2, 8)
    """

    def __init__(self, features: int = 64, hidden: int = 128, books: int | None = None, dim: int | None = None) -> None:
        super().__init__(features, hidden, books, dim)

    @classmethod
    def of(cls, tokenizer: Tokenizer1D, tokens: int | None = None, features: int = 64, hidden: int = 128) -> Codes:
        """A head with the codes of the first tokens of a tokenizer, all if None.

        Raises:
            ModelError: a tokenizer whose ids have no codes, or with more than 65,536 of them.
        """
        head = cls(features, hidden)
        head.take(CodeBooks.of(tokenizer.quantizer, tokenizer.max_tokens if tokens is None else tokens))
        return head

    def attach(self, width: int, space: TokenSpace) -> None:
        self.attach_codes(width, space)

    def at(self, places: int | Tensor) -> Placed:
        return Placed(self, places)

    def embed(self, data: Tensor, places: Places = None) -> Tensor:
        return self.ready().embed(data, places)

    def loss(self, states: Tensor, data: Tensor, chance: Chance, places: Places = None) -> Tensor:
        return self.ready().nats(states, data, places)

    def sample(
        self,
        states: Tensor,
        uniform: Tensor,
        g: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        places: Places = None,
    ) -> Tensor:
        # Logits are affine in the states: guided states give guided logits
        logits = self.ready().logits(guided(states, len(uniform), g)[:, None], places)[:, 0]
        return choose(logits, uniform[:, 0], temperature, top_k, top_p)


@dataclass(frozen=True)
class Placed:
    """A :class:`Codes` for tokens at some places."""

    head: Codes
    places: Places

    def embed(self, data: Tensor) -> Tensor:
        return self.head.embed(data, self.places)

    def loss(self, states: Tensor, data: Tensor, chance: Chance) -> Tensor:
        return self.head.loss(states, data, chance, self.places)

    def sample(self, states: Tensor, uniform: Tensor, *options: Any) -> Tensor:
        return self.head.sample(states, uniform, *options, places=self.places)
