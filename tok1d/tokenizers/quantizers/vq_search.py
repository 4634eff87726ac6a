"""The nearest of many codes, exactly, without ever holding all distances.

Scores of M rows against K codes are made for so many pairs at a time; the rest of the memory is one copy of the codes.

Shapes: M rows, K codes, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

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
            softmax(cosine / temperature); 0 takes the nearest. Draws come from torch's generator of the device.

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
    step, ids = rows_at_a_time(rows.device, codes * (2 if temperature else 1)), []
    for part in rows.split(step):
        part = F.normalize(part.float(), dim=-1) if l2 else part.float()
        scores = torch.cat([part, part.new_ones(len(part), 1)], -1) @ table.T
        if temperature:  # Gumbel-max: the argmin of E exp(score / t), E exponential, in logarithms
            noise = torch.empty_like(scores).exponential_().clamp_(min=torch.finfo(torch.float32).tiny).log_()
            # of unit vectors |z - e|² = 2 - 2 cosine
            scores = noise.add_(scores, alpha=(0.5 if l2 else 1.0) / temperature)
        ids.append(_first_minimum(scores))
    return torch.cat(ids)


def _first_minimum(x: Tensor) -> Tensor:
    """Float (m, K) → int64 (m,), ``x.argmin(-1)``, found through minima of groups: they vectorise, argmin does not."""
    m, k = x.shape
    group = math.gcd(k, 128)
    x = x.view(m, k // group, group)
    best = x.amin(-1).argmin(-1)
    return best * group + x[torch.arange(m, device=x.device), best].argmin(-1)
