"""CodesBody: guesses masked tokens knowing what ids stand for (:mod:`tok1d.generators.codes`), on the trunk of all generators.

Shapes: B rows, P places of the condition, n tokens, m of them, W width, K ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tok1d.generators.codes import WithCodes
from tok1d.generators.condition import Given
from tok1d.generators.masked_body import MaskedBody, seen
from tok1d.generators.space import TokenSpace
from tok1d.generators.trunk import Trunk
from tok1d.tokenizers.quantizers.code_books import CodeBooks

if TYPE_CHECKING:
    from tok1d.tokenizers.tokenizer import Tokenizer1D


class CodesBody(WithCodes, MaskedBody):
    """As :class:`tok1d.generators.masked_body.TrunkBody`, with inputs made of codes and logits by features of codes.

    Args:
        width, depth, heads, hidden, positions: see :class:`tok1d.generators.trunk.Trunk`.
        features, inner, books, dim: ``features``, ``hidden``, ``books`` and ``dim`` of :class:`tok1d.generators.codes.WithCodes`;
            configurations leave the last two out.

    Example:
        >>> import tok1d
        >>> from tok1d.generators.condition import ClassCondition
        >>> from tok1d.generators.masked import MaskedGenerator
        >>> tokenizer = tok1d.load("default")
        >>> body = CodesBody.of(tokenizer, tokens=8, width=32, depth=1, heads=2)
        >>> model = MaskedGenerator(TokenSpace.of(tokenizer).first(8), ClassCondition(3), body)
        >>> model.generate(2, label=1, seeds=7, steps=3).shape
        (2, 8)
    """

    def __init__(
        self,
        width: int = 768,
        depth: int = 12,
        heads: int | None = None,
        hidden: int | None = None,
        positions: str = "rotary",
        features: int = 64,
        inner: int = 128,
        books: int | None = None,
        dim: int | None = None,
    ) -> None:
        super().__init__(features, inner, books, dim)
        self.width, self.depth, self.sizes = width, depth, (heads, hidden, positions)

    @classmethod
    def of(cls, tokenizer: Tokenizer1D, tokens: int | None = None, **sizes: int | str | None) -> CodesBody:
        """A body with the codes of the first tokens of a tokenizer, all if None; further arguments as the class has them.

        Raises:
            ModelError: a tokenizer whose ids have no codes, or with more than 65,536 of them.
        """
        body = cls(**sizes)  # type: ignore[arg-type]
        body.take(CodeBooks.of(tokenizer.quantizer, tokenizer.max_tokens if tokens is None else tokens))
        return body

    def attach(self, space: TokenSpace, places: int) -> None:
        self.trunk = Trunk(self.width, self.depth, places + space.tokens, *self.sizes)
        self.blank = nn.Parameter(torch.randn(self.width) * 0.5)  # in place of what a masked token's code would give
        self.attach_codes(self.width, space)

    def forward(self, ids: Tensor, given: Given, kept: Tensor | None = None) -> Tensor:
        x = self.trunk(self.embed(ids, given), mask=seen(given, kept, ids.shape[1]))
        return x[:, x.shape[1] - ids.shape[1] :]

    def embed(self, ids: Tensor, given: Given) -> Tensor:
        x = self.ready().embed(ids, blank=self.blank)
        return x if given.tokens is None else torch.cat([given.tokens, x], dim=1)

    def logits(self, states: Tensor, places: Tensor | None = None) -> Tensor:
        return self.ready().logits(states, places)
