"""DualVQ: two codebooks searched together — one id names a semantic code and a pixel code at once (TokenFlow).

Paper: https://arxiv.org/abs/2412.03069. Latents hold semantic channels first, pixel channels after them; the id is
argmin_k |z_sem - e_k|² + w |z_pix - e'_k|². What makes the first kind semantic is its training: distil the codes that
:meth:`DualVQ.split` gives.

Shapes: B images, N tokens, D = D_sem + D_pix width, K codes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.part import Quantizer, QuantizerOutput
from tok1d.tokenizers.quantizers.common import (
    count_ids,
    kept_only,
    straight_through,
    sum_over_ranks,
    token_mean,
    usage_stats,
)
from tok1d.tokenizers.quantizers.vq_search import nearest


class DualVQ(Quantizer):
    """Vector quantization with a shared id of two codebooks.

    Args:
        vocab_size: K.
        semantic_dim: channels of the semantic branch, the first of a latent.
        pixel_dim: channels of the pixel branch, the rest.
        pixel_weight: w, weight of the pixel distance in the search.
        l2: compare and return unit vectors, in each branch.
        commitment: published weight of the ``commitment`` loss; goes into ``loss_weights``.

    The losses are unweighted: ``commitment`` (latents towards codes) and ``codebook`` (codes towards latents), each the
    sum over the two branches of the mean over kept tokens and the channels of the branch.

    Example:
        >>> vq = DualVQ(16, semantic_dim=6, pixel_dim=2)
        >>> semantic, pixel = vq.split(vq(torch.randn(2, 8, 8)).q)
        >>> semantic.shape, pixel.shape
        (torch.Size([2, 8, 6]), torch.Size([2, 8, 2]))
    """

    def __init__(
        self,
        vocab_size: int,
        semantic_dim: int,
        pixel_dim: int,
        pixel_weight: float = 1.0,
        l2: bool = True,
        commitment: float = 1.0,
    ) -> None:
        super().__init__()
        check_range("vocab_size", vocab_size, 2, 2**26)
        check_range("semantic_dim", semantic_dim, 1, 32768)
        check_range("pixel_dim", pixel_dim, 1, 32768)
        if not 0 < pixel_weight < math.inf:
            raise ModelError(f"pixel_weight must be a positive number, got {pixel_weight}; without pixels use VQ")
        self.vocab_size, self.l2, self.pixel_weight = vocab_size, l2, pixel_weight
        self.semantic_dim, self.pixel_dim, self.dim = semantic_dim, pixel_dim, semantic_dim + pixel_dim
        self.loss_weights = {"commitment": commitment, "codebook": 1.0}
        self.semantic_codebook = nn.Parameter(_codebook(vocab_size, semantic_dim, l2))
        self.pixel_codebook = nn.Parameter(_codebook(vocab_size, pixel_dim, l2))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Float (..., D) latents or codes → semantic (..., D_sem) and pixel (..., D_pix) channels."""
        semantic, pixel = x.split([self.semantic_dim, self.pixel_dim], -1)
        return semantic, pixel

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Float (B, N, D), bool mask (B, N) True = keep → QuantizerOutput with ids in [0, K)."""
        step = self.training and torch.is_grad_enabled()
        with torch.autocast(z.device.type, enabled=False):
            z = kept_only(z, mask)
            if self.l2:
                z = torch.cat([F.normalize(branch, dim=-1) for branch in self.split(z)], -1)
            ids = self.codes_to_ids(z.detach())
            codes = self.ids_to_codes(ids)
            losses = {
                "commitment": token_mean(self._error(z, codes.detach()), mask, step),
                "codebook": token_mean(self._error(codes, z.detach()), mask, step),
            }
            q = straight_through(z, codes)
            if mask is not None:
                ids, q = ids.masked_fill(~mask, 0), q.masked_fill(~mask[..., None], 0)
            counts = count_ids(ids, mask, self.vocab_size)
            if step:
                sum_over_ranks(counts)
        return QuantizerOutput(q, ids, losses, usage_stats(counts))

    def _error(self, a: Tensor, b: Tensor) -> Tensor:
        """Float (B, N, D) twice → float (B, N), squared error of the mean channel, the two branches added."""
        semantic, pixel = self.split((a - b).square())
        return semantic.mean(-1) + pixel.mean(-1)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """int64 (B, n) in [0, K) → float32 (B, n, D)."""
        branches = [F.embedding(ids, book).float() for book in (self.semantic_codebook, self.pixel_codebook)]
        return torch.cat([F.normalize(b, dim=-1) for b in branches] if self.l2 else branches, -1)

    @torch.no_grad()
    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """float (B, n, D) → int64 (B, n), the nearest codes."""
        with torch.autocast(codes.device.type, enabled=False):
            # The two distances are one when pixels are stretched by the root of their weight.
            books = torch.cat([self._stretched(self.semantic_codebook, 1), self._stretched(self.pixel_codebook, self.pixel_weight)], -1)
            semantic, pixel = self.split(codes.flatten(0, -2))
            rows = torch.cat([self._stretched(semantic, 1), self._stretched(pixel, self.pixel_weight)], -1)
            return nearest(rows, books).view(codes.shape[:-1])

    def _stretched(self, x: Tensor, weight: float) -> Tensor:
        """Float (n, d) of one branch, unit vectors if ``l2``, times the root of the weight of its distance."""
        x = F.normalize(x.float(), dim=-1) if self.l2 else x.float()
        return x if weight == 1 else x * math.sqrt(weight)


def _codebook(codes: int, dim: int, l2: bool) -> Tensor:
    """Random codes float (K, d), as VQ starts."""
    if l2:
        return F.normalize(torch.randn(codes, dim), dim=-1)
    return torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes)
