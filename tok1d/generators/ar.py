"""AutoregressiveGenerator: a Llama-type model of token sequences, of fixed or variable length.

Llama for images: https://arxiv.org/abs/2406.06525. The sequence is [condition | start | token 1 | token 2 | …]; the state at each
place predicts the next token. Positions count from the front whatever the length of a row, so the model of a short row is the
beginning of that of a long one.

Shapes: B rows, P places of the condition, N tokens, W width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError, TokenError
from tok1d.generators.chance import Chance
from tok1d.generators.condition import Condition, Given, check_share
from tok1d.generators.generator import Generator, OnStep, Request
from tok1d.generators.guidance import guided, strengths
from tok1d.generators.heads import Softmax, TokenHead, zero_linear
from tok1d.generators.sampling import flip, uniforms
from tok1d.generators.space import TokenSpace
from tok1d.generators.trunk import Trunk
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.lengths import TailDrop
from tok1d.tokenizers.quantizers.common import token_mean
from tok1d.tokens import TokenSequence

VARIABLE = ("none", "announced", "stop")


class AutoregressiveGenerator(Generator):
    """Predicts each token from those before it.

    Args:
        space: the tokens.
        condition: what they show.
        width, depth, heads, hidden, positions: of the trunk, see :class:`tok1d.generators.trunk.Trunk`.
        head: how a state becomes a token; :class:`tok1d.generators.heads.Softmax` if None.
        variable: how rows of several lengths are told apart. ``none``: they are not; sampling stops where it is told to.
            ``announced``: the start says how many will come (LEN_k). ``stop``: at every token the model may end the row instead,
            which is one more class beside the tokens (end of sequence), its logit computed apart so that it serves every head.
        distribution: of lengths in training where a batch has none, see :class:`tok1d.tokenizers.lengths.TailDrop`; with
            ``variable="announced"`` only.
        token_drop: probability that training hides an input token (whole tokens; published code drops channels).
        length_drop: probability that training leaves the announced length out.

    Example:
        >>> from tok1d.generators.condition import ClassCondition
        >>> space = TokenSpace(tokens=8, vocab_size=16, nested=True)
        >>> model = AutoregressiveGenerator(space, ClassCondition(3), width=32, depth=1, heads=2)
        >>> model.generate(2, label=1, tokens=4, seeds=7).shape
        (2, 4)
    """

    def __init__(
        self,
        space: TokenSpace,
        condition: Condition,
        width: int = 768,
        depth: int = 12,
        heads: int | None = None,
        hidden: int | None = None,
        positions: str = "rotary",
        head: TokenHead | None = None,
        variable: str = "none",
        distribution: str = "powers_of_two",
        token_drop: float = 0.1,
        length_drop: float = 0.1,
    ) -> None:
        super().__init__(space, condition)
        if space.kind == "latents":
            raise ModelError("an autoregressive generator makes ids or bits; for latents take a flow")
        if variable not in VARIABLE:
            raise ModelError(f"variable must be one of {', '.join(VARIABLE)}, got {variable!r:.100}")
        if variable != "none" and len(space.allowed) == 1:
            raise ModelError(f"{space.tokenizer} has rows of {space.tokens} tokens only; variable={variable!r} needs several lengths")
        if head is not None and not isinstance(head, TokenHead):
            raise ModelError(f"head must be a TokenHead, got {type(head).__name__}")
        check_range("width", width, 1, 16384)  # before anything is allocated
        condition.attach(width)
        self.trunk = Trunk(width, depth, condition.places + space.tokens, heads, hidden, positions)
        self.head = Softmax() if head is None else head
        self.head.attach(width, space)
        self.start = nn.Parameter(torch.randn(width) * 0.5)
        self.variable, self.rule = variable, TailDrop(distribution)
        self.announced = nn.Embedding(space.tokens + 1, width) if variable == "announced" else None  # row 0: not announced
        self.stop = zero_linear(width, 1) if variable == "stop" else None
        self.token_drop = check_share("token_drop", token_drop)
        self.length_drop = check_share("length_drop", length_drop)

    # training ----------------------------------------------------------------------------------------------------

    def losses(
        self, batch: dict[str, Any], generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``token``: mean nats of a token that counts; ``stop``: mean nats of going on or ending, where the model may end."""
        data = self.space.data_of(batch).to(self.device)
        rows, tokens = data.shape[:2]
        chance = Chance(rows, generator, self.device)
        noise = chance if self.training else None
        lengths = self._lengths(batch, rows, tokens, chance)
        mask = torch.arange(tokens, device=self.device) < lengths[:, None]
        states = self.states(self.condition(batch, rows, noise), data, lengths, noise)
        step = self.training and torch.is_grad_enabled()
        token = token_mean(self.head.loss(states, data, chance), mask, step)
        losses = {"token": token}
        if self.stop is not None:
            # Place i of the states has seen i tokens: it ends there if the row has i of them, and cannot end before the first.
            ends = torch.arange(tokens, device=self.device) == lengths[:, None]
            nats = F.binary_cross_entropy_with_logits(self.stop(states).squeeze(-1).float(), ends.float(), reduction="none")
            asked = mask | ends
            asked[:, 0] = False
            losses["stop"] = token_mean(nats, asked, step)
        return losses, {"bits_per_token": token.detach() / math.log(2)}

    def states(self, given: Given, data: Tensor, lengths: Tensor | None = None, noise: Chance | None = None) -> Tensor:
        """What predicts each token, all at once.

        Args:
            given: the condition, B rows.
            data: tokens (B, N, ...).
            lengths: int64 (B,), announced where the model announces; None: not announced.
            noise: of hidden tokens and flipped bits in training.

        Returns:
            float (B, N, W); entry i has seen the tokens before token i.
        """
        inputs = data[:, :-1]
        if noise is not None:
            if lengths is not None and self.length_drop and self.announced is not None:
                lengths = lengths.masked_fill(noise.uniform() < self.length_drop, 0)
            inputs = self.head.corrupt(inputs, noise)
        inputs = self.head.embed(inputs)
        if noise is not None and self.token_drop:
            inputs = inputs.masked_fill((noise.uniform(inputs.shape[1]) < self.token_drop)[..., None], 0)
        front, keys = self._front(given, len(data), lengths)
        x = torch.cat([front, inputs], dim=1)
        if keys is not None:
            keys = F.pad(keys, (0, x.shape[1] - keys.shape[1]), value=True)
        return self.trunk(x, causal=True, mask=keys)[:, self.condition.places :]

    def _front(self, given: Given, rows: int, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Condition and start, float (B, P + 1, W), and which of the condition may be attended to."""
        start = self.start.expand(rows, -1)
        if self.announced is not None:
            start = start + self.announced(torch.zeros_like(start[:, 0], dtype=torch.int64) if lengths is None else lengths)
        start = start[:, None]
        return (start if given.tokens is None else torch.cat([given.tokens, start], dim=1)), given.mask

    def _lengths(self, batch: dict[str, Any], rows: int, tokens: int, chance: Chance) -> Tensor:
        """int64 (B,), how many tokens count."""
        if "lengths" in batch:
            lengths = batch["lengths"].to(self.device)
            if lengths.shape != (rows,):
                raise TokenError(f"lengths must be ({rows},), one a row, got {tuple(lengths.shape)}")
            return lengths
        if self.stop is not None:
            raise TokenError('a generator with variable="stop" learns from rows of different lengths; the batch has no lengths')
        if self.training and self.announced is not None:
            return chance.draw(lambda all_rows: self.rule.sample(all_rows, tokens, chance.generator))
        return torch.full((rows,), tokens, device=self.device)

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
        announce: int | None = None,
        prefix: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> TokenSequence:
        """Token after token with a cache.

        Guidance progresses over all tokens of the space, however many are made, so a short row is the beginning of a long one.

        Args:
            announce: length the start speaks of, where the model announces; the number of tokens made if None, 0 for none.
        """
        if not self.head.filters and (top_k or top_p < 1):
            raise TokenError(f"{type(self.head).__name__} chooses bits, top_k and top_p choose among ids; leave them out")
        rows, tokens = request.rows, request.tokens
        g = strengths(guidance, schedule, self.space.tokens)
        given = request.both(guidance != 1)
        many = 2 if guidance != 1 else 1
        front, keys = self._front(given, rows * many, self._announcement(announce, tokens, rows * many))
        known = 0 if prefix is None else prefix.shape[1]
        uniform = uniforms(request.seeds, tokens, self.head.draws + 1, device=self.device)
        data = torch.zeros(rows, tokens, *self.space.shape, dtype=self.space.dtype, device=self.device)
        lengths = torch.full((rows,), tokens, device=self.device)
        alive = torch.ones(rows, dtype=torch.bool, device=self.device)
        if known == tokens:
            return self.space.sequence(prefix)
        if known:
            data[:, :known] = prefix
            front = torch.cat([front, self.head.embed(prefix).repeat(many, 1, 1)], dim=1)
        cache = self.trunk.cache(rows * many, front.shape[1] + tokens - known, keys)
        states = self.trunk(front, causal=True, cache=cache)[:, -1]
        for i in range(known, tokens):
            if self.stop is not None and i:
                ends = flip(guided(self.stop(states), rows, g[i])[:, 0], uniform[:, i, -1], temperature)
                lengths = torch.where(alive & ends, i, lengths)
                alive = alive & ~ends
                if not bool(alive.any()):
                    break
            data[:, i] = self.head.at(i).sample(states, uniform[:, i, :-1], g[i], temperature, top_k, top_p)
            if on_step is not None:
                on_step(i, tokens, data[:, : i + 1])
            if i + 1 < tokens:
                x = self.head.at(i).embed(data[:, i : i + 1])
                states = self.trunk(x.repeat(many, 1, 1), causal=True, cache=cache)[:, 0]
        return self.space.sequence(data[:, : int(lengths.max())], lengths)

    def _announcement(self, announce: int | None, tokens: int, rows: int) -> Tensor | None:
        """int64 (rows,), or None where nothing is announced."""
        if self.announced is None:
            if announce is not None:
                raise TokenError('this generator announces no lengths, got announce=; it was not made with variable="announced"')
            return None
        value = tokens if announce is None else announce
        if not isinstance(value, int) or isinstance(value, bool) or not (value == 0 or tokens <= value <= self.space.tokens):
            raise TokenError(f"announce must be 0 (nothing) or in {tokens}..{self.space.tokens}, got {announce!r:.100}")
        return torch.full((rows,), value, device=self.device)
