"""Parts of the two-stage ("legacy") TiTok and One-D-Piece releases; for their weights, not for new models.

Stage 1 learns to name, for each patch, one of the 1024 codes of a frozen MaskGIT-VQGAN ("proxy codes"); stage 2 adds a
copy of its decoder, fed with the mean of its codebook under the predicted probabilities, and trains on pixels. Paper:
https://arxiv.org/abs/2406.07550; One-D-Piece: https://arxiv.org/abs/2501.10064.

Shapes: B images, P patches, N tokens, n ≤ N given tokens, W width, D latent width, K proxy codes, E width of a proxy code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.tokenizers.blocks import check_range, init_weights
from tok1d.tokenizers.decoders.grid import MaskGrid
from tok1d.tokenizers.decoders.vqgan import VQGANDecoder
from tok1d.tokenizers.encoders.titok import TiTokEncoder
from tok1d.tokenizers.part import Decoder
from tok1d.tokenizers.tokenizer import Tokenizer1D

PIXEL_SIZES = ("width", "multipliers", "depth", "groups", "shortcut")  # arguments of VQGANDecoder that ours take as pixel_…


class LegacyTiTokEncoder(TiTokEncoder):
    """Image to latents, mixed the way the two-stage releases mix them.

    The outputs (N, W) at the queries are read as if they were (W, N), without transposing, before the projection to D:
    latent l is projected from elements l, l + N, l + 2N … of all of them in a row, so every latent depends on every query.
    The published weights were trained with it.

    Args: as :class:`tok1d.tokenizers.encoders.titok.TiTokEncoder`.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Float (B, 3, H, W) in [0, 1] → float (B, N, D)."""
        return self.proj(scramble(self.features(images)))


def scramble(x: Tensor) -> Tensor:
    """Float (B, N, W) → float (B, N, W): element (l, w) is number w · N + l of the input in a row.

    Example:
        >>> scramble(torch.arange(6).view(1, 2, 3)).tolist()
        [[[0, 2, 4], [1, 3, 5]]]
    """
    batch, tokens, width = x.shape
    return x.reshape(batch, width, tokens).transpose(1, 2)


class ProxyCodeDecoder(MaskGrid, Decoder):
    """Codes to logits over the codes of a MaskGIT-VQGAN, and those to pixels.

    Args:
        tokens, dim, width, depth, heads, patch_size, image_size, mlp_ratio: as
            :class:`tok1d.tokenizers.decoders.grid.GridDecoder`.
        proxy_codes: K.
        proxy_dim: E.
        pixels: whether there is a pixel decoder: stage 2. Without it (stage 1) there are logits but no pictures.
        soft: feed it the mean of the codebook under the predicted probabilities (stage 2); else the likeliest code, the
            way pictures of stage 1 are made.
        pixel_width, pixel_multipliers, pixel_depth, pixel_groups, pixel_shortcut: of the pixel decoder, as
            :class:`tok1d.tokenizers.decoders.vqgan.VQGANDecoder`.
    """

    painter = "pixels.conv_out"

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
        proxy_codes: int = 1024,
        proxy_dim: int = 256,
        pixels: bool = True,
        soft: bool = True,
        pixel_width: int = 128,
        pixel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        pixel_depth: int = 2,
        pixel_groups: int = 32,
        pixel_shortcut: str = "output",
    ) -> None:
        super().__init__(tokens, dim, width, depth, heads, patch_size, image_size, mlp_ratio)
        check_range("proxy_codes", proxy_codes, 2, 2**26)
        check_range("proxy_dim", proxy_dim, 1, 65536)
        self.soft = soft
        self.hidden = nn.Linear(width, 2 * width)
        self.to_logits = nn.Linear(2 * width, proxy_codes)
        self.pixels = None
        if pixels:
            self.proxy_codebook = nn.Parameter(torch.empty(proxy_codes, proxy_dim).uniform_(-1 / proxy_codes, 1 / proxy_codes))
            sizes = (pixel_width, pixel_multipliers, pixel_depth, image_size, pixel_groups, pixel_shortcut)
            self.pixels = VQGANDecoder(proxy_dim, *sizes)
            if self.pixels.grid != self.grid:
                raise ModelError(
                    f"patches of {patch_size} pixels make a grid of {self.grid}, {len(pixel_multipliers)} pixel_multipliers "
                    f"one of {self.pixels.grid}; a patch must be 2 ** (pixel_multipliers - 1) pixels"
                )
        self.apply(init_weights)
        self.add_tables()

    def logits(self, q: Tensor, mask: Tensor | None = None) -> Tensor:
        """Float (B, n, D), bool mask (B, n) True = given → float (B, P, K), of the proxy code of each patch.

        Stage 1 minimises their cross entropy with the ids of the MaskGIT-VQGAN.
        """
        return self.to_logits(self.hidden(self.patch_features(q, mask)).tanh())

    def forward(self, q: Tensor, mask: Tensor | None = None) -> Tensor:
        """Float (B, n, D), bool mask (B, n) True = given → float (B, 3, H, W), about [0, 1], not clamped.

        Raises:
            ModelError: a stage-1 model, which has no pixel decoder.
        """
        if self.pixels is None:
            raise ModelError(
                "these are stage-1 weights: they predict codes of a MaskGIT-VQGAN and hold no pixel decoder. Load that VQGAN "
                "(maskgit-vqgan-imagenet-f16-256.bin of fun-research/TiTok) and give it to "
                "tok1d.tokenizers.official.titok_legacy.add_pixels(tokenizer, vqgan)"
            )
        logits = self.logits(q, mask)
        if self.soft:
            return self.pixels(logits.softmax(-1) @ self.proxy_codebook)
        return self.pixels(self.proxy_codebook[logits.argmax(-1)])


def add_pixels(tokenizer: Tokenizer1D, vqgan: Tokenizer1D, *, soft: bool = False) -> Tokenizer1D:
    """A stage-1 tokenizer that makes pictures with the decoder and codebook of its MaskGIT-VQGAN.

    Args:
        tokenizer: two-stage TiTok without pixel decoder; its weights are shared with the result.
        vqgan: the MaskGIT-VQGAN that it was trained with; its weights are copied.
        soft: start of stage 2: mean codes. The default takes the likeliest code, as published for stage 1.

    Raises:
        ModelError: other kinds of tokenizers, or another codebook size or grid.
    """
    old, pixels = tokenizer.decoder, vqgan.decoder
    if not isinstance(old, ProxyCodeDecoder) or not isinstance(pixels, VQGANDecoder):
        raise ModelError(
            "add_pixels() takes a two-stage TiTok and a MaskGIT-VQGAN, "
            f"got decoders {type(old).__name__} and {type(pixels).__name__}"
        )
    if old.to_logits.out_features != vqgan.vocab_size or old.grid != pixels.grid:
        raise ModelError(
            f"{tokenizer.name} predicts {old.to_logits.out_features} codes on a grid of {old.grid}, "
            f"{vqgan.name} has {vqgan.vocab_size} on {pixels.grid}: another VQGAN trained it"
        )
    sizes = {f"pixel_{name}": pixels.config[name] for name in PIXEL_SIZES}
    arguments = old.config | sizes | {"proxy_dim": pixels.dim, "pixels": True, "soft": soft}
    with torch.device("meta"):
        decoder = ProxyCodeDecoder(**arguments)
    state = old.state_dict() | {f"pixels.{key}": value.clone() for key, value in pixels.state_dict().items()}
    decoder.load_state_dict(state | {"proxy_codebook": vqgan.quantizer.codebook.detach().clone()}, assign=True)
    decoder.train(old.training).requires_grad_(next(old.parameters()).requires_grad)
    parts = (tokenizer.encoder, tokenizer.quantizer, decoder, tokenizer.lengths)
    return Tokenizer1D(*parts, image_size=tokenizer.image_size, name=tokenizer.name).train(tokenizer.training)
