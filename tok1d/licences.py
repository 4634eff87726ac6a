"""Weights for research only: they are fetched after their licence was accepted, and say so once when they are used.

Acceptance is an argument (``accept_license=True``, ``--accept-license``) or the environment variable TOK1D_ACCEPT_LICENSE,
which lists names of the table, hub ids or licences, separated by commas; trainings know the variable only, so that no
configuration accepts for its next reader. Files that lie on the disk already are loaded with the notice only: whoever put
them there had to accept the licence where they came from.
"""

from __future__ import annotations

import os
import warnings

from tok1d.errors import ModelError
from tok1d.presets import PRESETS, Placed

VARIABLE = "TOK1D_ACCEPT_LICENSE"
_announced: set[str] = set()


class LicenceNotice(UserWarning):
    """Terms of weights that are being used."""


class LicenceError(ModelError):
    """A licence that was not accepted.

    Args:
        preset: whose.
        how: ways to accept it beside the environment variable.
    """

    def __init__(self, preset: Placed, how: str = "--accept-license, in Python accept_license=True, or ") -> None:
        self.preset = preset
        super().__init__(f"{notice(preset)} If you accept its terms: {how}the environment variable {VARIABLE}={preset.name}")


def require_acceptance(preset: Placed, accepted: bool) -> None:
    """Nothing for free weights; else the licence must have been accepted.

    Raises:
        LicenceError: it was not.
    """
    if not preset.research_only:
        return
    listed = {word.strip().lower() for word in os.environ.get(VARIABLE, "").split(",")}
    if not accepted and not listed & {preset.name.lower(), preset.hub_id.lower(), preset.licence.lower()}:
        raise LicenceError(preset)
    announce(preset, stacklevel=5)  # whoever called load()


def announce(preset: Placed, stacklevel: int = 2) -> None:
    """Say the terms of research-only weights, once in a process for each licence."""
    if preset.research_only and preset.licence not in _announced:
        _announced.add(preset.licence)
        warnings.warn(notice(preset), LicenceNotice, stacklevel=stacklevel)


def announce_layout(layout: str) -> None:
    """The same for files whose family was recognised but whose origin is unknown."""
    preset = next((p for p in PRESETS if p.layout == layout and p.research_only), None)
    if preset is not None and preset.licence not in _announced:
        _announced.add(preset.licence)
        warnings.warn(f"if these weights come from the published ones: {notice(preset)}", LicenceNotice, stacklevel=4)


def notice(preset: Placed) -> str:
    """One sentence about the terms.

    Example:
        >>> from tok1d.presets import PRESETS
        >>> print(notice(next(p for p in PRESETS if p.name == "instella-bae")))
        instella-bae: these weights are licensed for research only (RAIL-MS, https://huggingface.co/amd/Instella-T2I).
    """
    return f"{preset.name}: these weights are licensed for research only ({preset.licence}, {preset.url})."
