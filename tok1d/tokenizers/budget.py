"""Budgets: let each image of a nested model keep as many tokens as a quality or a file size asks for.

One encode; then prefixes are decoded for the whole batch at once, each image its own: all tokens first, then bisection
(9 decodes for 256 tokens, whatever the batch). Quality is nearly monotone in the number of tokens, not exactly: the
length returned was itself decoded and meets the target, and the one just below it was decoded and does not.
``Auto`` decodes nothing: it believes the halting head of the model.

Shapes: G originals, R rows of the batch (tiles of an original are consecutive rows), N tokens.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tok1d.errors import TokenError, UsageError
from tok1d.tokenizers.halting import check_quality, head_of
from tok1d.tokens import TokenSequence

if TYPE_CHECKING:
    from tok1d.tokenizers.tokenizer import Tokenizer1D

ROWS_AT_ONCE = 32  # bounds the memory of a search in a tiled image
Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BudgetResult:
    """What a search found, one entry per original image.

    Attributes:
        sequence: tokens with their own length for each image; all tiles of an image share it.
        tokens: how many were kept (of each tile).
        reached: whether the quality target is met; False means that every allowed token is kept and it is still missed.
        psnr, lpips: quality of what is kept, at the model's size; None where it was no target.
        predicted: whether that quality, and ``reached``, are what a halting head says, not measured.
    """

    sequence: TokenSequence
    tokens: tuple[int, ...]
    reached: tuple[bool, ...]
    psnr: tuple[float | None, ...]
    lpips: tuple[float | None, ...]
    predicted: bool = False


@dataclass(frozen=True)
class Budget:
    """How many tokens an image may or must keep; give it as ``tokens=`` to ``Tokenizer1D.encode``.

    With ``psnr`` or ``lpips``: the smallest prefix that reaches the target (both, if both are given). With ``max_bytes``:
    the largest prefix whose .tok record fits. Together: the smallest that reaches the target, never above the bytes.

    Args:
        psnr: dB to reach, measured at the model's size.
        lpips: LPIPS (VGG) not to exceed, at the model's size; needs the extra ``eval``.
        max_bytes: largest .tok record of an image, header and checksum included.

    Example:
        >>> Budget(psnr=24.0, max_bytes=200)
        Budget(psnr=24.0, lpips=None, max_bytes=200)
    """

    psnr: float | None = None
    lpips: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.psnr is None and self.lpips is None and self.max_bytes is None:
            raise UsageError("a Budget needs a target: psnr=, lpips= or max_bytes=")
        for name, value in (("psnr", self.psnr), ("lpips", self.lpips), ("max_bytes", self.max_bytes)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} must be a positive number, got {value}")

    def apply(self, tokenizer: Tokenizer1D, images: Tensor, seq: TokenSequence) -> TokenSequence:
        """As :meth:`search`, the sequence only; warns when a target is missed with every token kept."""
        return _warned(self.search(tokenizer, images, seq), self)

    def check(self, tokenizer: Tokenizer1D) -> None:
        """Refuse a model whose number of tokens cannot be chosen.

        Raises:
            TokenError: it is not nested.
        """
        if not tokenizer.is_nested:
            raise TokenError(
                f"{tokenizer.name} makes exactly {tokenizer.max_tokens} tokens and cannot adapt their number to a target. "
                "Use a nested model: tok models --filter nested"
            )

    @torch.inference_mode()
    def search(
        self,
        tokenizer: Tokenizer1D,
        images: Tensor,
        seq: TokenSequence,
        metas: Sequence[dict[str, Any]] | None = None,
    ) -> BudgetResult:
        """Find the length of each image.

        Args:
            tokenizer: a nested model.
            images: (R, 3, H, W) at the model's size, float in [0, 1] or uint8.
            seq: their tokens, in full.
            metas: JSON blocks that the records will carry, one per original; they count against ``max_bytes``.

        Raises:
            TokenError: the model is not nested, or one token alone takes more than ``max_bytes``.
            MissingExtraError: ``lpips`` without the extra ``eval``.
        """
        self.check(tokenizer)
        steps = [k for k in tokenizer.token_lengths if k <= seq.shape[1]]
        count = len(seq) if seq.geometry is None else len(seq.geometry)
        if count == 0:
            return BudgetResult(seq, (), (), (), ())
        tops = [len(steps) - 1] * count
        if self.max_bytes is not None:
            tops = [self._fitting(tokenizer, seq, i, steps, metas[i] if metas else None) for i in range(count)]
        found = {i: _Found(top) for i, top in enumerate(tops)}
        if self.psnr is not None or self.lpips is not None:
            self._search_quality(_Meter(tokenizer, images, seq, self.lpips is not None), steps, tops, found)
        kept = tuple(steps[found[i].step] for i in range(count))
        return BudgetResult(
            sequence=_cut(seq, kept),
            tokens=kept,
            reached=tuple(found[i].reached for i in range(count)),
            psnr=tuple(found[i].psnr if self.psnr is not None else None for i in range(count)),
            lpips=tuple(found[i].lpips for i in range(count)),
        )

    def _fitting(self, tokenizer: Tokenizer1D, seq: TokenSequence, i: int, steps: list[int], meta: dict[str, Any] | None) -> int:
        """Index of the longest step whose record of image i fits ``max_bytes``; sizes grow with length, so bisection."""
        from tok1d import tokfile

        assert self.max_bytes is not None
        alone = image_of(seq, i)
        size = lambda step: len(tokfile.pack(alone[:, : steps[step]], meta))  # noqa: E731
        if size(0) > self.max_bytes:
            raise TokenError(
                f"a .tok record of {tokenizer.name} takes at least {size(0)} bytes for this image ({steps[0]} token"
                f"{'s' if steps[0] > 1 else ''}, 32 of header, 4 of checksum), got max_bytes={self.max_bytes}"
            )
        low, high = 0, len(steps)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if size(middle) <= self.max_bytes else (low, middle)
        return low

    def _search_quality(self, meter: _Meter, steps: list[int], tops: list[int], found: dict[int, _Found]) -> None:
        """All allowed tokens first (whoever misses with them is done), then bisection, the whole batch at each step."""
        low = dict.fromkeys(found, -1)  # last step known to miss
        high: dict[int, int] = {}  # first step known to reach

        trial = dict(enumerate(tops))
        while trial:
            for i, (psnr, lpips) in meter({i: steps[s] for i, s in trial.items()}).items():
                ok = (self.psnr is None or psnr >= self.psnr) and (self.lpips is None or (lpips or 0.0) <= self.lpips)
                (high if ok else low)[i] = trial[i]
                if ok or trial[i] == tops[i]:
                    found[i] = _Found(trial[i], ok, psnr, lpips)
            trial = {i: (low[i] + high[i]) // 2 for i in high if high[i] - low[i] > 1}


@dataclass(frozen=True)
class Auto:
    """As many tokens as the halting head of the model says an image needs; give it as ``tokens=`` to ``Tokenizer1D.encode``.

    One encode and no decode: the smallest prefix that is predicted to reach the quality. What an image really gets lies
    around the target; a :class:`Budget` meets it exactly and costs a search.

    Args:
        quality: in the measure of the head (``tokenizer.halting.metric``): dB of PSNR, or LPIPS; that stored with it if None.
        max_bytes: never more tokens than a .tok record of so many bytes holds.

    Example:
        >>> Auto(quality=24.0)
        Auto(quality=24.0, max_bytes=None)
    """

    quality: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.quality is not None:
            check_quality(self.quality)
        if self.max_bytes is not None:
            Budget(max_bytes=self.max_bytes)

    def apply(self, tokenizer: Tokenizer1D, images: Tensor, seq: TokenSequence) -> TokenSequence:
        """As :meth:`search`, the sequence only; warns where all tokens are predicted to miss the target."""
        return _warned(self.search(tokenizer, images, seq), self)

    @torch.inference_mode()
    def search(
        self,
        tokenizer: Tokenizer1D,
        images: Tensor | None,
        seq: TokenSequence,
        metas: Sequence[dict[str, Any]] | None = None,
    ) -> BudgetResult:
        """Choose the length of each image; arguments as :meth:`Budget.search`, the pictures are not looked at.

        Raises:
            TokenError: the model has no halting head, or ``seq`` does not hold all its tokens.
        """
        head = head_of(tokenizer)
        if len(seq) == 0:
            return BudgetResult(seq, (), (), (), (), predicted=True)
        assert seq.lengths is not None
        if int(seq.lengths.min()) != tokenizer.max_tokens:
            raise TokenError(f"a halting head reads all {tokenizer.max_tokens} tokens of an image, got {int(seq.lengths.min())}")
        rows = head(tokenizer.codes_of(seq.data.to(tokenizer.device), seq.lengths.to(tokenizer.device)))
        images_rows = rows_of_images(seq)  # the error of an image is the mean over its tiles
        curves = torch.stack([rows[r.start : r.stop].logsumexp(0) - math.log(len(r)) for r in images_rows]).cpu()
        steps = torch.tensor(tokenizer.token_lengths)
        curves = curves[:, steps - 1]
        wanted = check_quality(head.quality if self.quality is None else self.quality)
        reaches = curves <= head.log_error(wanted) + 1e-6  # rounding of a target that is a point of the curve
        tops = [len(steps) - 1] * len(curves)
        if self.max_bytes is not None:
            limit = Budget(max_bytes=self.max_bytes)
            tops = [limit._fitting(tokenizer, seq, i, steps.tolist(), metas[i] if metas else None) for i in range(len(curves))]
        first = torch.where(reaches.any(1), reaches.int().argmax(1), len(steps) - 1)
        chosen = first.minimum(torch.tensor(tops))
        each = torch.arange(len(chosen))
        quality = tuple(head.quality_of(curves[each, chosen]).tolist())
        kept = tuple(steps[chosen].tolist())
        none = (None,) * len(kept)
        psnr, lpips = (quality, none) if head.metric == "psnr" else (none, quality)
        return BudgetResult(_cut(seq, kept), kept, tuple(reaches[each, chosen].tolist()), psnr, lpips, predicted=True)


def _warned(result: BudgetResult, target: Budget | Auto) -> TokenSequence:
    """The sequence, with a warning to the caller of ``encode`` about images that miss the target."""
    missed = result.reached.count(False)
    if missed:
        said = " by prediction" if result.predicted else ""
        warnings.warn(
            f"{missed} of {len(result.reached)} images{said} miss the target ({target}) and keep all tokens they may", stacklevel=5
        )
    return result.sequence


@dataclass
class _Found:
    """The step chosen for an image and its quality there."""

    step: int
    reached: bool = True
    psnr: float | None = None
    lpips: float | None = None


class _Meter:
    """Decodes prefixes of some images, each its own, and measures them against the originals."""

    def __init__(self, tokenizer: Tokenizer1D, images: Tensor, seq: TokenSequence, lpips: bool) -> None:
        self.tokenizer, self.images = tokenizer, images
        self.data = seq.data.to(tokenizer.device)
        self.rows = rows_of_images(seq)
        self.distance: Distance | None = lpips_on(tokenizer.device) if lpips else None

    def __call__(self, wanted: dict[int, int]) -> dict[int, tuple[float, float | None]]:
        """{image: tokens} → {image: (PSNR, LPIPS or None)}; tiles of an image are averaged (MSE, LPIPS)."""
        rows = torch.tensor([r for i in wanted for r in self.rows[i]])
        lengths = torch.tensor([k for i, k in wanted.items() for _ in self.rows[i]])
        errors: list[float] = []
        distances: list[float] = []
        for part, n in zip(rows.split(ROWS_AT_ONCE), lengths.split(ROWS_AT_ONCE)):
            original = self.images[part.to(self.images.device)].to(self.tokenizer.device)
            original = original.float().div(255) if original.dtype == torch.uint8 else original.float()
            n = n.to(self.tokenizer.device)
            q = self.tokenizer.codes_of(self.data[part.to(self.data.device), : int(n.max())], n)
            options = {"size": tuple(original.shape[-2:])} if self.tokenizer.any_size else {}
            decoded = self.tokenizer.decode_latents(q, n, **options).float().clamp(0, 1)
            errors += (decoded - original).square().double().mean((1, 2, 3)).tolist()
            if self.distance is not None:
                distances += self.distance(decoded, original).reshape(-1).double().tolist()
        result, start = {}, 0
        for i in wanted:
            tiles = slice(start, start + len(self.rows[i]))
            start = tiles.stop
            mean = math.fsum(errors[tiles]) / len(self.rows[i])
            lpips = math.fsum(distances[tiles]) / len(self.rows[i]) if distances else None
            result[i] = (-10 * math.log10(mean) if mean else math.inf, lpips)
        return result


@functools.lru_cache(maxsize=2)
def lpips_on(device: torch.device) -> Distance:
    """LPIPS (VGG) on a device, loaded once: float (B, 3, H, W) in [0, 1] twice → (B,).

    Raises:
        MissingExtraError: the extra ``eval`` is not installed.
    """
    from tok1d.eval.perceptual import Perceptual

    return Perceptual("vgg").to(device)


def rows_of_images(seq: TokenSequence) -> list[range]:
    """Rows of the batch that belong to each original."""
    if seq.geometry is None:
        return [range(i, i + 1) for i in range(len(seq))]
    rows, start = [], 0
    for g in seq.geometry:
        rows.append(range(start, start + g.tiles))
        start += g.tiles
    return rows


def image_of(seq: TokenSequence, i: int) -> TokenSequence:
    """Image i alone, with its tiles."""
    rows = rows_of_images(seq)[i]
    geometry = None if seq.geometry is None else seq.geometry[i : i + 1]
    return replace(replace(seq, geometry=None)[rows.start : rows.stop], geometry=geometry)


def _cut(seq: TokenSequence, kept: Sequence[int]) -> TokenSequence:
    """Keep ``kept[i]`` tokens of every tile of image i, zero what follows."""
    per_row = [k for rows, k in zip(rows_of_images(seq), kept) for _ in rows]
    lengths = torch.tensor(per_row, dtype=torch.int64, device=seq.device)
    cut = seq[:, : max(per_row)]
    mask = torch.arange(cut.shape[1], device=seq.device) < lengths[:, None]
    name = "ids" if seq.bits is None else "bits"
    data = cut.data * (mask if seq.bits is None else mask[..., None])
    return replace(cut, **{name: data.to(seq.data.dtype)}, lengths=lengths)  # type: ignore[arg-type]
