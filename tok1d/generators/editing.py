"""Editing images by their tokens. In nested tokenizers the first tokens say what a picture is and the last ones its details, so keeping
the first k keeps the picture and leaves the rest to chance, to another picture, or to something between two.

Shapes: B rows, N tokens, k kept, D width of a code, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tok1d.errors import TokenError
from tok1d.tokens import TokenSequence

if TYPE_CHECKING:
    from tok1d.generators.generator import Generator
    from tok1d.tokenizers.tokenizer import Tokenizer1D


def complete(generator: Generator, seq: TokenSequence, keep: int, *, tokens: int | None = None, seeds: int | Sequence[int] = 0, **options: Any) -> TokenSequence:
    """Keep the first tokens of every row and make the others anew.

    Args:
        generator: one that takes ``prefix``.
        seq: B rows of at least ``keep`` tokens, of its tokenizer.
        keep: k ≥ 0; 0 makes everything anew.
        tokens: how many there are in the end; all if None.
        seeds, options: of :meth:`Generator.generate`, such as ``label``.

    Returns:
        B rows; their first k tokens are those of ``seq``.

    Raises:
        TokenError: tokens of another tokenizer, fewer than k, or a generator that cannot continue.
    """
    return generator.generate(len(seq), prefix=_prefix(generator, seq, keep), tokens=tokens, seeds=seeds, **options)


def variations(
    generator: Generator, seq: TokenSequence, keep: int, n: int, *, tokens: int | None = None, seeds: int | Sequence[int] = 0, **options: Any
) -> TokenSequence:
    """``n`` rows that share the first ``keep`` tokens of one picture.

    Args:
        seq: one row.
        n: how many; other arguments as :func:`complete`.
    """
    if len(seq) != 1:
        raise TokenError(f"variations are of one picture, got {len(seq)} rows; choose one: seq[i:i+1]")
    return generator.generate(n, prefix=_prefix(generator, seq, keep), tokens=tokens, seeds=seeds, **options)


def splice(a: TokenSequence, b: TokenSequence, keep: int) -> TokenSequence:
    """The first ``keep`` tokens of ``a``, then those of ``b``, row by row.

    Args:
        a, b: B rows each, or one of them a single row, of one tokenizer and all of the same length.
        keep: k; 0 gives ``b``, all of them ``a``.

    Returns:
        B rows without geometry.
    """
    _same(a, b)
    n = _check_keep(keep, a)
    rows = max(len(a), len(b))
    first, last = (x.data.expand(rows, *x.data.shape[1:]) for x in (a, b))
    data = torch.cat([first[:, :n], last[:, n:]], dim=1)
    fields = {"ids": data} if a.bits is None else {"ids": None, "bits": data}
    return TokenSequence(**fields, vocab_size=a.vocab_size, model_id=a.model_id or b.model_id, nested=a.nested)


def interpolate(tokenizer: Tokenizer1D, a: TokenSequence, b: TokenSequence, steps: int = 8, *, keep: int = 0, **options: Any) -> Tensor:
    """Pictures on the way from ``a`` to ``splice(a, b, keep)``: codes of the tail are mixed linearly, the first tokens stay those of ``a``.

    Args:
        tokenizer: that made both.
        a, b: one row each, of the same length.
        steps: S ≥ 2, both ends included.
        keep: k.
        options: of the decoder.

    Returns:
        float32 (S, 3, H, W) in [0, 1]; the first is ``decode(a)``, the last ``decode(splice(a, b, keep))``.
    """
    if len(a) != 1 or len(b) != 1:
        raise TokenError(f"an interpolation is between two pictures, got {len(a)} and {len(b)} rows; choose one each: seq[i:i+1]")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 2:
        raise TokenError(f"steps must be an integer of at least 2, both ends included, got {steps!r:.100}")
    ends = TokenSequence.stack([splice(a, a, keep), splice(a, b, keep)])
    tokenizer._check_sequence(ends)
    with torch.inference_mode():
        start, stop = tokenizer.codes_of(ends.data.to(tokenizer.device), ends.lengths.to(tokenizer.device))
        share = torch.linspace(0, 1, steps, device=start.device)[:, None, None]
        return tokenizer.decode_latents(torch.lerp(start[None], stop[None], share), **options).float().clamp(0, 1)


def _prefix(generator: Generator, seq: TokenSequence, keep: int) -> TokenSequence:
    if "prefix" not in generator.options:
        raise TokenError(f"{type(generator).__name__} cannot continue given tokens; its options: {', '.join(generator.options)}")
    return seq[:, : _check_keep(keep, seq)]


def _check_keep(keep: int, seq: TokenSequence) -> int:
    if not isinstance(keep, int) or isinstance(keep, bool) or not 0 <= keep <= seq.shape[1]:
        raise TokenError(f"keep must be an integer in 0..{seq.shape[1]}, how many first tokens stay, got {keep!r:.100}")
    return keep


def _same(a: TokenSequence, b: TokenSequence) -> None:
    lengths = {n for seq in (a, b) for n in seq.lengths.tolist()}
    if len(lengths) > 1:
        raise TokenError(f"both pictures must have the same number of tokens, got {sorted(lengths)}; slice them: seq[:, :k]")
    if a.vocab_size != b.vocab_size or (a.model_id and b.model_id and a.model_id != b.model_id):
        raise TokenError(f"these tokens are of two models ({a.model_id:016x} and {b.model_id:016x}): their tails do not mix")
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise TokenError(f"rows must be as many on both sides, or one on either, got {len(a)} and {len(b)}")
