"""Noise levels of training and sampling, and the steps from noise to data.

Time t is 1 for noise (or any other source) e and 0 for data x; between them x_t = (1 - t) x + t e moves with velocity
v = dx_t/dt = e - x. Rectified flow: https://arxiv.org/abs/2209.03003; logit-normal times and their shift:
https://arxiv.org/abs/2403.03206; Euler-Maruyama steps of the same marginals: https://arxiv.org/abs/2401.08740.

Shapes: B rows, n tokens, C channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from tok1d.errors import ModelError, TokenError
from tok1d.generators.chance import Chance

SOLVERS = ("euler", "heun", "maruyama")
LAST_NOISE = 0.04  # where Euler-Maruyama steps end and one step to the mean follows

Field = Callable[[Tensor, float, int], Tensor]  # (x_t, t, number of the step) → velocity


def shifted(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): more time at noise for s > 1; 0 and 1 stay.

    Example:
        >>> shifted(torch.tensor([0.0, 0.5, 1.0]), 3.0).tolist()
        [0.0, 0.75, 1.0]
    """
    return shift * t / (1 + (shift - 1) * t)


def check_times(mean: float, std: float, shift: float) -> None:
    """Refuse what is no distribution of times.

    Raises:
        ModelError: a mean that is not finite, a deviation or shift that is not above 0.
    """
    for name, value, low in (("time_mean", mean, -100.0), ("time_std", std, 0.0), ("shift", shift, 0.0)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not low < value < 1e4:
            raise ModelError(f"{name} must be a number above {low:g}, got {value!r:.100}")


def draw_times(chance: Chance, *shape: int, mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> Tensor:
    """Logit-normal times float32 (B, *shape) in (0, 1), shifted."""
    return shifted((mean + std * chance.normal(*shape)).sigmoid(), shift)


def sampling_times(steps: int, shift: float = 1.0, solver: str = "euler") -> list[float]:
    """Times from 1 to 0 at the ends of the steps, evenly spaced and then shifted; ``steps + 1`` of them.

    Euler-Maruyama is even between 1 and 0.04 and ends with one step from there to 0.

    Raises:
        TokenError: an unknown solver, or a shift that is not above 0.

    Example:
        >>> sampling_times(4), sampling_times(2, shift=3.0)
        ([1.0, 0.75, 0.5, 0.25, 0.0], [1.0, 0.75, 0.0])
    """
    if solver not in SOLVERS:
        raise TokenError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r:.100}")
    if not isinstance(shift, int | float) or isinstance(shift, bool) or not 0 < shift < 1e4:
        raise TokenError(f"shift must be a number above 0, 1 for none, got {shift!r:.100}")
    if solver == "maruyama":
        even = torch.cat([torch.linspace(1, LAST_NOISE, steps, dtype=torch.float64, device="cpu"), torch.zeros(1, dtype=torch.float64, device="cpu")])
    else:
        even = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu")
    return shifted(even, shift).tolist()


def integrate(
    field: Field,
    x: Tensor,
    times: list[float],
    solver: str = "euler",
    kicks: Tensor | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Follow a velocity from noise to data.

    ``euler``: x - dt v. ``heun``: the mean of the velocities at both ends, except in the step that ends at 0.
    ``maruyama``: dx = (-v - e/2) dt + sqrt(t dt) kick with e = x + (1 - t) v the expected noise; that is the reverse diffusion of
    rate t with score -e/t, whose marginals are those of the flow. Its last step has no kick.

    Args:
        field: the velocity.
        x: float (B, n, C) at the first time.
        times: falling.
        solver: of these.
        kicks: float (B, at least steps - 1, n, C), standard normal, for ``maruyama``.
        on_step: called after every step with its number from 0, their number, and x.

    Returns:
        float (B, n, C) at the last time.
    """
    for i, (t, after) in enumerate(itertools.pairwise(times)):
        dt, v = t - after, field(x, t, i)
        if solver == "maruyama" and after > 0:
            assert kicks is not None
            x = x - dt * (v + (x + (1 - t) * v) / 2) + math.sqrt(t * dt) * kicks[:, i]
        elif solver == "heun" and after > 0:
            x = x - dt / 2 * (v + field(x - dt * v, after, i))
        else:
            x = x - dt * v
        if on_step is not None:
            on_step(i, len(times) - 1, x)
    return x
