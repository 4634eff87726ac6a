"""BernoulliBits: latents become d logits, the logits d coin flips in training and d signs afterwards (binary latents).

Paper: Instella-T2I, https://arxiv.org/abs/2506.21022. A code is the sum of the learned vectors of the bits that are set; a
bit of 0 adds nothing. Written from the formulas; the published weights name the same two modules.

Shapes: B images, N tokens, D width of latents, d bits of a token, C width of codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.tokenizers.blocks import check_range, learned
from tok1d.tokenizers.part import Quantizer, QuantizerOutput
from tok1d.tokenizers.quantizers.binary import binary_output
from tok1d.tokenizers.quantizers.common import rank_rows, token_mean
from tok1d.tokenizers.quantizers.packing import bits_to_tokens, tokens_to_bits


class BernoulliBits(Quantizer):
    """Stochastic binary quantization.

    Args:
        bits: d; a token is an id up to 62 of them, else its bits.
        dim: D.
        code_dim: C, at least ``bits`` so that codes can be told apart by least squares; D if None.
        temperature: T of the coin flips. The attribute of that name may be set at any time: annealing it towards 0 makes the
            flips certain. It is not part of the weights; a schedule that runs again from a step sets it again.
        bit_variance: weight of the ``bit_variance`` loss; goes into ``loss_weights``. The published weight is not known.

    Logits are l = proj(z) and p = sigmoid(l). In training steps bits are drawn with probability sigmoid(l / T), and the
    gradient passes as if each bit were p (without T); else a bit is ``l > 0``. The loss ``bit_variance``, the mean of
    p (1 - p), pushes the probabilities to 0 or 1.

    Example:
        >>> quantizer = BernoulliBits(bits=64, dim=96)
        >>> out = quantizer.eval()(torch.randn(1, 3, 96))
        >>> out.bits.shape, out.q.shape, bool((quantizer.codes_to_ids(out.q) == out.bits).all())
        (torch.Size([1, 3, 64]), torch.Size([1, 3, 96]), True)
    """

    picture_gradient = True

    def __init__(
        self,
        bits: int = 64,
        dim: int = 768,
        code_dim: int | None = None,
        temperature: float = 0.1,
        bit_variance: float = 0.1,
    ) -> None:
        super().__init__()
        check_range("bits", bits, 1, 128)
        check_range("dim", dim, 1, 65536)
        width = dim if code_dim is None else code_dim
        check_range("code_dim (at least bits, or codes could not be turned back into bits)", width, bits, 65536)
        if not temperature > 0:
            raise ModelError(f"temperature must be above 0, got {temperature!r:.100}")
        self.bits, self.dim, self.width, self.temperature = bits, dim, width, temperature
        self.vocab_size = 2**bits
        self.loss_weights = {"bit_variance": bit_variance}
        self.proj = nn.Linear(dim, bits)
        self.embed = learned(bits, width)

    @property
    def code_dim(self) -> int:
        return self.width

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Float (B, N, D), bool mask (B, N) True = keep → QuantizerOutput with q (B, N, C)."""
        step = self.training and torch.is_grad_enabled()
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if mask is not None:
                z = z.masked_fill(~mask[..., None], 0)  # whatever stood there, even nan, is gone from here on
            logits = F.linear(z, self.proj.weight.float(), self.proj.bias.float())
            p = logits.sigmoid()
            if step:  # encoding with a model in training mode is not one
                luck = rank_rows(len(logits), lambda rows: torch.rand(rows, *logits.shape[1:], device=logits.device))
                bits = luck < (logits.detach() / self.temperature).sigmoid()
            else:
                bits = logits > 0
            q = self._codes(bits + (p - p.detach()))  # exactly the bits, with the gradient of p
            losses = {"bit_variance": token_mean((p * (1 - p)).mean(-1), mask, step)}
            return binary_output(q, bits, mask, losses, {}, step)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """int64 (B, n) ids, or uint8 (B, n, d) bits if d > 62 → float32 (B, n, C)."""
        return self._codes(tokens_to_bits(ids, self.bits).float())

    @torch.no_grad()
    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """float (B, n, C) → int64 (B, n) ids, or uint8 (B, n, d) bits if d > 62.

        The bits are the least-squares solution of ``bits @ embed = codes``, rounded: exact for codes made by this
        quantizer as long as the d rows of ``embed`` are linearly independent.
        """
        solve = torch.linalg.pinv(self.embed.double())  # (C, d); double: learned rows can be nearly parallel
        return bits_to_tokens(codes.double() @ solve > 0.5)

    def _codes(self, bits: Tensor) -> Tensor:
        return bits @ self.embed.float()
