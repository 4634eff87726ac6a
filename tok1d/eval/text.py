"""Text fidelity: does a recogniser still read the words? T-ACC and T-NED of TokBench (https://arxiv.org/abs/2505.18142).

T-ACC is the share of words read exactly; T-NED is the mean of ``1 - Levenshtein / longer length`` (higher is better). Three
variants say what counts as the same: ``raw`` (every character, what TokBench reports), ``caseless``, and ``alnum`` (letters
and digits only, caseless, what scene text recognition usually reports). Strings never enter the states of a metric.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tok1d.errors import TokError
from tok1d.eval.binned import BinnedMean, Bins
from tok1d.eval.editdistance import similarity

VARIANTS = ("raw", "caseless", "alnum")
SCORES = ("acc", "ned")


def normalise(text: str, variant: str) -> str:
    """What of ``text`` is compared.

    Example:
        >>> [normalise("It's 5€", v) for v in ("raw", "caseless", "alnum")]
        ["It's 5€", "it's 5€", 'its5']
    """
    if variant not in VARIANTS:
        raise TokError(f"text is compared {', '.join(VARIANTS)}; got {variant!r}")
    text = text if variant == "raw" else text.lower()
    return "".join(filter(str.isalnum, text)) if variant == "alnum" else text


def text_scores(truths: Sequence[str], predictions: Sequence[str], score: str = "ned", variant: str = "raw") -> Tensor:
    """Score of each pair, float64 (n,) in [0, 1].

    Args:
        truths, predictions: equally many strings.
        score: ``acc`` (1 if equal, else 0) or ``ned`` (two empty strings: 1).
        variant: see :func:`normalise`. A truth of which ``alnum`` leaves nothing (say ``&``) gets NaN: there is nothing to
            read. Metrics count these as uncovered.

    Raises:
        TokError: different numbers of strings, an unknown score or variant.

    Example:
        >>> text_scores(["Exit", "&"], ["EXIT", "8"], "acc", "alnum").tolist()
        [1.0, nan]
    """
    if len(truths) != len(predictions):
        raise TokError(f"{len(truths)} words were to be read but {len(predictions)} readings came")
    if score not in SCORES:
        raise TokError(f"text scores are {', '.join(SCORES)}; got {score!r}")
    wanted, read = [normalise(t, variant) for t in truths], [normalise(p, variant) for p in predictions]
    if score == "acc":
        values = torch.tensor([a == b for a, b in zip(wanted, read)], dtype=torch.float64)
    else:
        values = torch.from_numpy(similarity(wanted, read))
    if variant == "alnum":
        values[torch.tensor([not w for w in wanted], dtype=torch.bool)] = math.nan
    return values


class TextMetric(BinnedMean):
    """Mean of a text score by size of the words; :class:`TextAccuracy` and :class:`TextNED` are its two forms.

    Args:
        bins: by relative size of a character.
        variant: what counts as the same, see :func:`normalise`.
        groups: source sets to keep apart, see :class:`tok1d.eval.binned.BinnedMean`.

    Example::

        metric = TextNED(Bins.named("text-v1-256"))
        metric.update(["Exit", "way"], ["Ex1t", "way"], [0.025, 0.05])
        metric.compute().mean       # [0.75, nan, 1.0]
    """

    score = ""

    def __init__(self, bins: Bins, variant: str = "raw", groups: Sequence[str] = ()) -> None:
        super().__init__(bins, groups)
        normalise("", variant)
        self.variant = variant

    def update(  # type: ignore[override]
        self, truths: Sequence[str], predictions: Sequence[str], scales: Sequence[float] | Tensor, groups: Sequence[str] | None = None
    ) -> None:
        """n words, their readings, relative sizes and, where the metric has groups, source sets."""
        values = text_scores(truths, predictions, self.score, self.variant)
        super().update(values, torch.as_tensor(scales, dtype=torch.float64), groups)


class TextAccuracy(TextMetric):
    """T-ACC: the share of words read exactly; see :class:`TextMetric`."""

    score = "acc"


class TextNED(TextMetric):
    """T-NED: mean normalised edit similarity, higher is better; see :class:`TextMetric`."""

    score = "ned"


class ChanceFloor(BinnedMean):
    """What a score is worth by chance: each word against the reading of another word of its bin.

    One ``update`` takes one whole pool (all words of a run, as they stand in its table): partners are found inside it, see
    :func:`partners`, so a pool must not be split. Results do not depend on the order of its rows. A word that is alone in
    its bin has no partner and is counted as uncovered.

    Args:
        bins: by relative size of a character.
        score: ``acc`` or ``ned``.
        variant, groups: as of :class:`TextMetric`; partners are sought over all groups.
    """

    def __init__(self, bins: Bins, score: str = "ned", variant: str = "raw", groups: Sequence[str] = ()) -> None:
        super().__init__(bins, groups)
        text_scores([], [], score, variant)
        self.score, self.variant = score, variant

    def update(  # type: ignore[override]
        self,
        ids: Sequence[str],
        truths: Sequence[str],
        predictions: Sequence[str],
        scales: Sequence[float] | Tensor,
        groups: Sequence[str] | None = None,
    ) -> None:
        """n unique ids of words, the words, their readings, relative sizes and source sets."""
        sizes = torch.as_tensor(scales, dtype=torch.float64)
        if not len(ids) == len(truths) == len(predictions) == len(sizes):
            raise TokError(f"got {len(ids)} ids, {len(truths)} words, {len(predictions)} readings, {len(sizes)} sizes: give one of each a word")
        partner = partners(ids, self.bins.cells(sizes).tolist())
        values = text_scores(truths, [predictions[j] for j in partner], self.score, self.variant)
        values[torch.tensor([i == j for i, j in enumerate(partner)], dtype=torch.bool)] = math.nan
        super().update(values, sizes, groups)


def partners(ids: Sequence[str], pools: Sequence[int]) -> list[int]:
    """For every row another row of its pool: sorted by a hash of their ids, each takes the next one, the last the first.

    The hash keeps neighbours from being words of one picture, and makes the pairing independent of the order of rows. Every
    row is partner once. A row that is alone gets itself.

    Raises:
        TokError: an id appears twice.

    Example:
        >>> partners(["a", "b", "c"], [0, 0, 1]), partners(["b", "a", "c"], [0, 0, 1])
        ([1, 0, 2], [1, 0, 2])
    """
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if list(ids).count(i) > 1)
        raise TokError(f"the id {twice!r} appears twice in one pool; every word needs its own")
    rows = sorted(range(len(ids)), key=lambda i: (pools[i], hashlib.blake2b(ids[i].encode("utf-8", "surrogatepass")).digest()))
    result = list(range(len(ids)))
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or pools[rows[end]] != pools[rows[start]]:
            pool = rows[start:end]
            for row, other in zip(pool, [*pool[1:], pool[0]]):
                result[row] = other
            start = end
    return result
