"""BinaryDecoder: a rotary transformer that draws an image of any size from its latents, splitting patches on the way.

The sequence is [latents, one mask token a coarse patch]; after some blocks every patch becomes 2 × 2. The mask tokens know
where they are by rotary position only, so the same latents are drawn at any size. Fewer latents make a shorter sequence,
and different lengths inside a batch are masked as keys. Decoder of Instella-T2I's tokenizer (https://arxiv.org/abs/2506.21022)
in a form for new models, see :mod:`tok1d.tokenizers.encoders.binary`.

Shapes: B images, P patches, n ≤ N given tokens, W width, D code width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tok1d.errors import TokenError
from tok1d.tokenizers.blocks import check_range, init_weights, learned, patch_grid, unpatchify
from tok1d.tokenizers.part import Decoder
from tok1d.tokenizers.rotary import centred_turns, rotary_axes, rotary_table
from tok1d.tokenizers.rotary_blocks import RMSNorm, Split, check_limit, check_moves, check_size, rotary_blocks


class BinaryDecoder(Decoder):
    """Codes to pixels.

    Args:
        tokens: N, the most latents it takes.
        dim: D of a code.
        width, depth: of the transformer; published: 1024 × 16.
        heads: width // 64 if None.
        split_after: numbers of blocks after which a patch becomes 2 × 2, ascending; none if empty.
        patch_size: pixels of a patch after the last split.
        image_size: of pictures that are not asked for at another size; an int, or (height, width).
        size_limit: largest height and width in pixels, which positions are scaled to.
        mlp_ratio: hidden width of the MLPs over ``width``.

    Example:
        >>> decoder = BinaryDecoder(8, 12, width=64, depth=2, split_after=[1], image_size=64)
        >>> decoder(torch.rand(2, 3, 12)).shape, decoder(torch.rand(2, 8, 12), size=(32, 96)).shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 3, 32, 96]))
    """

    options = ("size",)
    painter = "to_pixels"
    norm: type[RMSNorm] = RMSNorm

    def __init__(
        self,
        tokens: int,
        dim: int,
        width: int = 1024,
        depth: int = 16,
        heads: int | None = None,
        split_after: Sequence[int] = (8,),
        patch_size: int = 16,
        image_size: int | Sequence[int] = 256,
        size_limit: int = 1024,
        mlp_ratio: float = 4,
    ) -> None:
        super().__init__()
        check_range("tokens", tokens, 1, 65536)
        check_range("dim", dim, 1, 65536)
        self.tokens, self.dim, self.patch_size, self.size_limit = tokens, dim, patch_size, size_limit
        self.split_after = check_moves("split_after", split_after, depth)
        self.size_step = check_limit(size_limit, patch_size, len(self.split_after))
        rows, cols = patch_grid(image_size, self.size_step)  # of coarse patches
        check_range("the longer side of image_size", max(rows, cols) * self.size_step, 1, size_limit)
        self.image_size = (rows * self.size_step, cols * self.size_step)
        self.blocks = rotary_blocks(width, depth, heads, mlp_ratio, self.norm)
        self.axes = rotary_axes(width // self.blocks[0].attn.heads)
        self.norm_in = self.norm(dim)
        self.embed = nn.Linear(dim, width)
        self.splits = nn.ModuleList(Split(width) for _ in self.split_after)
        self.norm_out = self.norm(width)
        self.to_pixels = nn.Linear(width, 3 * patch_size * patch_size)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.to_pixels.weight, std=0.002)  # start at plain grey, see GridDecoder
        self.mask_token = learned(1, width)

    def table(self, latents: int, grid: tuple[int, int], merges: int) -> Tensor:
        """Rotary table of some latents and a grid that will be split so many times."""
        return rotary_table(centred_turns, latents, grid, self.axes, self.size_limit // self.patch_size, device=self.mask_token.device)

    def forward(self, q: Tensor, mask: Tensor | None = None, size: Sequence[int] | None = None) -> Tensor:
        """Codes to pictures.

        Args:
            q: float (B, n, D), n ≤ N.
            mask: bool (B, n) True = given.
            size: (height, width) of the pictures, multiples of ``size_step`` up to ``size_limit``; ``image_size`` if None.

        Returns:
            Float (B, 3, H, W), about [0, 1], not clamped.

        Raises:
            TokenError: too many tokens.
            ImageError: a size it does not draw.
        """
        batch, n, _ = q.shape
        if n > self.tokens:
            raise TokenError(f"this decoder takes up to {self.tokens} tokens, got {n}")
        height, width = self.image_size if size is None else check_size(size, self.size_step, self.size_limit)
        grid = (height // self.size_step, width // self.size_step)
        if mask is not None:
            q = q.masked_fill(~mask[..., None], 0)  # a masked key has weight zero, but 0 × nan would still be nan
        asking = self.mask_token.expand(batch, grid[0] * grid[1], -1)
        x = torch.cat([self.embed(self.norm_in(q)), asking], dim=1)  # (B, n + P, W)
        splits = list(self.splits)
        table, attended = self.table(n, grid, len(splits)), _attended(mask, grid)
        for i, block in enumerate(self.blocks[:-1], start=1):
            x = block(x, table, attended)
            if i in self.split_after:
                fine = splits.pop(0)(x[:, n:], grid)  # (B, 4 · P, W)
                grid = (grid[0] * 2, grid[1] * 2)
                x, table = torch.cat([x[:, :n], fine], dim=1), self.table(n, grid, len(splits))
                attended = _attended(mask, grid)
        x = self.to_pixels(self.norm_out(self.blocks[-1](x, table, attended, wanted=slice(n, None))))
        return (unpatchify(x, grid, self.patch_size) + 1) / 2


def _attended(mask: Tensor | None, grid: tuple[int, int]) -> Tensor | None:
    """bool (B, n) True = given, and a grid whose patches all count → bool (B, 1, 1, n + P)."""
    if mask is None:
        return None
    return torch.cat([mask, mask.new_ones(len(mask), grid[0] * grid[1])], dim=1)[:, None, None]
