"""Measure a spectral tokenizer on images: which coefficients each token codes, and its codebooks.

Greedy multi-stage design: token after token takes the D coefficients with the most energy left, learns (or borrows)
a codebook for what is left of them by k-means, and subtracts what it codes. The energy that remains falls as fast as
a linear code of that many bits allows, at every prefix length. No gradient is involved; minutes on a CPU.

Shapes: M samples, F = 3·G·G coefficients of which the P with the largest variance take part, D of a token, K codes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from tok1d.tokenizers.decoders.spectral import SpectralDecoder
from tok1d.tokenizers.encoders.spectral import SpectralEncoder
from tok1d.tokenizers.quantizers.nested_vq import NestedVQ
from tok1d.tokenizers.tokenizer import Tokenizer1D

log = logging.getLogger(__name__)


def nearest(x: Tensor, codes: Tensor, chunk: int = 8192) -> Tensor:
    """Index of the nearest row of ``codes`` (K, D) for each row of ``x`` (M, D): int64 (M,)."""
    half = codes.square().sum(1) / 2
    return torch.cat([torch.addmm(half, part, codes.T, alpha=-1).argmin(1) for part in x.split(chunk)])


def kmeans(x: Tensor, codes: int, steps: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm from random samples; empty clusters restart at random samples. (M, D) → (codes, D)."""
    centres = x[torch.randperm(len(x), generator=generator)[:codes]].clone()
    for _ in range(steps):
        near = nearest(x, centres)
        count = torch.bincount(near, minlength=codes).to(x.dtype)[:, None]
        total = torch.zeros_like(centres).index_add_(0, near, x)
        spare = x[torch.randint(len(x), (codes,), generator=generator)]
        centres = torch.where(count > 0, total / count.clamp(min=1), spare)
    return centres


def colour_axes(pixels: Tensor) -> Tensor:
    """Principal axes of colours: float (M, 3) → orthonormal rows (3, 3), brightest first, positive brightness."""
    _, axes = torch.linalg.eigh(torch.cov(pixels.T))
    axes = axes.flip(1).T
    return axes * torch.where(axes.sum(1, keepdim=True) < 0, -1.0, 1.0)


@torch.no_grad()
def fit_spectral(
    tokenizer: Tokenizer1D,
    batches: Iterable[Tensor],
    *,
    own_books: int = 32,
    pool: int = 3072,
    learn_on: int = 32768,
    steps: int = 8,
    refresh: int = 32,
    seed: int = 0,
) -> list[float]:
    """Fit encoder, quantizer and decoder of a spectral tokenizer in place.

    Args:
        tokenizer: SpectralEncoder × NestedVQ × SpectralDecoder.
        batches: float (B, 3, H, W) in [0, 1], iterated once; all coefficients are kept in memory (P floats an image,
            and as many for its mirror image).
        own_books: the first tokens have a codebook each; later ones share books learned on whitened remainders.
        pool: P coefficients that take part.
        learn_on: samples a k-means sees.
        steps: Lloyd iterations.
        refresh: tokens that share one book.
        seed: of sampling and k-means.

    Returns:
        Mean squared error per pixel and channel left after each token, on the fitting data.

    Raises:
        ValueError: the parts are not spectral, or the number of books does not fit ``own_books`` and ``refresh``.
    """
    encoder, quantizer, decoder = tokenizer.encoder, tokenizer.quantizer, tokenizer.decoder
    if not (isinstance(encoder, SpectralEncoder) and isinstance(quantizer, NestedVQ) and isinstance(decoder, SpectralDecoder)):
        raise ValueError("fit_spectral needs SpectralEncoder, NestedVQ and SpectralDecoder")
    tokens, dim = encoder.tokens, encoder.dim
    wanted = min(own_books, tokens) + -(-max(0, tokens - own_books) // refresh)
    if quantizer.books != wanted:
        raise ValueError(f"{tokens} tokens with {own_books} own books, one shared by {refresh}, need books={wanted}")
    generator = torch.Generator().manual_seed(seed)
    left, where = _collect(encoder, batches, pool)

    supports, scales, books, errors = [], [], [], []
    energy = torch.stack([row.square().mean() for row in left])
    total = energy.sum()
    for t in range(tokens):
        take = energy.topk(dim).indices
        now = left[take].T  # (2M, D)
        rows = torch.randperm(len(now), generator=generator)[:learn_on]
        if t < own_books:
            scale = torch.ones(dim)
            books.append(kmeans(now[rows], quantizer.vocab_size, steps, generator))
        else:
            scale = energy[take].sqrt()
            if (t - own_books) % refresh == 0:
                ahead = energy.argsort(descending=True)[: dim * 8].view(8, dim)
                some = rows[: learn_on // 4]
                whitened = torch.cat([left[a][:, some].T / energy[a].sqrt() for a in ahead])
                books.append(kmeans(whitened, quantizer.vocab_size, steps, generator))
        codes = books[-1] * scale
        now = now - codes[nearest(now, codes)]
        left[take], energy[take] = now.T.contiguous(), now.square().mean(0)
        supports.append(where[take]), scales.append(scale)
        quantizer.book[t] = len(books) - 1
        errors.append(energy.sum().item() / 3)
        if (t + 1) & t == 0:
            log.info("token %d: %.1f%% of the coded energy left", t + 1, 100 * energy.sum() / total)
    support = torch.stack(supports)
    for part in (encoder, quantizer, decoder):
        part.support.copy_(support)
    quantizer.scale.copy_(torch.stack(scales))
    quantizer.codebooks.copy_(torch.stack(books))
    quantizer._levels = None
    for name in ("colour", "mean"):
        getattr(decoder, name).data.copy_(getattr(encoder, name))
    return errors


def _collect(encoder: SpectralEncoder, batches: Iterable[Tensor], pool: int) -> tuple[Tensor, Tensor]:
    """Set colour axes and mean of the encoder; return centred coefficients (P, 2M) and their positions (P,)."""
    mirror = torch.ones(3, encoder.grid, encoder.grid)
    mirror[:, :, 1::2] = -1  # a mirrored image flips the sign of odd horizontal frequencies
    mirror = mirror.flatten()
    spectra, first = [], True
    for batch in batches:
        if first:
            encoder.colour.data.copy_(colour_axes(batch.permute(0, 2, 3, 1).reshape(-1, 3)))
            encoder.mean.zero_()
            first = False
        spectra.append(encoder.spectrum(batch).half())  # half: 1e-3 relative, far below what codes resolve
    count = sum(map(len, spectra))
    total, square = torch.zeros(len(mirror)), torch.zeros(len(mirror))
    for s in spectra:
        total += s.float().sum(0)
        square += s.float().square().sum(0)
    mean = total / count
    mean[mirror < 0] = 0  # of images and their mirrors together
    encoder.mean.copy_(mean)
    where = (square / count - mean.square()).topk(min(pool, len(mirror))).indices
    left = torch.empty(len(where), 2 * count)
    start = 0
    for s in spectra:
        rows = s[:, where].float()
        left[:, start : start + len(s)] = (rows - mean[where]).T
        left[:, count + start : count + start + len(s)] = (rows * mirror[where] - mean[where]).T
        start += len(s)
    return left, where
