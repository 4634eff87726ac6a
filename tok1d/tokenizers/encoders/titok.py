"""TiTokEncoder: a vision transformer that reads an image into N latent queries (one-stage TiTok).

Patches, a class token and learned latent queries run through one bidirectional transformer; the outputs at the queries,
projected to D channels, are the latents. Paper: https://arxiv.org/abs/2406.07550 (one-stage layout of the later releases:
latents are projected one by one; the two-stage releases scramble them by a reshape first, which stays out of new models).

Shapes: B images, P patches, N tokens, W width, D latent width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tok1d.tokenizers.blocks import Transformer, check_range, init_weights, learned, patch_grid, patchify
from tok1d.tokenizers.part import Encoder


class TiTokEncoder(Encoder):
    """Image to latents.

    Args:
        tokens: N latents.
        dim: D; twice the code width in front of a :class:`tok1d.tokenizers.quantizers.kl.KL`.
        width, depth: of the transformer; published sizes are 512 × 8 (S), 768 × 12 (B) and 1024 × 24 (L).
        heads: width // 64 if None.
        patch_size: pixels.
        image_size: an int, or (height, width).
        mlp_ratio: hidden width of the MLPs over ``width``.

    Example:
        >>> TiTokEncoder(8, 12, width=64, depth=1, image_size=64)(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 8, 12])
    """

    def __init__(
        self,
        tokens: int,
        dim: int,
        width: int = 512,
        depth: int = 8,
        heads: int | None = None,
        patch_size: int = 16,
        image_size: int | Sequence[int] = 256,
        mlp_ratio: float = 4,
    ) -> None:
        super().__init__()
        check_range("tokens", tokens, 1, 65536)
        check_range("dim", dim, 1, 65536)
        self.tokens, self.dim, self.patch_size = tokens, dim, patch_size
        rows, cols = patch_grid(image_size, patch_size)
        self.transformer = Transformer(width, depth, heads, mlp_ratio)
        self.patch_embed = nn.Linear(3 * patch_size * patch_size, width)
        self.proj = nn.Linear(width, dim)
        self.apply(init_weights)
        self.class_token = learned(1, width)
        self.positions = learned(1 + rows * cols, width)
        self.latents = learned(tokens, width)
        self.latent_positions = learned(tokens, width)

    def forward(self, images: Tensor) -> Tensor:
        """Float (B, 3, H, W) in [0, 1] → float (B, N, D)."""
        return self.proj(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Float (B, 3, H, W) in [0, 1] → float (B, N, W), the outputs at the queries."""
        batch = images.shape[0]
        patches = self.patch_embed(patchify(images, self.patch_size)) + self.positions[1:]
        first = (self.class_token + self.positions[:1]).expand(batch, -1, -1)
        queries = (self.latents + self.latent_positions).expand(batch, -1, -1)
        x = torch.cat([first, patches, queries], dim=1)  # (B, 1 + P + N, W)
        return self.transformer(x, slice(-self.tokens, None))
