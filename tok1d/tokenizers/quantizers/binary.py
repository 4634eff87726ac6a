"""What lookup-free quantizers of signs share: exact entropies without a table of codes, over the tokens of all ranks.

The softmax over the 2^d codes ±c with logits 2 <z, code> / T factorises: bit i is a coin of its own, + with probability
sigmoid(4 c z_i / T). So the entropy of one token is a sum over bits, exact in O(d). The entropy of the average over tokens
does not factorise; the sum over groups of bits bounds it from above, the closer the larger the groups. Every group keeps
its own average: pooled over groups, as published code has it, groups stuck at different codes look diverse.

LFQ: https://arxiv.org/abs/2310.05737; BSQ: https://arxiv.org/abs/2406.07548; groups: https://arxiv.org/abs/2508.05599.

Shapes: B images, N tokens, d bits of a token, g groups of k bits.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.part import QuantizerOutput
from tok1d.tokenizers.quantizers.common import count_ids, sum_over_ranks, usage_stats, world
from tok1d.tokenizers.quantizers.packing import bits_to_tokens

GROUP_BITS = 9  # of a group unless told otherwise, as BSQ has it: a close bound that costs little
COUNT_UP_TO = 16  # bits of a vocabulary whose codes are counted


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks of a tensor; its gradient is the sum over ranks too, as every rank's loss depends on all."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


def differentiable_sum_over_ranks(x: Tensor) -> Tensor:
    """Add ``x`` up over all ranks with gradient; every rank must call it, and go through its gradient."""
    return _SumOverRanks.apply(x) if world()[1] > 1 else x


def all_rows(x: Tensor) -> Tensor:
    """Float (B, …) of every rank → (ranks · B, …), the same everywhere, with gradient to the own rows. B must be equal on all ranks."""
    rank, ranks = world()
    if ranks == 1:
        return x
    places = torch.zeros(ranks, *x.shape, dtype=x.dtype, device=x.device)
    places[rank] = x
    return differentiable_sum_over_ranks(places).flatten(0, 1)


def coin_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of coins with probability sigmoid(logits); stable at any logit, a sum of positive terms."""
    distance = logits.abs()
    return F.softplus(-distance) + distance * torch.sigmoid(-distance)


def default_groups(bits: int) -> int:
    """Fewest groups of at most 9 bits."""
    return math.ceil(bits / GROUP_BITS)


def check_groups(bits: int, groups: int | None) -> int:
    """The number of groups to use: 1 bit to 20 bits each.

    Raises:
        ModelError: not such a number.
    """
    if groups is None:
        return default_groups(bits)
    name = f"entropy_groups (groups of 1 to 20 of the {bits} bits)"
    check_range(name, groups, math.ceil(bits / 20), bits)
    return groups


def group_marginals(logits: Tensor, groups: int, mask: Tensor | None, step: bool) -> list[Tensor]:
    """How probable each code of each group is on average over kept tokens.

    Never holds tokens × codes: a group is cut into two halves, whose probabilities (M, g, 2^(k/2)) multiply to the sum over
    tokens in one matrix product.

    Args:
        logits: float32 (B, N, d), of each bit being +.
        groups: number of groups of neighbouring bits; where it does not divide d, the first ones have a bit more.
        mask: bool (B, N) True = kept, or None.
        step: whether this is a training step: then the average is over the tokens of all ranks, with gradient.

    Returns:
        float32 (g, 2^k) each, for the groups of one size; the first bit of a group is the most significant of its code.
    """
    batch, tokens, bits = logits.shape
    size, larger = divmod(bits, groups)
    sums = []
    for part, count, k in ((logits[..., : larger * (size + 1)], larger, size + 1),
                           (logits[..., larger * (size + 1) :], groups - larger, size)):  # fmt: skip
        if count:
            part = part.reshape(batch * tokens, count, k)
            high, low = _joint(part[..., : k // 2]), _joint(part[..., k // 2 :])
            if mask is not None:
                high = high * mask.reshape(-1, 1, 1)
            sums.append(torch.einsum("mga,mgb->gab", high, low).flatten(1))
    kept = logits.new_tensor([batch * tokens]) if mask is None else mask.sum().view(1).to(logits.dtype)
    if step:  # one collective for all of them
        flat = differentiable_sum_over_ranks(torch.cat([*(s.flatten() for s in sums), kept]))
        *flat, kept = flat.split([*(s.numel() for s in sums), 1])
        sums = [f.view_as(s) for f, s in zip(flat, sums)]
    return [s / kept.clamp(min=1) for s in sums]


def codebook_entropy(marginals: list[Tensor]) -> Tensor:
    """Sum over groups of the entropy of their codes in nats, from :func:`group_marginals`; a scalar."""
    # A code that underflowed to 0 adds nothing; without the bound its gradient would be that of log 0.
    return -sum((p * p.clamp(min=1e-30).log()).sum() for p in marginals)


def binary_output(
    q: Tensor, bits: Tensor, mask: Tensor | None, losses: dict[str, Tensor], stats: dict[str, Tensor], step: bool
) -> QuantizerOutput:
    """Blank masked places, pack the bits to ids (or keep them beyond 62) and add what says how they are used.

    Args:
        q: float (B, N, D) codes.
        bits: bool (B, N, d).
        mask: bool (B, N) True = kept, or None.
        losses, stats: of the output.
        step: whether this is a training step: usage is then that of all ranks.
    """
    if mask is not None:
        bits, q = bits & mask[..., None], q.masked_fill(~mask[..., None], 0)
    tokens = bits_to_tokens(bits)
    stats = {**{k: v.detach() for k, v in stats.items()}, "bit_entropy": bit_entropy(bits, mask, step)}
    if bits.shape[-1] <= COUNT_UP_TO:
        counts = count_ids(tokens, mask, 2 ** bits.shape[-1])
        stats.update(usage_stats(sum_over_ranks(counts) if step else counts))
    if tokens.ndim == 3:
        return QuantizerOutput(q, None, losses, stats, bits=tokens)
    return QuantizerOutput(q, tokens, losses, stats)


@torch.no_grad()
def bit_entropy(bits: Tensor, mask: Tensor | None, step: bool) -> Tensor:
    """How evenly each bit is used: mean over bits of the entropy of its average, in bits; 1 is even, 0 is stuck.

    Args:
        bits: bool (B, N, d).
        mask: bool (B, N) True = kept, or None.
        step: whether to average over all ranks (then every rank gets here).
    """
    kept = bits if mask is None else bits & mask[..., None]
    count = torch.tensor(bits.shape[0] * bits.shape[1], device=bits.device) if mask is None else mask.sum()
    sums = torch.cat([kept.sum((0, 1)), count.view(1)]).float()
    if step:
        sum_over_ranks(sums)
    share = sums[:-1] / sums[-1].clamp(min=1)
    entropy = -torch.special.xlogy(share, share) - torch.special.xlogy(1 - share, 1 - share)
    return entropy.mean() / math.log(2)


def _joint(logits: Tensor) -> Tensor:
    """Float (M, g, k) logits of independent bits → (M, g, 2^k) probabilities of their values, first bit most significant."""
    joint = logits.new_ones(*logits.shape[:-1], 1)
    for bit in logits.unbind(-1):
        coin = torch.stack([torch.sigmoid(-bit), torch.sigmoid(bit)], -1)
        joint = (joint[..., None] * coin[..., None, :]).flatten(-2)
    return joint
