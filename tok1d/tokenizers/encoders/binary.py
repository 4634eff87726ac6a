"""BinaryEncoder: a rotary transformer that reads an image of any size into N latents, merging patches on the way.

Latent queries and patches run through one bidirectional transformer; after some of its blocks every 2 × 2 patches become
one, so that later blocks cost a quarter. The binary-latent tokenizer of Instella-T2I (https://arxiv.org/abs/2506.21022)
in a form for new models: the rotation is one (the published one is not; ``tok1d.tokenizers.official.instella`` has it),
patches sit where their centres are, and any quantizer fits behind.

Shapes: B images, P patches, N tokens, W width, D latent width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tok1d.tokenizers.blocks import check_range, init_weights, patchify
from tok1d.tokenizers.part import Encoder
from tok1d.tokenizers.rotary import centred_turns, rotary_axes, rotary_table
from tok1d.tokenizers.rotary_blocks import Merge, RMSNorm, check_limit, check_moves, check_size, rotary_blocks


class BinaryEncoder(Encoder):
    """Image of any size to latents.

    Args:
        tokens: N latents.
        dim: D.
        width, depth: of the transformer; published: 768 × 12.
        heads: width // 64 if None.
        merge_after: numbers of blocks after which 2 × 2 patches are merged into one, ascending; none if empty.
        patch_size: pixels; image sizes are multiples of it, doubled for each merge.
        size_limit: largest height and width in pixels, which positions are scaled to.
        mlp_ratio: hidden width of the MLPs over ``width``.

    Example:
        >>> encoder = BinaryEncoder(8, 12, width=64, depth=2, merge_after=[1])
        >>> encoder.size_step, encoder(torch.rand(2, 3, 64, 96)).shape
        (32, torch.Size([2, 8, 12]))
    """

    norm: type[RMSNorm] = RMSNorm

    def __init__(
        self,
        tokens: int,
        dim: int,
        width: int = 768,
        depth: int = 12,
        heads: int | None = None,
        merge_after: Sequence[int] = (8,),
        patch_size: int = 16,
        size_limit: int = 1024,
        mlp_ratio: float = 4,
    ) -> None:
        super().__init__()
        check_range("tokens", tokens, 1, 65536)
        check_range("dim", dim, 1, 65536)
        self.tokens, self.dim, self.patch_size, self.size_limit = tokens, dim, patch_size, size_limit
        self.merge_after = check_moves("merge_after", merge_after, depth)
        self.size_step = check_limit(size_limit, patch_size, len(self.merge_after))
        self.blocks = rotary_blocks(width, depth, heads, mlp_ratio, self.norm)
        self.axes = rotary_axes(width // self.blocks[0].attn.heads)
        self.patch_embed = nn.Linear(3 * patch_size * patch_size, width)
        self.merges = nn.ModuleList(Merge(width) for _ in self.merge_after)
        self.norm_out = self.norm(width)
        self.proj = nn.Linear(width, dim)
        self.apply(init_weights)
        # As loud as what attention adds: quieter ones are drowned by it, and the tokens of an image come out alike.
        self.latents = nn.Parameter(torch.randn(tokens, width))

    def table(self, grid: tuple[int, int], merges: int) -> Tensor:
        """Rotary table of the latents and a grid that was merged so many times."""
        return rotary_table(centred_turns, self.tokens, grid, self.axes, self.size_limit // self.patch_size, device=self.latents.device)

    def forward(self, images: Tensor) -> Tensor:
        """Float (B, 3, H, W) in [0, 1], H and W multiples of ``size_step`` up to ``size_limit`` → float (B, N, D).

        Raises:
            ImageError: another size.
        """
        height, width = check_size(images.shape[-2:], self.size_step, self.size_limit)
        grid, n = (height // self.patch_size, width // self.patch_size), self.tokens
        patches = self.patch_embed(patchify(images * 2 - 1, self.patch_size))  # (B, P, W)
        x = torch.cat([self.latents.expand(len(images), -1, -1), patches], dim=1)  # (B, N + P, W)
        table, *merges = self.table(grid, 0), *self.merges
        for i, block in enumerate(self.blocks[:-1], start=1):
            x = block(x, table)
            if i in self.merge_after:
                merged = merges.pop(0)(x[:, n:], grid)  # (B, P / 4, W)
                grid = (grid[0] // 2, grid[1] // 2)
                x, table = torch.cat([x[:, :n], merged], dim=1), self.table(grid, len(self.merges) - len(merges))
        return self.proj(self.norm_out(self.blocks[-1](x, table, wanted=slice(0, n))))
