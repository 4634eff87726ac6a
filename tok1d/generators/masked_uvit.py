"""UViTBody: the body of the published MaskGIT generator of TiTok-S-128.

U-ViT (https://arxiv.org/abs/2209.12152): the first half of the blocks hands its outputs to the second half, last to first.

Shapes: B rows, P places of the condition, n tokens, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.generators.condition import Given, check_share
from tok1d.generators.masked_bert import check_sizes
from tok1d.generators.masked_body import MaskedBody, seen
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.blocks import MLP, Attention, init_weights, learned


class UnbiasedAttention(Attention):
    """Attention whose queries, keys and values have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.qkv = nn.Linear(width, 3 * width, bias=False)


class Block(nn.Module):
    """``x + attention(norm1(x))``, then ``x + mlp(norm2(x))``; before that, if it has a skip, x is made of two inputs."""

    def __init__(self, width: int, heads: int, hidden: int, skip: bool, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-5), UnbiasedAttention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-5), MLP(width, hidden)
        self.skip = nn.Linear(2 * width, width) if skip else None
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Tensor | None, before: Tensor | None = None) -> Tensor:
        """Float (B, T, W), bool (B, 1, 1, T), float (B, T, W) of the first half → float (B, T, W)."""
        if self.skip is not None:
            x = self.skip(torch.cat([x, before], dim=-1))
        x = x + F.dropout(self.attn(self.norm1(x), mask), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class UViTBody(MaskedBody):
    """Args:
    width: W.
    depth: blocks of both halves, an even number; one more lies between them.
    heads: of attention.
    hidden: width inside the MLP; 4 W if None.
    dropout: of what blocks add, in training, as :class:`tok1d.generators.masked_bert.BertBody`; published: none.
    """

    def __init__(
        self, width: int = 1024, depth: int = 20, heads: int = 16, hidden: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_sizes(width, depth, heads, hidden)
        if depth % 2:
            raise ModelError(f"depth counts the blocks of two halves, so it must be even, got {depth}")
        self.width, self.half = width, depth // 2
        self.sizes, self.dropout = (width, heads, hidden or 4 * width), check_share("dropout", dropout)

    def attach(self, space: TokenSpace, places: int) -> None:
        self.positions = learned(places + space.tokens, self.width)
        self.first = nn.ModuleList(Block(*self.sizes, False, self.dropout) for _ in range(self.half))
        self.middle = Block(*self.sizes, False, self.dropout)
        self.second = nn.ModuleList(Block(*self.sizes, True, self.dropout) for _ in range(self.half))
        self.norm = nn.LayerNorm(self.width, eps=1e-5)
        self.apply(init_weights)
        self.attach_ends(space)

    def forward(self, ids: Tensor, given: Given, kept: Tensor | None = None) -> Tensor:
        x = self.embed(ids, given)
        mask = seen(given, kept, ids.shape[1])
        mask = None if mask is None else mask[:, None, None]
        x = x + self.positions[: x.shape[1]]
        before = []
        for block in self.first:
            x = block(x, mask)
            before.append(x)
        x = self.middle(x, mask)
        for block in self.second:
            x = block(x, mask, before.pop())
        x = self.norm(x)
        return x[:, x.shape[1] - ids.shape[1] :]
