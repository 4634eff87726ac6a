"""How published weights become ours and back: one table of places a family, strict in both directions.

A family's module says how to recognise its state dict, which configuration of our parts it belongs to, and where each of
its tensors goes. Everything else — strictness, reshaping, fused projections, error messages — is here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.tokenizers.tokenizer import Tokenizer1D

Shapes = Mapping[str, tuple[int, ...]]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Place:
    """Where a published tensor goes.

    Attributes:
        name: of our tensor in the tokenizer's state dict.
        shape: of the published tensor, where ours has the same numbers in another shape.
        rows: (start, stop) of our first dimension that it fills, where ours is several published ones in a row (q, k, v).
        part: (start, stop) of its first dimension that goes there, where it is several of ours in a row (one table of codes
            and classes); such a tensor has a tuple of places, in order.
    """

    name: str
    shape: tuple[int, ...] | None = None
    rows: tuple[int, int] | None = None
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class Layout:
    """The published layout of one family.

    Attributes:
        name: what ``tok export --layout`` takes, and messages say.
        recognises: whether a state dict of these tensor shapes is of this family, by its tell-tale names.
        config: (shapes, published configuration, name of the model) → ``from_config`` data of the model. The published
            configuration is plain data, {} when there was none; what it does not say is inferred from the shapes.
            Raises ModelError for shapes that contradict each other.
        places: our configuration → place of every published tensor.
        exports: whether a model has this layout; raises ModelError saying why not.
        ignored: published tensors that may be there or not and that we have no use for.
    """

    name: str
    recognises: Callable[[Shapes], bool]
    config: Callable[[Shapes, dict[str, Any], str], dict[str, Any]]
    places: Callable[[dict[str, Any]], Mapping[str, Place | tuple[Place, ...]]]
    exports: Callable[[Any], None]
    ignored: Collection[str] = ()


def load_state(layout: Layout, state: Mapping[str, Tensor], published: dict[str, Any], name: str) -> Tokenizer1D:
    """Build the tokenizer of a published state dict; see :func:`load_model`."""
    return load_model(layout, Tokenizer1D.from_config, state, published, name)


def load_model(
    layout: Layout, build: Callable[[dict[str, Any]], Model], state: Mapping[str, Tensor], published: dict[str, Any], name: str
) -> Model:
    """Build the model of a published state dict, in eval mode, float32.

    Args:
        layout: the family it belongs to.
        build: configuration → model.
        state: published tensors; float32 ones are shared where shapes allow it, not copied.
        published: configuration that came with them, plain data, {} if none.
        name: of the model.

    Raises:
        ModelError: missing or unexpected tensors, or shapes that do not fit.
    """
    config = layout.config({key: tuple(value.shape) for key, value in state.items()}, published, name)
    with torch.device("meta"):  # random weights of billions of parameters take longer than reading them
        model = build(config)
    places = layout.places(config)
    missing = sorted(places.keys() - state.keys() - set(layout.ignored))
    unexpected = sorted(state.keys() - places.keys() - set(layout.ignored))
    if missing or unexpected:
        raise ModelError(f"not the weights of a {layout.name} model: missing {_some(missing)}, unexpected {_some(unexpected)}")
    wanted = model.state_dict()
    ours: dict[str, Tensor] = {}
    filled = dict.fromkeys(wanted, 0)
    for key, found in places.items():
        if key not in state:
            continue
        several = _several(found)
        if several[-1].part is not None and len(state[key]) != several[-1].part[1]:
            raise ModelError(f"{key} has {len(state[key])} rows, a {layout.name} model of this size has {several[-1].part[1]}")
        for place in several:
            value, target = state[key], wanted[place.name]
            value = value if place.part is None else value[slice(*place.part)]
            shape = target.shape if place.rows is None else (place.rows[1] - place.rows[0], *target.shape[1:])
            if tuple(value.shape) != (tuple(shape) if place.shape is None else place.shape):
                raise ModelError(
                    f"{key} has shape {tuple(value.shape)}, a {layout.name} model of this size has {place.shape or tuple(shape)}"
                )
            value = value.reshape(shape)
            value = value.float() if value.is_floating_point() else value
            if place.rows is None:
                ours[place.name] = value
            else:
                whole = ours.setdefault(place.name, torch.empty(target.shape, dtype=target.dtype))
                whole[slice(*place.rows)] = value
            filled[place.name] += value.numel()
    for name_, count in filled.items():
        assert count == wanted[name_].numel(), f"{layout.name}: its places fill {count} of {wanted[name_].numel()} numbers of {name_}"
    model.load_state_dict(ours, assign=True)
    meta = [n for n, b in model.named_buffers() if b.is_meta]
    assert not meta, f"computed tables must be made with device='cpu', whatever the default device is: {meta}"
    return model.eval().requires_grad_(False)


def export_state(layout: Layout, model: Any) -> dict[str, Tensor]:
    """The state dict of a model under published names and shapes; the inverse of :func:`load_model`.

    Raises:
        ModelError: it has parts that the published layout has no place for.
    """
    layout.exports(model)
    state = model.state_dict()
    published = {}
    for key, found in layout.places(model.to_config()).items():
        values = []
        for place in _several(found):
            value = state[place.name].detach()
            value = value if place.rows is None else value[slice(*place.rows)]
            values.append(value if place.shape is None else value.reshape(place.shape))
        published[key] = (values[0] if len(values) == 1 else torch.cat(values)).contiguous()
    return published


def _several(found: Place | tuple[Place, ...]) -> tuple[Place, ...]:
    return found if isinstance(found, tuple) else (found,)


def module_path(part: type) -> str:
    """Import path of a part, the ``class`` entry of its configuration."""
    return f"{part.__module__}.{part.__qualname__}"


def shape_of(shapes: Shapes, key: str, ndim: int, family: str) -> tuple[int, ...]:
    """Shape of a tensor that must be there.

    Raises:
        ModelError: it is missing or has another number of dimensions.
    """
    if key not in shapes:
        raise ModelError(f"{key!r} is missing among {len(shapes)} tensors: not a {family} state dict")
    if len(shapes[key]) != ndim:
        raise ModelError(f"{key!r} of a {family} state dict should have {ndim} dimensions, got shape {shapes[key]}")
    return shapes[key]


def _some(keys: list[str]) -> str:
    return f"{keys[:5]}{' …' * (len(keys) > 5)}" if keys else "nothing"
