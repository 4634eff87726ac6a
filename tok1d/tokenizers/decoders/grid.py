"""GridDecoder: a grid of mask tokens asks the given latents for the picture (one-stage TiTok).

The sequence is [class token, one mask token a patch, latents]; the outputs at the mask tokens become patches of pixels
and one 3×3 convolution joins them. Fewer latents make a shorter sequence, so any prefix decodes (One-D-Piece,
https://arxiv.org/abs/2501.10064); different lengths inside a batch are masked as keys. Paper: https://arxiv.org/abs/2406.07550.

Shapes: B images, P patches, n ≤ N given tokens, W width, D code width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tok1d.errors import TokenError
from tok1d.tokenizers.blocks import Transformer, check_range, init_weights, learned, patch_grid, unpatchify
from tok1d.tokenizers.part import Decoder


class GridDecoder(Decoder):
    """Codes to pixels.

    Args:
        tokens: N, the most latents it takes.
        dim: D of a code.
        width, depth, heads, patch_size, image_size, mlp_ratio: as :class:`tok1d.tokenizers.encoders.titok.TiTokEncoder`.

    Example:
        >>> GridDecoder(8, 12, width=64, depth=1, image_size=64)(torch.rand(2, 3, 12)).shape
        torch.Size([2, 3, 64, 64])
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
        self.grid = patch_grid(image_size, patch_size)
        patches = self.grid[0] * self.grid[1]
        self.transformer = Transformer(width, depth, heads, mlp_ratio)
        self.embed = nn.Linear(dim, width)
        self.to_pixels = nn.Linear(width, 3 * patch_size * patch_size)
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)
        self.apply(init_weights)
        # Start at plain grey: a loud random picture would be unlearned by muting the codes, and they stay mute.
        nn.init.trunc_normal_(self.to_pixels.weight, std=0.002)
        nn.init.constant_(self.smooth.bias, 0.5)
        self.class_token = learned(1, width)
        self.mask_token = learned(1, width)
        self.positions = learned(1 + patches, width)
        self.latent_positions = learned(tokens, width)

    def forward(self, q: Tensor, mask: Tensor | None = None) -> Tensor:
        """Float (B, n, D), bool mask (B, n) True = given → float (B, 3, H, W), about [0, 1], not clamped."""
        batch, n, _ = q.shape
        if n > self.tokens:
            raise TokenError(f"this decoder takes up to {self.tokens} tokens, got {n}")
        attended = None
        if mask is not None:
            q = q.masked_fill(~mask[..., None], 0)  # a masked key has weight zero, but 0 × nan would still be nan
            attended = torch.cat([mask.new_ones(batch, self.positions.shape[0]), mask], dim=1)
        asking = torch.cat([self.class_token + self.positions[:1], self.mask_token + self.positions[1:]])
        latents = self.embed(q) + self.latent_positions[:n]
        x = torch.cat([asking.expand(batch, -1, -1), latents], dim=1)  # (B, 1 + P + n, W)
        x = self.transformer(x, slice(1, self.positions.shape[0]), attended)  # (B, P, W)
        return self.smooth(unpatchify(self.to_pixels(x), self.grid, self.patch_size))
