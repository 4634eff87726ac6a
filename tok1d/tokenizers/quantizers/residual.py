"""ResidualVQ: a few codebooks one after another, each coding what the ones before left over; one token holds all choices.

SoundStream: https://arxiv.org/abs/2107.03312 (residual stages, dropping late ones in training); RQ-VAE:
https://arxiv.org/abs/2203.01941 (one codebook for all stages). The S choices of a token are the digits of its id, the
first stage being the fastest digit; beyond 2^62 combinations they are its bits.

Shapes: B images, N tokens, D width, S stages, K codes of a stage, m rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.part import Quantizer, QuantizerOutput
from tok1d.tokenizers.quantizers.common import (
    count_ids,
    kept_only,
    rank_rows,
    rotated,
    straight_through,
    sum_over_ranks,
    token_mean,
    usage_stats,
)
from tok1d.tokenizers.quantizers.packing import digit_bits, digits_to_tokens, fits_id, tokens_to_digits
from tok1d.tokenizers.quantizers.vq import VQ

WIDEST_BEAM = 4096  # sums of codes kept in mind while codes_to_ids looks for the one that was meant


class ResidualVQ(Quantizer):
    """Residual vector quantization.

    Args:
        codes: K; the vocabulary has K^S tokens. A power of two if that is beyond 2^62.
        dim: D.
        stages: S.
        shared: one codebook for all stages.
        stage_dropout: probability, for an image in a training step, of a random number of stages (1 to S, equally likely)
            instead of all. Dropped stages code nothing and learn nothing; their digits are 0 in the ids of that step.
        commitment: published weight of the ``commitment`` loss; goes into ``loss_weights``.
        ema, ema_decay, dead_code_threshold, seed: as :class:`VQ`, of every codebook.
        kmeans_iterations: as :class:`VQ`; every stage is fitted to what the stages before it left over.
        rotation: pass gradients back through the rotation that takes a latent to its code (the sum), instead of unchanged.

    The losses are unweighted means over kept tokens, channels and stages of ``commitment`` (what a stage sees towards
    its code) and, unless ``ema``, ``codebook`` (the reverse). Usage and perplexity are means over codebooks.

    Example:
        >>> rvq = ResidualVQ(16, dim=4, stages=3)
        >>> rvq.vocab_size, rvq.bits_per_token, rvq(torch.randn(2, 8, 4)).ids.shape
        (4096, 12, torch.Size([2, 8]))
    """

    def __init__(
        self,
        codes: int,
        dim: int,
        stages: int,
        shared: bool = False,
        stage_dropout: float = 0.0,
        commitment: float = 0.25,
        ema: bool = False,
        ema_decay: float = 0.99,
        dead_code_threshold: float = 0.0,
        kmeans_iterations: int = 0,
        rotation: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_range("codes", codes, 2, 2**26)
        check_range("dim", dim, 1, 65536)
        check_range("stages", stages, 1, 64)
        if not 0 <= stage_dropout <= 1:
            raise ModelError(f"stage_dropout is a probability, in [0, 1], got {stage_dropout}")
        if shared and kmeans_iterations:
            raise ModelError("a shared codebook cannot start from k-means: late stages have no residuals before it exists")
        self.sizes = [codes] * stages
        if not fits_id(self.sizes) and codes & (codes - 1):
            raise ModelError(
                f"{codes} codes in {stages} stages are more than 2^62 tokens, which are kept as bits: codes must be a power of "
                f"two then. Use {1 << codes.bit_length() - 1} or {1 << codes.bit_length()}, or fewer stages"
            )
        self.vocab_size = codes**stages if fits_id(self.sizes) else 2 ** sum(digit_bits(self.sizes))
        self.codes, self.dim, self.stages = codes, dim, stages
        self.stage_dropout, self.rotation, self.ema = stage_dropout, rotation, ema
        self.loss_weights = {"commitment": commitment} if ema else {"commitment": commitment, "codebook": 1.0}
        self.books = nn.ModuleList(
            VQ(
                codes,
                dim,
                ema=ema,
                ema_decay=ema_decay,
                dead_code_threshold=dead_code_threshold,
                kmeans_iterations=kmeans_iterations,
                seed=seed + stage,
            )
            for stage in range(1 if shared else stages)
        )

    def book(self, stage: int) -> VQ:
        """The codebook of a stage."""
        return self.books[stage % len(self.books)]  # type: ignore[return-value]

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Float (B, N, D), bool mask (B, N) True = keep → QuantizerOutput."""
        step = self.training and torch.is_grad_enabled()
        with torch.autocast(z.device.type, enabled=False):
            z = kept_only(z, mask)
            active = self._active(z, mask, step)
            left, total = z, torch.zeros_like(z)
            ids, seen, losses = [], [], {name: z.new_zeros(()) for name in self.loss_weights}
            for stage in range(self.stages):
                book, here = self.book(stage), mask if active is None else active[stage]
                residual = left.detach()
                if step:
                    book.fit(residual, here)
                digit = book.choose(residual, step)
                codes = book.ids_to_codes(digit)
                if here is not None:
                    digit = digit.masked_fill(~here, 0)
                ids.append(digit), seen.append(residual if here is None else residual * here[..., None])
                errors = {"commitment": left - codes.detach(), "codebook": codes - residual}
                for name in losses:
                    losses[name] = losses[name] + token_mean(errors[name].square().mean(-1), here, step) / self.stages
                coded = codes.detach() if here is None else codes.detach() * here[..., None]
                left, total = left - coded, total + coded
            q = rotated(z, total) if self.rotation else straight_through(z, total)
            if mask is not None:
                q = q.masked_fill(~mask[..., None], 0)
            stats = self._learn(seen, ids, [mask] * self.stages if active is None else active, step)
            tokens = digits_to_tokens(torch.stack(ids, -1), self.sizes)
        as_ids = fits_id(self.sizes)
        return QuantizerOutput(q, tokens if as_ids else None, losses, stats, bits=None if as_ids else tokens)

    def _active(self, z: Tensor, mask: Tensor | None, step: bool) -> list[Tensor] | None:
        """Which tokens (B, N) take part in each stage; None if all stages take the tokens of the mask."""
        if not (step and self.stage_dropout):
            return None
        batch = len(z)
        count = rank_rows(batch, lambda rows: torch.randint(1, self.stages + 1, (rows,)))
        count = torch.where(rank_rows(batch, torch.rand) < self.stage_dropout, count, self.stages).to(z.device)
        keep = z.new_ones(z.shape[:2], dtype=torch.bool) if mask is None else mask
        return [keep & (stage < count)[:, None] for stage in range(self.stages)]

    def _learn(self, seen: list[Tensor], ids: list[Tensor], masks: list[Tensor | None], step: bool) -> dict[str, Tensor]:
        """Let every codebook learn from its stages once all are coded; ``usage`` and ``perplexity`` of the mean codebook."""
        each = []
        for i, book in enumerate(self.books):
            mine = range(i, self.stages, len(self.books))
            rows, digits = torch.cat([seen[s] for s in mine], 1), torch.cat([ids[s] for s in mine], 1)
            mask = None if masks[i] is None else torch.cat([masks[s] for s in mine], 1)
            counts = count_ids(digits, mask, self.codes)
            if step:
                book.learn(rows, digits, mask, sum_over_ranks(counts))
            each.append(usage_stats(counts))
        return {name: torch.stack([stats[name] for stats in each]).mean() for name in each[0]}

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """int64 (B, n) ids, or uint8 (B, n, d) bits → float32 (B, n, D), the sum of the codes of all stages."""
        return self.digits_to_codes(tokens_to_digits(ids, self.sizes))

    def digits_to_codes(self, digits: Tensor) -> Tensor:
        """int64 (..., G), choices of the first G ≤ S stages → float32 (..., D), the sum of their codes."""
        total = torch.zeros((), device=digits.device)
        for stage, digit in enumerate(digits.unbind(-1)):
            total = total + self.book(stage).ids_to_codes(digit)
        return total

    @torch.no_grad()
    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """float (B, n, D) codes (not latents) → int64 (B, n) ids, or uint8 (B, n, d) bits.

        Which codes make up a sum is a search: the first one is not always the nearest. It starts greedily; rows whose sum
        is not found to the last bit are tried again with more and more partial sums in mind, up to `WIDEST_BEAM`, which
        finds every sum if K^(S-1) is no more than that. Beyond, a row may end with the nearest sum that was met.
        """
        rows = codes.float().flatten(0, -2)
        digits = torch.zeros(len(rows), self.stages, dtype=torch.int64, device=rows.device)
        error = rows.new_full((len(rows),), torch.inf)
        width = 1
        while True:
            wrong = (error > 0).nonzero().flatten()
            for part in wrong.split(max(1, 2**22 // (width * self.codes))):
                found = self._beam(rows[part], width)
                miss = (self.digits_to_codes(found) - rows[part]).abs().amax(-1)
                better = miss < error[part]
                digits[part[better]], error[part[better]] = found[better], miss[better]
            if width >= min(WIDEST_BEAM, self.codes ** (self.stages - 1)) or not bool((error > 0).any()):
                return digits_to_tokens(digits, self.sizes).view(*codes.shape[:-1], *self._token_shape())
            width *= 8

    def _token_shape(self) -> tuple[int, ...]:
        return () if fits_id(self.sizes) else (sum(digit_bits(self.sizes)),)

    def _beam(self, rows: Tensor, width: int) -> Tensor:
        """Float (m, D) → int64 (m, S): the best of the sums reached by keeping ``width`` partial ones at every stage."""
        m = len(rows)
        left, digits = rows[:, None], torch.zeros(m, 1, 0, dtype=torch.int64, device=rows.device)
        for stage in range(self.stages):
            book = self.book(stage).codebook.float()
            gap = torch.cdist(left.flatten(0, 1), book, compute_mode="donot_use_mm_for_euclid_dist").view(m, -1)
            # towards the end everything counts: the last stage keeps one
            keep = 1 if stage == self.stages - 1 else min(width, gap.shape[1])
            best = gap.topk(keep, largest=False).indices
            parent, digit = best // self.codes, best % self.codes
            left = left.gather(1, parent[..., None].expand(-1, -1, self.dim)) - book[digit]
            kept = digits.gather(1, parent[..., None].expand(-1, -1, stage))
            digits = torch.cat([kept, digit[..., None]], -1)
        return digits[:, 0]
