"""MaskedGenerator: guesses all masked tokens at once and keeps the surest, step after step (MaskGIT).

MaskGIT: https://arxiv.org/abs/2202.04200; for 1D tokens: https://arxiv.org/abs/2406.07550. A row of k tokens of a nested tokenizer
is a sequence of its own: what lies beyond its end is not there, instead of masked. So a short row is not the beginning of a long one
made with the same seed; an autoregressive generator has that.

Shapes: B rows, N tokens, n ≤ N of this batch, m masked, K ids.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import ModelError, TokenError
from tok1d.generators.chance import Chance
from tok1d.generators.condition import Condition, check_share
from tok1d.generators.generator import Generator, OnStep, Request
from tok1d.generators.guidance import guided, strengths
from tok1d.generators.masked_body import MaskedBody, TrunkBody
from tok1d.generators.masked_steps import SHARES, check_share_name, unmask
from tok1d.generators.sampling import uniforms
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.lengths import TailDrop
from tok1d.tokenizers.quantizers.common import sum_over_ranks, world
from tok1d.tokens import TokenSequence


class MaskedGenerator(Generator):
    """Predicts masked tokens from those that are not.

    Args:
        space: the tokens, ids.
        condition: what they show.
        body: the network; :class:`tok1d.generators.masked_body.TrunkBody` if None.
        masking: how training draws the share of masked tokens from a uniform number: ``arccos``, ``cosine`` or ``linear``.
        label_smoothing: of the cross entropy.
        unmasked_weight: of tokens that are not masked, in the loss.
        distribution: of lengths in training where a batch has none, see :class:`tok1d.tokenizers.lengths.TailDrop`; None: all
            tokens.

    Example:
        >>> from tok1d.generators.condition import ClassCondition
        >>> space = TokenSpace(tokens=8, vocab_size=16, nested=True)
        >>> model = MaskedGenerator(space, ClassCondition(3), TrunkBody(width=32, depth=1, heads=2))
        >>> model.generate(2, label=1, tokens=4, seeds=7, steps=3, guidance=2.0).shape
        (2, 4)
    """

    def __init__(
        self,
        space: TokenSpace,
        condition: Condition,
        body: MaskedBody | None = None,
        masking: str = "arccos",
        label_smoothing: float = 0.1,
        unmasked_weight: float = 0.1,
        distribution: str | None = None,
    ) -> None:
        super().__init__(space, condition)
        body = TrunkBody() if body is None else body
        if not isinstance(body, MaskedBody):
            raise ModelError(f"body must be a MaskedBody, got {type(body).__name__}")
        if distribution is not None and len(space.allowed) == 1:
            raise ModelError(f"{space.tokenizer} has rows of {space.tokens} tokens only; distribution={distribution!r} needs several lengths")
        condition.attach(body.width)
        body.attach(space, condition.places)
        self.body, self.masking = body, check_share_name(masking)
        self.label_smoothing = check_share("label_smoothing", label_smoothing)
        self.unmasked_weight = check_share("unmasked_weight", unmasked_weight)
        self.rule = None if distribution is None else TailDrop(distribution)

    # training ----------------------------------------------------------------------------------------------------

    def losses(
        self, batch: dict[str, Any], generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``token``: weighted mean cross entropy of masked and other tokens."""
        ids = self.space.data_of(batch).to(self.device)
        rows, tokens = ids.shape
        chance = Chance(rows, generator, self.device)
        lengths = row_lengths(batch, rows, tokens, self.device, chance, self.rule if self.training else None)
        given = self.condition(batch, rows, chance if self.training else None)
        masked = self.draw_mask(lengths, tokens, chance)
        there = torch.arange(tokens, device=self.device) < lengths[:, None]
        kept = None if lengths.device.type == "cpu" and bool(there.all()) else there
        logits = self.logits(ids, masked, given, kept)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none", label_smoothing=self.label_smoothing)
        weight = torch.where(masked, 1.0, self.unmasked_weight) * there
        total = weight.sum()
        if self.training and torch.is_grad_enabled():
            # Gradients that data parallelism averages are then those of the mean over the tokens of all ranks.
            total = sum_over_ranks(total) / world()[1]
        loss = (nats.view(ids.shape) * weight).sum() / total.clamp(min=1e-8)
        right = ((logits.detach().argmax(-1) == ids) & masked).sum() / masked.sum()
        return {"token": loss}, {"accuracy": right, "masked": masked.sum() / there.sum()}

    def draw_mask(self, lengths: Tensor, tokens: int, chance: Chance) -> Tensor:
        """bool (B, n): round(share · length) random tokens of each row, at least one, none beyond its length."""
        share = SHARES[self.masking](chance.uniform(), torch)
        count = (lengths * share).round().clamp(min=1)
        beyond = torch.arange(tokens, device=self.device) >= lengths[:, None]
        rank = chance.uniform(tokens).masked_fill(beyond, math.inf).argsort(1).argsort(1)
        return (rank < count[:, None]) & ~beyond

    def logits(self, ids: Tensor, masked: Tensor, given: Any, kept: Tensor | None = None) -> Tensor:
        """What every token might be.

        Args:
            ids: int64 (B, n).
            masked: bool (B, n), which of them are hidden.
            given: the condition.
            kept: bool (B, n), which there are at all; None: all.

        Returns:
            float (B, n, K).
        """
        return self.body.logits(self.body(ids.masked_fill(masked, self.space.vocab_size), given, kept))

    # sampling ----------------------------------------------------------------------------------------------------

    def sample(
        self,
        request: Request,
        *,
        guidance: float = 1.0,
        schedule: str = "constant",
        temperature: float = 4.5,
        steps: int = 8,
        annealing: bool = False,
        masking: str = "arccos",
        prefix: Tensor | None = None,
        keep: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> TokenSequence:
        """All tokens in some steps; a guided step is one forward of twice the rows.

        The published code adds w (c - u) to c for its schedules ``constant`` and ``linear``: its w is our guidance - 1; for
        ``power-cosine`` it is our guidance.

        Args:
            temperature: T of the noise on choices and on their order; it falls linearly to 0 with the steps.
            annealing: divide logits by a number that falls from 1.3 to 0.5 as well.
            masking: how the share of masked tokens falls: ``arccos``, ``cosine`` or ``linear``.
            prefix: tokens that are known, the first ones.
            keep: bool (k,) or (B, k), which of the prefix are known, to fill in the others; all if None.
            on_step: sees the guesses for what is still masked.
        """
        if type(annealing) is not bool:
            raise TokenError(f"annealing must be true or false, got {annealing!r:.100}")
        check_share_name(masking)
        rows, tokens = request.rows, request.tokens
        ids = torch.zeros(rows, tokens, dtype=torch.int64, device=self.device)
        masked = torch.ones_like(ids, dtype=torch.bool)
        known = self._keep(keep, prefix)
        if prefix is not None:
            ids[:, : prefix.shape[1]] = prefix
            masked[:, : prefix.shape[1]] = ~known
        g = strengths(guidance, schedule, steps)
        both = request.both(any(x != 1 for x in g))

        def predict(step: int, ids: Tensor, masked: Tensor, places: Tensor) -> Tensor:
            many = 1 if g[step] == 1 else 2
            x = ids.masked_fill(masked, self.space.vocab_size).repeat(many, 1)
            states = self.body(x, request.given if many == 1 else both)
            states = torch.take_along_dim(states, places.repeat(many, 1)[..., None], 1)
            logits = self.body.logits(guided(states, rows, g[step]), places)  # affine: the same as guided logits, for half the work
            return logits.float()

        noise = uniforms(request.seeds, 2, steps, tokens, device=self.device)
        options = {"steps": steps, "temperature": temperature, "annealing": annealing, "masking": masking}
        for step, (made, _) in enumerate(unmask(predict, ids, masked, (noise[:, 0], noise[:, 1]), **options)):
            if on_step is not None:
                on_step(step, steps, made)
        return self.space.sequence(made)

    def _keep(self, keep: Any, prefix: Tensor | None) -> Tensor | None:
        """bool, broadcast to the prefix; None without one."""
        if prefix is None:
            if keep is not None:
                raise TokenError("keep says which tokens of prefix are known; give prefix= as well")
            return None
        keep = torch.ones(1, prefix.shape[1], dtype=torch.bool) if keep is None else torch.as_tensor(keep)
        keep = keep[None] if keep.ndim == 1 else keep
        if keep.dtype != torch.bool or keep.ndim != 2 or len(keep) not in (1, len(prefix)) or keep.shape[1] != prefix.shape[1]:
            wanted = f"({prefix.shape[1]},) or ({len(prefix)}, {prefix.shape[1]})"
            raise TokenError(f"keep must be bool {wanted}, one for each token of prefix, got {keep.dtype} {tuple(keep.shape)}")
        return keep.to(prefix.device)


def row_lengths(
    batch: dict[str, Any], rows: int, tokens: int, device: torch.device, chance: Chance, rule: TailDrop | None = None
) -> Tensor:
    """How many tokens of each row count: as the batch says, else as the rule draws, else all; int64 (B,).

    Raises:
        TokenError: not one length a row, or out of range.
    """
    if "lengths" not in batch:
        if rule is not None:
            return chance.draw(lambda all_rows: rule.sample(all_rows, tokens, chance.generator))
        return torch.full((rows,), tokens, device=device)
    lengths = batch["lengths"]
    if lengths.shape != (rows,):
        raise TokenError(f"lengths must be ({rows},), one a row, got {tuple(lengths.shape)}")
    if lengths.device.type == "cpu" and rows and not 1 <= int(lengths.min()) <= int(lengths.max()) <= tokens:
        raise TokenError(f"lengths must be in 1..{tokens}, got {int(lengths.min())}..{int(lengths.max())}")
    return lengths.to(device)
