"""The transformer of RAR: LayerNorm, normalised queries and keys, GELU, modulated at every place by class and step (AdaLN-zero).

Modulations depend on condition and place, not on tokens, so they are computed apart: in sampling for many places at once, and
once for all rows with the same condition. They take a third of the weights, which would else be read again for every token.

RAR: https://arxiv.org/abs/2411.00776; AdaLN-zero: https://arxiv.org/abs/2212.09748.

Shapes: B rows, T places, S ≥ T places with those in the cache, W width, h heads of d channels, D blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.generators.cache import KVCache
from tok1d.tokenizers.blocks import MLP, init_weights, learned


class Attention(nn.Module):
    """Causal self-attention; queries and keys are normalised in each head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = nn.LayerNorm(width // heads, eps=1e-6), nn.LayerNorm(width // heads, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        """Float (B, T, W), bool mask broadcast to (B, h, T, S), None: causal → float (B, T, W)."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).unbind(2)
        q, k = self.norm_q(q).transpose(1, 2), self.norm_k(k)
        if cache is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        else:
            k, v = cache.append(layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and length > 1)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """``x + gate · attention(modulated norm1(x))``, then the same with the MLP."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), MLP(width, hidden)
        self.modulation = nn.Linear(width, 6 * width)
        self.dropout = dropout

    def forward(self, x: Tensor, modulation: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        """Float (B, T, W), float (B, T, 6 W) → float (B, T, W)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        y = self.attn(torch.addcmul(shift1, self.norm1(x), 1 + scale1), mask, cache, layer)
        x = torch.addcmul(x, gate1, F.dropout(y, self.dropout, self.training))
        y = self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2))
        return torch.addcmul(x, gate2, F.dropout(y, self.dropout, self.training))


class RARTrunk(nn.Module):
    """Blocks and a last norm, all modulated.

    Args:
        width, depth, heads, hidden: W, D, h and the width inside the MLP.
        places: rows of the table of steps.
        dropout: of what attention and MLP add, in training.
    """

    def __init__(self, width: int, depth: int, heads: int, hidden: int, places: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.times = learned(places, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.apply(init_weights)
        for layer in (*(block.modulation for block in self.blocks), self.modulation):
            nn.init.zeros_(layer.weight)

    def modulations(self, vector: Tensor, start: int, stop: int) -> list[Tensor]:
        """Float (B, W) → for each block float (B, stop - start, 6 W), and (B, stop - start, 2 W) for the last norm."""
        c = F.silu(vector[:, None] + self.times[start:stop])
        return [*(block.modulation(c) for block in self.blocks), self.modulation(c)]

    def chunk(self, rows: int, numbers: int = 2**24) -> int:
        """For how many places the modulations of so many rows fit into so many numbers, at least one."""
        return max(1, numbers // (rows * (6 * len(self.blocks) + 2) * self.width))

    def cache(self, rows: int, places: int, keys: Tensor | None = None) -> KVCache:
        """An empty cache; ``keys`` as :class:`tok1d.generators.cache.KVCache`."""
        like = self.times
        return KVCache(len(self.blocks), rows, self.heads, places, self.width // self.heads, like.dtype, like.device, keys)

    def forward(self, x: Tensor, modulations: list[Tensor], keys: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """States of all places given.

        Args:
            x: float (B, T, W).
            modulations: of these rows and places.
            keys: bool (B, T), which may be attended to; None: all. A cache has its own.
            cache: what came before; x is appended to it.

        Returns:
            float (B, T, W), modulated.
        """
        start = 0 if cache is None else cache.position
        if cache is not None and cache.keys is not None:
            keys = cache.keys[:, : start + x.shape[1]]
        mask = None
        if keys is not None or (start and x.shape[1] > 1):
            mask = torch.ones(x.shape[1], start + x.shape[1], dtype=torch.bool, device=x.device).tril(start)
            mask = mask if keys is None else mask & keys[:, None, None]
        for layer, block in enumerate(self.blocks):
            x = block(x, modulations[layer], mask, cache, layer)
        if cache is not None:
            cache.advance(x.shape[1])
        scale, shift = modulations[-1].chunk(2, dim=-1)  # the other way round than in the blocks, as published
        return torch.addcmul(shift, self.norm(x), 1 + scale)
