"""Published families: one readable key map each, how a state dict is told to be of one of them, and loading its weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tok1d.errors import ModelError

if TYPE_CHECKING:
    from tok1d.presets import Preset
    from tok1d.tokenizers.official.layout import Layout, Shapes
    from tok1d.tokenizers.tokenizer import Tokenizer1D

# What `tok export --layout` takes; the table of models uses the same names.
NAMES = ("titok", "titok-legacy", "tatitok", "maskgit-vqgan", "flextok", "instella")


def layouts() -> list[Layout]:
    """Every published layout, in the order in which they are asked whether a state dict is theirs."""
    from tok1d.tokenizers.official import flextok, instella, titok

    return [*titok.LAYOUTS, flextok.FLEXTOK, instella.INSTELLA]


def layout_named(name: str) -> Layout:
    """A layout by its name.

    Raises:
        ModelError: there is none of that name.
    """
    found = next((layout for layout in layouts() if layout.name == name), None)
    if found is None:
        raise ModelError(f"no published layout is called {name!r}; there are {', '.join(NAMES)}")
    return found


def recognise(shapes: Shapes) -> Layout:
    """The layout of a state dict, told by the names and shapes of its tensors.

    Raises:
        ModelError: none of the known families.
    """
    for layout in layouts():
        if layout.recognises(shapes):
            return layout
    names = sorted(shapes)
    some = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    raise ModelError(
        f"these {len(shapes)} tensors ({some}) are not those of a published family we know: {', '.join(NAMES)}. A model of "
        "your own needs the config.json it was saved with"
    )


def config_of(preset: Preset) -> dict[str, Any]:
    """``Tokenizer1D.from_config`` data of a published model from its row alone, to train one like it.

    Raises:
        ModelError: a model that was not published by others.
    """
    from tok1d.tokenizers.official import flextok, instella, titok

    builders = {
        "titok": titok.titok_config,
        "titok-legacy": titok.legacy_config,
        "tatitok": titok.tatitok_config,
        "maskgit-vqgan": titok.maskgit_vqgan_config,
        "flextok": flextok.flextok_config,
        "instella": instella.instella_config,
    }
    if preset.layout not in builders:
        raise ModelError(f"{preset.name} is a model of tok1d: its configuration is in its folder")
    config: dict[str, Any] = builders[preset.layout](name=preset.name, **preset.sizes)
    return config


def load_published(
    source: Path, *, name: str, layout: str | None = None, options: Mapping[str, Any] | None = None
) -> tuple[str, Tokenizer1D]:
    """Build the tokenizer of published weights, in eval mode, float32, on the CPU.

    Args:
        source: folder or file, as :func:`tok1d.tokenizers.official.read.read`.
        name: of the tokenizer.
        layout: its family; recognised if None.
        options: entries of the published configuration to replace or add, ones that the family reads.

    Returns:
        Name of the family, tokenizer.

    Raises:
        ModelError: unreadable files, no known family, tensors or sizes that do not fit it, options it never looks at.
    """
    from tok1d.tokenizers.official.layout import load_state
    from tok1d.tokenizers.official.read import read

    found = read(source)
    try:
        family = layout_named(layout) if layout else recognise(found.shapes)
        published = found.config
        for key, value in (options or {}).items():
            published = overridden(published, key, value)
        if options:
            _check_read(family, found.shapes, published, name, options)
        return family.name, load_state(family, found.state, published, name)
    except ModelError as error:
        raise ModelError(f"{found.path}: {error}") from error


class _Watched(dict[str, Any]):
    """A configuration tree that notes the paths it is asked for."""

    def __init__(self, tree: Mapping[str, Any], asked: set[str], path: str = "") -> None:
        super().__init__({k: _Watched(v, asked, f"{path}{k}.") if isinstance(v, dict) else v for k, v in tree.items()})
        self._asked, self._path = asked, path

    def __getitem__(self, key: str) -> Any:
        self._asked.add(self._path + key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._asked.add(f"{self._path}{key}")
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add(self._path + key)
        return super().get(key, default)


def _check_read(
    family: Layout, shapes: Shapes, published: dict[str, Any], name: str, options: Mapping[str, Any]
) -> None:
    """Refuse options that the family never looks at: a misspelt one would be ignored in silence."""
    asked: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again when the model is built
        family.config(shapes, _Watched(published, asked), name)
    for key in options:
        if key not in asked and not ("." not in key and any(path.endswith(f".{key}") for path in asked)):
            raise ModelError(
                f"{family.name} has no option {key!r}: its configuration is asked for "
                f"{', '.join(sorted(asked)) or 'nothing'}. A dotted path names a place in config.json"
            )


def overridden(published: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A published configuration with one entry replaced or added.

    Args:
        published: left as it is.
        key: a dotted path, followed from the root and made as far as it is missing; or a bare name, which is replaced
            wherever it stands and put at the root.
        value: plain data.

    Example:
        >>> overridden({"vae": {"scaling_factor": None}}, "scaling_factor", 0.5)
        {'vae': {'scaling_factor': 0.5}, 'scaling_factor': 0.5}
        >>> overridden({}, "model.vq_model.use_l2_norm", True)
        {'model': {'vq_model': {'use_l2_norm': True}}}
    """
    first, _, rest = key.partition(".")
    if rest:
        below = published.get(first)
        return {**published, first: _at_path(below if isinstance(below, dict) else {}, rest, value)}
    return {**_everywhere(published, key, value), key: value}


def _at_path(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    first, _, rest = path.partition(".")
    below = tree.get(first)
    return {**tree, first: _at_path(below if isinstance(below, dict) else {}, rest, value) if rest else value}


def _everywhere(node: Any, key: str, value: Any) -> Any:
    if isinstance(node, dict):
        return {k: value if k == key else _everywhere(v, key, value) for k, v in node.items()}
    return [_everywhere(v, key, value) for v in node] if isinstance(node, list) else node
