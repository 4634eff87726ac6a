"""How a codebook learns outside the gradient: moving averages, restart of dead codes, k-means, clustering.

Plain functions on the tensors of a codebook, all without gradient and in place. A batch is what all ranks hold together,
in the order of ranks: every function gives the same codebook on all of them, the one a single process gets from the
concatenation. Every rank must call; a rank may have no live latents.

Shapes: m live (unmasked) latents of this rank, K codes, D width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tok1d.tokenizers.quantizers.common import sum_over_ranks, world
from tok1d.tokenizers.quantizers.vq_search import nearest


@torch.no_grad()
def moving_average(
    codebook: Tensor, count: Tensor, total: Tensor, live: Tensor, ids: Tensor, decay: float, l2: bool
) -> None:
    """Every code becomes the mean of the latents it stood for lately (VQ-VAE, appendix A.1).

    Args:
        codebook: (K, D), replaced.
        count: float (K,), average of the counts, already updated.
        total: float (K, D), average of the sums of latents, updated.
        live: float (m, D), unit vectors if ``l2``.
        ids: int64 (m,), their codes.
        decay: of the averages, for one step.
        l2: codes are unit vectors.
    """
    sums = torch.zeros_like(total).index_add_(0, ids, live)
    total.lerp_(sum_over_ranks(sums), 1 - decay)
    used, eps = count.sum(), 1e-5  # Laplace smoothing: no division by a count of zero
    counted = (count + eps) / (used + len(count) * eps) * used
    mean = total / counted[:, None]
    codebook.copy_(F.normalize(mean, dim=-1) if l2 else mean)


@torch.no_grad()
def restart(
    codebook: Tensor, count: Tensor, total: Tensor | None, live: Tensor, threshold: float, seed: int
) -> None:
    """Put latents of the batch in the place of codes used less than ``threshold`` times the average.

    Args:
        codebook, count, total: as :func:`moving_average` (total: None if the codebook is no average).
        live: float (m, D).
        threshold: share of the average use.
        seed: which latents are taken.
    """
    mean = count.mean()
    dead = (count < threshold * mean).nonzero().flatten()
    if len(dead) == 0:  # counts are equal on all ranks, so all of them leave here together
        return
    start, supply = _place(live)
    picks = torch.randperm(supply, generator=torch.Generator().manual_seed(seed))[: len(dead)]
    dead = dead[: len(picks)]
    fresh = _rows(live, start, picks)
    codebook[dead] = fresh.to(codebook.dtype)
    count[dead] = mean
    if total is not None:
        total[dead] = fresh * mean


@torch.no_grad()
def kmeans(live: Tensor, codes: int, iterations: int, l2: bool, seed: int) -> tuple[Tensor, Tensor] | None:
    """Lloyd's algorithm on the latents of all ranks, from K of them drawn without repetition.

    Where there are fewer latents than codes, the remaining codes start beside latents drawn again, a hundredth of the
    latents' deviation away, so that no two codes are one. A centre that loses its latents stays where it was.

    Args:
        live: float (m, D), unit vectors if ``l2``.
        codes: K.
        iterations: rounds of assignment and averaging.
        l2: centres are unit vectors.
        seed: of the draws.

    Returns:
        Centres float32 (K, D) and how many latents each has, float32 (K,); None if no rank has any latent.
    """
    start, supply = _place(live)
    if supply == 0:
        return None
    rng = torch.Generator().manual_seed(seed)
    centres = _rows(live, start, torch.randperm(supply, generator=rng)[:codes])
    if supply < codes:
        again = torch.randint(supply, (codes - supply,), generator=rng).to(live.device)
        shift = torch.randn(len(again), live.shape[1], generator=rng).to(live.device)
        centres = torch.cat([centres, centres[again] + shift * centres.std(0, correction=0) / 100])
    counts = torch.zeros(codes, device=live.device)
    for _ in range(iterations):
        ids = nearest(live, centres, l2)
        counts = sum_over_ranks(torch.zeros_like(counts).index_add_(0, ids, torch.ones_like(live[:, 0])))
        sums = sum_over_ranks(torch.zeros_like(centres).index_add_(0, ids, live))
        mean = sums / counts.clamp(min=1)[:, None]
        centres = torch.where(counts[:, None] > 0, F.normalize(mean, dim=-1) if l2 else mean, centres)
    return centres, counts


@torch.no_grad()
def cluster(codebook: Tensor, prob: Tensor, live: Tensor, counts: Tensor, decay: float, l2: bool) -> None:
    """Codes out of use move to the latents nearest to them (CVQ-VAE, https://arxiv.org/abs/2307.15139, and TA-TiTok).

    With ``prob`` the average share of use of code k and f_k the latent nearest to it, e_k becomes (1 - a) e_k + a f_k,
    a = exp(-10 K prob / (1 - decay) - 0.001): about 1 for dead codes, nothing for those in use.

    Args:
        codebook: (K, D), updated.
        prob: float (K,), average share of use, updated.
        live: float (m, D); not normalised, whatever ``l2`` says.
        counts: float (K,), how often each code was used, over all ranks.
        decay: of the average, for one step.
        l2: "nearest" is by cosine. The published code mixes codes with the latents' own length even then; so do we.
    """
    used = counts.sum()
    prob.copy_(torch.where(used > 0, prob.lerp(counts / used.clamp(min=1), 1 - decay), prob))
    alpha = torch.exp(-prob * len(prob) * 10 / (1 - decay) - 1e-3)
    if len(live):
        found = live[nearest(codebook, live, l2)]
        gap = _distance(found, codebook.float(), l2)
    else:
        found, gap = torch.zeros_like(codebook, dtype=torch.float32), torch.full_like(prob, torch.inf)
    rank, ranks = world()
    if ranks > 1:  # the nearest over all ranks, the lowest rank's if several are as near
        least = gap.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        owner = torch.where(gap == least, rank, ranks)
        dist.all_reduce(owner, dist.ReduceOp.MIN)
        found, gap = sum_over_ranks(found.masked_fill_((owner != rank)[:, None], 0)), least
    alpha = alpha.masked_fill(gap.isinf(), 0)  # nobody has a latent
    codebook.copy_(torch.lerp(codebook.float(), found, alpha[:, None]))


def _distance(a: Tensor, b: Tensor, l2: bool) -> Tensor:
    """Float (K, D) twice → float (K,) squared distances."""
    if l2:
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    return (a - b).square_().sum(-1)


def _place(live: Tensor) -> tuple[int, int]:
    """How many live latents the ranks before this one have, and all ranks together."""
    rank, ranks = world()
    if ranks == 1:
        return 0, len(live)
    supply = torch.zeros(ranks, dtype=torch.int64, device=live.device)
    supply[rank] = len(live)
    counts = sum_over_ranks(supply).tolist()
    return sum(counts[:rank]), sum(counts)


def _rows(live: Tensor, start: int, index: Tensor) -> Tensor:
    """Rows of all ranks' latents in the order of ranks, int64 (n,) → float32 (n, D), the same on every rank."""
    index = index.to(live.device) - start
    mine = (index >= 0) & (index < len(live))
    rows = torch.zeros(len(index), live.shape[1], device=live.device)
    rows[mine] = live[index[mine]].float()
    return sum_over_ranks(rows)
