"""BSQ: binary spherical quantization — latents on the unit sphere, codes the corners of the cube inside it.

Paper: https://arxiv.org/abs/2406.07548; conventions and weights of the published code. The entropies are exact where they
factorise and averaged over all ranks: see binary.py.

Shapes: B images, N tokens, d bits of a token = width of latents and codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


class BSQ(Quantizer):
    """Binary spherical quantization.

    Args:
        bits: d; a token is an id up to 62 of them, else its bits. The first channel is the most significant bit.
        entropy_groups: groups of neighbouring bits whose average use is measured, 1 to 20 bits each; None: groups of at most
            9 bits, the published ``group`` mode; ``bits`` groups of one are its ``analytical`` mode. (The modes differ in
            this alone: the entropy of a token is the same in both, and exact.)
        inv_temperature: of the softmax over codes, logits 2 <u, code> · inv_temperature for the latent u on the sphere.
        gamma0, gamma: weights of the entropy of a token and of the codebook inside the ``entropy`` loss.
        entropy, commitment: published weights of the losses of those names; go into ``loss_weights``.

    The unweighted losses are ``commitment``, the squared distance of a latent on the sphere from its code, and ``entropy``,
    ``(gamma0 · entropy of a token - gamma · entropy of the codebook) / inv_temperature`` in nats.

    Example:
        >>> out = BSQ(4)(torch.tensor([[[-3.0, 0.1, 0.2, -0.1]]]))
        >>> out.ids.tolist(), out.q.tolist()
        ([[6]], [[[-0.5, 0.5, 0.5, -0.5]]])
    """

    def __init__(
        self,
        bits: int = 18,
        entropy_groups: int | None = None,
        inv_temperature: float = 100.0,
        gamma0: float = 1.0,
        gamma: float = 1.0,
        entropy: float = 0.1,
        commitment: float = 0.0,
    ) -> None:
        super().__init__()
        check_range("bits", bits, 1, 128)
        if not inv_temperature > 0:
            raise ModelError(f"inv_temperature must be above 0, got {inv_temperature!r:.100}")
        self.bits = self.dim = bits
        self.vocab_size = 2**bits
        self.groups = check_groups(bits, entropy_groups)
        self.inv_temperature, self.gamma0, self.gamma = inv_temperature, gamma0, gamma
        self.loss_weights = {"commitment": commitment, "entropy": entropy}

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Float (B, N, d), bool mask (B, N) True = keep → QuantizerOutput with unit vectors q."""
        step = self.training and torch.is_grad_enabled()
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if mask is not None:
                z = z.masked_fill(~mask[..., None], 0)  # whatever stood there, even nan, is gone from here on
            bits = z > 0  # of the latent itself: on the sphere the smallest channels can underflow to 0
            z = F.normalize(z, dim=-1)
            codes = self._codes(bits)
            commitment = token_mean((z - codes).square().sum(-1), mask, step)
            logits = 4 * self.inv_temperature * self.bits**-0.5 * z
            sample = token_mean(coin_entropy(logits).sum(-1), mask, step)
            codebook = codebook_entropy(group_marginals(logits, self.groups, mask, step))
            entropy = (self.gamma0 * sample - self.gamma * codebook) / self.inv_temperature
            stats = {"sample_entropy": sample, "codebook_entropy": codebook}
            q = codes + (z - z.detach())  # value of the code to the last bit, gradient of the sphere
            return binary_output(q, bits, mask, {"commitment": commitment, "entropy": entropy}, stats, step)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """int64 (B, n) ids, or uint8 (B, n, d) bits if d > 62 → float32 (B, n, d) unit vectors."""
        return self._codes(tokens_to_bits(ids, self.bits))

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """float (B, n, d) codes → int64 (B, n) ids, or uint8 (B, n, d) bits if d > 62."""
        return bits_to_tokens(codes > 0)

    def _codes(self, bits: Tensor) -> Tensor:
        return (bits.float() * 2 - 1) * self.bits**-0.5
