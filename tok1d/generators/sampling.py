"""Choosing a token: temperature → top-k → top-p → the inverse of the distribution at one uniform number.

The uniform numbers of a row come from its own seed, all drawn before the first step. So an image does not depend on what else
is in the batch (beyond the rounding of matrix products, which can tip a choice once in about a million), and a short row is the
beginning of a long one. Top-p (nucleus): https://arxiv.org/abs/1904.09751.

Shapes: B rows, n ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tok1d.errors import TokenError


def row_seeds(seeds: int | Sequence[int] | Tensor, rows: int) -> list[int]:
    """One seed a row: an int s stands for s, s + 1, s + 2 …

    Raises:
        TokenError: not so many seeds, or not in [0, 2^63).

    Example:
        >>> row_seeds(7, 3)
        [7, 8, 9]
    """
    try:
        values = [seeds + i for i in range(rows)] if isinstance(seeds, int) else [int(s) for s in seeds]
    except (TypeError, ValueError):
        values = []
    if len(values) != rows or not all(0 <= s < 2**63 for s in values):
        raise TokenError(f"seeds must be one integer in [0, 2^63), or one for each of the {rows} rows, got {seeds!r:.100}")
    return values


def uniforms(seeds: Sequence[int], *shape: int, device: torch.device | str = "cpu") -> Tensor:
    """float64 (B, *shape) in [0, 1), each row from a generator of its own.

    Example:
        >>> torch.equal(uniforms([3, 4], 5)[1:], uniforms([4], 5))
        True
    """
    rows = [torch.rand(shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64, device="cpu") for s in seeds]
    return torch.stack(rows).to(device)


def check_choice(temperature: float, top_k: int, top_p: float) -> None:
    """Refuse what cannot be sampled with.

    Raises:
        TokenError: temperature below 0 or not finite, top_k below 0, top_p outside (0, 1].
    """
    if not isinstance(temperature, int | float) or isinstance(temperature, bool) or not 0 <= temperature < math.inf:
        raise TokenError(f"temperature must be a finite number from 0 (the likeliest token), got {temperature!r:.100}")
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0:
        raise TokenError(f"top_k must be an integer from 1, or 0 for all, got {top_k!r:.100}")
    if not isinstance(top_p, int | float) or isinstance(top_p, bool) or not 0 < top_p <= 1:
        raise TokenError(f"top_p must be in (0, 1], 1 for all, got {top_p!r:.100}")


def distribution(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The probabilities that are sampled from.

    Args:
        logits: float (B, n).
        temperature: logits are divided by it; 0 leaves the likeliest id alone.
        top_k: how many of the likeliest are kept; 0 for all.
        top_p: the likeliest are kept until their probability (after top_k) reaches this; always at least one.

    Returns:
        float64 (B, n), rows sum to 1; zero for what is dropped.

    Example:
        >>> distribution(torch.tensor([[0.5, 0.3, 0.2]]).log(), top_p=0.6).round(decimals=3).tolist()
        [[0.625, 0.375, 0.0]]
    """
    logits = logits.double()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1)
    logits = logits / temperature
    keep = min(top_k, logits.shape[1]) if top_k else logits.shape[1]
    if keep == logits.shape[1] and top_p == 1:
        return logits.softmax(1)
    top, index = logits.topk(keep, dim=1)
    weight = top.softmax(1)
    weight = weight.masked_fill(weight.cumsum(1) - weight >= top_p, 0)  # the first has nothing before it and stays
    weight = weight / weight.sum(1, keepdim=True)
    return torch.zeros_like(logits).scatter_(1, index, weight)


def choose(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """One id a row.

    Args:
        logits: float (B, n).
        uniform: float64 (B,) in [0, 1); id i is chosen where it falls between the sums of probabilities before and with i.
        temperature, top_k, top_p: as :func:`distribution`.

    Returns:
        int64 (B,).
    """
    total = distribution(logits, temperature, top_k, top_p).cumsum(1)
    last = total[:, -1]
    point = torch.minimum(uniform * last, torch.nextafter(last, last.new_zeros(())))  # below the end also after rounding
    return torch.searchsorted(total, point[:, None], right=True).squeeze(1)


def flip(logits: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """Independent bits: float logits of 1, float64 uniform of the same shape → bool; temperature 0 takes the likelier value."""
    if temperature == 0:
        return logits > 0
    return uniform < torch.sigmoid(logits.double() / temperature)
