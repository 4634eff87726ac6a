"""PerChannel: every channel of a continuous latent rounded to a small table of its own, measured after training.

Paper: TokenBridge, https://arxiv.org/abs/2503.20430. It makes a discrete tokenizer of any continuous one at once, with nothing
to train: see :func:`quantize_after_training`. The published table (``tokenbridge``) is fixed: unit normal latents, one range
for all channels, an order of channels chosen by hand. Here tables and order can be measured.

Shapes: B images, N tokens, C channels, K entries of the largest table, M latents to measure.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from tok1d.errors import ModelError
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.part import Quantizer, QuantizerOutput
from tok1d.tokenizers.quantizers.common import token_mean
from tok1d.tokenizers.quantizers.packing import digits_to_tokens, fits_id, tokens_to_digits
from tok1d.tokenizers.quantizers.scalar_tables import lloyd_table, normal_table, quantile_table, truncated_normal_table
from tok1d.tokenizers.tokenizer import Tokenizer1D

CALIBRATIONS = ("gaussian", "quantile", "lloyd", "tokenbridge")


class PerChannel(Quantizer):
    """Scalar quantization of every channel, for latents that were trained without it.

    Args:
        channels: C, width of codes.
        bits: of every channel, 1 to 12; or a list of C, for the channels in order of importance. At most 255 together; a
            token is an id up to 62 bits, else its bits.
        calibration: how :meth:`calibrate` makes the tables: ``gaussian``, the least squared error for a normal channel of its
            mean and deviation; ``lloyd``, the least squared error on the latents themselves; ``quantile``, all entries used
            equally often; ``tokenbridge``, the published table for unit normal latents, nothing measured but the order.
        posterior: latents are mean and log-variance side by side, 2 C wide, as in front of a KL bottleneck; codes are means.

    Until :meth:`calibrate`, tables are those of unit normal channels. The most important channel, that of the largest
    variance, comes first in a token: the fastest digit of an id, the first bits of a bit code. ``explained`` says which share
    of the variance each channel has, in that order. The stat ``error`` is the squared error of a channel over its variance
    at calibration, mean over channels.

    Example:
        >>> quantizer = PerChannel(16, bits=6)
        >>> out = quantizer(torch.randn(1, 4, 16))
        >>> quantizer.bits_per_token, out.bits.shape, bool(out.stats["error"] < 0.01)
        (96, torch.Size([1, 4, 96]), True)
    """

    def __init__(
        self,
        channels: int,
        bits: int | Sequence[int] = 6,
        calibration: str = "gaussian",
        posterior: bool = False,
    ) -> None:
        super().__init__()
        check_range("channels", channels, 1, 255)
        widths = [bits] * channels if isinstance(bits, int) else list(bits)
        for width in widths:
            check_range("bits of a channel", width, 1, 12)
        if len(widths) != channels:
            raise ModelError(f"bits must be one number or {channels} of them, one a channel, got {len(widths)}")
        check_range("bits of all channels together", sum(widths), 1, 255)
        if calibration not in CALIBRATIONS:
            raise ModelError(f"calibration must be one of {', '.join(CALIBRATIONS)}, got {calibration!r:.100}")
        if calibration == "tokenbridge" and max(widths) > 9:
            raise ModelError("tokenbridge clips its table at 3 deviations, which leaves 9 bits at most; use gaussian beyond")
        self.channels, self.bits, self.calibration, self.posterior = channels, widths, calibration, posterior
        self.dim = 2 * channels if posterior else channels
        self.sizes = [2**width for width in widths]
        self.vocab_size = 2 ** sum(widths)
        published = calibration == "tokenbridge"
        make = truncated_normal_table if published else normal_table
        tables = {size: make(size) for size in set(self.sizes)}
        self.register_buffer("order", torch.arange(channels, device="cpu"))
        self.register_buffer("explained", torch.full((channels,), 1 / channels, device="cpu"))
        self.register_buffer("mean", torch.zeros(channels, device="cpu"))
        self.register_buffer("scale", torch.full((channels,), 5 / 3 if published else 1.0, device="cpu"))
        self.register_buffer("deviation", torch.ones(channels, device="cpu"))
        self.register_buffer("tables", self._padded([tables[size] for size in self.sizes]))

    @property
    def code_dim(self) -> int:
        return self.channels

    @torch.no_grad()
    def calibrate(self, latents: Tensor) -> None:
        """Measure order and tables.

        Args:
            latents: float (..., C) or, with ``posterior``, (..., 2 C), of as many images as there are.

        Raises:
            ModelError: another width, values that are not finite, or too few latents to measure.
        """
        if latents.shape[-1] != self.dim:
            raise ModelError(f"latents of width {self.dim} are to be measured, got {tuple(latents.shape)}")
        x = latents.flatten(0, -2)[:, : self.channels].double().cpu()
        least = max(self.sizes) if self.calibration in ("quantile", "lloyd") else 2
        if len(x) < least:
            raise ModelError(
                f"{self.calibration} with {max(self.bits)} bits measures at least {least} latents, got {len(x)}. "
                "Give more images, or take calibration='gaussian'"
            )
        if not bool(x.isfinite().all()):
            raise ModelError("latents to measure must be finite; they hold nan or inf")
        mean, deviation = x.mean(0), x.std(0)
        order = deviation.argsort(descending=True, stable=True)
        mean, deviation = mean[order], deviation[order]
        variance = deviation.square()
        self.order.copy_(order)
        self.explained.copy_(variance / variance.sum().clamp(min=1e-30))
        # A channel that never varies gets a table all the same, small beside the others but wide enough for float32.
        floor = torch.maximum(1e-3 * variance.mean().sqrt(), 1e-3 * mean.abs()).clamp(min=1e-6)
        deviation = torch.maximum(deviation, floor)
        self.deviation.copy_(deviation)
        if self.calibration == "tokenbridge":
            return
        self.mean.copy_(mean)
        self.scale.copy_(deviation)
        if self.calibration != "gaussian":
            make = lloyd_table if self.calibration == "lloyd" else quantile_table
            columns = ((x[:, order] - mean) / deviation).T.contiguous()
            self.tables.copy_(self._padded([make(column, size) for column, size in zip(columns, self.sizes)]))

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Float (B, N, C) or (B, N, 2 C), bool mask (B, N) True = keep → QuantizerOutput with q (B, N, C); no losses."""
        with torch.autocast(z.device.type, enabled=False):
            z = z[..., : self.channels].float()
            if mask is not None:
                z = z.masked_fill(~mask[..., None], 0)  # whatever stood there, even nan, is gone from here on
            tokens = self.codes_to_ids(z.detach())
            codes = self.ids_to_codes(tokens)
            q = codes + (z - z.detach())  # value of the code to the last bit, gradient of z
            error = ((z.detach() - codes)[..., self.order] / self.deviation.float()).square().mean(-1)
            stats = {"error": token_mean(error, mask, self.training and torch.is_grad_enabled())}
            if mask is not None:
                q = q.masked_fill(~mask[..., None], 0)
                tokens = tokens.masked_fill(~(mask if fits_id(self.sizes) else mask[..., None]), 0)
        if fits_id(self.sizes):
            return QuantizerOutput(q, tokens, {}, stats)
        return QuantizerOutput(q, None, {}, stats, bits=tokens)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """int64 (B, n) ids, or uint8 (B, n, d) bits beyond 62 of them → float32 (B, n, C)."""
        digits = self.channel_ids(ids)
        values = self.tables.float().gather(1, digits.flatten(0, -2).T).T.view(digits.shape)
        ordered = values * self.scale.float() + self.mean.float()
        return torch.empty_like(ordered).index_copy_(-1, self.order, ordered)

    @torch.no_grad()
    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """float (B, n, C) → int64 (B, n) ids, or uint8 (B, n, d) bits beyond 62 of them: the nearest entries."""
        tables = self.tables.float()
        values = (codes.float()[..., self.order] - self.mean.float()) / self.scale.float()
        between = (tables[:, 1:] + tables[:, :-1]) / 2
        digits = torch.searchsorted(between, values.flatten(0, -2).T.contiguous()).T.view(codes.shape)
        return self.from_channel_ids(digits)

    def channel_ids(self, ids: Tensor) -> Tensor:
        """Tokens, int64 (B, n) or uint8 (B, n, d), → int64 (B, n, C): the entry of each channel, most important first."""
        return tokens_to_digits(ids, self.sizes)

    def from_channel_ids(self, channel_ids: Tensor) -> Tensor:
        """int64 (B, n, C) → tokens, int64 (B, n) or uint8 (B, n, d)."""
        return digits_to_tokens(channel_ids, self.sizes)

    def _padded(self, tables: list[Tensor]) -> Tensor:
        """Tables of different sizes → float32 (C, K); what is missing is infinitely far away."""
        full = torch.full((self.channels, max(self.sizes)), torch.inf, device="cpu")
        for row, table in zip(full, tables):
            row[: len(table)] = table.float()
        return full


@torch.inference_mode(False)
@torch.no_grad()
def quantize_after_training(
    tokenizer: Tokenizer1D,
    images_or_latents: Tensor,
    bits: int | Sequence[int] = 6,
    calibration: str = "gaussian",
    batch: int = 16,
) -> Tokenizer1D:
    """Make a discrete tokenizer of a continuous one, without training.

    Args:
        tokenizer: one with a continuous bottleneck; it is copied, not changed.
        images_or_latents: what to measure: float (M, 3, H, W) in [0, 1] at its ``image_size``, or latents (M, N, D) as its
            ``encode_latents`` makes them.
        bits, calibration: as :class:`PerChannel`.
        batch: images encoded at a time.

    Returns:
        The copy with a calibrated :class:`PerChannel` for a quantizer, in eval mode.

    Raises:
        ModelError: the tokenizer is discrete already, or what is to be measured does not fit.
    """
    old = tokenizer.quantizer
    if old.vocab_size:
        raise ModelError(f"{tokenizer.name} is discrete already (vocabulary {old.vocab_size}); take a continuous tokenizer")
    if old.dim not in (old.code_dim, 2 * old.code_dim):
        raise ModelError(
            f"latents of width {old.dim} with codes of {old.code_dim} are neither codes nor mean and log-variance"
        )
    quantizer = PerChannel(old.code_dim, bits, calibration, posterior=old.dim != old.code_dim)
    latents = images_or_latents
    if latents.ndim == 4:
        training = tokenizer.training
        tokenizer.eval()
        latents = torch.cat([tokenizer.encode_latents(part).cpu() for part in latents.split(batch)])
        tokenizer.train(training)
    elif latents.ndim != 3:
        raise ModelError(f"give images (M, 3, H, W) or latents (M, N, {old.dim}), got {tuple(latents.shape)}")
    quantizer.calibrate(latents)
    twin = copy.deepcopy(tokenizer)
    name = f"{tokenizer.name}-{calibration}-{sum(quantizer.bits)}"
    made = Tokenizer1D(twin.encoder, quantizer.to(tokenizer.device), twin.decoder, twin.lengths, twin.image_size, name)
    return made.eval()
