"""Halting heads: how good a picture will be after every number of tokens, said from its codes alone, nothing decoded.

The length of an image is then one comparison in one encode pass. Predicting the quality at every length follows the scorer
of AdapTok (https://arxiv.org/abs/2505.17011), asking for a quality and getting a length is KARL's (https://arxiv.org/abs/2507.07995);
lengths stay prefixes here, and the curve falls by construction as keep-probabilities do in STAT (https://arxiv.org/abs/2601.14246).

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

if TYPE_CHECKING:
    from tok1d.tokenizers.tokenizer import Tokenizer1D

METRICS = ("psnr", "lpips")
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

    def log_error(self, quality: float) -> float:
        """Logarithm of the error that has this quality."""
        return -quality / DECIBEL if self.metric == "psnr" else math.log(quality)

    def quality_of(self, log_errors: Tensor) -> Tensor:
        """Logarithms of errors → PSNR in dB or LPIPS, of the same shape."""
        return -DECIBEL * log_errors if self.metric == "psnr" else log_errors.exp()


class CurveHead(HaltingHead):
    """One small net: each token says by how much it lowers the error, seeing itself and a summary of all.

    A code enters as its direction and the logarithm of its size, so no statistics of the data are kept. The curve is
    the log error before the first token minus the running sum of non-negative steps; they start at 0.3 / k, about 1 dB for
    every doubling.

    Args:
        tokens: N tokens of the model.
        dim: D, width of its codes (``quantizer.code_dim``).
        width: W of the head.
        metric: ``psnr`` or ``lpips``.
        quality: target where none is asked for, in dB or LPIPS.
    """

    def __init__(self, tokens: int, dim: int, width: int = 48, metric: str = "psnr", quality: float = 22.0) -> None:
        super().__init__()
        if metric not in METRICS:
            raise TokenError(f"metric must be one of {', '.join(METRICS)}, got {metric!r:.100}")
        self.tokens, self.dim, self.metric, self.quality = tokens, dim, metric, check_quality(quality)
        self.token = nn.Linear(dim + 1, width)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.1)
        self.sizes = nn.Linear(tokens, width)
        self.summary = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width))
        self.step = nn.Sequential(nn.GELU(), nn.Linear(width, 1))
        self.start = nn.Linear(width, 1)
        rest = 0.3 / torch.arange(1, tokens + 1)
        self.fall = nn.Parameter(rest.expm1().log())  # softplus of it is 0.3 / k
        nn.init.zeros_(self.step[1].weight)
        nn.init.zeros_(self.step[1].bias)
        nn.init.zeros_(self.start.weight)
        nn.init.constant_(self.start.bias, self.log_error(14.0 if metric == "psnr" else 0.8))

    def forward(self, codes: Tensor) -> Tensor:
        with torch.autocast(codes.device.type, enabled=False):
            codes = codes.float()
            size = codes.square().mean(-1, keepdim=True).add(1e-6).sqrt()  # (B, N, 1)
            x = self.token(torch.cat([codes / size, size.log()], -1)) + self.position  # (B, N, W)
            seen = torch.cat([F.gelu(x).mean(1), F.gelu(self.sizes(size[..., 0].log()))], -1)
            whole = self.summary(seen)  # (B, W)
            steps = F.softplus(self.step(x + whole[:, None])[..., 0] + self.fall)  # (B, N)
            return self.start(whole) - steps.cumsum(-1)


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
