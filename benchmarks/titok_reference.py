"""A plain TiTok to measure against: the published architecture done the way the published code runs it.

Convolutions for patches and 1×1 projections, sequence-first nn.MultiheadAttention between permutes, the mask sequence made
for every image in every call, all outputs computed and most thrown away, the full token × code distance matrix, and a
MaskGIT-VQGAN decoder in contiguous NCHW, one operation after the other, its convolutions padding their input in a step of
their own (the published layers compute TensorFlow's "same" padding). ``PAD_INSIDE`` leaves that to the convolution, which
is kinder than the published code. Written for this benchmark; parameter names are those of the published state dicts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // 64)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential()
        for name, layer in layers.items():
            self.mlp.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    def __init__(self, tokens: int, dim: int, width: int, depth: int, side: int, patch: int, legacy: bool) -> None:
        super().__init__()
        self.legacy = legacy
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.class_embedding = nn.Parameter(torch.empty(1, width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + (side // patch) ** 2, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleList(Block(width) for _ in range(depth))
        self.conv_out = nn.Conv2d(width, dim, 1)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        batch, tokens = len(images), len(latent_tokens)
        x = self.patch_embed(images).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.expand(batch, 1, -1), x], dim=1) + self.positional_embedding
        latents = latent_tokens.expand(batch, -1, -1) + self.latent_token_positional_embedding
        x = self.ln_pre(torch.cat([x, latents], dim=1)).permute(1, 0, 2)
        for block in self.transformer:
            x = block(x)
        x = self.ln_post(x.permute(1, 0, 2)[:, -tokens:])
        x = x.reshape(batch, -1, tokens, 1) if self.legacy else x.permute(0, 2, 1).unsqueeze(-1)
        return self.conv_out(x).transpose(2, 3)  # (B, C, 1, L)


class Decoder(nn.Module):
    def __init__(self, tokens: int, dim: int, width: int, depth: int, side: int, patch: int, proxies: int) -> None:
        super().__init__()
        self.grid, self.patch, self.proxies = side // patch, patch, proxies
        self.decoder_embed = nn.Linear(dim, width)
        self.class_embedding = nn.Parameter(torch.empty(1, width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + self.grid**2, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleList(Block(width) for _ in range(depth))
        if proxies:
            self.ffn = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, proxies, 1))
        else:
            self.ffn = nn.Sequential(nn.Conv2d(width, 3 * patch * patch, 1))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        batch, _, _, tokens = z.shape
        grid, patch = self.grid, self.patch
        x = self.decoder_embed(z.squeeze(2).permute(0, 2, 1)) + self.latent_token_positional_embedding[:tokens]
        masks = self.mask_token.repeat(batch, grid * grid, 1)
        masks = torch.cat([self.class_embedding.expand(batch, 1, -1), masks], dim=1) + self.positional_embedding
        x = self.ln_pre(torch.cat([masks, x], dim=1)).permute(1, 0, 2)
        for block in self.transformer:
            x = block(x)
        x = self.ln_post(x.permute(1, 0, 2)[:, 1 : 1 + grid * grid])
        x = self.ffn(x.permute(0, 2, 1).reshape(batch, -1, grid, grid))
        if self.proxies:
            return x
        x = x.view(batch, patch, patch, 3, grid, grid).permute(0, 3, 4, 1, 5, 2)
        return self.conv_out(x.reshape(batch, 3, grid * patch, grid * patch))


PAD_INSIDE = False


class SameConv(nn.Conv2d):
    """3×3 convolution that keeps the size."""

    def __init__(self, before: int, after: int, bias: bool = True) -> None:
        super().__init__(before, after, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if PAD_INSIDE:
            return F.conv2d(x, self.weight, self.bias, padding=1)
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class ConvBlock(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, before, eps=1e-6), nn.GroupNorm(32, after, eps=1e-6)
        self.conv1 = SameConv(before, after, bias=False)
        self.conv2 = SameConv(after, after, bias=False)
        if before != after:
            self.nin_shortcut = nn.Conv2d(after, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(y) if hasattr(self, "nin_shortcut") else x)


class PixelDecoder(nn.Module):
    def __init__(self, dim: int, width: int, multipliers: tuple[int, ...], depth: int = 2) -> None:
        super().__init__()
        widths = [width * m for m in multipliers]
        self.conv_in = SameConv(dim, widths[-1])
        self.mid = nn.ModuleList(ConvBlock(widths[-1], widths[-1]) for _ in range(depth))
        self.up = nn.ModuleList()
        for level, after in enumerate(widths):
            before = widths[min(level + 1, len(widths) - 1)]
            self.up.append(nn.Module())
            self.up[level].block = nn.ModuleList(ConvBlock(after if b else before, after) for b in range(depth))
            if level:
                self.up[level].upsample_conv = SameConv(after, after)
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = SameConv(widths[0], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in reversed(range(len(self.up))):
            for block in self.up[level].block:
                x = block(x)
            if level:
                x = self.up[level].upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


class Reference(nn.Module):
    """The whole model.

    Args:
        encoder, decoder: (width, depth).
        tokens, codes, dim: of the tokens.
        side, patch: pixels.
        pixel: (width, multipliers) of the pixel decoder of a two-stage model; None for one stage.
    """

    def __init__(
        self,
        encoder: tuple[int, int],
        decoder: tuple[int, int],
        tokens: int,
        codes: int,
        dim: int,
        side: int = 256,
        patch: int = 16,
        pixel: tuple[int, tuple[int, ...]] | None = None,
        proxies: int = 1024,
        proxy_dim: int = 256,
    ) -> None:
        super().__init__()
        self.two_stage, self.dim = pixel is not None, dim
        self.encoder = Encoder(tokens, dim, *encoder, side, patch, legacy=self.two_stage)
        self.decoder = Decoder(tokens, dim, *decoder, side, patch, proxies if self.two_stage else 0)
        self.latent_tokens = nn.Parameter(torch.empty(tokens, encoder[0]))
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(codes, dim)
        if pixel is not None:
            self.pixel_quantize = nn.Module()
            self.pixel_quantize.embedding = nn.Embedding(proxies, proxy_dim)
            self.pixel_decoder = PixelDecoder(proxy_dim, *pixel)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → ids (B, N); two-stage models compare by cosine."""
        z = self.encoder(images, self.latent_tokens)
        flat, codebook = z.permute(0, 2, 3, 1).reshape(-1, self.dim), self.quantize.embedding.weight
        if self.two_stage:
            flat, codebook = F.normalize(flat, dim=-1), F.normalize(codebook, dim=-1)
        distance = flat.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * flat @ codebook.T
        return distance.argmin(1).view(len(images), -1)

    def decode(self, ids: Tensor) -> Tensor:
        """Ids (B, N) → (B, 3, H, W)."""
        codes = self.quantize.embedding(ids)
        if not self.two_stage:
            return self.decoder(codes.permute(0, 2, 1).unsqueeze(2)).clamp(0, 1)
        logits = self.decoder(F.normalize(codes, dim=-1).permute(0, 2, 1).unsqueeze(2))
        soft = torch.einsum("nchw,cd->ndhw", logits.softmax(1), self.pixel_quantize.embedding.weight)
        return self.pixel_decoder(soft).clamp(0, 1)
