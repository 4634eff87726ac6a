"""Integrating a velocity field from noise to an image's latents: solvers, guidance, and noise of its own for each image.

Rectified flow (https://arxiv.org/abs/2209.03003): x_t = t · noise + (1 - t) · clean, velocity v = noise - clean, so
dx/dt = v is followed from t = 1 down to 0. Guidance pushes the velocity away from the one without a condition:
classifier-free guidance (https://arxiv.org/abs/2207.12598) or its normalised form, adaptive projected guidance
(https://arxiv.org/abs/2410.02416).

Shapes: B images, C × h × w latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tok1d.errors import TokenError

SOLVERS = ("euler", "heun", "midpoint")
MAX_STEPS = 1000


def check_sampling(steps: int, guidance: float, solver: str) -> None:
    """Refuse what cannot be sampled with.

    Raises:
        TokenError: steps outside 1..1000, a guidance that is no finite number, an unknown solver.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MAX_STEPS:
        raise TokenError(f"steps must be an integer in 1..{MAX_STEPS}, got {steps!r:.100}. Published quality needs about 25")
    if not isinstance(guidance, int | float) or isinstance(guidance, bool) or not math.isfinite(guidance):
        raise TokenError(f"guidance must be a finite number, 1 for none, got {guidance!r:.100}")
    if solver not in SOLVERS:
        raise TokenError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r:.100}")


def evaluation_times(steps: int, solver: str = "euler") -> list[float]:
    """Times at which :func:`integrate` asks for the velocity, in order.

    Example:
        >>> evaluation_times(4), evaluation_times(2, "heun"), evaluation_times(2, "midpoint")
        ([1.0, 0.75, 0.5, 0.25], [1.0, 0.5, 0.5, 0.0], [1.0, 0.75, 0.5, 0.25])
    """
    grid = [i / steps for i in range(steps, -1, -1)]
    if solver == "euler":
        return grid[:-1]
    if solver == "heun":
        return [t for pair in zip(grid, grid[1:]) for t in pair]
    return [t for a, b in zip(grid, grid[1:]) for t in (a, (a + b) / 2)]


def integrate(field: Callable[[Tensor, int], Tensor], x: Tensor, steps: int, solver: str = "euler") -> Tensor:
    """Follow a velocity from t = 1 to t = 0 in equal steps.

    Args:
        field: (x, index of the evaluation in :func:`evaluation_times`) → velocity, of the shape of x. It is called once for
            each evaluation, in order, so it may keep state (the momentum of :class:`Guidance`).
        x: float (B, C, h, w) noise.
        steps: number of steps.
        solver: ``euler`` (as published, one evaluation a step), ``heun`` or ``midpoint`` (second order, two a step).

    Returns:
        float (B, C, h, w).
    """
    size = 1 / steps
    for step in range(steps):
        if solver == "euler":
            x = x - size * field(x, step)
        elif solver == "heun":
            first = field(x, 2 * step)
            second = field(x - size * first, 2 * step + 1)
            x = x - size / 2 * (first + second)
        else:
            middle = x - size / 2 * field(x, 2 * step)
            x = x - size * field(middle, 2 * step + 1)
    return x


class Guidance:
    """Velocity with a condition and without → guided velocity; keeps the momentum of one sampling run.

    Args:
        scale: s; 1 means none and needs no velocity without a condition.
        normalised: the adaptive projected form, else plain v_u + s (v_c - v_u).
        momentum, threshold, eta: of that form: share of the last difference that is added, largest L2 norm of a
            difference over (C, h, w), and the share of its part parallel to v_c that is kept. Defaults are FlexTok's.
    """

    def __init__(
        self, scale: float, normalised: bool = True, momentum: float = -0.5, threshold: float = 2.5, eta: float = 0.0
    ) -> None:
        self.scale, self.normalised = scale, normalised
        self.momentum, self.threshold, self.eta = momentum, threshold, eta
        self.last: Tensor | None = None

    def __call__(self, given: Tensor, without: Tensor) -> Tensor:
        """Float (B, C, h, w) twice → float (B, C, h, w)."""
        difference = given - without
        if not self.normalised:
            return without + self.scale * difference
        if self.last is not None:
            difference = difference + self.momentum * self.last
        self.last = difference  # unclipped
        length = difference.flatten(1).norm(dim=1).clamp(min=1e-12)
        difference = difference * (self.threshold / length).clamp(max=1)[:, None, None, None]
        along = given.double().flatten(1)
        along = along / along.norm(dim=1, keepdim=True).clamp(min=1e-12)
        flat = difference.double().flatten(1)
        parallel = (flat * along).sum(1, keepdim=True) * along
        kept = (flat - parallel + self.eta * parallel).to(given.dtype).view_as(given)
        return given + (self.scale - 1) * kept


def seeded_noise(seeds: Iterable[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal float32 (B, *shape): one CPU generator an image, so an image is the same in any batch, on any device.

    Example:
        >>> torch.equal(seeded_noise([5, 6], (1, 2, 2))[1:], seeded_noise([6], (1, 2, 2)))
        True
    """
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(int(seed)), device="cpu") for seed in seeds]
    return torch.stack(rows).to(device) if rows else torch.zeros(0, *shape, device=device)
