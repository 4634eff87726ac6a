"""The network of flows and bit diffusion: noisy tokens, their times and a condition → one output for each token.

The trunk of all generators modulated by time + condition (https://arxiv.org/abs/2212.09748), as in LightningDiT
(https://arxiv.org/abs/2501.01423). Positions are learned by default: open to all sides, rotary ones tell only distances, and
tokens of a 1D tokenizer have a place of their own.

Shapes: B rows, P places of the condition, N tokens, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tok1d.generators.cache import KVCache
from tok1d.generators.chance import Chance
from tok1d.generators.condition import Condition, Given
from tok1d.generators.heads import zero_linear
from tok1d.generators.trunk import Trunk
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.decoders.flow_blocks import TimeEmbedding


class Denoiser(nn.Module):
    """Trunk with numbers in and out.

    Args:
        inputs, outputs: numbers of one token.
        places: P.
        tokens: N, the most.
        width, depth, heads, hidden, positions: see :class:`tok1d.generators.trunk.Trunk`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        places: int,
        tokens: int,
        width: int,
        depth: int,
        heads: int | None,
        hidden: int | None,
        positions: str,
    ) -> None:
        super().__init__()
        self.trunk = Trunk(width, depth, places + tokens, heads, hidden, positions, modulated=True)
        self.into = nn.Linear(inputs, width)
        self.time = TimeEmbedding(width, 1.0)
        self.out = zero_linear(width, outputs)

    def forward(
        self, x: Tensor, t: Tensor, given: Given, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Outputs of all tokens.

        Args:
            x: float (B, N, inputs).
            t: float (B,), or (B, P + N) one for each place and token.
            given: vector and, where P > 0, tokens of the condition.
            mask: bool (B, P + N) or (B or 1, P + N, P + N), see :meth:`tok1d.generators.trunk.Trunk.forward`.
            cache: what came before.

        Returns:
            float32 (B, N, outputs).
        """
        h = self.into(x.to(self.into.weight.dtype))
        if given.tokens is not None:
            h = torch.cat([given.tokens, h], dim=1)
        time = self.time(t.flatten()).view(*t.shape, -1)
        vector = time + (given.vector if t.ndim == 1 else given.vector[:, None])
        h = self.trunk(h, vector=vector, mask=mask, cache=cache)
        return self.out(h[:, h.shape[1] - x.shape[1] :]).float()


def attach_condition(condition: Condition, width: int) -> None:
    """Make the parameters of a condition: a vector, and of texts their tokens too."""
    check_range("width", width, 1, 16384)  # before anything is allocated
    condition.attach(width, tokens=condition.takes == "text", vector=True)


def clean_beginnings(chance: Chance, share: float, tokens: int) -> Tensor | None:
    """bool (B, N), tokens of training rows that stay clean: a share of the rows have the first k, k even in 0..N-1."""
    if not share:
        return None
    known = (chance.uniform() * tokens).long() * (chance.uniform() < share)
    return torch.arange(tokens, device=known.device) < known[:, None]


def counted(kept: Tensor | None, clean: Tensor | None) -> Tensor | None:
    """bool (B, N), tokens that a loss is taken of: those there are and that were not left clean; None: all."""
    if clean is None:
        return kept
    return ~clean if kept is None else kept & ~clean


def token_times(t: Tensor, clean: Tensor | None, places: int) -> Tensor:
    """Times of rows (B,), and 0 for clean tokens → (B,), or (B, P + N) if there are any; places have that of their row."""
    if clean is None:
        return t
    every = t[:, None].expand(-1, places + clean.shape[1]).clone()
    every[:, places:].masked_fill_(clean, 0)
    return every
