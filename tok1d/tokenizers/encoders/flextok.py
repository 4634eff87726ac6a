"""FlexTokEncoder: registers that read an image in order, so that any prefix of them is a code by itself.

Latents of a frozen VAE (or pixels) are cut in patches; learned registers follow them. Patches see patches; register j sees
all patches and the registers up to j. Nothing therefore depends on later registers: the first n are computed exactly with
n registers alone (``tokens=n``), and patches never look at registers, so no dense mask over the whole sequence is needed.
Paper: https://arxiv.org/abs/2502.13967, section 3.

Shapes: B images, P patches, n ≤ N registers, W width, D latent width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tok1d.errors import TokenError
from tok1d.tokenizers.blocks import check_range, init_weights, patch_grid
from tok1d.tokenizers.flextok_blocks import Attention, GatedMLP, check_trunk, norm, patches_of, sine_table, small
from tok1d.tokenizers.part import Encoder
from tok1d.tokenizers.vae import LatentEncoder, check_vae


class RegisterBlock(nn.Module):
    """Pre-norm block over patches and registers: patches attend to patches, registers to both as the mask allows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = GatedMLP(width)

    def forward(self, x: Tensor, patches: int, mask: Tensor, last: bool = False) -> Tensor:
        """Float (B, P + n, W), bool mask (n, P + n) True = register may look → the same; the n registers alone if ``last``."""
        q, k, v = self.attn.heads_of(self.attn.qkv(norm(x)))
        y = self.attn.attend(q[:, :, patches:], k, v, mask)
        if last:
            x = x[:, patches:]
        else:
            y = torch.cat([self.attn.attend(*(s[:, :, :patches] for s in (q, k, v))), y], dim=1)
        x = x + self.attn.proj(y)
        return x + self.mlp(norm(x))


class FlexTokEncoder(Encoder):
    """Image to latents of registers.

    Args:
        tokens: N registers.
        dim: D; the number of levels in front of a :class:`tok1d.tokenizers.quantizers.fsq.FSQ`.
        width, depth: of the transformer; published sizes are 768 × 12 (d12), 1152 × 18 (d18) and 1792 × 28 (d28).
        heads: width // 64 if None.
        patch_size: side of a patch in pixels, a multiple of the VAE's reduction.
        image_size: an int, or (height, width).
        vae_channels: widths of the VAE's levels, published [128, 256, 512, 512]; None for pixels as latents.
        vae_layers: residual blocks of a level.
        latent_channels: of the VAE; 3 without one.
        scaling_factor: what the VAE's latents are multiplied by.
        posterior: ``mean`` of the VAE's posterior, or ``sample``.

    Example:
        >>> encoder = FlexTokEncoder(8, 6, width=64, depth=1, image_size=64)
        >>> encoder(torch.rand(2, 3, 64, 64)).shape, encoder(torch.rand(2, 3, 64, 64), tokens=3).shape
        (torch.Size([2, 8, 6]), torch.Size([2, 3, 6]))
    """

    prefix = True
    float32_input = True

    def __init__(
        self,
        tokens: int,
        dim: int,
        width: int = 768,
        depth: int = 12,
        heads: int | None = None,
        patch_size: int = 16,
        image_size: int | Sequence[int] = 256,
        vae_channels: Sequence[int] | None = None,
        vae_layers: int = 2,
        latent_channels: int = 3,
        scaling_factor: float = 1.0,
        posterior: str = "mean",
    ) -> None:
        super().__init__()
        check_range("tokens", tokens, 1, 65536)
        check_range("dim", dim, 1, 65536)
        heads = check_trunk(width, depth, heads)
        rows, cols = patch_grid(image_size, patch_size)
        factor = check_vae(vae_channels, vae_layers, latent_channels, scaling_factor, patch_size)
        self.tokens, self.dim, self.patch = tokens, dim, patch_size // factor
        self.registers = small(tokens, width)
        # never learned, yet kept with the weights: published files hold it
        self.register_buffer("positions", sine_table(width, rows, cols))
        self.patch_embed = nn.Linear(self.patch**2 * latent_channels, width)
        self.blocks = nn.ModuleList(RegisterBlock(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, dim)
        self.apply(init_weights)
        nn.init.zeros_(self.head.weight)
        self.vae = LatentEncoder(vae_channels, vae_layers, latent_channels, scaling_factor, posterior)

    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Float (B, 3, H, W) in [0, 1] → float32 (B, C, h, w) latents of the VAE, times the scaling factor."""
        return self.vae(images, generator)

    def forward(self, images: Tensor, tokens: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Float (B, 3, H, W) in [0, 1] → float (B, n, D).

        Args:
            images: as above.
            tokens: n, how many registers to compute, exactly those of a full pass; None for all N.
            generator: of ``posterior="sample"``, a CPU generator.
        """
        return self.encode_latents(self.latents(images, generator), tokens)

    def encode_latents(self, latents: Tensor, tokens: int | None = None) -> Tensor:
        """Float (B, C, h, w) scaled latents of the VAE → float (B, n, D)."""
        n = self.tokens if tokens is None else tokens
        if not 1 <= n <= self.tokens:
            raise TokenError(f"this encoder makes 1 to {self.tokens} tokens, got tokens={n}")
        x = self.patch_embed(patches_of(latents, self.patch).to(self.registers.dtype))
        x = x + self.positions.flatten(1).T
        patches = x.shape[1]
        x = torch.cat([x, self.registers[:n].expand(len(x), -1, -1)], dim=1)  # (B, P + n, W)
        mask = torch.ones(n, patches + n, dtype=torch.bool, device=x.device).tril(patches)
        for block in self.blocks[:-1]:
            x = block(x, patches, mask)
        return self.head(norm(self.blocks[-1](x, patches, mask, last=True)))
