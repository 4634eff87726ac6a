"""BlockFlow: blocks of tokens one after another, each of them by a flow that looks at those before it.

https://arxiv.org/abs/2502.20388 (xAR). In training every block has its own noise level and looks at itself and at the noisy blocks
before it; in sampling the blocks before it are finished, with time 0, and lie in a cache. For nested tokens blocks that grow
(1, 3, 12, 48 …) follow what matters. One block is a plain flow, a block a token is autoregression.

Shapes: B rows, P places of the condition, N tokens, M blocks, C channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tok1d.errors import ModelError, TokenError
from tok1d.generators.bits import row_mask
from tok1d.generators.cache import KVCache
from tok1d.generators.chance import Chance
from tok1d.generators.condition import Condition, Given
from tok1d.generators.denoiser import Denoiser, attach_condition
from tok1d.generators.flow import check_latents
from tok1d.generators.generator import Generator, OnStep, Request
from tok1d.generators.guidance import guided, strengths_at
from tok1d.generators.latents import Latents, Scale
from tok1d.generators.masked_body import seen
from tok1d.generators.row_noise import RowNoise
from tok1d.generators.space import TokenSpace
from tok1d.generators.times import check_times, draw_times, integrate, sampling_times
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.quantizers.common import token_mean


class BlockFlow(Generator):
    """Latents of one block after another.

    Args:
        space: of kind ``latents``.
        condition: what they show.
        blocks: tokens of each block, first to last, N in all; four of the same size, or as even as can be, if None.
        width, depth, heads, hidden, positions: of the trunk, see :class:`tok1d.generators.trunk.Trunk`.
        time_mean, time_std: of the logits of training times.
        shift: of times in training, and in sampling where nothing else is asked for.
        measured: how many first training batches the scale of the channels is measured on.

    Example:
        >>> from tok1d.generators.condition import ClassCondition
        >>> space = TokenSpace(tokens=8, kind="latents", channels=4, nested=True)
        >>> model = BlockFlow(space, ClassCondition(3), [1, 3, 4], width=32, depth=1, heads=2)
        >>> model.generate(2, label=1, tokens=4, steps=3).data.shape
        torch.Size([2, 4, 4])
    """

    def __init__(
        self,
        space: TokenSpace,
        condition: Condition,
        blocks: Sequence[int] | None = None,
        width: int = 768,
        depth: int = 12,
        heads: int | None = None,
        hidden: int | None = None,
        positions: str = "learned",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        shift: float = 1.0,
        measured: int = 100,
    ) -> None:
        super().__init__(space, condition)
        check_latents(space)
        check_times(time_mean, time_std, shift)
        tokens, channels = space.tokens, space.channels
        many = min(4, tokens)
        sizes = [tokens * (m + 1) // many - tokens * m // many for m in range(many)] if blocks is None else list(blocks)
        for size in sizes:
            check_range("every block", size, 1, tokens)
        if sum(sizes) != tokens:
            raise ModelError(f"blocks must be {tokens} tokens in all, got {sizes!r:.100}, which are {sum(sizes)}")
        self.ends = list(itertools.accumulate(sizes))
        attach_condition(condition, width)
        self.net = Denoiser(channels, channels, condition.places, tokens, width, depth, heads, hidden, positions)
        self.scale = Scale(channels, measured)
        self.time_mean, self.time_std, self.shift = time_mean, time_std, shift
        # The block of every place: the condition is block 0 and seen by all.
        number = torch.repeat_interleave(torch.arange(len(sizes), device="cpu") + 1, torch.tensor(sizes, device="cpu"))
        number = torch.cat([torch.zeros(condition.places, dtype=torch.int64, device="cpu"), number])
        self.register_buffer("number", number, persistent=False)

    # training ----------------------------------------------------------------------------------------------------

    def losses(
        self, batch: dict[str, Any], generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``flow``: mean squared error of the velocity of tokens that count, every block at a random time of its own."""
        data = self.space.data_of(batch).to(self.device)
        rows, tokens = data.shape[:2]
        chance = Chance(rows, generator, self.device)
        step = self.training and torch.is_grad_enabled()
        kept = row_mask(batch, rows, tokens, self.device)
        if step:
            self.scale.learn(data, kept)
        x, e = self.scale(data), chance.normal(*data.shape[1:])
        t = draw_times(chance, len(self.ends), mean=self.time_mean, std=self.time_std, shift=self.shift)
        given = self.condition(batch, rows, chance if self.training else None)
        t = self.of_places(t, tokens)
        v = self.velocity(torch.lerp(x, e, t[:, self.condition.places :, None]), t, given, kept)
        return {"flow": token_mean((v - (e - x)).square().mean(-1), kept, step)}, {}

    def of_places(self, t: Tensor, tokens: int) -> Tensor:
        """Times of blocks, float (B, M) → of places and the first tokens, float (B, P + n); those of the condition are 0."""
        return torch.cat([torch.zeros_like(t[:, :1]), t], dim=1)[:, self.number[: self.condition.places + tokens]]

    def velocity(self, x: Tensor, t: Tensor, given: Given, kept: Tensor | None = None) -> Tensor:
        """Velocities of all blocks at once.

        Args:
            x: float (B, n, C), the first n tokens in the scale of the flow.
            t: float (B, P + n).
            given: the condition.
            kept: bool (B, n), what there is at all; None: everything.

        Returns:
            float32 (B, n, C); a block has seen itself and those before it.
        """
        number = self.number[: t.shape[1]]
        mask = (number <= number[:, None])[None]
        keys = seen(given, kept, x.shape[1])
        return self.net(x, t, given, mask if keys is None else mask & keys[:, None])

    # sampling ----------------------------------------------------------------------------------------------------

    def sample(
        self,
        request: Request,
        *,
        guidance: float = 1.0,
        schedule: str = "linear",
        steps: int = 50,
        solver: str = "maruyama",
        shift: float | None = None,
        prefix: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Latents:
        """Block after block with a cache; no further than what was asked for.

        Args:
            guidance, schedule: of the velocity, over the blocks: ``linear`` goes from 1 in the first to ``guidance`` in the last.
            steps: of each block.
            solver: ``euler``, ``heun`` or ``maruyama``, see :func:`tok1d.generators.times.integrate`.
            shift: of the times; that of training if None.
            prefix: whole blocks, the first ones. The others are those that the seeds have without it.
            on_step: called after every block.
        """
        times = sampling_times(steps, self.shift if shift is None else shift, solver)
        many, blocks = 2 if guidance != 1 else 1, len(self.ends)
        g = strengths_at(guidance, schedule, [m / max(1, blocks - 1) for m in range(blocks)])
        known = self._known(prefix)
        needed = next(m + 1 for m, end in enumerate(self.ends) if end >= request.tokens)
        noise, done = RowNoise(request.seeds, self.device), []
        context = Context(self, request.both(guidance != 1), many, self.ends[needed - 1])
        for m, (start, end) in enumerate(itertools.pairwise([0, *self.ends[:needed]])):
            drawn = noise.normal(steps if solver == "maruyama" else 1, end - start, self.space.channels)
            if end <= known:
                x = self.scale(prefix[:, start:end])
            else:
                field = context.field(request.rows, g[m])
                x = integrate(field, drawn[:, 0], times, solver, drawn[:, 1:])
            done.append(x)
            if m + 1 < needed:
                context.add(x)
            if on_step is not None:
                on_step(m, needed, self._given_out(done, prefix)[:, : request.tokens])
        return Latents(self._given_out(done, prefix)[:, : request.tokens], self.space)

    def _given_out(self, done: list[Tensor], prefix: Tensor | None) -> Tensor:
        made = self.scale.inverse(torch.cat(done, dim=1))
        return made if prefix is None else torch.cat([prefix.float(), made[:, prefix.shape[1] :]], dim=1)[:, : made.shape[1]]

    def _known(self, prefix: Tensor | None) -> int:
        """How many tokens a prefix gives."""
        known = 0 if prefix is None else prefix.shape[1]
        if known not in (0, *self.ends):
            raise TokenError(f"a prefix must be whole blocks, {', '.join(map(str, self.ends))} tokens, got {known}")
        return known


class Context:
    """What is finished: condition and blocks in a cache.

    Args:
        model: whose.
        given: of the rows, or of the rows with and without the condition.
        many: 1 or 2, which of them.
        tokens: how many will be there at most.
    """

    def __init__(self, model: BlockFlow, given: Given, many: int, tokens: int) -> None:
        self.model, self.many, self.given = model, many, Given(vector=given.vector)
        places, rows = model.condition.places, len(given.vector)
        self.cache: KVCache = model.net.trunk.cache(rows, places + tokens, given.mask)
        if places:
            model.net(given.vector.new_zeros(rows, 0, model.space.channels), self.times(0.0), given, cache=self.cache)

    def times(self, t: float) -> Tensor:
        """One time for all rows."""
        return torch.full((len(self.given.vector),), t, device=self.given.vector.device)

    def add(self, x: Tensor) -> None:
        """A finished block, float (B, n, C)."""
        self.model.net(x.repeat(self.many, 1, 1), self.times(0.0), self.given, cache=self.cache)

    def field(self, rows: int, g: float) -> Any:
        """The guided velocity of the next block, which leaves the cache as it is."""

        def velocity(x: Tensor, t: float, i: int) -> Tensor:
            place = self.cache.position
            v = self.model.net(x.repeat(self.many, 1, 1), self.times(t), self.given, cache=self.cache)
            self.cache.position = place
            return guided(v, rows, g)

        return velocity
