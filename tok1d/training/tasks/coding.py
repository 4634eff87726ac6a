"""The first half of a tokenizer's training forward, for tasks whose decoder does something else than paint the picture.

Shapes: B images, N tokens, n ≤ N tokens of the longest, D latent width, C code width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tok1d.tokenizers.part import token_mask
from tok1d.tokenizers.tokenizer import Tokenizer1D, TokenizerOutput


@dataclass
class Coded:
    """Quantized latents on their way to the decoder.

    Attributes:
        output: as :meth:`Tokenizer1D.forward` returns it, without a reconstruction.
        q: float (B, n, C) codes in the dtype of the decoder; (B, N, C) from quantizers whose tokens refine all latents.
        given: bool (B, n) which of them count, None for all.
    """

    output: TokenizerOutput
    q: Tensor
    given: Tensor | None


def quantize(tokenizer: Tokenizer1D, z: Tensor, lengths: Tensor) -> Coded:
    """Latents to the codes that the decoder is given, with gradient.

    Args:
        tokenizer: whose quantizer.
        z: float (B, N, D).
        lengths: int64 (B,) tokens kept of each image, on the CPU, where questions about them are free.
    """
    mask, whole = token_mask(lengths, tokenizer.max_tokens), tokenizer.quantizer.whole
    code = tokenizer.quantizer(z, None if mask is None else mask.to(z.device))
    longest = code.q.shape[1] if whole else int(lengths.max())
    given = None if whole else token_mask(lengths, longest)
    kept = None if mask is None or whole else mask.to(z.device)
    output = TokenizerOutput(None, code.ids, lengths.to(z.device), code.losses, code.stats, z, code.q, kept)
    return Coded(output, code.q[:, :longest].to(tokenizer.dtype), None if given is None else given.to(z.device))
