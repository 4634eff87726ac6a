"""LFQ: lookup-free quantization — a code is the signs of the latent, kept diverse by an entropy loss.

Paper: https://arxiv.org/abs/2310.05737 (MAGVIT-v2); conventions and weights of Open-MAGVIT2, https://arxiv.org/abs/2409.04410.
The entropies are exact where they factorise and averaged over all ranks: see binary.py.

Shapes: B images, N tokens, d bits of a token = width of latents and codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tok1d.errors import ModelError
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.part import Quantizer, QuantizerOutput
from tok1d.tokenizers.quantizers.binary import (
    binary_output,
    check_groups,
    codebook_entropy,
    coin_entropy,
    group_marginals,
)
from tok1d.tokenizers.quantizers.common import token_mean
from tok1d.tokenizers.quantizers.packing import bits_to_tokens, tokens_to_bits


class LFQ(Quantizer):
    """Lookup-free quantization.

    Args:
        bits: d; a token is an id up to 62 of them, else its bits. The first channel is the most significant bit.
        entropy_groups: groups of neighbouring bits whose average use is measured, 1 to 20 bits each; 1 group is the published
            entropy of the whole codebook, more are a bound from above that costs less. None: groups of at most 9 bits.
        temperature: T of the softmax over codes, logits 2 <z, code> / T.
        gamma: weight of the codebook entropy inside the ``entropy`` loss.
        entropy, commitment: published weights of the losses of those names; go into ``loss_weights``.

    The unweighted losses are ``commitment``, the mean squared distance of a channel of a latent from its sign, and
    ``entropy`` in nats: that of a token's softmax over codes, less ``gamma`` times that of its average over tokens. Both
    entropies are among the stats (``sample_entropy``, ``codebook_entropy``).

    Example:
        >>> out = LFQ(18)(torch.tensor([[[-1.0] * 17 + [0.5]]]))
        >>> out.ids.tolist(), out.q[0, 0, -2:].tolist()
        ([[1]], [-1.0, 1.0])
    """

    def __init__(
        self,
        bits: int = 18,
        entropy_groups: int | None = None,
        temperature: float = 0.01,
        gamma: float = 1.0,
        entropy: float = 0.1,
        commitment: float = 0.25,
    ) -> None:
        super().__init__()
        check_range("bits", bits, 1, 128)
        if not temperature > 0:
            raise ModelError(f"temperature must be above 0, got {temperature!r:.100}")
        self.bits = self.dim = bits
        self.vocab_size = 2**bits
        self.groups = check_groups(bits, entropy_groups)
        self.temperature, self.gamma, self.entropy_scale = temperature, gamma, 1.0
        self.loss_weights = {"commitment": commitment, "entropy": entropy}

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Float (B, N, d), bool mask (B, N) True = keep → QuantizerOutput with q of -1 and 1."""
        step = self.training and torch.is_grad_enabled()
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if mask is not None:
                z = z.masked_fill(~mask[..., None], 0)  # whatever stood there, even nan, is gone from here on
            bits = z > 0
            codes = self._codes(bits)
            commitment = token_mean((z - codes).square().mean(-1), mask, step)
            logits = 4 / self.temperature * z
            sample = token_mean(coin_entropy(logits).sum(-1), mask, step)
            codebook = codebook_entropy(group_marginals(logits, self.groups, mask, step))
            losses = {"commitment": commitment, "entropy": self.entropy_scale * (sample - self.gamma * codebook)}
            stats = {"sample_entropy": sample, "codebook_entropy": codebook}
            q = codes + (z - z.detach())  # value of the code to the last bit, gradient of z
            return binary_output(q, bits, mask, losses, stats, step)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """int64 (B, n) ids, or uint8 (B, n, d) bits if d > 62 → float32 (B, n, d) of -1 and 1."""
        return self._codes(tokens_to_bits(ids, self.bits))

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """float (B, n, d) codes → int64 (B, n) ids, or uint8 (B, n, d) bits if d > 62."""
        return bits_to_tokens(codes > 0)

    def _codes(self, bits: Tensor) -> Tensor:
        return bits.float() * 2 - 1
