"""Classifier-free guidance: how strong at each step, by name, and the one way to combine.

    guided = u + g (c - u)

with c the prediction under the condition and u without it: g = 1 is no guidance. Papers that write c + s (c - u) mean
s = g - 1 (MaskGIT, Instella). Classifier-free guidance: https://arxiv.org/abs/2207.12598; power-cosine:
https://arxiv.org/abs/2411.00776 (RAR), https://arxiv.org/abs/2312.14988 (MDTv2); interval: https://arxiv.org/abs/2404.07724.
"""

from __future__ import annotations

import math
import re

from torch import Tensor

from tok1d.errors import TokenError

SCHEDULES = {"constant": (), "linear": (), "power_cosine": (3.0,), "interval": (0.0, 1.0)}  # names and default arguments


def parse_schedule(schedule: str) -> tuple[str, tuple[float, ...]]:
    """``name`` or ``name(numbers)`` → name and numbers.

    Raises:
        TokenError: no such schedule, or numbers it has no use for.

    Example:
        >>> parse_schedule("power_cosine(2.75)"), parse_schedule("interval")
        (('power_cosine', (2.75,)), ('interval', (0.0, 1.0)))
    """
    found = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", schedule) if isinstance(schedule, str) else None
    if found is None or found[1] not in SCHEDULES:
        raise TokenError(
            f"schedule must be constant, linear, power_cosine(power) or interval(from, to), got {schedule!r:.100}"
        )
    name, default = found[1], SCHEDULES[found[1]]
    try:
        given = tuple(float(x) for x in found[2].split(",")) if found[2] and found[2].strip() else default
    except ValueError:
        given = (math.nan,)
    if len(given) != len(default) or not all(math.isfinite(x) and x >= 0 for x in given):
        raise TokenError(f"{name} takes {len(default)} numbers that are not negative, got {schedule!r:.100}")
    if name == "interval" and not given[0] <= given[1] <= 1:
        raise TokenError(f"interval(from, to) needs 0 ≤ from ≤ to ≤ 1, got {schedule!r:.100}")
    return name, given


def strengths(guidance: float, schedule: str, steps: int) -> list[float]:
    """g of every step; progress r = step / steps.

    Args:
        guidance: w. ``constant``: g = w. ``linear``: g = 1 + (w - 1) r. ``power_cosine(p)``: g = 1 + (w - 1) (1 - cos(π r^p)) / 2.
            ``interval(a, b)``: g = w where a ≤ r ≤ b, 1 elsewhere.
        schedule: one of these names, with arguments in parentheses.
        steps: how many.

    Raises:
        TokenError: not a schedule, or a guidance that is no finite number.

    Example:
        >>> strengths(3.0, "linear", 4), strengths(3.0, "interval(0.5, 0.5)", 4)
        ([1.0, 1.5, 2.0, 2.5], [1.0, 1.0, 3.0, 1.0])
    """
    return strengths_at(guidance, schedule, [step / steps for step in range(steps)])


def strengths_at(guidance: float, schedule: str, progress: list[float]) -> list[float]:
    """g at any progress r in [0, 1]; arguments and errors as :func:`strengths`."""
    if not isinstance(guidance, int | float) or isinstance(guidance, bool) or not math.isfinite(guidance):
        raise TokenError(f"guidance must be a finite number, 1 for none, got {guidance!r:.100}")
    name, numbers = parse_schedule(schedule)
    if name == "interval":
        return [float(guidance) if numbers[0] <= r <= numbers[1] else 1.0 for r in progress]
    if name == "linear":
        share = progress
    elif name == "power_cosine":
        share = [(1 - math.cos(math.pi * r ** numbers[0])) / 2 for r in progress]
    else:
        share = [1.0] * len(progress)
    return [1 + (guidance - 1) * s for s in share]


def combine(given: Tensor, without: Tensor, g: float) -> Tensor:
    """u + g (c - u) of two predictions of one shape."""
    return without + g * (given - without)


def guided(both: Tensor, rows: int, g: float) -> Tensor:
    """Predictions of one batched forward → guided ones.

    Args:
        both: (2 · rows, ...), first with the condition, then without; or (rows, ...), which is returned as it is.
        rows: B.
        g: strength.

    Returns:
        (B, ...).
    """
    return both if len(both) == rows else combine(both[:rows], both[rows:], g)
