"""BitDiffusion: bit vectors out of coin tosses, with a network that says which bits are wrong.

https://arxiv.org/abs/2506.21022 (Instella-T2I). Noise replaces a bit by a coin toss with probability t:

    q(x_t = 1 | x_0) = (1 - t) x_0 + t / 2

The network sees x_t and gives the logit f of every bit having been flipped, so P(x_0 = 1) = x_t (1 - s) + (1 - x_t) s with
s = sigmoid(f). All tokens are made together, and the first n of them are given out where fewer were asked for.

Shapes: B rows, N tokens, d bits of one token.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import ModelError, TokenError
from tok1d.generators.chance import Chance
from tok1d.generators.condition import Condition, check_share
from tok1d.generators.denoiser import Denoiser, attach_condition, clean_beginnings, counted, token_times
from tok1d.generators.generator import Generator, OnStep, Request
from tok1d.generators.guidance import guided, strengths
from tok1d.generators.masked_body import seen
from tok1d.generators.row_noise import RowNoise
from tok1d.generators.space import TokenSpace
from tok1d.generators.times import check_times, draw_times
from tok1d.tokenizers.quantizers.common import token_mean
from tok1d.tokenizers.quantizers.packing import bits_to_tokens, tokens_to_bits
from tok1d.tokens import TokenSequence

SAMPLERS = ("fresh", "posterior")


def noised(x: Tensor, t: Tensor | float) -> Tensor:
    """Probability that a bit is 1 at time t: float x in [0, 1], itself a bit or the probability of one → the same shape."""
    return (1 - t) * x + t / 2


def clean_logits(flips: Tensor, x: Tensor) -> Tensor:
    """Logits of having been flipped, bits x_t bool or 0/1 → logits of x_0 = 1: f where x_t is 0, -f where it is 1."""
    return torch.where(x.bool(), -flips, flips)


def posterior(p: Tensor, x: Tensor, t: float, after: float) -> Tensor:
    """Probability that a bit is 1 at an earlier time, exactly: the sum over x_0 of P(x_0) q(x_after | x_t, x_0).

    q(x_after | x_t, x_0) is proportional to q(x_t | x_after) q(x_after | x_0), and from ``after`` to t a bit is replaced by a toss
    with probability b = (t - after) / (1 - after). Published code takes b = t - after, and one product with P in place of
    x_0; neither leads from the noise of t to that of ``after``, these do.

    Args:
        p: float (...), P(x_0 = 1).
        x: bits (...) at time t.
        t, after: 1 ≥ t > after ≥ 0.

    Returns:
        float (...) in [0, 1].

    Example:
        >>> posterior(torch.tensor([0.0, 1.0]), torch.tensor([1, 1]), 0.5, 0.0).tolist()
        [0.0, 1.0]
    """
    toss = (t - after) / (1 - after)
    one, zero = noised(x.to(p.dtype), toss), noised(1 - x.to(p.dtype), toss)  # q(x_t | x_after = 1), q(x_t | x_after = 0)
    mixed = torch.zeros_like(p)
    for clean, weight in ((0.0, 1 - p), (1.0, p)):
        up, down = one * noised_number(clean, after), zero * (1 - noised_number(clean, after))
        mixed = mixed + weight * up / (up + down).clamp(min=1e-30)  # both are 0 only where the weight ought to be
    return mixed


def noised_number(x: float, t: float) -> float:
    """:func:`noised` of one number."""
    return (1 - t) * x + t / 2


class BitDiffusion(Generator):
    """All bits of all tokens, better in every step.

    Args:
        space: tokens that are bit vectors, or ids of a vocabulary of 2^d.
        condition: what they show.
        width, depth, heads, hidden, positions: of the trunk, see :class:`tok1d.generators.trunk.Trunk`.
        time_mean, time_std: of the logits of training times.
        prefix_share: share of training rows whose first k tokens are left clean, k even in 0..N-1; above 0, ``prefix`` can be
            given when sampling.

    Example:
        >>> from tok1d.generators.condition import ClassCondition
        >>> space = TokenSpace(tokens=8, vocab_size=16)
        >>> BitDiffusion(space, ClassCondition(3), width=32, depth=1, heads=2).generate(2, label=1, steps=4).shape
        (2, 8)
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
        prefix_share: float = 0.0,
    ) -> None:
        super().__init__(space, condition)
        if space.kind == "latents" or (space.kind == "ids" and space.vocab_size != 2**space.bits):
            raise ModelError(f"bit diffusion needs 2^d ids or bit vectors, {space.tokenizer} has {space.kind} ({space.vocab_size} ids)")
        check_times(time_mean, time_std, 1.0)
        attach_condition(condition, width)
        self.net = Denoiser(space.bits, space.bits, condition.places, space.tokens, width, depth, heads, hidden, positions)
        self.time_mean, self.time_std = time_mean, time_std
        self.prefix_share = check_share("prefix_share", prefix_share)

    def to_bits(self, data: Tensor) -> Tensor:
        """Tokens, int64 (B, n) or uint8 (B, n, d) → uint8 (B, n, d)."""
        return tokens_to_bits(data, self.space.bits) if self.space.kind == "ids" else data

    def to_tokens(self, bits: Tensor) -> Tensor:
        """Inverse of :meth:`to_bits`, for bits that may be bool."""
        return bits_to_tokens(bits.to(torch.uint8)) if self.space.kind == "ids" else bits.to(torch.uint8)

    # training ----------------------------------------------------------------------------------------------------

    def losses(
        self, batch: dict[str, Any], generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``bit``: mean nats of a clean bit that counts, at random times; ``accuracy``: share of them guessed right."""
        bits = self.to_bits(self.space.data_of(batch).to(self.device))
        rows, tokens = bits.shape[:2]
        chance = Chance(rows, generator, self.device)
        kept = row_mask(batch, rows, tokens, self.device)
        t = draw_times(chance, mean=self.time_mean, std=self.time_std)
        x = chance.uniform(*bits.shape[1:]) < noised(bits.float(), t[:, None, None])
        clean = clean_beginnings(chance, self.prefix_share, tokens)
        if clean is not None:
            x = torch.where(clean[..., None], bits.bool(), x)
        given = self.condition(batch, rows, chance if self.training else None)
        logits = clean_logits(self.net(x * 2.0 - 1, token_times(t, clean, self.condition.places), given, seen(given, kept, tokens)), x)
        nats = F.binary_cross_entropy_with_logits(logits, bits.float(), reduction="none").mean(-1)
        right = ((logits > 0) == bits.bool()).float().mean(-1)
        count = counted(kept, clean)
        loss = token_mean(nats, count, self.training and torch.is_grad_enabled())
        return {"bit": loss}, {"accuracy": token_mean(right.detach(), count, False)}

    # sampling ----------------------------------------------------------------------------------------------------

    def sample(
        self,
        request: Request,
        *,
        guidance: float = 1.0,
        schedule: str = "constant",
        temperature: float = 1.0,
        steps: int = 50,
        sampler: str = "fresh",
        power: float = 1.0,
        prefix: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> TokenSequence:
        """From coin tosses to bits at times (1 - i / steps)^power.

        Args:
            guidance: of the logits of flips.
            temperature: the guided logits are divided by it; 0 takes the likelier value.
            sampler: ``fresh``: toss anew, with the noise of the next time, from what is believed of x_0; ``posterior``: the
                distribution of the next bits given the present ones. The last step of both takes the likelier value.
        """
        if sampler not in SAMPLERS:
            raise TokenError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r:.100}")
        if not isinstance(power, int | float) or isinstance(power, bool) or not 0 < power < 100:
            raise TokenError(f"power must be a number above 0, got {power!r:.100}")
        g = strengths(guidance, schedule, steps)
        rows, tokens, noise = request.rows, self.space.tokens, RowNoise(request.seeds, self.device)
        x = noise.uniform(tokens, self.space.bits) < 0.5
        clean = known_tokens(self, prefix, rows)
        known = None if prefix is None else F.pad(self.to_bits(prefix), (0, 0, 0, tokens - prefix.shape[1])).bool()
        times = [(1 - i / steps) ** power for i in range(steps + 1)]
        with_one, with_both = request.both(False), request.both(guidance != 1)
        for i, (t, after) in enumerate(itertools.pairwise(times)):
            if clean is not None:
                x = torch.where(clean[..., None], known, x)
            many = 2 if g[i] != 1 else 1
            given = with_both if many == 2 else with_one
            time = token_times(torch.full((rows,), t, device=self.device), clean, self.condition.places)
            flips = self.net((x * 2.0 - 1).repeat(many, 1, 1), time.repeat(many, *[1] * (time.ndim - 1)), given, seen(given, None, tokens))
            p = clean_probability(guided(flips, rows, g[i]), x, temperature)
            x = step_bits(p, x, t, after, sampler, noise)
            if on_step is not None:
                on_step(i, steps, self.to_tokens(x)[:, : request.tokens])
        if clean is not None:
            x = torch.where(clean[..., None], known, x)
        return self.space.sequence(self.to_tokens(x)[:, : request.tokens])


def clean_probability(flips: Tensor, x: Tensor, temperature: float = 1.0) -> Tensor:
    """P(x_0 = 1) of logits of flips and bits x_t; 0 or 1 at temperature 0."""
    logits = clean_logits(flips, x)
    return (logits > 0).float() if temperature == 0 else torch.sigmoid(logits / temperature)


def step_bits(p: Tensor, x: Tensor, t: float, after: float, sampler: str, noise: RowNoise) -> Tensor:
    """One step of a sampler.

    Args:
        p: float (B, N, d), P(x_0 = 1).
        x: bool (B, N, d) at time t.
        t, after: times.
        sampler: ``fresh`` or ``posterior``.
        noise: of the rows.

    Returns:
        bool (B, N, d) at the time ``after``; at 0 the likelier values.
    """
    if after == 0:
        return p > 0.5
    chance_of_one = noised(p, after) if sampler == "fresh" else posterior(p, x, t, after)
    return noise.uniform(*p.shape[1:]) < chance_of_one


def row_mask(batch: dict[str, Any], rows: int, tokens: int, device: torch.device) -> Tensor | None:
    """bool (B, N), tokens that count by the ``lengths`` of a batch; None: all.

    Raises:
        TokenError: not one length a row.
    """
    if "lengths" not in batch:
        return None
    lengths = batch["lengths"].to(device)
    if lengths.shape != (rows,):
        raise TokenError(f"lengths must be ({rows},), one a row, got {tuple(lengths.shape)}")
    return torch.arange(tokens, device=device) < lengths[:, None]


def known_tokens(model: Any, prefix: Tensor | None, rows: int) -> Tensor | None:
    """bool (B, N), tokens a prefix gives; None without one.

    Raises:
        TokenError: the model did not learn to go on from clean tokens.
    """
    if prefix is None:
        return None
    if not model.prefix_share:
        raise TokenError("this generator did not learn to go on from given tokens; train one with prefix_share above 0")
    return (torch.arange(model.space.tokens, device=model.device) < prefix.shape[1]).expand(rows, -1)
