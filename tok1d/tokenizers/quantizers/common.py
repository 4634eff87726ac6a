"""What several quantizers share: masked means and sums over all ranks, and codebook usage.

Shapes: B images, N tokens, K codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, number of ranks) of the running process group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def rank_rows(rows: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Random numbers of this rank's samples: drawn for those of all ranks, of which each takes its own.

    With the same state of the generator on every rank (training steps see to that), several processes draw what one would
    for their batches put together.

    Args:
        rows: samples of this rank; all ranks have as many.
        draw: from a number of samples to a tensor with so many rows.

    Example:
        >>> rank_rows(2, torch.arange)
        tensor([0, 1])
    """
    rank, ranks = world()
    return draw(rows * ranks)[rank * rows : (rank + 1) * rows]


def sum_over_ranks(x: Tensor) -> Tensor:
    """Add ``x`` up over all ranks, in place and without gradient; every rank must call it."""
    if world()[1] > 1:
        dist.all_reduce(x)
    return x


def token_mean(values: Tensor, mask: Tensor | None, step: bool) -> Tensor:
    """Mean over kept tokens.

    In a training step the divisor is the mean number of kept tokens of a rank: gradients that data parallelism averages
    are then those of the mean over the tokens of all ranks, however unequal their masks are.

    Args:
        values: float (B, N).
        mask: bool (B, N) True = kept, or None.
        step: whether this is a training step (then every rank gets here).
    """
    kept = values if mask is None else values.masked_fill(~mask, 0)
    count = torch.tensor(float(values.numel()), device=values.device) if mask is None else mask.sum().float()
    if step:
        count = sum_over_ranks(count) / world()[1]
    return kept.sum() / count.clamp(min=1)


def count_ids(ids: Tensor, mask: Tensor | None, vocab_size: int) -> Tensor:
    """int64 (B, N) ids → float32 (K,), how often each is used by kept tokens."""
    weight = torch.ones(ids.shape, device=ids.device) if mask is None else mask.float()
    return torch.zeros(vocab_size, device=ids.device).scatter_add_(0, ids.flatten(), weight.flatten())


def usage_stats(counts: Tensor) -> dict[str, Tensor]:
    """Float (K,) counts → ``usage``, the share of codes met, and ``perplexity``, exp of the entropy of their use."""
    share = counts / counts.sum().clamp(min=1)
    entropy = -torch.special.xlogy(share, share).sum()
    return {"usage": (counts > 0).float().mean(), "perplexity": entropy.exp()}


def kept_only(z: Tensor, mask: Tensor | None) -> Tensor:
    """Float (B, N, D) as float32, zero where the mask is False: whatever stood there, even nan, is gone from here on."""
    z = z.float()
    return z if mask is None else z.masked_fill(~mask[..., None], 0)


def kept_rows(z: Tensor, mask: Tensor | None) -> Tensor:
    """Float (B, N, D) → (m, D), the kept ones."""
    return z.flatten(0, 1) if mask is None else z[mask]


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """The value of ``codes`` to the last bit, the gradient of ``z``."""
    return codes.detach() + (z - z.detach())


def rotated(z: Tensor, codes: Tensor) -> Tensor:
    """The value of ``codes`` to the last bit, with the gradient of the rotation and stretch that take z there.

    The rotation trick, https://arxiv.org/abs/2410.06424, eq. 4: q = s R z with s = |q| / |z| and
    R = I - 2 w wᵀ + 2 q̂ ûᵀ constant, where û and q̂ are the directions of z and q and w that of û + q̂. The gradient of z
    is s Rᵀ times that of q: its angle to z is that of the incoming gradient to q. A latent of zero has no direction; it
    gets the straight-through gradient.
    """
    with torch.no_grad():
        length = z.norm(dim=-1, keepdim=True)
        stretch = codes.norm(dim=-1, keepdim=True) / length.clamp(min=1e-12)
        u, v = (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x in (z, codes))
        w = u + v
        w = w / w.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    turned = z - 2 * w * (w * z).sum(-1, keepdim=True) + 2 * v * (u * z).sum(-1, keepdim=True)
    return straight_through(torch.where(length > 1e-12, stretch * turned, z), codes)
