"""Steps of masked generation: choose all masked tokens at once, keep those that are surest, mask the rest again.

MaskGIT: https://arxiv.org/abs/2202.04200. A token is drawn from softmax(logits / T), which is what the published code does by
adding T · Gumbel noise to all logits and taking the largest; one uniform number a token is enough. How sure it is: its logit
plus T · Gumbel noise. T falls to 0 with the steps, so the last step takes the likeliest tokens.

Shapes: B rows, N tokens, m ≤ N masked ones, K ids, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tok1d.errors import TokenError
from tok1d.generators.sampling import choose

# Share of tokens that is masked at r of the way, 1 at 0 and 0 at 1; of numbers (m = math) or of tensors (m = torch).
SHARES: dict[str, Callable[[Any, Any], Any]] = {
    "arccos": lambda r, m: m.acos(r) / (math.pi / 2),
    "cosine": lambda r, m: m.cos(r * (math.pi / 2)),
    "linear": lambda r, m: 1 - r,
}
Predict = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (step, ids (B, N), masked (B, N), places (B, m)) → logits (B, m, K)


def check_share_name(masking: str) -> str:
    """The name of a schedule.

    Raises:
        TokenError: there is none of that name.
    """
    if masking not in SHARES:
        raise TokenError(f"masking must be one of {', '.join(SHARES)}, got {masking!r:.100}")
    return masking


def still_masked(masked: int, steps: int, masking: str = "arccos") -> list[int]:
    """How many tokens are masked after every step: floor(masked · share), at least one less than before, at least one till the end.

    Example:
        >>> still_masked(16, 6)
        [14, 12, 10, 8, 5, 0]
    """
    left, counts = masked, []
    for step in range(1, steps):
        share = SHARES[masking](step / steps, math)
        left = min(left, max(1, min(left - 1, math.floor(masked * share))))
        counts.append(left)
    return [*counts, 0]


def gumbel(uniform: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) → Gumbel noise, finite."""
    tiny = torch.finfo(uniform.dtype).tiny
    return -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()


def pick(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """A token of softmax(logits / temperature) at each place; the likeliest for 0.

    Args:
        logits: float (B, m, K).
        uniform: float (B, m): the inverse of the distribution at that number; or (B, m, K): the largest of logits plus
            temperature times Gumbel noise, the same distribution for K times the random numbers.
        temperature: from 0.

    Returns:
        int64 (B, m).
    """
    if temperature == 0:
        return logits.argmax(-1)
    if uniform.ndim == logits.ndim:
        return (logits + temperature * gumbel(uniform)).argmax(-1)
    return choose(logits.flatten(0, 1), uniform.flatten(), temperature).view(uniform.shape)


def settle(
    logits: Tensor,
    ids: Tensor,
    masked: Tensor,
    places: Tensor,
    left: Tensor,
    uniform: tuple[Tensor, Tensor],
    temperature: float,
    id_temperature: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One step: draw tokens, mask the least sure again.

    Args:
        logits: float (B, m, K), of the places.
        ids: int64 (B, N).
        masked: bool (B, N).
        places: int64 (B, m), among them all masked ones.
        left: int64 (B,), how many are to be masked afterwards.
        uniform: of the tokens, (B, m) or (B, m, K), and of how sure they are, (B, m).
        temperature: T of the noise on how sure a token is.
        id_temperature: of drawing tokens; the same if None.

    Returns:
        ids with the drawn tokens at all masked places, and which of them are masked again.
    """
    hidden = masked.gather(1, places)
    drawn = pick(logits, uniform[0], temperature if id_temperature is None else id_temperature)
    sure = logits.gather(2, drawn[..., None]).squeeze(2)
    if temperature:
        sure = sure + temperature * gumbel(uniform[1])
    ids = ids.scatter(1, places, torch.where(hidden, drawn, ids.gather(1, places)))
    rank = sure.masked_fill(~hidden, math.inf).argsort(1).argsort(1)  # of the least sure: 0
    return ids, torch.zeros_like(masked).scatter(1, places, rank < left[:, None])


def unmask(
    predict: Predict,
    ids: Tensor,
    masked: Tensor,
    uniform: tuple[Tensor, Tensor],
    *,
    steps: int,
    temperature: float,
    annealing: bool = False,
    masking: str = "arccos",
) -> Iterator[tuple[Tensor, Tensor]]:
    """All steps.

    Args:
        predict: gives the logits of some places.
        ids: int64 (B, N); what masked places hold does not matter.
        masked: bool (B, N), what is to be made; the rest is kept.
        uniform: of the tokens, float (B, S, N) or (B, S, N, K), and of how sure they are, (B, S, N); see :func:`pick`.
        steps: S.
        temperature: T; (1 - r) T at step s from 1, r = s / S.
        annealing: divide logits by 0.5 + 0.8 (1 - r) as well.
        masking: how the share of masked tokens falls: ``arccos``, ``cosine`` or ``linear``.

    Yields:
        After every step, ids (guesses where masked) and what is still masked.
    """
    counts = masked.sum(1).tolist()
    plans = {count: still_masked(count, steps, masking) for count in set(counts)}
    plan = torch.tensor([plans[count] for count in counts])
    most = [max(counts), *plan.amax(0).tolist()]  # widths are known here, so that no step waits for the device
    plan = plan.to(ids.device)
    for step in range(steps):
        if most[step]:
            rest = 1 - (step + 1) / steps
            places = masked.byte().argsort(dim=1, descending=True, stable=True)[:, : most[step]]
            logits = predict(step, ids, masked, places)
            if annealing:
                logits = logits / (0.5 + 0.8 * rest)
            noise = tuple(torch.take_along_dim(u[:, step], places.view(*places.shape, *[1] * (u.ndim - 3)), 1) for u in uniform)
            ids, masked = settle(logits, ids, masked, places, plan[:, step], noise, temperature * rest)
        yield ids, masked
