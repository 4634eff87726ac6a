"""Protocols: what a number means. A protocol freezes the preprocessing; its id stands beside every score.

Numbers of different protocols are never put in one table; :func:`require_same` refuses and says what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tok1d.errors import UsageError


@dataclass(frozen=True)
class Protocol:
    """How images are brought before a system, and where its pictures are judged.

    Attributes:
        id: name with version; a change of any other field needs another id.
        size: side in pixels of the square view that systems see.
        fit: ``crop`` (shorter edge to ``size``, centre crop) or ``pad`` (longer edge to ``size``, centred on black).
        resample: ``bicubic`` (antialiased, on 8 bits) or ``lanczos`` (Pillow).
        space: text and faces are cut from the view (``model``), or from the picture brought back to the original size
            (``original``; needs ``pad``).
        text_bins, face_bins: names of the size bins (:data:`tok1d.eval.binned.BINS`).
        note: what it is for.

    Raises:
        UsageError: a field that is none of these.
    """

    id: str
    size: int
    fit: str
    resample: str
    space: str
    text_bins: str
    face_bins: str
    note: str

    def __post_init__(self) -> None:
        for field, allowed in (("fit", ("crop", "pad")), ("resample", ("bicubic", "lanczos")), ("space", ("model", "original"))):
            if getattr(self, field) not in allowed:
                raise UsageError(f"protocol {self.id}: {field} is {' or '.join(allowed)}, got {getattr(self, field)!r}")
        if self.size < 1:
            raise UsageError(f"protocol {self.id}: size should be at least 1 pixel, got {self.size}")
        if (self.fit, self.space) == ("crop", "original"):
            raise UsageError(f"protocol {self.id}: a cropped view cannot be brought back to the original picture; judge it with space=model, or pad")


def _family(size: int) -> list[Protocol]:
    bins = {"text_bins": f"text-v1-{size}", "face_bins": f"face-v2-{size}"}
    return [
        Protocol(f"recon{size}-v1", size, "crop", "bicubic", "model", **bins, note="the field's reconstruction view: centre crop"),
        Protocol(f"fit{size}-v1", size, "pad", "bicubic", "model", **bins, note="whole image, text and faces judged in the view"),
        Protocol(f"tokbench{size}-v1", size, "pad", "lanczos", "original", **bins, note="TokBench's preprocessing (own recogniser and embedder)"),
    ]


PROTOCOLS: dict[str, Protocol] = {p.id: p for size in (256, 512, 1024) for p in _family(size)}


def protocol(name: str) -> Protocol:
    """Protocol by id.

    Raises:
        UsageError: unknown id.
    """
    if name not in PROTOCOLS:
        raise UsageError(f"unknown protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def conditions(p: Protocol, **others: Any) -> dict[str, Any]:
    """Everything two numbers must share to be compared: the protocol's fields and, say, data hash and network ids."""
    return {"protocol": asdict(p), **others}


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two sets of conditions differ, ``name: one ≠ other``.

    Example:
        >>> differences({"size": 256, "data": "x"}, {"size": 512, "data": "x"})
        ['size: 256 ≠ 512']
    """
    found = []
    for key in sorted({*a, *b}):
        one, other = a.get(key, "(absent)"), b.get(key, "(absent)")
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found.append(f"{prefix}{key}: {one} ≠ {other}")
    return found


def require_same(a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str] = ("A", "B")) -> None:
    """Refuse to compare numbers made under different conditions.

    Raises:
        UsageError: with every difference spelt out.
    """
    found = differences(a, b)
    if found:
        raise UsageError(f"{names[0]} and {names[1]} were measured differently and cannot be compared: {'; '.join(found)}")
