"""Published generators: one readable key map each, loading their weights, and writing ours the way they are published.

The engine is that of tokenizers (:mod:`tok1d.tokenizers.official.layout`): strict in both directions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tok1d.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tok1d.generators.generator import Generator
    from tok1d.tokenizers.official.layout import Layout

NAMES = ("maskgit-bert", "maskgit-uvit", "rar")


def layouts() -> list[Layout]:
    """Every published layout, in the order in which they are asked whether a state dict is theirs."""
    from tok1d.generators.official.maskgit import BERT, UVIT
    from tok1d.generators.official.rar import RAR

    return [BERT, UVIT, RAR]


def layout_named(name: str) -> Layout:
    """A layout by its name.

    Raises:
        ModelError: there is none of that name.
    """
    found = next((layout for layout in layouts() if layout.name == name), None)
    if found is None:
        raise ModelError(f"no published generator has a layout called {name!r:.100}; there are {', '.join(NAMES)}")
    return found


def load_state(
    state: Mapping[str, Tensor], published: dict[str, Any] | None = None, *, tokenizer: str = "tokenizer", layout: str | None = None
) -> tuple[str, Generator]:
    """Build the generator of a published state dict, in eval mode, float32, on the CPU.

    Args:
        state: published tensors, with or without the ``model.`` before all names of the BERT.
        published: configuration that came with them, {} if none.
        tokenizer: whose tokens it makes, for messages.
        layout: name of its family; recognised if None.

    Returns:
        Name of the family, generator.

    Raises:
        ModelError: no known family, tensors or sizes that do not fit it.
    """
    from tok1d.generators.generator import Generator
    from tok1d.tokenizers.official.layout import load_model

    if "embeddings.word_embeddings.weight" in state:  # readers take a prefix that all names share for a wrapper's
        state = {f"model.{key}": value for key, value in state.items()}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    family = layout_named(layout) if layout else next((found for found in layouts() if found.recognises(shapes)), None)
    if family is None:
        names = sorted(shapes)
        raise ModelError(
            f"these {len(shapes)} tensors ({', '.join(names[:3])}{' …' * (len(names) > 3)}) are not those of a published generator "
            f"we know: {', '.join(NAMES)}. A generator of your own needs the config.json it was saved with"
        )
    return family.name, load_model(family, Generator.from_config, state, published or {}, tokenizer)


def load_published(source: Path, *, tokenizer: str = "tokenizer", layout: str | None = None) -> tuple[str, Generator]:
    """The generator of published weights on disk; arguments and errors as :func:`load_state`.

    Args:
        source: folder or file, as :func:`tok1d.tokenizers.official.read.read`.
    """
    from tok1d.tokenizers.official.read import read

    found = read(source)
    try:
        return load_state(found.state, found.config, tokenizer=tokenizer, layout=layout)
    except ModelError as error:
        raise ModelError(f"{found.path}: {error}") from error


def write_published(generator: Generator, layout: str, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write model.safetensors and config.json as the family publishes them, each atomically.

    Args:
        generator: one whose parts the layout has places for.
        layout: ``maskgit-bert``, ``maskgit-uvit`` or ``rar``.
        folder: made if missing.
        dtype: of the stored weights; float32 if None.

    Raises:
        ModelError: no such layout, or a generator that does not fit it.
    """
    from safetensors.torch import save

    from tok1d.disk import atomic_write
    from tok1d.generators.official.sizes import published_config
    from tok1d.tokenizers.official.layout import export_state

    state = export_state(layout_named(layout), generator)
    blob = save({key: value.cpu() if dtype is None else value.cpu().to(dtype) for key, value in state.items()}, metadata={"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "model.safetensors", blob)
    config = published_config(generator.to_config(), layout)
    atomic_write(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
