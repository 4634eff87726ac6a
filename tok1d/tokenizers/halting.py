"""Halting heads: how good a picture will be after every number of tokens, said from its codes alone, nothing decoded.

The length of an image is then one comparison in one encode pass. Predicting the quality at every length follows the scorer
of AdapTok (https://arxiv.org/abs/2505.17011), asking for a quality and getting a length is KARL's (https://arxiv.org/abs/2507.07995);
lengths stay prefixes here, and the curve falls by construction, as the keep-probabilities of STAT
(https://arxiv.org/abs/2601.14246) do.

A head is no part of what ids mean: it changes neither the id of a model nor its files, and models may go without.
Shapes: B images, N tokens, D width of a code, W width of the head.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.part import Part
from tok1d.tokenizers.quantizers.common import sum_over_ranks

if TYPE_CHECKING:
    from tok1d.tokenizers.tokenizer import Tokenizer1D

METRICS = ("psnr", "lpips")
OBSERVED = 512  # images that the usual sizes are taken from
DECIBEL = 10 / math.log(10)  # PSNR in dB is minus this times the logarithm of the mean squared error


class HaltingHead(Part):
    """Predicts the reconstruction error of every prefix.

    The error is the mean squared error where ``metric`` is ``psnr`` and LPIPS (VGG) where it is ``lpips``, at the model's size.

    Attributes:
        tokens: N.
        dim: width D of the codes it reads.
        metric: ``psnr`` or ``lpips``.
        quality: target where none is asked for, in dB or LPIPS.
    """

    tokens: int
    dim: int
    metric: str
    quality: float

    @abstractmethod
    def forward(self, codes: Tensor) -> Tensor:
        """Float (B, N, D) codes of all tokens → float32 (B, N): logarithm of the error after 1..N tokens, never rising."""

    def observe(self, codes: Tensor) -> None:
        """Called in training with the codes (B, N, D) of every new batch, before they are fitted; statistics belong here."""

    def log_error(self, quality: float) -> float:
        """Logarithm of the error that has this quality."""
        return -quality / DECIBEL if self.metric == "psnr" else math.log(quality)

    def quality_of(self, log_errors: Tensor) -> Tensor:
        """Logarithms of errors → PSNR in dB or LPIPS, of the same shape."""
        return -DECIBEL * log_errors if self.metric == "psnr" else log_errors.exp()


class CurveHead(HaltingHead):
    """What is left after k tokens = what all tokens leave + what each token beyond k would have taken away.

    A small net says the logarithms of these amounts, each token seeing itself and a summary of all; so the curve cannot
    rise. A code enters as its direction and the logarithm of its size, and an amount starts proportional to the square of
    that size: exact for orthonormal transforms, and a beginning for others. Sizes are compared with the usual ones of their
    position, which :meth:`observe` finds; untrained, a picture of usual codes gains 0.9 dB with every doubling.

    Args:
        tokens: N tokens of the model.
        dim: D, width of its codes (``quantizer.code_dim``).
        width: W of the head.
        metric: ``psnr`` or ``lpips``.
        quality: target where none is asked for, in dB or LPIPS.
    """

    GAIN = 8.0  # levels learn this much faster than the net

    def __init__(self, tokens: int, dim: int, width: int = 32, metric: str = "psnr", quality: float = 22.0) -> None:
        super().__init__()
        if metric not in METRICS:
            raise TokenError(f"metric must be one of {', '.join(METRICS)}, got {metric!r:.100}")
        self.tokens, self.dim, self.metric, self.quality = tokens, dim, metric, check_quality(quality)
        self.register_buffer("power", torch.ones(tokens))  # mean square of each token's code
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # images it is the mean of
        self.token = nn.Linear(dim + 1, width)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.1)
        self.sizes = nn.Linear(tokens, width)
        self.summary = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width))
        self.amount = nn.Sequential(nn.GELU(), nn.Linear(width, 1))
        self.rest = nn.Linear(width, 1)
        self.slope = nn.Parameter(torch.ones(()))
        first = self.log_error(14.0 if metric == "psnr" else 0.8)  # with usual codes the error starts as that · (k + 1)^-0.3
        k = torch.arange(1, tokens + 1)
        self.level = nn.Parameter((first + (k**-0.3 - (k + 1) ** -0.3).log()) / self.GAIN)
        for layer in (self.amount[1], self.rest):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.amount[1].bias)
        nn.init.constant_(self.rest.bias, first - 0.3 * math.log(tokens + 1))

    @torch.no_grad()
    def observe(self, codes: Tensor) -> None:
        if int(self.seen) >= OBSERVED:
            return
        new = torch.cat([codes.float().square().mean(-1).sum(0), codes.new_full((1,), len(codes), dtype=torch.float32)])
        new = sum_over_ranks(new)
        self.seen += int(new[-1])
        self.power += (new[:-1] - new[-1] * self.power) / self.seen

    def forward(self, codes: Tensor) -> Tensor:
        with torch.autocast(codes.device.type, enabled=False):
            codes = codes.float()
            size = log_size(codes)  # (B, N, 1)
            more = size - self.power[:, None].add(1e-6).log() / 2
            x = self.token(torch.cat([codes / size.exp(), more], -1)) + self.position  # (B, N, W)
            seen = torch.cat([F.gelu(x).mean(1), F.gelu(self.sizes(more[..., 0]))], -1)
            whole = self.summary(seen)  # (B, W)
            amounts = self.amount(x + whole[:, None])[..., 0] + 2 * self.slope * more[..., 0] + self.GAIN * self.level  # (B, N)
            left = torch.cat([self.rest(whole), amounts[:, 1:].flip(1)], 1)  # what all tokens leave, token N, N-1 … 2
            return left.logcumsumexp(1).cummax(1).values.flip(1)  # cummax: sums that differ by rounding never rise


def log_size(codes: Tensor) -> Tensor:
    """Float (B, N, D) → (B, N, 1): logarithm of the root mean square of each code."""
    return codes.square().mean(-1, keepdim=True).add(1e-6).log() / 2


def check_quality(quality: float) -> float:
    """The target itself.

    Raises:
        TokenError: not a positive number.
    """
    if not (math.isfinite(quality) and quality > 0):
        raise TokenError(f"quality must be a positive number (PSNR in dB, or LPIPS), got {quality}")
    return float(quality)


def check_head(tokenizer: Tokenizer1D) -> None:
    """Whether the head fits the tokenizer it is put on.

    Raises:
        ModelError: another number of tokens or width, or a tokenizer that cannot use one.
    """
    head, quantizer = tokenizer.halting, tokenizer.quantizer
    assert head is not None
    if not tokenizer.is_nested or quantizer.whole or not tokenizer.is_discrete:
        raise ModelError(
            f"{tokenizer.name} cannot have a halting head: it needs a nested model with discrete tokens, one code a token "
            f"({type(tokenizer.lengths).__name__}, {type(quantizer).__name__})"
        )
    if (head.tokens, head.dim) != (tokenizer.max_tokens, quantizer.code_dim):
        raise ModelError(
            f"the halting head is for {head.tokens} tokens of width {head.dim}, {tokenizer.name} has {tokenizer.max_tokens} of width "
            f"{quantizer.code_dim}. Build it with those"
        )


def head_of(tokenizer: Tokenizer1D) -> HaltingHead:
    """The head of a tokenizer.

    Raises:
        TokenError: it has none, with what to do.
    """
    if tokenizer.halting is None:
        raise TokenError(
            f"{tokenizer.name} has no halting head and cannot say how many tokens an image needs. Search for a quality instead "
            "(--target-psnr, in Python tokens=Budget(psnr=…)), or train a head: tok fit --config debug/halting"
        )
    return tokenizer.halting
