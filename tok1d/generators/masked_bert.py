"""BertBody: the body of the published MaskGIT generators of TiTok-L-32, TiTok-B-64 and One-D-Piece.

A BERT encoder (https://arxiv.org/abs/1810.04805): norms after the sums, learned positions, and a token type that is always
the first of two. The class is a token in front, a row of the same table in the published weights.

Shapes: B rows, P places of the condition, n tokens, W width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.generators.condition import Given, check_share
from tok1d.generators.masked_body import MaskedBody, seen
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.blocks import MLP, Attention, check_range, init_weights, learned


class Layer(nn.Module):
    """``x = norm1(x + attention(x))``, then ``norm2(x + mlp(x))``."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attn, self.norm1 = Attention(width, heads), nn.LayerNorm(width, eps=1e-12)
        self.mlp, self.norm2 = MLP(width, hidden), nn.LayerNorm(width, eps=1e-12)
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Float (B, T, W), bool (B, 1, 1, T) → float (B, T, W)."""
        x = self.norm1(x + F.dropout(self.attn(x, mask), self.dropout, self.training))
        return self.norm2(x + F.dropout(self.mlp(x), self.dropout, self.training))


class BertBody(MaskedBody):
    """Args:
    width: W.
    depth: number of layers.
    heads: of attention.
    hidden: width inside the MLP; 4 W if None.
    dropout: of what layers add, in training; published models: 0.1, there also of attention weights. Drawn by torch's
        global generator, so it is the one choice that differs between one process and two.
    """

    def __init__(
        self, width: int = 768, depth: int = 24, heads: int = 16, hidden: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_sizes(width, depth, heads, hidden)
        self.width, self.depth, self.heads, self.hidden = width, depth, heads, hidden or 4 * width
        self.dropout = check_share("dropout", dropout)

    def attach(self, space: TokenSpace, places: int) -> None:
        self.positions = learned(places + space.tokens, self.width)
        self.types = learned(2, self.width)
        self.norm = nn.LayerNorm(self.width, eps=1e-12)
        self.layers = nn.ModuleList(Layer(self.width, self.heads, self.hidden, self.dropout) for _ in range(self.depth))
        self.layers.apply(init_weights)
        self.attach_ends(space)

    def forward(self, ids: Tensor, given: Given, kept: Tensor | None = None) -> Tensor:
        x = self.embed(ids, given)
        mask = seen(given, kept, ids.shape[1])
        mask = None if mask is None else mask[:, None, None]
        x = self.norm(x + self.positions[: x.shape[1]] + self.types[0])
        x = F.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, mask)
        return x[:, x.shape[1] - ids.shape[1] :]


def check_sizes(width: int, depth: int, heads: int, hidden: int | None) -> None:
    """Refuse sizes no network has.

    Raises:
        ModelError: out of range, or heads that do not divide the width.
    """
    check_range("width", width, 1, 16384)
    check_range("depth", depth, 1, 256)
    check_range("heads", heads, 1, width)
    check_range("hidden", 4 * width if hidden is None else hidden, 1, 131072)
    if width % heads:
        raise ModelError(f"width {width} cannot be split into {heads} heads; choose heads that divide the width")
