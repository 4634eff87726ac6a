"""VQ: the nearest row of a codebook, learned by gradient or as a moving average, with restart of dead codes.

VQ-VAE: https://arxiv.org/abs/1711.00937; cosine form (``l2``): https://arxiv.org/abs/2110.04627. A batch is what all ranks
hold together: usage and averages are summed over them, and a restarted code is the same everywhere.

Shapes: B images, N tokens, D width, K codes, M = B · N.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.part import Quantizer, QuantizerOutput
from tok1d.tokenizers.quantizers.common import count_ids, sum_over_ranks, token_mean, usage_stats, world

# Scores of M tokens against K codes are made for so many pairs at a time: a CPU cache's worth, more where launches cost.
PAIRS_CPU, PAIRS_GPU = 2**22, 2**25


class VQ(Quantizer):
    """Vector quantization.

    Args:
        vocab_size: K.
        dim: D.
        l2: compare and return unit vectors (cosine distance).
        commitment: published weight of the ``commitment`` loss; goes into ``loss_weights``.
        ema: the codebook follows the latents as a moving average instead of the ``codebook`` loss.
        ema_decay: of the moving averages, for one training step.
        dead_code_threshold: a code used less than this share of the average use is restarted from a latent of the
            batch; 0 never restarts.
        seed: of the choice of those latents.

    The losses are unweighted means over kept tokens and channels: ``commitment`` (latents towards codes) and, unless
    ``ema``, ``codebook`` (codes towards latents). Averages and restarts happen in training steps only: in training mode
    with gradients enabled.

    Example:
        >>> vq = VQ(16, 4)
        >>> out = vq(torch.randn(2, 8, 4))
        >>> out.ids.shape, out.q.shape, bool((vq.codes_to_ids(out.q) == out.ids).all())
        (torch.Size([2, 8]), torch.Size([2, 8, 4]), True)
    """

    training_only = ("ema_count", "ema_sum", "steps")

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        l2: bool = False,
        commitment: float = 0.25,
        ema: bool = False,
        ema_decay: float = 0.99,
        dead_code_threshold: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_range("vocab_size", vocab_size, 2, 2**26)
        check_range("dim", dim, 1, 65536)
        if not 0 <= ema_decay < 1 or not 0 <= dead_code_threshold < 1:
            raise ModelError(
                f"ema_decay and dead_code_threshold must be in [0, 1), got {ema_decay} and {dead_code_threshold}"
            )
        self.vocab_size, self.dim, self.l2, self.ema = vocab_size, dim, l2, ema
        self.ema_decay, self.dead_code_threshold, self.seed = ema_decay, dead_code_threshold, seed
        self.loss_weights = {"commitment": commitment} if ema else {"commitment": commitment, "codebook": 1.0}
        if l2:
            codebook = F.normalize(torch.randn(vocab_size, dim), dim=-1)
        else:
            codebook = torch.empty(vocab_size, dim).uniform_(-1 / vocab_size, 1 / vocab_size)
        if ema:
            self.register_buffer("codebook", codebook)
            self.register_buffer("ema_sum", codebook.clone())
        else:
            self.codebook = nn.Parameter(codebook)
        if ema or dead_code_threshold:
            self.register_buffer("ema_count", torch.ones(vocab_size))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Float (B, N, D), bool mask (B, N) True = keep → QuantizerOutput with ids in [0, K)."""
        step = self.training and torch.is_grad_enabled()
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if mask is not None:
                z = z.masked_fill(~mask[..., None], 0)  # whatever stood there, even nan, is gone from here on
            if self.l2:
                z = F.normalize(z, dim=-1)
            ids = self.codes_to_ids(z.detach())
            codes = self.ids_to_codes(ids)
            losses = {"commitment": token_mean((z - codes.detach()).square().mean(-1), mask, step)}
            if not self.ema:
                losses["codebook"] = token_mean((codes - z.detach()).square().mean(-1), mask, step)
            q = codes.detach() + (z - z.detach())  # value of the code to the last bit, gradient of z
            if mask is not None:
                ids, q = ids.masked_fill(~mask, 0), q.masked_fill(~mask[..., None], 0)
            counts = count_ids(ids, mask, self.vocab_size)
            if step:
                self._learn(z.detach(), ids, mask, sum_over_ranks(counts))
        return QuantizerOutput(q, ids, losses, usage_stats(counts))

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """int64 (B, n) in [0, K) → float32 (B, n, D)."""
        # Only the rows that are used get normalised: gradients and the restart then never meet on one tensor.
        codes = F.embedding(ids, self.codebook).float()
        return F.normalize(codes, dim=-1) if self.l2 else codes

    @torch.no_grad()
    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """float (B, n, D) → int64 (B, n), the nearest codes; never holds all M × K distances."""
        with torch.autocast(codes.device.type, enabled=False):
            rows, book = codes.float().flatten(0, -2), self.codebook.float()
            if self.l2:
                rows, book = F.normalize(rows, dim=-1), F.normalize(book, dim=-1)
            # |z - e|² without |z|², the same for every code, as one product: (z, 1) · (-2 e, |e|²)
            book = torch.cat([-2 * book, book.square().sum(-1, keepdim=True)], -1).T
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], -1)
            pairs = PAIRS_CPU if rows.device.type == "cpu" else PAIRS_GPU
            ids = [_first_minimum(part @ book) for part in rows.split(max(1, pairs // self.vocab_size))]
        return torch.cat(ids).view(codes.shape[:-1])

    # learning of the codebook outside the gradient -----------------------------------------------------------------

    @torch.no_grad()
    def _learn(self, z: Tensor, ids: Tensor, mask: Tensor | None, counts: Tensor) -> None:
        """One step of the moving averages and the restart; ``counts`` are those of all ranks, masked z are zero."""
        if not (self.ema or self.dead_code_threshold):
            return
        self.steps += 1
        self.ema_count.lerp_(counts, 1 - self.ema_decay)
        if self.ema:
            sums = torch.zeros_like(self.ema_sum).index_add_(0, ids.flatten(), z.flatten(0, 1))
            self.ema_sum.lerp_(sum_over_ranks(sums), 1 - self.ema_decay)
            total, eps = self.ema_count.sum(), 1e-5  # Laplace smoothing: no division by a count of zero
            counted = (self.ema_count + eps) / (total + self.vocab_size * eps) * total
            codebook = self.ema_sum / counted[:, None]
            self.codebook.copy_(F.normalize(codebook, dim=-1) if self.l2 else codebook)
        if self.dead_code_threshold:
            self._restart(z.flatten(0, 1) if mask is None else z[mask])

    def _restart(self, live: Tensor) -> None:
        """Put latents of the batch, float (m, D), in the place of codes that have fallen out of use."""
        rank, ranks = world()
        mean = self.ema_count.mean()
        dead = (self.ema_count < self.dead_code_threshold * mean).nonzero().flatten()
        if len(dead) == 0:  # counts are equal on all ranks, so all of them leave here together
            return
        supply = torch.zeros(ranks, device=live.device)
        supply[rank] = len(live)
        supply = [int(m) for m in sum_over_ranks(supply).tolist()]
        givers = [r for r in range(ranks) if supply[r]]
        dead = dead[: len(givers) * min((supply[r] for r in givers), default=0)]
        fresh = torch.zeros(len(dead), self.dim, device=live.device)
        if rank in givers:  # ranks take turns: each fills its rows, the sum over ranks is everybody's
            turn = fresh[givers.index(rank) :: len(givers)]
            rng = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.steps) * ranks + rank)
            turn.copy_(live[torch.randperm(len(live), generator=rng)[: len(turn)].to(live.device)])
        self.codebook[dead] = sum_over_ranks(fresh).to(self.codebook.dtype)
        self.ema_count[dead] = mean
        if self.ema:
            self.ema_sum[dead] = fresh * mean

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Exported weights leave the averages out: start them as a new codebook does."""
        codebook = state_dict.get(prefix + "codebook")
        if codebook is not None:
            fresh = {"ema_count": torch.ones(len(codebook)), "ema_sum": codebook.float(), "steps": torch.tensor(0)}
            for name in self.training_only:
                if name in self._buffers:
                    state_dict.setdefault(prefix + name, fresh[name].to(codebook.device, copy=True))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _first_minimum(x: Tensor) -> Tensor:
    """Float (m, K) → int64 (m,), ``x.argmin(-1)``, found through minima of groups: they vectorise, argmin does not."""
    m, k = x.shape
    group = math.gcd(k, 128)
    x = x.view(m, k // group, group)
    best = x.amin(-1).argmin(-1)
    return best * group + x[torch.arange(m, device=x.device), best].argmin(-1)
