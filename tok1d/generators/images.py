"""From a generator to pictures: find it, find the tokenizer it was trained for, paint what it makes.

Shapes: B rows, n tokens, C width of a latent, H × W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tok1d import hub
from tok1d.errors import TokenError
from tok1d.generators.generator import Generator
from tok1d.generators.latents import Latents
from tok1d.tokens import TokenSequence

if TYPE_CHECKING:
    from tok1d.tokenizers.tokenizer import Tokenizer1D


def load_generator(
    source: str | Path, *, tokenizer: str | None = None, revision: str | None = None, accept_license: bool = False, progress: bool = True
) -> Generator:
    """Load a generator, in eval mode, on the CPU; its tokenizer is ``tok1d.load(generator.space.tokenizer)``.

    Args:
        source: a name of :data:`tok1d.generators.presets.GENERATORS`; a folder of ``tok export``; published weights of a known family,
            as a folder or as one file (``.safetensors``, or a pickle of tensors); or a hub id of either, ``owner/name``,
            ``owner/name@revision``, ``owner/name:file``.
        tokenizer: name of the tokenizer of published weights that no row of the table knows.
        revision: branch, tag or commit, for hub ids and published names only.
        accept_license: needed to fetch weights that are licensed for research only.
        progress: whether downloads show bars on a terminal.

    Returns:
        The generator; what its authors sample with is in its ``sampling``, if a row says so or the folder does.

    Raises:
        ModelError: unknown name, unusable files, another family, a hub that cannot be reached, or a tokenizer instead of a generator.
    """
    from tok1d.generators.official import load_published
    from tok1d.generators.presets import GENERATORS

    found = hub.find(source, revision=revision, accept_license=accept_license, progress=progress, table=GENERATORS)
    if found.ours:
        return Generator.from_pretrained(found.path)
    row = found.preset
    known = {"tokenizer": row.tokenizer, "layout": row.layout} if row else {"tokenizer": tokenizer or "tokenizer"}
    model = load_published(found.path, **known)[1].eval().requires_grad_(False)
    model.sampling = model.check_sampling(row.sampling) if row else {}
    return model


def paint(tokenizer: Tokenizer1D, made: TokenSequence | Latents, *, seeds: Sequence[int] | None = None, **options: Any) -> Tensor:
    """Pictures of generated tokens.

    Args:
        tokenizer: the one the generator was trained for.
        made: B rows.
        seeds: of decoders with noise, one a row; others need none.
        options: further options of the decoder.

    Returns:
        float32 (B, 3, H, W) in [0, 1].

    Raises:
        TokenError: an option the decoder does not have, or tokens of another model.
    """
    if seeds is not None and "seeds" in tokenizer.decoder.options and options.get("seeds") is None:
        options["seeds"] = list(seeds)
    if isinstance(made, Latents):
        return made.images(tokenizer, **options)
    pictures = tokenizer.decode(made, **options)
    if not isinstance(pictures, Tensor):
        raise TokenError("generated rows have no sizes of their own; got pictures of several sizes")
    return pictures


def tokens_of(tokenizer: Tokenizer1D, made: TokenSequence | Latents) -> TokenSequence | None:
    """What can be stored of generated rows: their tokens, None for latents that have none."""
    if isinstance(made, TokenSequence):
        return made
    return made.tokens(tokenizer) if tokenizer.is_discrete and not tokenizer.quantizer.whole else None
