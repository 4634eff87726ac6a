"""FSQ: finite scalar quantization — every channel is squashed and rounded to a few levels; no codebook, no loss.

Paper: https://arxiv.org/abs/2309.15505. The default bound is that of the paper and of FlexTok; ``symmetric`` places the
levels symmetrically around zero, which even numbers of levels otherwise are not (vector-quantize-pytorch calls it
preserve_symmetry). An id is the mixed-radix number of the levels, the first channel being the fastest digit.

Shapes: B images, N tokens, D channels = len(levels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tok1d.errors import ModelError
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.part import Quantizer, QuantizerOutput
from tok1d.tokenizers.quantizers.common import count_ids, usage_stats

STATS_UP_TO = 2**16  # counting every code of a larger vocabulary says nothing and costs memory


class FSQ(Quantizer):
    """Finite scalar quantization.

    Args:
        levels: number of levels of each channel, 2 only if ``symmetric``; their product, the vocabulary, is at most 2^62.
        symmetric: levels at ``2 i / (L - 1) - 1`` instead of ``(i - L // 2) / (L // 2)``.

    Example:
        >>> fsq = FSQ([8, 5, 5, 5])
        >>> fsq.vocab_size, fsq.bits_per_token, fsq(torch.zeros(1, 2, 4)).ids.tolist()
        (1000, 10, [[500, 500]])
    """

    def __init__(self, levels: Sequence[int], symmetric: bool = False) -> None:
        super().__init__()
        for count in levels:
            check_range("every entry of levels", count, 2, 2**16)
        if not levels or math.prod(levels) > 2**62:
            raise ModelError(f"levels need 1 or more entries with a product of at most 2^62, got {levels!r:.200}")
        if 2 in levels and not symmetric:
            raise ModelError("two levels need symmetric=True: the default bound would part them at -3.8 instead of 0")
        self.levels, self.symmetric = tuple(levels), symmetric
        self.dim, self.vocab_size = len(levels), math.prod(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("_levels", torch.tensor(levels, device="cpu"), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis, device="cpu"), persistent=False)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Float (B, N, D), bool mask (B, N) True = keep → QuantizerOutput; there are no losses."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if mask is not None:
                z = z.masked_fill(~mask[..., None], 0)
            smooth, digits = self._squash(z)
            codes = self._digits_to_codes(digits)
            ids = (digits * self._basis).sum(-1)
            q = codes + (smooth - smooth.detach())  # value of the code to the last bit, gradient of the squashing
            if mask is not None:
                ids, q = ids.masked_fill(~mask, 0), q.masked_fill(~mask[..., None], 0)
            small = self.vocab_size <= STATS_UP_TO
            stats = usage_stats(count_ids(ids, mask, self.vocab_size)) if small else {}
        return QuantizerOutput(q, ids, {}, stats)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """int64 (B, n) in [0, vocab_size) → float32 (B, n, D) in [-1, 1]."""
        return self._digits_to_codes(ids[..., None] // self._basis % self._levels)

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """float (B, n, D) codes (not latents) → int64 (B, n)."""
        if self.symmetric:
            digits = (codes.float() + 1) / 2 * (self._levels - 1)
        else:
            digits = codes.float() * (self._levels // 2) + self._levels // 2
        return (self._in_range(digits.round()) * self._basis).sum(-1)

    def _squash(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents → their bounded value, whose rounding is the code, and int64 digits, both (B, N, D)."""
        if self.symmetric:
            smooth = z.tanh()
            return smooth, self._in_range(((self._levels - 1) * (smooth + 1) / 2 + 0.5).floor())
        half = (self._levels - 1) * (1 + 1e-3) / 2
        offset = (self._levels % 2 == 0) * 0.5
        bounded = (z + (offset / half).atanh()).tanh() * half - offset
        return bounded / (self._levels // 2), self._in_range(bounded.round() + self._levels // 2)

    def _in_range(self, digits: Tensor) -> Tensor:
        """Whole float digits → int64 in [0, levels); the bound overshoots by 1e-3, half a level from 1001 levels on."""
        return digits.long().clamp(min=torch.zeros_like(self._levels), max=self._levels - 1)

    def _digits_to_codes(self, digits: Tensor) -> Tensor:
        if self.symmetric:
            return digits.float() * (2 / (self._levels - 1)) - 1
        return (digits - self._levels // 2).float() / (self._levels // 2)
