"""What a sample is asked to show: nothing, a class, or (:mod:`tok1d.generators.text`) a description.

A condition turns labels or texts into states at the front of the sequence, a vector for modulation, or both, and has learned
ones for "nothing in particular", which guidance and dropped conditions use.

Shapes: B rows, P places of the condition in the sequence, W width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tok1d.errors import TokenError
from tok1d.generators.chance import Chance
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.part import Part


@dataclass(frozen=True)
class Given:
    """A condition as states.

    Attributes:
        tokens: float (B, P, W), or None where P is 0 or no tokens were attached.
        vector: float (B, W), or None.
        mask: bool (B, P) which tokens may be attended to; None for all.
    """

    tokens: Tensor | None = None
    vector: Tensor | None = None
    mask: Tensor | None = None

    def join(self, other: Given) -> Given:
        """The rows of both, these first: how a guided batch (with, without) is made."""
        pairs = zip((self.tokens, self.vector, self.mask), (other.tokens, other.vector, other.mask), strict=True)
        return Given(*(None if a is None or b is None else torch.cat([a, b]) for a, b in pairs))


class Condition(Part):
    """Labels or texts → states.

    Attributes:
        places: P.
        guidable: whether there is anything to leave out, so that guidance means something.
        takes: ``label``, ``text`` or empty: the entry of a batch it reads.
        drop: probability that training leaves it out.
    """

    places: int = 0
    guidable: bool = False
    takes: str = ""
    drop: float = 0.0

    @abstractmethod
    def attach(self, width: int, tokens: bool = True, vector: bool = False) -> None:
        """Make the parameters; a generator calls this once.

        Args:
            width: W.
            tokens, vector: which of them the generator will use; :meth:`forward` gives only those.
        """

    @abstractmethod
    def request(self, rows: int, label: Any = None, text: Any = None) -> dict[str, Any]:
        """What a user asks for → a batch for :meth:`forward`.

        Raises:
            TokenError: it does not fit this condition; the message says what does.
        """

    @abstractmethod
    def forward(self, batch: dict[str, Any], rows: int, chance: Chance | None = None) -> Given:
        """States of a batch.

        Args:
            batch: its entry ``label`` (int64 (B,), -1 for none) or ``text`` (B strings, "" for none) is read.
            rows: B.
            chance: of what is left out in training; None leaves nothing out.
        """

    @abstractmethod
    def null(self, rows: int) -> Given | None:
        """States without the condition; None if there is nothing to leave out."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def dropped(self, rows: int, chance: Chance | None) -> Tensor | None:
        """bool (B,), rows that training leaves out."""
        return None if chance is None or not self.drop else chance.uniform() < self.drop


class Unconditional(Condition):
    """Nothing is asked for."""

    def __init__(self) -> None:
        super().__init__()

    def attach(self, width: int, tokens: bool = True, vector: bool = False) -> None:
        # A modulated trunk needs some vector: a learned one, the same for all.
        self.bias = nn.Parameter(torch.zeros(width)) if vector else None

    def request(self, rows: int, label: Any = None, text: Any = None) -> dict[str, Any]:
        for name, value in (("label", label), ("text", text)):
            if value is not None:
                raise TokenError(f"this generator is unconditional, got {name}={value!r:.100}; leave it out")
        return {}

    def forward(self, batch: dict[str, Any], rows: int, chance: Chance | None = None) -> Given:
        return Given(vector=None if self.bias is None else self.bias.expand(rows, -1))

    def null(self, rows: int) -> None:
        return None


class ClassCondition(Condition):
    """A row of a table for each class, and one for none.

    Args:
        classes: how many.
        names: of the classes, for messages and for asking by name; empty if they have none.
        drop: probability that training leaves the class out.

    Example:
        >>> ClassCondition(2, ["cat", "dog"]).request(2, ["dog", 0])["label"].tolist()
        [1, 0]
    """

    guidable = True
    takes = "label"

    def __init__(self, classes: int, names: Sequence[str] = (), drop: float = 0.1) -> None:
        super().__init__()
        check_range("classes", classes, 1, 2**24)
        if names and (len(names) != classes or not all(isinstance(name, str) for name in names)):
            raise TokenError(f"names must be {classes} texts, one a class, or none at all; got {len(names)}")
        self.classes, self.names, self.drop = classes, list(names), check_share("drop", drop)

    def attach(self, width: int, tokens: bool = True, vector: bool = False) -> None:
        self.table = nn.Embedding(self.classes + 1, width)  # the last row: no class
        nn.init.trunc_normal_(self.table.weight, std=0.5)
        self.tokens, self.vector, self.places = tokens, vector, int(tokens)

    def request(self, rows: int, label: Any = None, text: Any = None) -> dict[str, Any]:
        if text is not None:
            raise TokenError(f"this generator takes one of {self.classes} classes, not a text, got text={text!r:.100}. Give label=")
        if label is None:
            raise TokenError(f"this generator needs a class: label=0..{self.classes - 1}, or -1 for none in particular")
        many = isinstance(label, list | tuple) or (isinstance(label, Tensor) and label.ndim == 1)
        found = [self.index(value) for value in (label if many else [label])]
        if len(found) not in (1, rows):
            raise TokenError(f"label must be one class, or one for each of the {rows} rows, got {len(found)}")
        return {"label": torch.tensor(found * (rows // len(found)))}

    def index(self, label: Any) -> int:
        """A class by number or name.

        Raises:
            TokenError: there is no such class.
        """
        if isinstance(label, str):
            if label not in self.names:
                raise TokenError(f"no class is called {label!r:.100}; {_some(self.names)}")
            return self.names.index(label)
        value = label.item() if isinstance(label, Tensor) and label.ndim == 0 else label
        if not isinstance(value, int) or isinstance(value, bool) or not -1 <= value < self.classes:
            raise TokenError(f"classes are 0 to {self.classes - 1} (-1: none in particular), got {value!r:.100}")
        return value

    def forward(self, batch: dict[str, Any], rows: int, chance: Chance | None = None) -> Given:
        label = batch.get("label")
        if label is None:
            raise TokenError("a batch for this generator needs 'label', int64 (B,), -1 for none; the data has no labels")
        if label.shape != (rows,):
            raise TokenError(f"label must be ({rows},), one a row, got {tuple(label.shape)}")
        if label.device.type == "cpu" and rows and not -1 <= int(label.min()) <= int(label.max()) < self.classes:
            raise TokenError(f"classes are 0 to {self.classes - 1} (-1: none), got {int(label.min())}..{int(label.max())}")
        label = label.to(self.device)
        label = label.masked_fill(label < 0, self.classes)
        dropped = self.dropped(rows, chance)
        if dropped is not None:
            label = label.masked_fill(dropped.to(label.device), self.classes)
        return self._given(label)

    def null(self, rows: int) -> Given:
        return self._given(torch.full((rows,), self.classes, device=self.device))

    def _given(self, label: Tensor) -> Given:
        states = self.table(label)
        return Given(states[:, None] if self.tokens else None, states if self.vector else None)


def check_share(name: str, value: float) -> float:
    """A probability.

    Raises:
        TokenError: it is none.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise TokenError(f"{name} must be a probability in [0, 1], got {value!r:.100}")
    return float(value)


def _some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    if not names:
        return "the classes have no names, give a number"
    shown = ", ".join(names[:8])
    return f"the classes are {shown}" + (f" … ({len(names)} in all)" if len(names) > 8 else "")
