"""GrowingScaleVQ: residual quantization over growing numbers of tokens — first the gist of all latents, then detail.

Multi-scale residual quantization of VAR (https://arxiv.org/abs/2404.02905) on 1D latents, as VAT does
(https://arxiv.org/abs/2411.11025). Level s shrinks what is left of the N latents to n_s by area averages, codes those,
stretches the codes back by linear interpolation and takes them away; the codes of all levels, stretched, add up to q.

The tokens are those of level 0, then of level 1, …; T = Σ n_s. A prefix may end inside a level: the tokens that are there
count, the missing ones add nothing, as if their codes were zero before stretching, so latents between the last token
given and the first missing one get a share of the level that falls from one to nothing. The levels after it add nothing.

Shapes: B images, N latents, T tokens, S levels, n_s tokens of level s, D width, K codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.part import Quantizer, QuantizerOutput
from tok1d.tokenizers.quantizers.common import (
    count_ids,
    straight_through,
    sum_over_ranks,
    token_mean,
    usage_stats,
)
from tok1d.tokenizers.quantizers.vq import VQ


class GrowingScaleVQ(Quantizer):
    """Residual vector quantization on growing scales.

    Args:
        vocab_size: K.
        dim: D.
        scales: n_0 ≤ n_1 ≤ … tokens of the levels; the last is N, the number of latents.
        shared: one codebook for all levels, as VAR; else one each.
        phi: share r of a convolution after stretching, h ← (1 - r) h + r conv3(h); VAR has 0.5; 0 for none.
        phi_convs: number of convolutions, each of them serving a run of levels.
        commitment: published weight of the ``commitment`` loss; goes into ``loss_weights``.
        ema, ema_decay, dead_code_threshold, seed: as :class:`VQ`, of every codebook. With ``phi`` the codebook loss stays,
            as the convolutions learn by it alone.
        kmeans_iterations: as :class:`VQ`, fitted to what each level would see if those before it coded without error.

    The losses are unweighted: with f_s the sum up to level s, ``commitment`` is the mean square of z - sg[f_s] and
    ``codebook`` that of f_s - sg[z], over latents, channels and those levels of which an image keeps a token.
    An image of which no token is kept touches nothing.

    Example:
        >>> vq = GrowingScaleVQ(16, dim=4, scales=[1, 2, 4])
        >>> out = vq(torch.randn(2, 4, 4))
        >>> vq.tokens_made(4), out.ids.shape, out.q.shape, vq.ids_to_codes(out.ids[:, :3]).shape
        (7, torch.Size([2, 7]), torch.Size([2, 4, 4]), torch.Size([2, 4, 4]))
    """

    whole = True

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        scales: Sequence[int],
        shared: bool = True,
        phi: float = 0.0,
        phi_convs: int = 1,
        commitment: float = 0.25,
        ema: bool = False,
        ema_decay: float = 0.99,
        dead_code_threshold: float = 0.0,
        kmeans_iterations: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_range("vocab_size", vocab_size, 2, 2**26)
        check_range("dim", dim, 1, 65536)
        check_range("number of scales", len(scales), 1, 256)
        for count in scales:
            check_range("every entry of scales", count, 1, 65536)
        if list(scales) != sorted(scales):
            raise ModelError(f"scales must not shrink: the last is the number of latents, got {list(scales)}")
        if not 0 <= phi <= 1:
            raise ModelError(f"phi is the share of a convolution, in [0, 1], got {phi}")
        check_range("phi_convs", phi_convs, 1, len(scales))
        self.vocab_size, self.dim, self.scales = vocab_size, dim, tuple(scales)
        self.phi, self.latents, self.tokens = phi, scales[-1], sum(scales)
        self.loss_weights = {"commitment": commitment} if ema and not phi else {"commitment": commitment, "codebook": 1.0}
        self.books = nn.ModuleList(
            VQ(
                vocab_size,
                dim,
                ema=ema,
                ema_decay=ema_decay,
                dead_code_threshold=dead_code_threshold,
                kmeans_iterations=kmeans_iterations,
                seed=seed + level,
            )
            for level in range(1 if shared else len(scales))
        )
        self.convs = nn.ModuleList(nn.Conv1d(dim, dim, 3, padding=1) for _ in range(phi_convs if phi else 0))

    def tokens_made(self, latents: int) -> int:
        """T, for the N latents this quantizer was built for.

        Raises:
            ModelError: another number of latents.
        """
        if latents != self.latents:
            raise ModelError(
                f"the last of scales {list(self.scales)} must be the number of latents, which is {latents}; change the scales"
            )
        return self.tokens

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Float (B, N, D), bool mask (B, T) over tokens, True = keep → QuantizerOutput with q (B, N, D) and ids (B, T)."""
        self.tokens_made(z.shape[1])
        step = self.training and torch.is_grad_enabled()
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            keep = z.new_ones(len(z), self.tokens, dtype=torch.bool) if mask is None else mask
            given = keep.any(1)[:, None, None]
            z = z.masked_fill(~given, 0)  # an image of which nothing is kept, nan and all
            if step:
                self._fit(z.detach(), keep)
            left, total, seen, ids = z.detach(), None, [], []
            errors: dict[str, list[Tensor]] = {name: [] for name in self.loss_weights}
            for level, here in enumerate(keep.split(self.scales, 1)):
                small = self._shrink(left, level)
                digit = self._book(level).choose(small, step).masked_fill(~here, 0)
                added = self._add(digit, here, level)
                total = added if total is None else total + added
                left = left - added.detach()
                seen.append(small * here[..., None]), ids.append(digit)
                difference = {"commitment": z - total.detach(), "codebook": total - z.detach()}
                for name in errors:
                    errors[name].append(difference[name].square().mean((1, 2)))
            active = torch.stack([here.any(1) for here in keep.split(self.scales, 1)], 1)  # (B, S)
            losses = {name: token_mean(torch.stack(each, 1), active, step) for name, each in errors.items()}
            q = straight_through(z, total).masked_fill(~given, 0)
            stats = self._learn(seen, ids, keep, step)
        return QuantizerOutput(q, torch.cat(ids, 1), losses, stats)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """int64 (B, n) in [0, K), the first n ≤ T tokens → float32 (B, N, D).

        Raises:
            TokenError: more tokens than the scales have.
        """
        batch, n = ids.shape
        if n > self.tokens:
            raise TokenError(f"scales {list(self.scales)} have {self.tokens} tokens, got {n} ids")
        here = torch.arange(self.tokens, device=ids.device).expand(batch, -1) < n
        total = None
        for level, (digit, present) in enumerate(
            zip(F.pad(ids, (0, self.tokens - n)).split(self.scales, 1), here.split(self.scales, 1))
        ):
            added = self._add(digit, present, level)
            total = added if total is None else total + added
        return total

    @torch.no_grad()
    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """float (B, N, D) → int64 (B, T): what they are coded as.

        Levels overlap, so that codes do not tell which ids they came from: those found here are coded anew, level after
        level, and their codes are near the given ones, not equal to them.
        """
        with torch.autocast(codes.device.type, enabled=False):
            self.tokens_made(codes.shape[1])
            left, ids = codes.float(), []
            for level, count in enumerate(self.scales):
                digit = self._book(level).codes_to_ids(self._shrink(left, level))
                left = left - self._add(digit, left.new_ones(len(left), count, dtype=torch.bool), level)
                ids.append(digit)
            return torch.cat(ids, 1)

    # levels ------------------------------------------------------------------------------------------------------------

    def _book(self, level: int) -> VQ:
        return self.books[level % len(self.books)]  # type: ignore[return-value]

    def _shrink(self, x: Tensor, level: int) -> Tensor:
        """Float (B, N, D) → (B, n_s, D), means over areas."""
        return F.interpolate(x.transpose(1, 2), self.scales[level], mode="area").transpose(1, 2)

    def _add(self, ids: Tensor, here: Tensor, level: int) -> Tensor:
        """int64 (B, n_s), bool (B, n_s) of the tokens there are → float32 (B, N, D), what the level adds to the latents."""
        codes = self._book(level).ids_to_codes(ids) * here[..., None]
        x = F.interpolate(codes.transpose(1, 2), self.latents, mode="linear")
        if self.phi:
            conv = self.convs[level * len(self.convs) // len(self.scales)]
            # Its bias, too, is part of tokens: where nothing is given the level adds nothing.
            x = (1 - self.phi) * x + self.phi * conv(x) * here.any(1)[:, None, None]
        return x.transpose(1, 2)

    @torch.no_grad()
    def _fit(self, z: Tensor, keep: Tensor) -> None:
        """Start the codebooks from latents, float32 (B, N, D), if so configured."""
        if not self._book(0).kmeans_iterations:
            return
        rows, coarse = [], torch.zeros_like(z)
        for level in range(len(self.scales)):
            rows.append(self._shrink(z - coarse, level))
            coarse = coarse + F.interpolate(rows[-1].transpose(1, 2), self.latents, mode="linear").transpose(1, 2)
        if len(self.books) == 1:
            self._book(0).fit(torch.cat(rows, 1), keep)
        else:
            for level, (row, here) in enumerate(zip(rows, keep.split(self.scales, 1))):
                self._book(level).fit(row, here)

    def _learn(self, seen: list[Tensor], ids: list[Tensor], keep: Tensor, step: bool) -> dict[str, Tensor]:
        """Let the codebooks learn once all levels are coded; ``usage`` and ``perplexity`` of the mean codebook."""
        if len(self.books) == 1:
            groups = [(torch.cat(seen, 1), torch.cat(ids, 1), keep)]
        else:
            groups = list(zip(seen, ids, keep.split(self.scales, 1)))
        each = []
        for book, (rows, digits, here) in zip(self.books, groups):
            counts = count_ids(digits, here, self.vocab_size)
            if step:
                book.learn(rows, digits, here, sum_over_ranks(counts))  # type: ignore[operator]
            each.append(usage_stats(counts))
        return {name: torch.stack([stats[name] for stats in each]).mean() for name in each[0]}
