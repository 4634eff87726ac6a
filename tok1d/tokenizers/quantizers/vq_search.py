"""The nearest of many codes, exactly, without ever holding all distances.

Scores of M rows against K codes are made for so many pairs at a time; the rest of the memory is one copy of the codes.

Shapes: M rows, K codes, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.tokenizers.quantizers.common import rank_rows

# Pairs of rows and codes scored at a time: a CPU cache's worth, more where launches cost.
PAIRS_CPU, PAIRS_GPU = 2**22, 2**25
CODES_AT_A_TIME = 2**13  # while the copy of the codes is made


def rows_at_a_time(device: torch.device, codes: int) -> int:
    """How many rows are scored against all codes at once."""
    return max(1, (PAIRS_CPU if device.type == "cpu" else PAIRS_GPU) // codes)


@torch.no_grad()
def nearest(rows: Tensor, book: Tensor, l2: bool = False, temperature: float = 0.0) -> Tensor:
    """The nearest code of every row; of equally near ones the first.

    Args:
        rows: float (M, D).
        book: float (K, D).
        l2: compare unit vectors; rows that are not unit vectors may be given.
        temperature: draw code k with probability softmax(-|row - code k|² / temperature) instead, or with ``l2``
            softmax(cosine / temperature); 0 takes the nearest. Luck comes from torch's generator of the device.

    Returns:
        int64 (M,) in [0, K).
    """
    codes, dim = book.shape
    # |z - e|² without |z|², the same for every code, as one product: (z, 1) · (-2 e, |e|²)
    table = torch.empty(codes, dim + 1, device=rows.device)
    for part, into in zip(book.split(CODES_AT_A_TIME), table.split(CODES_AT_A_TIME)):
        part = F.normalize(part.float(), dim=-1) if l2 else part.float()
        torch.mul(part, -2, out=into[:, :dim])
        into[:, dim] = part.square().sum(-1)
    # one number a row, drawn before: draws do not depend on how many rows are scored at a time
    luck = rank_rows(len(rows), lambda n: torch.rand(n, dtype=torch.float64, device=rows.device)) if temperature else None
    step, ids = min(rows_at_a_time(rows.device, codes), max(len(rows), 1)), []
    room = torch.empty(step, codes, device=rows.device)
    for start in range(0, max(len(rows), 1), step):
        part = rows[start : start + step].float()
        part = F.normalize(part, dim=-1) if l2 else part
        scores = torch.mm(torch.cat([part, part.new_ones(len(part), 1)], -1), table.T, out=room[: len(part)])
        if luck is None:
            ids.append(_first_minimum(scores))
        else:  # of unit vectors |z - e|² = 2 - 2 cosine
            ids.append(_drawn(scores.mul_((-0.5 if l2 else -1.0) / temperature), luck[start : start + step]))
    return torch.cat(ids)


def _first_minimum(x: Tensor) -> Tensor:
    """Float (m, K) → int64 (m,), ``x.argmin(-1)``, found through minima of groups: they vectorise, argmin does not."""
    m, k = x.shape
    group = math.gcd(k, 128)
    x = x.view(m, k // group, group)
    best = x.amin(-1).argmin(-1)
    return best * group + x[torch.arange(m, device=x.device), best].argmin(-1)


def _drawn(logits: Tensor, luck: Tensor) -> Tensor:
    """Float (m, K) logits, overwritten, float64 (m,) uniform in [0, 1) → int64 (m,) drawn from their softmax.

    Inverse of the distribution function in two steps, a group of codes and a code of it, the sums in float64: a running
    float32 sum over all codes would give the late ones wrong shares.
    """
    m, k = logits.shape
    group = math.gcd(k, 256)
    p = logits.sub_(logits.amax(-1, keepdim=True)).exp_().view(m, k // group, group)
    which, luck = _place(p.sum(-1).double(), luck)
    code, _ = _place(p[torch.arange(m, device=p.device), which].double(), luck)
    return which * group + code


def _place(weights: Tensor, luck: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 (m, n), (m,) in [0, 1) → index int64 (m,) drawn by weight, never one of weight 0, and luck to draw within it."""
    bounds = weights.cumsum(-1)
    target = luck[:, None].clamp(max=1 - 1e-12) * bounds[:, -1:]
    index = torch.searchsorted(bounds, target, right=True)
    size = weights.gather(1, index)
    rest = (target - bounds.gather(1, index)) / size + 1
    return index[:, 0], rest[:, 0].clamp(0, 1)
