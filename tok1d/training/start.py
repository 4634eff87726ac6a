"""Start a training from the weights of another model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tok1d import hub
from tok1d.errors import ModelError, TokError
from tok1d.licences import LicenceError
from tok1d.tokenizers.tokenizer import Tokenizer1D

log = logging.getLogger(__name__)
PARTS = ("encoder", "quantizer", "decoder")


def start_from(tokenizer: Tokenizer1D, source: str) -> None:
    """Copy weights in place; what the source lacks keeps its initial values, with a warning.

    Args:
        tokenizer: what will be trained.
        source: whatever :func:`tok1d.load` takes: a shipped name, a model folder, an id on the hub, published weights. A licence is
            accepted by the environment variable TOK1D_ACCEPT_LICENSE, so that no configuration accepts it for its next reader.

    Raises:
        ModelError: the source cannot be loaded, or its parts are others than those of ``tokenizer``.
    """
    copy_weights(tokenizer, load_named("init_from", source), source)


def load_named(argument: str, source: str) -> Tokenizer1D:
    """``tok1d.load``; an error says which argument named the source, and what can be done about it in a training."""
    try:
        return hub.load(source)
    except TokError as error:
        error = LicenceError(error.preset, how="") if isinstance(error, LicenceError) else error
        raise ModelError(f"{argument} {source}: cannot be loaded: {error}") from error


def copy_weights(tokenizer: Tokenizer1D, found: Tokenizer1D, source: str, parts: Sequence[str] = PARTS) -> None:
    """As :func:`start_from`, of a model that is loaded already.

    Args:
        tokenizer: what will be trained.
        found: where the weights come from.
        source: what messages call it.
        parts: those that are copied; the others may be of any kind.
    """
    # A halting head is copied with all parts alone: it knows the weights that it was trained with, not those that will come.
    names = (*parts, "halting") if tokenizer.halting is not None and tuple(parts) == PARTS else parts
    here, there = ({k: v for k, v in m.state_dict().items() if k.partition(".")[0] in names} for m in (tokenizer, found))
    foreign = sorted(there.keys() - here.keys())
    reshaped = sorted(k for k in there.keys() & here.keys() if there[k].shape != here[k].shape)
    if foreign or reshaped:
        raise ModelError(f"init_from {source}: the weights do not fit this tokenizer: {_difference(tokenizer, found, reshaped, foreign, parts)}")
    missing = sorted(here.keys() - there.keys())
    if missing:
        log.warning("init_from %s lacks %d tensors, which start untrained: %s …", source, len(missing), ", ".join(missing[:3]))
    if other := _settings(tokenizer, found, parts):
        log.warning("init_from %s fits, but %s; here the settings of this configuration hold", source, "; ".join(other))
    tokenizer.load_state_dict(there, strict=False)


def _difference(tokenizer: Tokenizer1D, found: Tokenizer1D, reshaped: list[str], foreign: list[str], parts: Sequence[str]) -> str:
    """Settings of parts that differ, and an example among the tensors."""
    name = (reshaped or foreign)[0]
    shape = tuple(found.state_dict()[name].shape)
    example = f"{name} is {shape} there" + (f" and {tuple(tokenizer.state_dict()[name].shape)} here" if reshaped else " and does not exist here")
    return "; ".join([*_settings(tokenizer, found, parts), example]) + ". Take the parts from the configuration of that model, or another source"


def _settings(tokenizer: Tokenizer1D, found: Tokenizer1D, parts: Sequence[str]) -> list[str]:
    """What the configurations of the parts say differently, a sentence for each part."""
    lines = []
    for part in parts:
        here, there = getattr(tokenizer, part).to_config(), getattr(found, part).to_config()
        names = ["class"] if here["class"] != there["class"] else [k for k in there if here.get(k) != there[k]]
        if names:
            lines.append(f"its {part} has " + ", ".join(f"{k} {there[k]} (here {here.get(k)})" for k in names))
    return lines
