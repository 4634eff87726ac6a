"""A grid of mask tokens asks the given latents for the picture: GridDecoder (one-stage TiTok), TextGridDecoder (TA-TiTok).

The sequence is [class token, one mask token a patch, latents, text if any]; the outputs at the mask tokens become patches
of pixels and one 3×3 convolution joins them. Fewer latents make a shorter sequence, so any prefix decodes (One-D-Piece,
https://arxiv.org/abs/2501.10064); different lengths inside a batch are masked as keys. Papers: TiTok
https://arxiv.org/abs/2406.07550, TA-TiTok https://arxiv.org/abs/2501.07730.

Shapes: B images, P patches, n ≤ N given tokens, T text tokens, W width, D code width, V width of text vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tok1d.errors import TokenError
from tok1d.tokenizers.blocks import Transformer, check_range, init_weights, learned, patch_grid, unpatchify
from tok1d.tokenizers.part import Decoder


class MaskGrid(nn.Module):
    """The transformer that decoders of this kind share, up to one feature vector a patch; inherit it before ``Decoder``.

    A subclass makes its head after ``super().__init__``, initialises it, and calls :meth:`add_tables` last.

    Args: as :class:`GridDecoder`.
    """

    def __init__(
        self,
        tokens: int,
        dim: int,
        width: int,
        depth: int,
        heads: int | None,
        patch_size: int,
        image_size: int | Sequence[int],
        mlp_ratio: float,
    ) -> None:
        super().__init__()
        check_range("tokens", tokens, 1, 65536)
        check_range("dim", dim, 1, 65536)
        self.tokens, self.dim, self.patch_size = tokens, dim, patch_size
        self.grid = patch_grid(image_size, patch_size)
        self.transformer = Transformer(width, depth, heads, mlp_ratio)
        self.embed = nn.Linear(dim, width)

    def add_tables(self) -> None:
        """The learned rows of the sequence."""
        width = self.embed.out_features
        self.class_token = learned(1, width)
        self.mask_token = learned(1, width)
        self.positions = learned(1 + self.grid[0] * self.grid[1], width)
        self.latent_positions = learned(self.tokens, width)

    def patch_features(self, q: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Float (B, n, D), bool mask (B, n) True = given, float context (B, T, W) at the end → float (B, P, W)."""
        batch, n, _ = q.shape
        if n > self.tokens:
            raise TokenError(f"this decoder takes up to {self.tokens} tokens, got {n}")
        asking = torch.cat([self.class_token + self.positions[:1], self.mask_token + self.positions[1:]])
        attended = None
        if mask is not None:
            q = q.masked_fill(~mask[..., None], 0)  # a masked key has weight zero, but 0 × nan would still be nan
            attended = [mask.new_ones(batch, len(asking)), mask]
            attended += [] if context is None else [mask.new_ones(batch, context.shape[1])]
            attended = torch.cat(attended, dim=1)
        latents = self.embed(q) + self.latent_positions[:n]
        x = [asking.expand(batch, -1, -1), latents] + ([] if context is None else [context])
        return self.transformer(torch.cat(x, dim=1), slice(1, len(asking)), attended)


class GridDecoder(MaskGrid, Decoder):
    """Codes to pixels.

    Args:
        tokens: N, the most latents it takes.
        dim: D of a code.
        width, depth, heads, patch_size, image_size, mlp_ratio: as :class:`tok1d.tokenizers.encoders.titok.TiTokEncoder`.

    Example:
        >>> GridDecoder(8, 12, width=64, depth=1, image_size=64)(torch.rand(2, 3, 12)).shape
        torch.Size([2, 3, 64, 64])
    """

    painter = "smooth"

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
        super().__init__(tokens, dim, width, depth, heads, patch_size, image_size, mlp_ratio)
        self.to_pixels = nn.Linear(width, 3 * patch_size * patch_size)
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)
        self.apply(init_weights)
        # Start at plain grey: a loud random picture would be unlearned by muting the codes, and they stay mute.
        nn.init.trunc_normal_(self.to_pixels.weight, std=0.002)
        nn.init.constant_(self.smooth.bias, 0.5)
        self.add_tables()

    def forward(self, q: Tensor, mask: Tensor | None = None) -> Tensor:
        """Float (B, n, D), bool mask (B, n) True = given → float (B, 3, H, W), about [0, 1], not clamped."""
        return self._paint(self.patch_features(q, mask))

    def _paint(self, x: Tensor) -> Tensor:
        """Float (B, P, W) → float (B, 3, H, W)."""
        return self.smooth(unpatchify(self.to_pixels(x), self.grid, self.patch_size))


class TextGridDecoder(GridDecoder):
    """Codes and a description to pixels: encoded text stands at the end of the sequence.

    Args:
        tokens, dim, width, depth, heads, patch_size, image_size, mlp_ratio: as :class:`GridDecoder`.
        text_tokens: T, the number of text vectors it takes.
        text_dim: V, width of a text vector.

    The published weights take all 77 vectors of the CLIP ViT-L/14-336 text tower after its final norm:
    :func:`tok1d.tokenizers.official.clip_text.text_features`.

    Example:
        >>> decoder = TextGridDecoder(8, 12, width=64, depth=1, image_size=64, text_tokens=5, text_dim=32)
        >>> decoder(torch.rand(2, 3, 12), text=torch.randn(2, 5, 32)).shape
        torch.Size([2, 3, 64, 64])
    """

    options = ("text",)

    def __init__(
        self,
        tokens: int,
        dim: int,
        width: int = 1024,
        depth: int = 24,
        heads: int | None = None,
        patch_size: int = 16,
        image_size: int | Sequence[int] = 256,
        mlp_ratio: float = 4,
        text_tokens: int = 77,
        text_dim: int = 768,
    ) -> None:
        check_range("text_tokens", text_tokens, 1, 65536)
        check_range("text_dim", text_dim, 1, 65536)
        super().__init__(tokens, dim, width, depth, heads, patch_size, image_size, mlp_ratio)
        self.text_embed = nn.Linear(text_dim, width)
        init_weights(self.text_embed)
        self.text_positions = learned(text_tokens, width)

    def forward(self, q: Tensor, mask: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """Float (B, n, D), bool mask (B, n) True = given, float text (B, T, V) → float (B, 3, H, W), about [0, 1], not clamped.

        Raises:
            TokenError: no text, or text of another shape.
        """
        shape = (len(q), len(self.text_positions), self.text_embed.in_features)
        if text is None or tuple(text.shape) != shape:
            got = "none" if text is None else f"shape {tuple(text.shape)}"
            raise TokenError(
                f"this decoder needs the encoded text of each image, float {shape} = (images, text tokens, width), got {got}. "
                'Pass text=text_features(["A photo of a cat."]) of tok1d.tokenizers.official.clip_text'
            )
        context = self.text_embed(text.to(self.text_embed.weight)) + self.text_positions
        return self._paint(self.patch_features(q, mask, context))
