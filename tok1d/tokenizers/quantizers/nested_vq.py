"""NestedVQ: residual vector quantization in which every token refines its own few coefficients.

Token t sees D entries of one long coefficient vector (its ``support``) minus what earlier tokens already coded there,
and codes them with one of a small shelf of codebooks, stretched by a per-token ``scale``. With supports chosen
greedily by remaining energy this is successive refinement: any prefix is a good code of its length.
Residual quantization: https://ieeexplore.ieee.org/document/1056067 (multi-stage VQ).

Shapes: B images, N tokens, D coefficients of a token, K codes, S codebooks, n tokens of one level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import TokenError
from tok1d.tokenizers.part import Quantizer, QuantizerOutput


class NestedVQ(Quantizer):
    """Scheduled residual VQ.

    Args:
        tokens: N tokens.
        dim: D.
        vocab_size: K codes of a codebook.
        books: S codebooks; ``book[t]`` names the one of token t.

    Tokens that share no coefficient with the ones just before them do not depend on them, so they are quantized
    together ("a level"): a 256-token model takes a few dozen batched steps, not 256.
    """

    loss_weights = {"codebook": 0.0}  # noqa: RUF012  (books come fitted; give it a weight to refine them)

    def __init__(self, tokens: int, dim: int, vocab_size: int = 4096, books: int = 1) -> None:
        super().__init__()
        self.tokens, self.dim, self.vocab_size, self.books = tokens, dim, vocab_size, books
        self.codebooks = nn.Parameter(torch.randn(books, vocab_size, dim) * 0.5)
        self.register_buffer("support", torch.arange(tokens * dim).view(tokens, dim))
        self.register_buffer("scale", torch.ones(tokens, dim))
        self.register_buffer("book", torch.arange(tokens) * books // tokens)
        self._levels: list[tuple[int, int]] | None = None
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_levels", None))

    def levels(self) -> list[tuple[int, int]]:
        """[start, end) runs of tokens with one codebook and disjoint supports."""
        if self._levels is None:
            runs, start, seen = [], 0, set[int]()
            support, book = self.support.tolist(), self.book.tolist()
            for t, entries in enumerate(support):
                if t > start and (book[t] != book[start] or not seen.isdisjoint(entries)):
                    runs.append((start, t))
                    start, seen = t, set()
                seen.update(entries)
            self._levels = [*runs, (start, len(support))]
        return self._levels

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Float (B, n, D) coefficients of the first n tokens, bool mask (B, n) True = keep (a prefix) → QuantizerOutput."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if mask is not None:
                z = z.masked_fill(~mask[..., None], 0)  # whatever stood there, even nan, is gone from here on
            residual, codes, ids = self._search(z.detach())
            if mask is not None:
                ids = ids.masked_fill(~mask, 0)
            keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
            chosen = self.ids_to_codes(ids)  # with gradient to the codebooks
            error = (chosen - residual).square().mean(-1)
            codebook = (error * keep).sum() / keep.sum().clamp(min=1)
            q = (z - z.detach() + codes) * keep[..., None]
            books = self.book[: ids.shape[1]]
            used = torch.bincount((ids + books * self.vocab_size)[keep], minlength=self.books * self.vocab_size)
        usage = (used > 0).float().mean()
        return QuantizerOutput(q, ids, {"codebook": codebook}, {"usage": usage})

    @torch.no_grad()
    def _search(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, n, D) coefficients → residual seen by each token, its code, both (B, n, D), and ids (B, n)."""
        batch, tokens = z.shape[:2]
        left = z.new_zeros(batch, int(self.support.max()) + 1)
        for start, end in reversed(self.levels()):  # of repeated coefficients the first counts: masks keep a prefix
            if start < tokens:
                end = min(end, tokens)
                left[:, self.support[start:end].flatten()] = z[:, start:end].flatten(1)
        seen, codes, ids = [], [], []
        for start, end in self.levels():
            end = min(end, tokens)
            if start >= end:
                break
            where = self.support[start:end].flatten()
            r = left[:, where].view(batch, end - start, self.dim)
            book, s = self.codebooks[self.book[start]].float(), self.scale[start:end].float()
            # |r - s∘c|² = const + (s²)·(c²) - 2 (s∘r)·c, without stretching a copy of the codebook for every token
            power = s.square() @ book.square().T
            score = torch.baddbmm(power[:, None], (r * s).transpose(0, 1), book.T.expand(end - start, -1, -1), alpha=-2)
            best = score.argmin(-1).T  # (B, n)
            code = book[best] * s
            left[:, where] -= code.flatten(1)
            seen.append(r), codes.append(code), ids.append(best)
        return torch.cat(seen, 1), torch.cat(codes, 1), torch.cat(ids, 1)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """int64 (B, n) in [0, K) → float32 (B, n, D)."""
        n = ids.shape[1]
        if n > self.tokens:
            raise TokenError(f"this quantizer has {self.tokens} tokens, got {n} ids")
        flat = ids + self.book[:n] * self.vocab_size
        return F.embedding(flat, self.codebooks.flatten(0, 1)).float() * self.scale[:n].float()

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """float (B, n, D) codes (not residuals) → int64 (B, n)."""
        ids = []
        for t in range(codes.shape[1]):
            book = self.codebooks[self.book[t]].float() * self.scale[t].float()
            ids.append(torch.cdist(codes[:, t].float(), book).argmin(-1))
        return torch.stack(ids, 1)
