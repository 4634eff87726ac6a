"""The table of models that can be loaded by name, as plain data; nothing else in the package knows their names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One model.

    Attributes:
        name: what ``tok1d.load`` and ``--model`` take.
        where: ``package`` (its weights ship inside tok1d) or ``hub:owner/name``.
        tokens: how many it makes; nested models make any number up to that.
        bits_per_token: ceil(log2(vocabulary)).
        nested: whether any prefix decodes.
        image_size: (height, width) in pixels.
        licence: of the weights.
        parameters: of all parts together.
        description: one line.
    """

    name: str
    where: str
    tokens: int
    bits_per_token: int
    nested: bool
    image_size: tuple[int, int]
    licence: str
    parameters: int
    description: str


PRESETS: tuple[Preset, ...] = (
    Preset(
        name="default",
        where="package",
        tokens=256,
        bits_per_token=12,
        nested=True,
        image_size=(256, 256),
        licence="Apache-2.0",
        parameters=8_053_496,
        description="photos, any number of tokens from 1 to 256",
    ),
)
