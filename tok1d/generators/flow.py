"""FlowGenerator: latents out of noise, by the velocity that leads there.

Rectified flow (https://arxiv.org/abs/2209.03003) on 1D tokens, in the manner of LightningDiT
(https://arxiv.org/abs/2501.01423): x_t = (1 - t) x + t e, the network learns v = e - x. All tokens are made together, and the
first n of them are given out where fewer were asked for.

Shapes: B rows, N tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import ModelError
from tok1d.generators.bits import known_tokens, row_mask
from tok1d.generators.chance import Chance
from tok1d.generators.condition import Condition, check_share
from tok1d.generators.denoiser import Denoiser, attach_condition, clean_beginnings, counted, token_times
from tok1d.generators.generator import Generator, OnStep, Request
from tok1d.generators.guidance import guided, strengths
from tok1d.generators.latents import Latents, Scale
from tok1d.generators.masked_body import seen
from tok1d.generators.row_noise import RowNoise
from tok1d.generators.space import TokenSpace
from tok1d.generators.times import check_times, draw_times, integrate, sampling_times
from tok1d.tokenizers.quantizers.common import token_mean


class FlowGenerator(Generator):
    """Latents of all tokens, from noise.

    Args:
        space: of kind ``latents``: of a continuous tokenizer, or codes of a discrete one (``TokenSpace.of(t, "latents")``).
        condition: what they show.
        width, depth, heads, hidden, positions: of the trunk, see :class:`tok1d.generators.trunk.Trunk`.
        time_mean, time_std: of the logits of training times.
        shift: of times in training, and in sampling where nothing else is asked for; above 1: more of them near noise.
        measured: how many first training batches the scale of the channels is measured on.
        prefix_share: share of training rows whose first k tokens are left clean, k even in 0..N-1; above 0, ``prefix`` can be
            given when sampling.

    Example:
        >>> from tok1d.generators.condition import ClassCondition
        >>> space = TokenSpace(tokens=8, kind="latents", channels=4)
        >>> FlowGenerator(space, ClassCondition(3), width=32, depth=1, heads=2).generate(2, label=1, steps=4).data.shape
        torch.Size([2, 8, 4])
    """

    def __init__(
        self,
        space: TokenSpace,
        condition: Condition,
        width: int = 768,
        depth: int = 12,
        heads: int | None = None,
        hidden: int | None = None,
        positions: str = "learned",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        shift: float = 1.0,
        measured: int = 100,
        prefix_share: float = 0.0,
    ) -> None:
        super().__init__(space, condition)
        check_latents(space)
        check_times(time_mean, time_std, shift)
        attach_condition(condition, width)
        channels = space.channels
        self.shape = (space.tokens, channels)  # of a row, where the flow works
        self.net = Denoiser(channels, channels, condition.places, space.tokens, width, depth, heads, hidden, positions)
        self.scale = Scale(channels, measured)
        self.time_mean, self.time_std, self.shift = time_mean, time_std, shift
        self.prefix_share = check_share("prefix_share", prefix_share)

    # training ----------------------------------------------------------------------------------------------------

    def losses(
        self, batch: dict[str, Any], generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``flow``: mean squared error of the velocity of tokens that count, at random times."""
        data = self.space.data_of(batch).to(self.device)
        rows, tokens = data.shape[:2]
        chance = Chance(rows, generator, self.device)
        step = self.training and torch.is_grad_enabled()
        kept = row_mask(batch, rows, tokens, self.device)
        if step:
            self.scale.learn(data, kept)
        x, e = self.scale(data), chance.normal(*data.shape[1:])
        t = draw_times(chance, mean=self.time_mean, std=self.time_std, shift=self.shift)
        clean = clean_beginnings(chance, self.prefix_share, tokens)
        between = torch.lerp(x, e, t[:, None, None])
        if clean is not None:
            between = torch.where(clean[..., None], x, between)
        given = self.condition(batch, rows, chance if self.training else None)
        v = self.net(between, token_times(t, clean, self.condition.places), given, seen(given, kept, tokens))
        count = counted(kept, clean)
        return {"flow": token_mean((v - (e - x)).square().mean(-1), count, step)}, {}

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
        prefix: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Latents:
        """From noise to latents.

        Args:
            guidance, schedule: of the velocity, over the steps: ``interval(0.1, 0.8)`` guides in the middle only, and steps
                without guidance take half of the work.
            solver: ``euler``, ``heun`` or ``maruyama``, see :func:`tok1d.generators.times.integrate`.
            shift: of the times; that of training if None.
        """
        times = sampling_times(steps, self.shift if shift is None else shift, solver)
        g = strengths(guidance, schedule, steps)
        rows, tokens, noise = request.rows, self.shape[0], RowNoise(request.seeds, self.device)
        x = noise.normal(*self.shape)
        kicks = noise.normal(steps - 1, *self.shape) if solver == "maruyama" else None
        clean = known_tokens(self, prefix, rows)
        known = None if prefix is None else F.pad(self.scale(prefix), (0, 0, 0, tokens - prefix.shape[1]))
        with_one, with_both = request.both(False), request.both(guidance != 1)

        def velocity(x: Tensor, t: float, i: int) -> Tensor:
            many = 2 if g[i] != 1 else 1
            given = with_both if many == 2 else with_one
            time = token_times(torch.full((rows,), t, device=self.device), clean, self.condition.places)
            x = x if clean is None else torch.where(clean[..., None], known, x)
            v = self.net(x.repeat(many, 1, 1), time.repeat(many, *[1] * (time.ndim - 1)), given, seen(given, None, tokens))
            return guided(v, rows, g[i])

        def given_out(x: Tensor) -> Tensor:
            made = self.scale.inverse(x)[:, : request.tokens]
            return made if prefix is None else torch.cat([prefix.float(), made[:, prefix.shape[1] :]], dim=1)

        tell = None if on_step is None else lambda i, of, x: on_step(i, of, given_out(x))
        return Latents(given_out(integrate(velocity, x, times, solver, kicks, tell)), self.space)


def check_latents(space: TokenSpace) -> None:
    """Refuse tokens that are no numbers.

    Raises:
        ModelError: they are ids or bits.
    """
    if space.kind != "latents":
        raise ModelError(
            f"a flow makes latents, {space.tokenizer} has {space.kind} here. Give the codes of its tokens: "
            'TokenSpace.of(tokenizer, "latents"), shards of tok tokenize --what latents; or take BitDiffusion'
        )
