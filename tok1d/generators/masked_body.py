"""Networks that guess masked tokens from the others: the contract, and one on the trunk of all generators for new models.

The bodies of published models: :mod:`tok1d.generators.masked_bert`, :mod:`tok1d.generators.masked_uvit`; one that knows what ids
stand for: :mod:`tok1d.generators.masked_codes`.

Shapes: B rows, P places of the condition, n tokens, m of them, W width, K ids.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.generators.condition import Given
from tok1d.generators.heads import MAX_SOFTMAX, zero_linear
from tok1d.generators.space import TokenSpace
from tok1d.generators.trunk import Trunk
from tok1d.tokenizers.part import Part


class MaskedBody(Part):
    """Tokens, some of them masked → states → logits.

    That logits are affine in the states matters: guidance, which combines with weights that sum to 1, can combine states.

    Attributes:
        width: W.
        table: of :meth:`attach_ends`: K + 1 rows, the last for masked tokens.
        head: of :meth:`attach_ends`: W → K.
    """

    width: int
    table: nn.Embedding
    head: nn.Linear

    @abstractmethod
    def attach(self, space: TokenSpace, places: int) -> None:
        """Make the parameters; a generator calls this once.

        Args:
            space: of the tokens.
            places: P.
        """

    @abstractmethod
    def forward(self, ids: Tensor, given: Given, kept: Tensor | None = None) -> Tensor:
        """int64 (B, n) ids, K where masked; bool (B, n) what there is at all, None: everything → float (B, n, W)."""

    def logits(self, states: Tensor, places: Tensor | None = None) -> Tensor:
        """Float (B, m, W) states of the tokens at places int64 (B, m), None: of the first m → float (B, m, K)."""
        return self.head(states)

    def attach_ends(self, space: TokenSpace) -> None:
        """Make table and head.

        Raises:
            ModelError: tokens that are no ids, or too many.
        """
        if space.kind != "ids" or space.vocab_size > MAX_SOFTMAX:
            many = f"{space.vocab_size} ids" if space.kind == "ids" else space.kind
            raise ModelError(f"masked generation has a logit for each of up to {MAX_SOFTMAX} ids, {space.tokenizer} has {many}")
        self.table = nn.Embedding(space.vocab_size + 1, self.width)
        nn.init.trunc_normal_(self.table.weight, std=0.5)
        self.head = zero_linear(self.width, space.vocab_size)

    def embed(self, ids: Tensor, given: Given) -> Tensor:
        """Condition and tokens, float (B, P + n, W)."""
        x = self.table(ids)
        return x if given.tokens is None else torch.cat([given.tokens, x], dim=1)


def seen(given: Given, kept: Tensor | None, tokens: int) -> Tensor | None:
    """bool (B, P + n), which places may be attended to; None: all."""
    if given.mask is None and kept is None:
        return None
    front = 0 if given.tokens is None else given.tokens.shape[1]
    if kept is None:
        return F.pad(given.mask, (0, tokens), value=True)
    return F.pad(kept, (front, 0), value=True) if given.mask is None else torch.cat([given.mask, kept], dim=1)


class TrunkBody(MaskedBody):
    """The trunk of all generators, open to all sides.

    Args:
        width, depth, heads, hidden, positions: see :class:`tok1d.generators.trunk.Trunk`.
    """

    def __init__(
        self,
        width: int = 768,
        depth: int = 12,
        heads: int | None = None,
        hidden: int | None = None,
        positions: str = "rotary",
    ) -> None:
        super().__init__()
        self.width, self.sizes = width, (heads, hidden, positions)
        self.depth = depth

    def attach(self, space: TokenSpace, places: int) -> None:
        self.trunk = Trunk(self.width, self.depth, places + space.tokens, *self.sizes)
        self.attach_ends(space)

    def forward(self, ids: Tensor, given: Given, kept: Tensor | None = None) -> Tensor:
        x = self.trunk(self.embed(ids, given), mask=seen(given, kept, ids.shape[1]))
        return x[:, x.shape[1] - ids.shape[1] :]
