"""The transformer of all generators: pre-RMSNorm, SwiGLU, normalised queries and keys, rotary or learned positions.

Llama: https://arxiv.org/abs/2302.13971; normalised queries and keys: https://arxiv.org/abs/2302.05442; modulation by a vector
(AdaLN-zero): https://arxiv.org/abs/2212.09748. Causal with a cache, causal without, or open to all sides.

Shapes: B rows, T positions, S ≥ T positions with those in the cache, W width, h heads of d channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.generators.cache import KVCache
from tok1d.tokenizers.blocks import check_range, learned
from tok1d.tokenizers.rotary import angles, rotary_table, rotate
from tok1d.tokenizers.rotary_blocks import RMSNorm, SwiGLU

POSITIONS = ("rotary", "learned", "none")


class Attention(nn.Module):
    """Self-attention without biases.

    Args:
        width: W.
        heads: h.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q, self.norm_k = RMSNorm(width // heads), RMSNorm(width // heads)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, table: Tensor | None, mask: Tensor | None, causal: bool, cache: KVCache | None, layer: int
    ) -> Tensor:
        """Float (B, T, W), table (2, T or B, T, 1, d), bool mask broadcast to (B, h, T, S) → float (B, T, W)."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).unbind(2)
        q, k = self.norm_q(q), self.norm_k(k)
        if table is not None:
            q, k = rotate(q, table).to(v.dtype), rotate(k, table).to(v.dtype)
        if cache is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        else:
            k, v = cache.append(layer, k, v)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, is_causal=causal)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """``x + attention(norm1(x))``, then ``x + mlp(norm2(x))``; shifted, scaled and gated if modulated.

    Args:
        width, heads: as :class:`Attention`.
        hidden: width inside the SwiGLU.
        modulated: whether a vector shifts, scales and gates, initially not at all and shut (AdaLN-zero).
    """

    def __init__(self, width: int, heads: int, hidden: int, modulated: bool) -> None:
        super().__init__()
        self.norm1, self.attn = RMSNorm(width), Attention(width, heads)
        self.norm2, self.mlp = RMSNorm(width), SwiGLU(width, hidden)
        self.modulation = nn.Linear(width, 6 * width) if modulated else None

    def forward(
        self,
        x: Tensor,
        vector: Tensor | None,
        table: Tensor | None,
        mask: Tensor | None,
        causal: bool,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        """Float (B, T, W), vector after SiLU (B, 1 or T, W) → float (B, T, W)."""
        if self.modulation is None:
            x = x + self.attn(self.norm1(x), table, mask, causal, cache, layer)
            return x + self.mlp(self.norm2(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(vector).chunk(6, dim=-1)
        y = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        x = torch.addcmul(x, gate1, self.attn(y, table, mask, causal, cache, layer))
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))


class Trunk(nn.Module):
    """Blocks and a last norm.

    Args:
        width: W.
        depth: number of blocks.
        length: the most positions.
        heads: W // 64 if None (at least 1).
        hidden: width inside the SwiGLU; 8/3 W, rounded up to a multiple of 64, if None.
        positions: ``rotary``, ``learned`` (added to the input) or ``none``.
        modulated: whether :meth:`forward` takes a vector.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        length: int,
        heads: int | None = None,
        hidden: int | None = None,
        positions: str = "rotary",
        modulated: bool = False,
    ) -> None:
        super().__init__()
        check_range("width", width, 1, 16384)
        check_range("depth", depth, 1, 256)
        check_range("length", length, 1, 2**20)
        heads = max(1, width // 64) if heads is None else heads
        check_range("heads", heads, 1, width)
        if width % heads or width // heads % 2:
            raise ModelError(f"width {width} cannot be split into {heads} heads of an even width; choose other heads")
        hidden = -(-8 * width // 3 // 64) * 64 if hidden is None else hidden
        check_range("hidden", hidden, 1, 131072)
        if positions not in POSITIONS:
            raise ModelError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r:.100}")
        self.width, self.depth, self.length, self.heads = width, depth, length, heads
        self.rotary = positions == "rotary"
        self.positions = learned(length, width) if positions == "learned" else None
        self.blocks = nn.ModuleList(Block(width, heads, hidden, modulated) for _ in range(depth))
        self.norm = RMSNorm(width)
        self.modulation = nn.Linear(width, 2 * width) if modulated else None
        self._initialise()

    def _initialise(self) -> None:
        """Linear layers of deviation inputs^-0.5, those that end in the stream smaller by sqrt(2 depth), modulations zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                ends = name.endswith(("attn.proj", "mlp.down"))
                nn.init.trunc_normal_(module.weight, std=(module.in_features * (2 * self.depth if ends else 1)) ** -0.5)
            if name.endswith("modulation") and module is not None:
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def cache(self, rows: int, places: int | None = None, keys: Tensor | None = None) -> KVCache:
        """An empty cache for so many rows and places (``length`` if None); ``keys`` as :class:`KVCache`."""
        like = self.norm.weight
        return KVCache(self.depth, rows, self.heads, places or self.length, self.width // self.heads, like.dtype, like.device, keys)

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool = False,
        vector: Tensor | None = None,
        mask: Tensor | None = None,
        order: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """States of all positions given.

        Args:
            x: float (B, T, W).
            causal: whether a position sees only itself and those before it.
            vector: float (B, W), or (B, T, W) one for each position, of a modulated trunk.
            mask: bool (B, S) which positions may be attended to, or (B or 1, T, S) by which; True = may. None: all.
            order: int64 (T,) or (B, T), which position each entry has; None: as they come, after those in the cache.
            cache: what came before; x is appended to it. Its own ``keys`` hold, ``mask`` must be None.

        Returns:
            float (B, T, W) after the last norm.
        """
        length, start = x.shape[1], 0 if cache is None else cache.position
        if start + length > self.length:
            raise ModelError(f"this trunk has {self.length} positions, got {start + length}")
        if cache is not None and cache.keys is not None:
            mask = cache.keys[:, : start + length]
        places = slice(start, start + length) if order is None else order
        if self.positions is not None:
            x = x + self.positions[places]
        table = None
        if self.rotary:
            table = rotary_table(line_turns, self.length, self.width // self.heads, device=x.device)[:, places]
        allowed, triangle = self._mask(mask, causal, length, start, x.device)
        if vector is not None:
            vector = F.silu(vector if vector.ndim == 3 else vector[:, None])
        for layer, block in enumerate(self.blocks):
            x = block(x, vector, table, allowed, triangle, cache, layer)
        if cache is not None:
            cache.advance(length)
        x = self.norm(x)
        if self.modulation is None:
            return x
        shift, scale = self.modulation(vector).chunk(2, dim=-1)
        return torch.addcmul(shift, x, 1 + scale)

    @staticmethod
    def _mask(
        mask: Tensor | None, causal: bool, length: int, start: int, device: torch.device
    ) -> tuple[Tensor | None, bool]:
        """What attention takes: a mask broadcast to (B, h, T, S) or None, and whether it is to be causal by itself."""
        if mask is not None:
            mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        if not causal or length == 1:
            return mask, False
        if start == 0 and mask is None:
            return None, True
        before = torch.ones(length, start + length, dtype=torch.bool, device=device).tril(start)
        return before if mask is None else mask & before, False


def line_turns(length: int, head_width: int, device: torch.device) -> Tensor:
    """The angle of every channel at positions 0, 1, 2 …; channels j and j + d/2 are a pair: float64 (length, d)."""
    turn = angles(torch.arange(length, dtype=torch.float64, device=device)[:, None], [head_width])
    return torch.cat([turn, turn], dim=1)
