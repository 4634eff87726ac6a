"""PrincipalFlow: a flow over principal components of the latents of whole rows.

Tokens of a 1D tokenizer overlap in what they say: later ones refine earlier ones, and many directions of a row hardly vary. The
components of largest variance (Pearson 1901) are uncorrelated and ordered, so a few places of many components each replace one
place a token: 16 of 35 hold 64 tokens of the shipped tokenizer, for a quarter of the work and with nothing left out.

Shapes: B rows, N tokens, C channels, P places of D components, K = P · D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tok1d.errors import ModelError, TokenError
from tok1d.generators.chance import Chance
from tok1d.generators.condition import Condition
from tok1d.generators.denoiser import Denoiser, attach_condition
from tok1d.generators.flow import FlowGenerator, check_latents
from tok1d.generators.generator import Generator, OnStep, Request
from tok1d.generators.latents import Latents
from tok1d.generators.masked_body import seen
from tok1d.generators.space import TokenSpace
from tok1d.generators.times import check_times, draw_times
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.quantizers.common import token_mean

MAX_NUMBERS = 8192  # of a row: their covariance is a matrix that is taken apart
MEASURED = 65536  # rows that are looked at


class Principal(nn.Module):
    """Rows of latents ⇄ their first K principal components, in P places, ordered by variance.

    Args:
        tokens, channels: N and C.
        places, components: P and K, a multiple of P.
        whitening: 0: components keep their relative deviations, 1: all have deviation 1, between: powers of them. The mean
            variance is 1 in any case, as flows want it.

    Example:
        >>> torch.manual_seed(0); rows = torch.randn(100, 4, 1) @ torch.ones(1, 2)
        <torch._C.Generator object at ...>
        >>> plan = Principal(4, 2, places=2, components=4, whitening=1.0)
        >>> plan.measure([rows])
        >>> torch.allclose(plan.inverse(plan(rows)), rows, atol=1e-5), plan(rows).shape
        (True, torch.Size([100, 2, 2]))
    """

    def __init__(self, tokens: int, channels: int, places: int, components: int, whitening: float = 0.5) -> None:
        super().__init__()
        numbers = tokens * channels
        check_range("tokens · channels", numbers, 1, MAX_NUMBERS)
        check_range("components", components, 1, numbers)
        check_range("places", places, 1, components)
        if not 0 <= whitening <= 1:
            raise ModelError(f"whitening must be in [0, 1], from none to whole, got {whitening!r:.100}")
        if components % places:
            raise ModelError(f"components are shared out evenly: {components} are no multiple of {places} places")
        self.tokens, self.channels, self.places, self.whitening = tokens, channels, places, whitening
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("basis", torch.eye(components, numbers))  # rows are directions
        self.register_buffer("unit", torch.ones(components))
        self.register_buffer("measured", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """Float (B, N, C) → float32 (B, P, D)."""
        return ((x.float().flatten(1) - self.mean) @ self.basis.T / self.unit).unflatten(1, (self.places, -1))

    def inverse(self, y: Tensor) -> Tensor:
        """Float (B, P, D) → float32 (B, N, C), the row with these components and no others."""
        return ((y.flatten(1) * self.unit) @ self.basis + self.mean).unflatten(1, (self.tokens, self.channels))

    @torch.no_grad()
    def measure(self, rows: Iterable[Tensor]) -> None:
        """Find the components of given rows.

        Args:
            rows: batches of float (B, N, C).

        Raises:
            TokenError: there are none, or they are not finite.
        """
        count, sums, products = 0, self.mean.double() * 0, None
        first = None
        for x in rows:
            x = x.to(self.mean.device).flatten(1).double()
            first = x.mean(0) if first is None else first  # sums about a point near the mean lose no digits
            x = x - first
            count, sums = count + len(x), sums + x.sum(0)
            products = x.T @ x if products is None else products.addmm_(x.T, x)
        if products is None or not count:
            raise TokenError("no latents to measure the components of")
        mean = sums / count
        covariance = products / count - torch.outer(mean, mean)
        if not bool(covariance.isfinite().all()):
            raise TokenError("latents that are not finite have no components; make the shards again")
        variance, directions = torch.linalg.eigh(covariance)
        keep = len(self.basis)
        variance, directions = variance.flip(0)[:keep].clamp(min=0), directions.flip(1)[:, :keep]
        ends = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        directions = directions * ends.sign()  # a direction and its opposite are one component
        largest = float(variance[0]) or 1.0  # rows that are all the same have no variance
        unit = variance.clamp(min=largest * 1e-12).sqrt() ** self.whitening
        unit = unit * ((variance / unit.square()).mean().sqrt() if variance[0] else 1 / unit)
        self.mean.copy_(first + mean), self.basis.copy_(directions.T), self.unit.copy_(unit)
        self.measured.fill_(True)


class PrincipalFlow(FlowGenerator):
    """Components of the latents of a row, from noise; :class:`FlowGenerator` in other coordinates.

    Args:
        space: of kind ``latents``. Of residual tokenizers take those from before quantization (``tok tokenize --what encoder``): what
            later tokens say then varies with what earlier ones say, and the components see it.
        condition: what they show.
        components: K, how many are generated; the others have their means.
        places: P, places of the network, of K / P components.
        whitening: see :class:`Principal`.
        width, depth, heads, hidden, positions: of the trunk, see :class:`tok1d.generators.trunk.Trunk`.
        time_mean, time_std, shift: of training times, see :class:`FlowGenerator`.

    Rows are whole in training, and shorter ones are their beginnings.

    Example:
        >>> from tok1d.generators.condition import ClassCondition
        >>> space = TokenSpace(tokens=8, kind="latents", channels=4, nested=True)
        >>> model = PrincipalFlow(space, ClassCondition(3), components=16, places=4, width=32, depth=1, heads=2)
        >>> model.generate(2, label=1, tokens=5, steps=4).data.shape
        torch.Size([2, 5, 4])
    """

    def __init__(
        self,
        space: TokenSpace,
        condition: Condition,
        components: int,
        places: int = 16,
        whitening: float = 0.5,
        width: int = 768,
        depth: int = 12,
        heads: int | None = None,
        hidden: int | None = None,
        positions: str = "learned",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        shift: float = 1.0,
    ) -> None:
        Generator.__init__(self, space, condition)
        check_latents(space)
        check_times(time_mean, time_std, shift)
        self.scale = Principal(space.tokens, space.channels, places, components, whitening)
        self.shape = (places, components // places)
        attach_condition(condition, width)
        self.net = Denoiser(self.shape[1], self.shape[1], condition.places, places, width, depth, heads, hidden, positions)
        self.time_mean, self.time_std, self.shift = time_mean, time_std, shift
        self.prefix_share = 0.0

    def prepare(self, batches: Callable[[], Iterable[dict[str, Any]]]) -> None:
        def rows() -> Iterable[Tensor]:
            seen = 0
            for batch in batches():
                yield self.space.data_of(batch)
                seen += len(batch["latents"])
                if seen >= MEASURED:
                    return

        self.scale.measure(rows())

    def losses(
        self, batch: dict[str, Any], generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``flow``: mean squared error of the velocity of all components, at random times.

        Raises:
            TokenError: rows that are not whole, or components that were not measured.
        """
        if not self.scale.measured:
            raise TokenError("the components are not known yet: prepare() the generator with its data, as tok fit does, or scale.measure(rows)")
        data = self.space.data_of(batch).to(self.device)
        rows = len(data)
        if data.shape[1] != self.space.tokens or "lengths" in batch:
            raise TokenError(f"components are those of whole rows of {self.space.tokens} tokens; take FlowGenerator for rows of several lengths")
        chance = Chance(rows, generator, self.device)
        x, e = self.scale(data), chance.normal(*self.shape)
        t = draw_times(chance, mean=self.time_mean, std=self.time_std, shift=self.shift)
        given = self.condition(batch, rows, chance if self.training else None)
        v = self.net(torch.lerp(x, e, t[:, None, None]), t, given, seen(given, None, self.shape[0]))
        return {"flow": token_mean((v - (e - x)).square().mean(-1), None, self.training and torch.is_grad_enabled())}, {}

    # sampling ----------------------------------------------------------------------------------------------------

    def sample(
        self,
        request: Request,
        *,
        guidance: float = 1.0,
        schedule: str = "constant",
        steps: int = 50,
        solver: str = "euler",
        shift: float | None = None,
        on_step: OnStep | None = None,
    ) -> Latents:
        """See :meth:`FlowGenerator.sample`; whole rows are made, so there is no prefix to go on from."""
        return super().sample(request, guidance=guidance, schedule=schedule, steps=steps, solver=solver, shift=shift, on_step=on_step)
