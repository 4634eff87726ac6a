"""VQ: the nearest row of a codebook, learned by gradient, as a moving average or by clustering.

VQ-VAE: https://arxiv.org/abs/1711.00937; cosine form (``l2``): https://arxiv.org/abs/2110.04627; clustering as in TA-TiTok:
https://arxiv.org/abs/2307.15139; drawn codes as in LARP: https://arxiv.org/abs/2410.21264; rotation trick:
https://arxiv.org/abs/2410.06424. A batch is what all ranks hold together: usage and averages are summed over them, and
the codebook is the same everywhere.

Shapes: B images, N tokens, D width, K codes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.part import Quantizer, QuantizerOutput
from tok1d.tokenizers.quantizers import vq_learning
from tok1d.tokenizers.quantizers.common import (
    count_ids,
    kept_only,
    kept_rows,
    rotated,
    straight_through,
    sum_over_ranks,
    token_mean,
    usage_stats,
)
from tok1d.tokenizers.quantizers.vq_search import nearest


class VQ(Quantizer):
    """Vector quantization.

    Args:
        vocab_size: K.
        dim: D.
        l2: compare and return unit vectors (cosine distance).
        commitment: published weight of the ``commitment`` loss; goes into ``loss_weights``.
        ema: the codebook follows the latents as a moving average instead of the ``codebook`` loss.
        ema_decay: of the moving averages (codes, and their use), for one training step.
        dead_code_threshold: a code used less than this share of the average use is restarted from a latent of the
            batch; 0 never restarts.
        seed: of the choice of those latents, and of k-means.
        temperature: in training steps, draw each code with probability softmax(similarity / temperature) instead of taking
            the nearest (LARP: ``l2`` and 0.03); similarity is the cosine with ``l2``, else minus the squared distance.
            0 always takes the nearest, and so does everything but a training step.
        kmeans_iterations: before the first training step, put the codes at the centres that so many rounds of k-means
            find in its latents; 0 keeps the random codes.
        rotation: pass gradients back through the rotation that takes a latent to its code, instead of unchanged.
        clustering: besides the ``codebook`` loss, pull codes out of use to the latents nearest to them (TA-TiTok).

    The losses are unweighted means over kept tokens and channels: ``commitment`` (latents towards codes) and, unless
    ``ema``, ``codebook`` (codes towards latents). Draws, averages, restarts, clustering and k-means happen in training
    steps only: in training mode with gradients enabled.

    Example:
        >>> vq = VQ(16, 4)
        >>> out = vq(torch.randn(2, 8, 4))
        >>> out.ids.shape, out.q.shape, bool((vq.codes_to_ids(out.q) == out.ids).all())
        (torch.Size([2, 8]), torch.Size([2, 8, 4]), True)
    """

    training_only = ("ema_count", "ema_sum", "steps", "embed_prob", "fitted")

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
        temperature: float = 0.0,
        kmeans_iterations: int = 0,
        rotation: bool = False,
        clustering: bool = False,
    ) -> None:
        super().__init__()
        check_range("vocab_size", vocab_size, 2, 2**26)
        check_range("dim", dim, 1, 65536)
        check_range("kmeans_iterations", kmeans_iterations, 0, 10_000)
        if not 0 <= ema_decay < 1 or not 0 <= dead_code_threshold < 1:
            raise ModelError(
                f"ema_decay and dead_code_threshold must be in [0, 1), got {ema_decay} and {dead_code_threshold}"
            )
        if not 0 <= temperature < float("inf"):
            raise ModelError(f"temperature must be 0 (nearest code) or a positive number, got {temperature}")
        if clustering and (ema or dead_code_threshold):
            raise ModelError(
                "clustering already moves dead codes of a codebook learned by gradient; "
                "use it without ema and dead_code_threshold, or leave it out"
            )
        self.vocab_size, self.dim, self.l2, self.ema = vocab_size, dim, l2, ema
        self.ema_decay, self.dead_code_threshold, self.seed = ema_decay, dead_code_threshold, seed
        self.temperature, self.kmeans_iterations = temperature, kmeans_iterations
        self.rotation, self.clustering = rotation, clustering
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
        if clustering:
            self.register_buffer("embed_prob", torch.zeros(vocab_size))
        if kmeans_iterations:
            self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self._fitted: bool | None = None  # `fitted` where it can be read without waiting for the GPU; None: not read yet

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Float (B, N, D), bool mask (B, N) True = keep → QuantizerOutput with ids in [0, K)."""
        step = self.training and torch.is_grad_enabled()
        with torch.autocast(z.device.type, enabled=False):
            raw = kept_only(z, mask)
            if step:
                self.fit(raw.detach(), mask)
            ids = self.choose(raw.detach(), step)
            codes = self.ids_to_codes(ids)
            z = F.normalize(raw, dim=-1) if self.l2 else raw
            losses = {"commitment": token_mean((z - codes.detach()).square().mean(-1), mask, step)}
            if not self.ema:
                losses["codebook"] = token_mean((codes - z.detach()).square().mean(-1), mask, step)
            q = rotated(z, codes) if self.rotation else straight_through(z, codes)
            if mask is not None:
                ids, q = ids.masked_fill(~mask, 0), q.masked_fill(~mask[..., None], 0)
            counts = count_ids(ids, mask, self.vocab_size)
            if step:
                self.learn(raw.detach(), ids, mask, sum_over_ranks(counts))
        return QuantizerOutput(q, ids, losses, usage_stats(counts))

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """int64 (B, n) in [0, K) → float32 (B, n, D)."""
        # Only the rows that are used get normalised: gradients and the restart then never meet on one tensor.
        codes = F.embedding(ids, self.codebook).float()
        return F.normalize(codes, dim=-1) if self.l2 else codes

    @torch.no_grad()
    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """float (B, n, D) → int64 (B, n), the nearest codes; never holds all distances."""
        with torch.autocast(codes.device.type, enabled=False):
            return nearest(codes.flatten(0, -2), self.codebook, self.l2).view(codes.shape[:-1])

    # the steps of forward, for quantizers made of several codebooks --------------------------------------------------

    @torch.no_grad()
    def choose(self, z: Tensor, step: bool) -> Tensor:
        """Float32 (B, N, D) → int64 (B, N): the nearest codes, or in a training step with a temperature drawn ones."""
        temperature = self.temperature if step else 0.0
        return nearest(z.flatten(0, -2), self.codebook, self.l2, temperature).view(z.shape[:-1])

    @torch.no_grad()
    def fit(self, z: Tensor, mask: Tensor | None) -> None:
        """Put the codes at the centres of the first latents, float32 (B, N, D), if so configured and not done yet."""
        if not self.kmeans_iterations:
            return
        if self._fitted is None:
            self._fitted = bool(self.fitted)
        if self._fitted:
            return
        live = kept_rows(F.normalize(z, dim=-1) if self.l2 else z, mask)
        found = vq_learning.kmeans(live, self.vocab_size, self.kmeans_iterations, self.l2, self.seed)
        if found is None:  # every token of every rank is masked: the next step will do
            return
        centres, counts = found
        self.codebook.copy_(centres)
        if "ema_count" in self._buffers:
            self.ema_count.copy_(counts.clamp(min=1))
        if self.ema:
            self.ema_sum.copy_(centres * self.ema_count[:, None])
        self.fitted.fill_(True)
        self._fitted = True

    @torch.no_grad()
    def learn(self, z: Tensor, ids: Tensor, mask: Tensor | None, counts: Tensor) -> None:
        """What a training step does to the codebook besides the gradient.

        Args:
            z: float32 (B, N, D) as given, zero where masked.
            ids: int64 (B, N), zero where masked.
            mask: bool (B, N) True = kept, or None.
            counts: float (K,), how often each code was used, over all ranks.
        """
        if self.clustering:
            live = kept_rows(z, mask)
            vq_learning.cluster(self.codebook, self.embed_prob, live, counts, self.ema_decay, self.l2)
        if not (self.ema or self.dead_code_threshold):
            return
        z = F.normalize(z, dim=-1) if self.l2 else z
        self.steps += 1
        self.ema_count.lerp_(counts, 1 - self.ema_decay)
        total = self.ema_sum if self.ema else None
        if total is not None:
            rows, ids = z.flatten(0, 1), ids.flatten()  # masked rows are zeros: they add nothing
            vq_learning.moving_average(self.codebook, self.ema_count, total, rows, ids, self.ema_decay, self.l2)
        if self.dead_code_threshold:
            seed = self.seed * 1_000_003 + int(self.steps)
            vq_learning.restart(self.codebook, self.ema_count, total, kept_rows(z, mask), self.dead_code_threshold, seed)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Exported weights leave the averages out: start them as a new codebook does. Theirs is a codebook that was fitted."""
        codebook = state_dict.get(prefix + "codebook")
        if codebook is not None:
            codes = len(codebook)
            fresh = {
                "ema_count": torch.ones(codes),
                "ema_sum": codebook.float(),
                "steps": torch.tensor(0),
                "embed_prob": torch.zeros(codes),
                "fitted": torch.tensor(True),
            }
            for name in self.training_only:
                if name in self._buffers:
                    state_dict.setdefault(prefix + name, fresh[name].to(codebook.device, copy=True))
        self._fitted = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
