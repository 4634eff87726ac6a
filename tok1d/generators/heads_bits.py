"""Heads for tokens that are bit vectors: all bits at once, or a few at a time given those already known.

Independent bits: https://arxiv.org/abs/2412.04431 (Infinity), https://arxiv.org/abs/2506.21022 (Instella-T2I). Masked bits:
https://arxiv.org/abs/2602.09024 (BAR). Ids of a vocabulary of 2^d are bit vectors too, the first bit the most significant.

Shapes: B rows, N tokens, W width, d bits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.generators.chance import Chance
from tok1d.generators.condition import check_share
from tok1d.generators.guidance import guided
from tok1d.generators.heads import TokenHead, zero_linear
from tok1d.generators.sampling import flip
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.quantizers.packing import bits_to_tokens, tokens_to_bits
from tok1d.tokenizers.rotary_blocks import RMSNorm, SwiGLU


class Bits(TokenHead):
    """One logit for each bit; bits of a token are independent given the tokens before it.

    Args:
        noise: in training every input row gets a rate from 0 to this, and its bits are flipped at that rate, so that the model
            learns to go on from its own errors; targets stay clean (which is right for tokens that are no residuals).
    """

    filters = False

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = check_share("noise", noise)

    def attach(self, width: int, space: TokenSpace) -> None:
        if space.kind == "latents" or (space.kind == "ids" and space.vocab_size != 2**space.bits):
            raise ModelError(f"heads of bits need 2^d ids or bit vectors, {space.tokenizer} has {space.kind} ({space.vocab_size} ids)")
        self.bits, self.packed = space.bits, space.kind == "ids"
        self.draws = space.bits
        self.into = nn.Linear(space.bits, width)
        self._attach_out(width)

    def _attach_out(self, width: int) -> None:
        self.out = zero_linear(width, self.bits)

    def to_bits(self, data: Tensor) -> Tensor:
        """Tokens, int64 (...) or uint8 (..., d) → uint8 (..., d)."""
        return tokens_to_bits(data, self.bits) if self.packed else data

    def to_tokens(self, bits: Tensor) -> Tensor:
        """Inverse of :meth:`to_bits`, for bits that may be bool."""
        return bits_to_tokens(bits) if self.packed else bits.to(torch.uint8)

    def signs(self, bits: Tensor) -> Tensor:
        """Bits → -1 and 1 in the precision of the weights."""
        return bits.to(self.into.weight.dtype) * 2 - 1

    def embed(self, data: Tensor) -> Tensor:
        return self.into(self.signs(self.to_bits(data)))

    def corrupt(self, data: Tensor, chance: Chance) -> Tensor:
        if not self.noise:
            return data
        bits = self.to_bits(data)
        rate = chance.uniform(1, 1) * self.noise
        return self.to_tokens(bits.bool() ^ (chance.uniform(*bits.shape[1:]) < rate))

    def loss(self, states: Tensor, data: Tensor, chance: Chance) -> Tensor:
        bits = self.to_bits(data).float()
        return F.binary_cross_entropy_with_logits(self.out(states).float(), bits, reduction="none").sum(-1)

    def sample(
        self,
        states: Tensor,
        uniform: Tensor,
        g: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Tensor:
        logits = guided(self.out(states), len(uniform), g)
        return self.to_tokens(flip(logits, uniform, temperature))


class MaskedBits(Bits):
    """Bits of one token in a few rounds: a small network sees those already known beside the state of the trunk.

    With one round this is :class:`Bits`; with d rounds no independence is assumed. Which bits come first is random. The loss is
    an unbiased estimate of the exact nats of this sampler: of a random round, scaled by what that round reveals.

    Args:
        rounds: m.
        width: of the network; that of the trunk if None.
        depth: blocks of the network.
        noise: as :class:`Bits`.
    """

    def __init__(self, rounds: int = 4, width: int | None = None, depth: int = 3, noise: float = 0.0) -> None:
        super().__init__(noise)
        check_range("rounds", rounds, 1, 4096)
        check_range("depth", depth, 1, 64)
        if width is not None:
            check_range("width", width, 1, 16384)
        self.rounds, self.width, self.depth = rounds, width, depth

    def attach(self, width: int, space: TokenSpace) -> None:
        super().attach(width, space)
        self.draws = 2 * self.bits  # values, then the order
        self.known = revealed(self.bits, self.rounds)

    def _attach_out(self, width: int) -> None:
        inner = self.width or width
        self.from_state = nn.Linear(width, inner)
        self.from_bits = nn.Linear(self.bits, inner)
        self.norms = nn.ModuleList(RMSNorm(inner) for _ in range(self.depth + 1))
        self.mlps = nn.ModuleList(SwiGLU(inner, 2 * inner) for _ in range(self.depth))
        self.out = zero_linear(inner, self.bits)

    def logits(self, states: Tensor, bits: Tensor, known: Tensor) -> Tensor:
        """Every bit being 1, given some.

        Args:
            states: float (..., W).
            bits: (..., d) of 0 and 1.
            known: bool (..., d), which of them may be seen.

        Returns:
            float (..., d).
        """
        x = self.from_state(states) + self.from_bits(self.signs(bits).masked_fill(~known, 0))
        for norm, mlp in zip(self.norms, self.mlps):
            x = x + mlp(norm(x))
        return self.out(self.norms[-1](x))

    def loss(self, states: Tensor, data: Tensor, chance: Chance) -> Tensor:
        bits = self.to_bits(data)
        counts = torch.tensor(self.known, device=bits.device)
        rounds = len(self.known) - 1
        turn = (chance.uniform(bits.shape[1]) * rounds).long().clamp(max=rounds - 1)  # (B, N)
        before, now = counts[turn], counts[turn + 1]
        rank = chance.uniform(*bits.shape[1:]).argsort(-1).argsort(-1)
        known = rank < before[..., None]
        nats = F.binary_cross_entropy_with_logits(self.logits(states, bits, known).float(), bits.float(), reduction="none")
        # The bits this round reveals are a fair sample of those still unknown, so all of the unknown ones may speak for them.
        return nats.masked_fill(known, 0).sum(-1) * (rounds * (now - before) / (self.bits - before))

    def sample(
        self,
        states: Tensor,
        uniform: Tensor,
        g: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Tensor:
        rows, many = len(uniform), len(states) // len(uniform)
        value, order = uniform.split(self.bits, -1)
        rank = order.argsort(dim=-1, stable=True).argsort(-1)
        bits = torch.zeros(rows, self.bits, dtype=torch.bool, device=states.device)
        for before, now in zip(self.known, self.known[1:]):
            known = rank < before
            logits = self.logits(states, bits.repeat(many, 1), known.repeat(many, 1))
            drawn = flip(guided(logits, rows, g), value, temperature)
            bits = torch.where((rank >= before) & (rank < now), drawn, bits)
        return self.to_tokens(bits)


def revealed(bits: int, rounds: int) -> list[int]:
    """How many bits are known before each round and after the last: few at first (cosine), at least one more each round.

    Example:
        >>> revealed(8, 1), revealed(8, 3), revealed(3, 9)
        ([0, 8], [0, 1, 4, 8], [0, 1, 2, 3])
    """
    rounds = min(rounds, bits)
    counts = [0]
    for r in range(1, rounds):
        wanted = math.floor(bits * (1 - math.cos(math.pi / 2 * r / rounds)) + 1e-9)
        counts.append(min(max(wanted, counts[-1] + 1), bits - (rounds - r)))
    return [*counts, bits]
