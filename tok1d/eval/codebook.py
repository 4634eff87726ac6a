"""What a codebook is used for: usage, perplexity and entropy, in all and by position; bits after ideal static coding.

Counts are kept as the codes that were met, so a vocabulary of 2^62 costs what the data cost. A code is counted at its position:
the first tokens of a nested tokenizer are used quite unlike the last. Shapes: B images, n tokens, d bits of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tok1d.eval.measures import Batch, Measure, Row, State
from tok1d.eval.systems import Pictures

_MIX = 0x9E3779B97F4A7C15 - 2**64  # odd; spreads bit codes beyond 62 bits over int64


class Codes(Measure):
    """Statistics of the tokens of a run, at each rate.

    ``distinct`` is how many codes were met, ``perplexity`` the exponential of the entropy of all positions pooled,
    ``bits_by_position`` the entropy at each position: an ideal static code a position would spend their sum. They are estimates from
    ``tokens`` counted and too low when these are few beside the vocabulary.
    """

    name = "codes"

    def __init__(self) -> None:
        self._state: State = {}

    def pictures(self, batch: Batch, pictures: Pictures) -> dict[str, list[float | None]]:
        codes = pictures.codes
        if codes is not None:
            self._state = self.add(self._state, {pictures.rate.name: _count(codes)} | _bits(codes, pictures.rate.name))
        return {}

    def state(self) -> State:
        held, self._state = self._state, {}
        return held

    def add(self, a: State, b: State) -> State:
        out: State = {}
        for key in {*a, *b}:
            parts = [s[key] for s in (a, b) if key in s]
            if key.startswith("ones/"):
                out[key] = parts[0] + parts[1] if len(parts) == 2 else parts[0]
            else:
                out[key] = parts[0] if len(parts) == 1 else _merge(torch.cat(parts))
        return out

    def results(self, state: State, rate: str) -> Row:
        if rate not in state:
            return {}
        position, code, count = state[rate].unbind(-1)
        _, pooled = _sum_by(code, count)
        row: dict[str, Any] = {
            "tokens": int(count.sum()),
            "distinct": len(pooled),
            "perplexity": 2 ** _entropy(pooled),
            "entropy_bits": _entropy(pooled),
            "bits_by_position": [round(_entropy(count[position == p]), 4) for p in position.unique().tolist()],
        }
        row["static_bits_per_image"] = sum(row["bits_by_position"])
        if f"ones/{rate}" in state:
            ones, total = state[f"ones/{rate}"][..., 0].double(), state[f"ones/{rate}"][..., 1].double()
            share = ones / total
            bits = -(torch.special.xlogy(share, share) + torch.special.xlogy(1 - share, 1 - share)) / torch.log(torch.tensor(2.0))
            row["bit_entropy_mean"] = bits.mean().item()
        return row


def _count(codes: Tensor) -> Tensor:
    """ids (B, n) or bits (B, n, d) → int64 (m, 3): position, code, how often."""
    if codes.ndim == 3:
        folded = torch.zeros(codes.shape[:2], dtype=torch.int64)
        for plane in codes.unbind(-1):  # as many steps as a code has bits
            folded = folded * _MIX + plane.long() + 1
        codes = folded
    position = torch.arange(codes.shape[1]).expand(codes.shape)
    return _merge(torch.stack([position.flatten(), codes.flatten(), torch.ones_like(codes).flatten()], -1))


def _bits(codes: Tensor, rate: str) -> State:
    """How often each bit of each position is one, int64 (n, d, 2): ones and codes."""
    if codes.ndim != 3:
        return {}
    ones = codes.long().sum(0)
    return {f"ones/{rate}": torch.stack([ones, torch.full_like(ones, len(codes))], -1)}


def _merge(rows: Tensor) -> Tensor:
    """Rows (m, 3) with equal position and code become one."""
    keys, inverse = rows[:, :2].unique(dim=0, return_inverse=True)
    counts = torch.zeros(len(keys), dtype=torch.int64).index_add_(0, inverse, rows[:, 2])
    return torch.cat([keys, counts[:, None]], -1)


def _sum_by(code: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    codes, inverse = code.unique(return_inverse=True)
    return codes, torch.zeros(len(codes), dtype=torch.int64).index_add_(0, inverse, count)


def _entropy(counts: Tensor) -> float:
    """Bits."""
    share = counts.double() / counts.sum()
    return max(0.0, (-torch.special.xlogy(share, share).sum() / torch.log(torch.tensor(2.0, dtype=torch.float64))).item())
