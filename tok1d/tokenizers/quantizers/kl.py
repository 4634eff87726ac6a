"""KL: the continuous bottleneck of a variational autoencoder (TiTok-VAE); no ids, sampled only while training.

The latents are mean and log-variance of a diagonal Gaussian per token; evaluation takes the mean, so that encoding is
deterministic (the published demo samples).

Shapes: B images, N tokens, D = 2 C latent width, C code width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.part import Quantizer, QuantizerOutput
from tok1d.tokenizers.quantizers.common import rank_rows


@dataclass
class Posterior:
    """A diagonal Gaussian for each token.

    Attributes:
        mean: float32 (B, N, C).
        logvar: float32 (B, N, C) in [-30, 20].
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw float32 (B, N, C); ranks that share a batch draw different noise from one state of the generator."""
        shape, device = self.mean.shape, self.mean.device
        noise = rank_rows(len(self.mean), lambda rows: torch.randn(rows, *shape[1:], generator=generator, device=device))
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """Divergence from the unit Gaussian in nats, float32 (B, N)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(-1)


class KL(Quantizer):
    """Variational bottleneck.

    Args:
        dim: D, width of the latents, even; codes have half of it (``code_dim``).
        weight: published weight of the ``kl`` loss; goes into ``loss_weights``.

    The loss ``kl`` is unweighted: the divergence of an image (sum over its kept tokens), mean over the batch.

    Example:
        >>> KL(32)(torch.zeros(1, 4, 32)).q.shape
        torch.Size([1, 4, 16])
    """

    vocab_size = 0

    def __init__(self, dim: int, weight: float = 1e-6) -> None:
        super().__init__()
        check_range("dim", dim, 2, 65536)
        if dim % 2:
            raise ModelError(f"KL takes mean and log-variance side by side, so dim must be even, got {dim}")
        self.dim = dim
        self.loss_weights = {"kl": weight}

    @property
    def code_dim(self) -> int:
        return self.dim // 2

    def posterior(self, z: Tensor) -> Posterior:
        """Float (B, N, D) → Posterior."""
        mean, logvar = z.float().chunk(2, dim=-1)
        return Posterior(mean, logvar.clamp(-30, 20))

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Float (B, N, D), bool mask (B, N) True = keep → QuantizerOutput without ids; q is (B, N, C)."""
        with torch.autocast(z.device.type, enabled=False):
            if mask is not None:
                z = z.masked_fill(~mask[..., None], 0)  # a unit Gaussian: its divergence is zero
            posterior = self.posterior(z)
            step = self.training and torch.is_grad_enabled()  # encoding with a model in training mode is not one
            q = posterior.sample() if step else posterior.mean
            if mask is not None:
                q = q.masked_fill(~mask[..., None], 0)
            kl = posterior.kl()
            kept = kl.numel() if mask is None else mask.sum().clamp(min=1)
            losses, stats = {"kl": kl.sum() / len(kl)}, {"kl_per_token": kl.detach().sum() / kept}
        return QuantizerOutput(q, None, losses, stats)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        raise TokenError("a KL bottleneck is continuous and has no ids; decode its codes with decode_latents()")

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        raise TokenError("a KL bottleneck is continuous and has no ids; keep its codes as they are")
