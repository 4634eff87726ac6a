"""SimVQ: the codebook is a frozen random table seen through one learned linear map, so that no code can be left behind.

Paper: https://arxiv.org/abs/2411.02038. The gradient of any code turns and stretches all of them; the table itself
never learns.

Shapes: B images, N tokens, D width, K codes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.part import Quantizer, QuantizerOutput
from tok1d.tokenizers.quantizers.common import (
    count_ids,
    kept_only,
    rotated,
    straight_through,
    sum_over_ranks,
    token_mean,
    usage_stats,
)
from tok1d.tokenizers.quantizers.vq_search import nearest


class SimVQ(Quantizer):
    """Vector quantization with a linear map of a frozen codebook.

    Args:
        vocab_size: K.
        dim: D.
        commitment: published weight of the ``commitment`` loss; goes into ``loss_weights``.
        rotation: pass gradients back through the rotation that takes a latent to its code, instead of unchanged.

    The losses are unweighted means over kept tokens and channels: ``commitment`` (latents towards codes) and
    ``codebook`` (codes towards latents, by way of the map).

    Example:
        >>> vq = SimVQ(16, 4)
        >>> [name for name, _ in vq.named_parameters()], vq(torch.randn(2, 8, 4)).ids.shape
        (['map.weight'], torch.Size([2, 8]))
    """

    def __init__(self, vocab_size: int, dim: int, commitment: float = 0.25, rotation: bool = False) -> None:
        super().__init__()
        check_range("vocab_size", vocab_size, 2, 2**26)
        check_range("dim", dim, 1, 65536)
        self.vocab_size, self.dim, self.rotation = vocab_size, dim, rotation
        self.loss_weights = {"commitment": commitment, "codebook": 1.0}
        self.register_buffer("table", torch.randn(vocab_size, dim) * dim**-0.5)
        self.map = nn.Linear(dim, dim, bias=False)
        self._book: tuple[Any, Tensor] | None = None

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Float (B, N, D), bool mask (B, N) True = keep → QuantizerOutput with ids in [0, K)."""
        step = self.training and torch.is_grad_enabled()
        with torch.autocast(z.device.type, enabled=False):
            z = kept_only(z, mask)
            book = self.book()
            ids = nearest(z.detach().flatten(0, 1), book).view(z.shape[:2])
            learned = F.linear(F.embedding(ids, self.table).float(), self.map.weight.float())  # with gradient to the map
            # Products of other sizes round differently; rows of the one table are the codes to the last bit.
            codes = F.embedding(ids, book)
            losses = {
                "commitment": token_mean((z - codes).square().mean(-1), mask, step),
                "codebook": token_mean((learned - z.detach()).square().mean(-1), mask, step),
            }
            q = rotated(z, codes) if self.rotation else straight_through(z, codes)
            if mask is not None:
                ids, q = ids.masked_fill(~mask, 0), q.masked_fill(~mask[..., None], 0)
            counts = count_ids(ids, mask, self.vocab_size)
            if step:
                sum_over_ranks(counts)
        return QuantizerOutput(q, ids, losses, usage_stats(counts))

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """int64 (B, n) in [0, K) → float32 (B, n, D)."""
        return F.embedding(ids, self.book())

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """float (B, n, D) → int64 (B, n), the nearest codes."""
        return nearest(codes.flatten(0, -2), self.book()).view(codes.shape[:-1])

    def book(self) -> Tensor:
        """The codes, float32 (K, D); kept in eval mode until table or map change."""
        sources = (self.table, self.map.weight)
        plain = not (self.training or any(s.is_inference() for s in sources))  # inference tensors have no version
        key = [(s.data_ptr(), s._version) for s in sources] if plain else None
        if self._book is None or key is None or self._book[0] != key:
            # Made within inference mode, a table kept for later could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.table.device.type, enabled=False):
                book = F.linear(self.table.float(), self.map.weight.float())
            if key is None:
                return book
            self._book = (key, book)
        return self._book[1]

    def _apply(self, fn: Any, recurse: bool = True) -> SimVQ:
        self._book = None  # moved or cast
        return super()._apply(fn, recurse)
