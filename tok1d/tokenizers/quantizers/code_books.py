"""CodeBooks: what the ids of a quantizer stand for, as plain tables, for whoever reads ids without running the quantizer.

Ids are names: id 17 of one token and id 17 of another mean the same only if both have the same codebook. Most quantizers have
one for all tokens; nested ones have several, stretched for every token.

Shapes: N tokens, S codebooks, K codes, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import ModelError
from tok1d.tokenizers.part import Quantizer
from tok1d.tokenizers.quantizers.nested_vq import NestedVQ

MAX_CODES = 2**16


@dataclass(frozen=True)
class CodeBooks:
    """The code of id i as token t is ``books[book[t], i] * scale[t]``.

    Attributes:
        books: float32 (S, K, D), every one used by some token.
        book: int64 (N,) in [0, S).
        scale: float32 (N, D).

    Example:
        >>> from tok1d.tokenizers.quantizers.fsq import FSQ
        >>> found = CodeBooks.of(FSQ([3, 3]), tokens=4)
        >>> found.books.shape, found.book.tolist(), found.codes(torch.tensor([[8]])).tolist()
        (torch.Size([1, 9, 2]), [0, 0, 0, 0], [[[1.0, 1.0]]])
    """

    books: Tensor
    book: Tensor
    scale: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, quantizer: Quantizer, tokens: int) -> CodeBooks:
        """The codebooks of the first tokens, as they are now, on the CPU.

        Args:
            quantizer: any whose ids mean codes token by token, of at most 65,536 ids.
            tokens: N.

        Raises:
            ModelError: a quantizer that has no ids, too many, or whose codes depend on other tokens.
        """
        name, vocab = type(quantizer).__name__, quantizer.vocab_size
        if not 0 < vocab <= MAX_CODES:
            have = f"has {vocab if vocab < 2**63 else f'2^{quantizer.bits_per_token}'} ids" if vocab else "is continuous and has no ids"
            raise ModelError(f"a table of codes needs 2 to {MAX_CODES} ids with a code each, {name} {have}")
        whole = f"{name} makes codes of several tokens together, so that an id has no code of its own"
        if quantizer.whole:
            raise ModelError(whole)
        some = next(iter(quantizer.state_dict().values()), torch.zeros(()))
        if isinstance(quantizer, NestedVQ):
            if tokens > quantizer.tokens:
                raise ModelError(f"this NestedVQ has {quantizer.tokens} tokens, asked for the codes of {tokens}")
            used, book = quantizer.book[:tokens].unique(return_inverse=True)
            found = cls(quantizer.codebooks[used].float(), book, quantizer.scale[:tokens].float())
        else:
            codes = quantizer.ids_to_codes(torch.arange(vocab, device=some.device)[:, None])
            if codes.shape[:2] != (vocab, 1):
                raise ModelError(whole)
            found = cls(codes.transpose(0, 1).float(), codes.new_zeros(tokens, dtype=torch.int64), codes.new_ones(tokens, codes.shape[2]).float())
        ids = torch.randint(vocab, (4, tokens), generator=torch.Generator().manual_seed(0)).to(some.device)
        if not torch.allclose(found.codes(ids), quantizer.ids_to_codes(ids).float(), rtol=1e-4, atol=1e-6):
            raise ModelError(whole)
        return replace(found, books=found.books.cpu().clone(), book=found.book.cpu(), scale=found.scale.cpu().clone())

    def codes(self, ids: Tensor) -> Tensor:
        """int64 (B, n), the first n tokens → float32 (B, n, D)."""
        n = ids.shape[1]
        return F.embedding(ids + self.book[:n] * self.books.shape[1], self.books.flatten(0, 1)) * self.scale[:n]
