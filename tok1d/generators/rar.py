"""RARGenerator: autoregressive, but trained in random orders first and in the natural one last (RAR).

RAR: https://arxiv.org/abs/2411.00776. The sequence is [start | condition | tokens in some order]. Every token has a position of its
own, and what is at a place is also told the position of the token it is to predict (target-aware). With probability r a row's
order is random; r falls from 1 to 0 between two steps of training. Samples are made in the natural order.

Shapes: B rows, P places of the condition, N tokens of the space, n ≤ N of this batch, W width, F = 1 + P places in front of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import ModelError, TokenError
from tok1d.generators.chance import Chance
from tok1d.generators.condition import Condition, Given, check_share
from tok1d.generators.generator import Generator, OnStep, Request
from tok1d.generators.guidance import strengths
from tok1d.generators.heads import Softmax, TokenHead
from tok1d.generators.masked import row_lengths
from tok1d.generators.masked_bert import check_sizes
from tok1d.generators.rar_blocks import RARTrunk
from tok1d.generators.sampling import uniforms
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.blocks import check_range, learned
from tok1d.tokenizers.quantizers.common import token_mean
from tok1d.tokens import TokenSequence


class RARGenerator(Generator):
    """Predicts tokens in random orders while it trains, in the natural one when it samples.

    Args:
        space: the tokens.
        condition: what they show.
        width, depth, heads: of the transformer.
        hidden: width inside its MLPs; 4 W if None.
        head: how a state becomes a token; :class:`tok1d.generators.heads.Softmax` if None.
        random_until: up to this step of training all orders are random.
        natural_from: from this step on all are natural. The default, 0, is never random: the order of nested tokens means
            something. Published models: 125,000 and 187,500 of 250,000 steps.
        groups: sizes of groups of neighbours, N in all; random orders move tokens inside their group only. One group if None.
        token_drop: probability that training hides an input token.
        dropout: of what blocks add, in training; published: 0.1, there also of attention weights. Drawn by torch's global
            generator, so it is the one choice that differs between one process and two.
        spare_positions, spare_times: rows of the tables that no token uses (published tables have some).

    Example:
        >>> from tok1d.generators.condition import ClassCondition
        >>> model = RARGenerator(TokenSpace(tokens=8, vocab_size=16), ClassCondition(3), width=32, depth=1, heads=2)
        >>> model.generate(2, label=1, seeds=7, guidance=4.0, schedule="power_cosine(2.75)").shape
        (2, 8)
    """

    def __init__(
        self,
        space: TokenSpace,
        condition: Condition,
        width: int = 768,
        depth: int = 24,
        heads: int = 16,
        hidden: int | None = None,
        head: TokenHead | None = None,
        random_until: int = 0,
        natural_from: int = 0,
        groups: Sequence[int] | None = None,
        token_drop: float = 0.0,
        dropout: float = 0.0,
        spare_positions: int = 0,
        spare_times: int = 0,
    ) -> None:
        super().__init__(space, condition)
        if space.kind == "latents":
            raise ModelError("an autoregressive generator makes ids or bits; for latents take a flow")
        if head is not None and not isinstance(head, TokenHead):
            raise ModelError(f"head must be a TokenHead, got {type(head).__name__}")
        check_sizes(width, depth, heads, hidden)
        check_range("random_until", random_until, 0, 2**62)
        check_range("natural_from", natural_from, random_until, 2**62)
        for name, value in (("spare_positions", spare_positions), ("spare_times", spare_times)):
            check_range(name, value, 0, 65536)
        condition.attach(width, tokens=True, vector=True)
        self.random_until, self.natural_from = random_until, natural_from
        self.groups = _groups(space.tokens if groups is None else groups, space.tokens)
        self.front = 1 + condition.places
        places = self.front + space.tokens
        self.trunk = RARTrunk(width, depth, heads, hidden or 4 * width, places + spare_times, check_share("dropout", dropout))
        self.head = Softmax() if head is None else head
        self.head.attach(width, space)
        self.start, self.hidden_token = learned(width), learned(width)  # the second for tokens that training hides
        self.positions, self.targets = learned(places + spare_positions, width), learned(places + spare_positions, width)
        self.token_drop = check_share("token_drop", token_drop)

    # training ----------------------------------------------------------------------------------------------------

    def random_share(self, step: int) -> float:
        """r, the share of rows in a random order at a step of training."""
        if step < self.random_until:
            return 1.0
        if step >= self.natural_from:
            return 0.0
        return 1 - (step - self.random_until) / (self.natural_from - self.random_until)

    def losses(
        self, batch: dict[str, Any], generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``token``: mean nats of a token that counts.

        Args:
            batch: in training also ``step``, the number of the training step from 0, of models with ``natural_from``.
        """
        data = self.space.data_of(batch).to(self.device)
        rows, tokens = data.shape[:2]
        chance = Chance(rows, generator, self.device)
        noise = chance if self.training else None
        lengths = row_lengths(batch, rows, tokens, self.device, chance)
        share = self._share(batch)
        order = self.draw_orders(lengths, tokens, share, chance)
        data = torch.take_along_dim(data, order.view(*order.shape, *[1] * (data.ndim - 2)), 1)
        states = self.states(self.condition(batch, rows, noise), data[:, :-1], order, noise)
        mask = torch.arange(tokens, device=self.device) < lengths[:, None]
        token = token_mean(self.head.at(order).loss(states, data, chance), mask, self.training and torch.is_grad_enabled())
        return {"token": token}, {"bits_per_token": token.detach() / math.log(2), "random": torch.tensor(share)}

    def _share(self, batch: dict[str, Any]) -> float:
        if not self.training or not self.natural_from:
            return 0.0
        step = batch.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise TokenError(f"orders depend on the step of training: the batch needs 'step', an integer from 0, got {step!r:.100}")
        return self.random_share(step)

    def draw_orders(self, lengths: Tensor, tokens: int, share: float, chance: Chance) -> Tensor:
        """int64 (B, n), the tokens of each row in the order they are predicted; those beyond its length come last, as they are."""
        place = torch.arange(tokens, device=self.device)
        if not share:
            return place.expand(len(lengths), -1)
        beyond = place >= lengths[:, None]
        key = self.groups[:tokens].to(self.device) + chance.uniform(tokens).double()
        order = torch.where(beyond, 2.0 * self.space.tokens + place, key).argsort(1)
        return torch.where((chance.uniform() < share)[:, None], order, place)

    def states(self, given: Given, data: Tensor, order: Tensor | None = None, noise: Chance | None = None) -> Tensor:
        """What predicts each token, all at once.

        Args:
            given: the condition, B rows.
            data: tokens (B, n, ...), in this order, n ≤ N.
            order: int64 (B or 1, at least n + 1, or N), which token is the i-th; None: the natural order.
            noise: of hidden tokens and flipped bits in training.

        Returns:
            float (B, n + 1, W); entry i has seen the i tokens before and is told the position of the next. After N tokens there
            is none: the last entry then predicts nothing.
        """
        rows, tokens = data.shape[:2]
        order = torch.arange(self.space.tokens, device=self.device)[None] if order is None else order
        inputs = self.head.at(order[:, :tokens]).embed(data if noise is None else self.head.corrupt(data, noise))
        if noise is not None:  # also where nothing is dropped: every parameter takes part in every step
            inputs = torch.where((noise.uniform(tokens) < self.token_drop)[..., None], self.hidden_token, inputs)
        before = self._before(given, rows) + self.positions[: self.front]
        x = torch.cat([before, inputs + self.positions[self.front + order[:, :tokens]]], dim=1)
        targets = self.targets[self.front + order[:, : tokens + 1]]
        targets = F.pad(targets, (0, 0, self.front - 1, tokens + 1 - targets.shape[1]))
        keys = None if given.mask is None else F.pad(F.pad(given.mask, (1, 0), value=True), (0, tokens), value=True)
        modulations = self.trunk.modulations(given.vector, 0, x.shape[1])
        return self.trunk(x + targets, modulations, keys)[:, self.front - 1 :]

    def _before(self, given: Given, rows: int) -> Tensor:
        """Start and condition, float (B, F, W); padding is empty, for the last place predicts the first token even so."""
        start, tokens = self.start.expand(rows, 1, -1), given.tokens
        if tokens is not None and given.mask is not None:
            tokens = tokens.masked_fill(~given.mask[..., None], 0)
        return start if tokens is None else torch.cat([start, tokens], dim=1)

    # sampling ----------------------------------------------------------------------------------------------------

    def sample(
        self,
        request: Request,
        *,
        guidance: float = 1.0,
        schedule: str = "constant",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        prefix: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> TokenSequence:
        """Token after token with a cache, in the natural order, where both positions of a place are one table.

        Guidance progresses over all tokens of the space, however many are made, so a short row is the beginning of a long one.
        """
        if not self.head.filters and (top_k or top_p < 1):
            raise TokenError(f"{type(self.head).__name__} chooses bits, top_k and top_p choose among ids; leave them out")
        rows, tokens = request.rows, request.tokens
        if prefix is not None and prefix.shape[1] == tokens:
            return self.space.sequence(prefix)
        g = strengths(guidance, schedule, self.space.tokens)
        given = request.both(guidance != 1)
        many = 2 if guidance != 1 else 1
        known = 0 if prefix is None else prefix.shape[1]
        uniform = uniforms(request.seeds, tokens, self.head.draws, device=self.device)
        data = torch.zeros(rows, tokens, *self.space.shape, dtype=self.space.dtype, device=self.device)
        places = self.positions[: self.front + tokens] + F.pad(self.targets[self.front : self.front + tokens], (0, 0, self.front - 1, 1))
        x = self._before(given, rows * many)
        if known:
            data[:, :known] = prefix
            x = torch.cat([x, self.head.embed(prefix).repeat(many, 1, 1)], dim=1)
        keys = None if given.mask is None else F.pad(given.mask, (1, 0), value=True)
        cache = self.trunk.cache(rows * many, self.front + tokens, keys)
        vectors, whose = given.vector.unique(dim=0, return_inverse=True)
        chunk, ahead = self.trunk.chunk(len(vectors)), (0, 0)
        for i in range(known, tokens):
            start, stop = cache.position, self.front + i
            if stop > ahead[1]:  # modulations of the next places, once for rows with the same condition
                ahead = (start, min(max(stop, start + chunk), self.front + tokens))
                modulations = self.trunk.modulations(vectors, *ahead)
            now = [m[whose, start - ahead[0] : stop - ahead[0]] for m in modulations]
            states = self.trunk(x + places[start:stop], now, cache=cache)[:, -1]
            data[:, i] = self.head.at(i).sample(states, uniform[:, i], g[i], temperature, top_k, top_p)
            if on_step is not None:
                on_step(i, tokens, data[:, : i + 1])
            x = self.head.at(i).embed(data[:, i : i + 1]).repeat(many, 1, 1)
        return self.space.sequence(data)


def _groups(groups: int | Sequence[int], tokens: int) -> Tensor:
    """Sizes → float64 (N,), number of the group of each token."""
    sizes = [groups] if isinstance(groups, int) else list(groups)
    if not sizes or not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes) or sum(sizes) != tokens:
        raise ModelError(f"groups must be sizes from 1 that sum to {tokens} tokens, got {sizes!r:.100}")
    number = [i for i, size in enumerate(sizes) for _ in range(size)]
    return torch.tensor(number, dtype=torch.float64, device="cpu")
