"""From a generator to pictures: find it, find the tokenizer it was trained for, paint what it makes.

Shapes: B rows, n tokens, C width of a latent, H × W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tok1d import hub
from tok1d.errors import ModelError, TokenError
from tok1d.generators.generator import Generator
from tok1d.generators.latents import Latents
from tok1d.tokens import TokenSequence

if TYPE_CHECKING:
    from tok1d.tokenizers.tokenizer import Tokenizer1D


def load_generator(source: str | Path, *, tokenizer: str | None = None, revision: str | None = None, progress: bool = True) -> Generator:
    """A generator in eval mode, on the CPU.

    Args:
        source: folder of ``tok export``, hub id of one, published weights (folder, file or hub id), or a name of
            :data:`tok1d.generators.presets.GENERATORS`.
        tokenizer: name of the tokenizer of published weights, which do not say it.
        revision: of a hub id.
        progress: whether downloads show bars on a terminal.

    Raises:
        ModelError: nothing of that name, damaged, or a tokenizer rather than a generator.
    """
    from tok1d.generators.official import load_published
    from tok1d.generators.presets import GENERATORS

    preset = next((p for p in GENERATORS if p.name == str(source)), None)
    if preset is None and not isinstance(source, Path) and not Path(source).exists() and hub.hub_name(source) is None:
        names = ", ".join(p.name for p in GENERATORS)
        raise ModelError(f"no generator {source!r}: give a folder of tok export, published weights, a hub id owner/name, or one of {names}")
    found = hub.find(preset.where.removeprefix("hub:") if preset else source, revision=revision, progress=progress)
    if not found.ours:
        named = tokenizer or (preset.tokenizer if preset else "tokenizer")
        return load_published(found.path, tokenizer=named, layout=preset.layout if preset else None)[1].eval()
    if _config(found.path).get("_class_name") == "Tokenizer1D":
        raise ModelError(f"{source} is a tokenizer, which encodes and decodes; a generator for its tokens is needed (tok fit with GeneratorTask)")
    return Generator.from_pretrained(found.path)


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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
