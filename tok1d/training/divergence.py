"""Stop a run before numbers that are not finite reach its weights, and say which images they came from."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from tok1d.disk import atomic_write
from tok1d.errors import ModelError, TokError
from tok1d.tokenizers.quantizers.common import sum_over_ranks
from tok1d.training.ranks import gather, world

FILE = "diverged.json"


@dataclass
class Seen:
    """A batch since the last optimizer step: its number, names of its samples, loss and parts of the loss."""

    number: int
    keys: list[str]
    loss: Tensor
    parts: dict[str, Tensor]

    def row(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "batch": self.number, "loss": _number(self.loss),
            "losses": {k: _number(v) for k, v in self.parts.items()}, "keys": self.keys,
        }  # fmt: skip


class Watch:
    """Remembers the batches that the next optimizer step is made of; looks at numbers only when that step is due.

    The question is asked of the gradients, which data parallelism has summed up by then: all ranks stop together, and none
    waits for one that has gone.
    """

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def note(self, number: int, keys: list[str], loss: Tensor, parts: dict[str, Tensor]) -> None:
        """A batch has been computed; nothing is copied from its device yet."""
        self.seen.append(Seen(number, list(keys), loss.detach(), {k: v.detach() for k, v in parts.items()}))

    def forget(self) -> None:
        """The step is taken."""
        self.seen.clear()

    def nan_losses(self) -> Tensor:
        """Scalar, nan if a loss of any rank is, else 0; every rank must call it."""
        if not self.seen:
            return torch.zeros(())
        losses = torch.stack([b.loss.float() for b in self.seen])
        return sum_over_ranks(torch.where(losses.isnan(), losses, 0).sum())

    def check(self, norm: Tensor, folder: Path | None, step: int) -> None:
        """Go on if the norm of the gradient is finite.

        Args:
            norm: scalar, the same on all ranks.
            folder: where to write ``diverged.json``; None for nowhere.
            step: optimizer steps taken so far.

        Raises:
            ModelError: it is not, on every rank; with the loss it came from and where the names of the images are.
        """
        if not torch.isfinite(norm):
            self.stop(f"the norm of the gradient became {norm.item()}", folder, step)

    def stop(self, what: str, folder: Path | None, step: int) -> NoReturn:
        """Raise the error; every rank must call it.

        Args:
            what: went wrong; a loss that is not finite is said instead.
            folder, step: as :meth:`check`.
        """
        rows = [{"rank": rank, **row} for rank, found in enumerate(gather([b.row() for b in self.seen])) for row in found]
        bad = next((row for row in rows if isinstance(row["loss"], str)), None)
        if bad is not None:
            what = f"the loss became {bad['loss']} ({', '.join(f'{k} {v}' for k, v in bad['losses'].items())})"
        where = ""
        if folder is not None:
            where = _write(folder / FILE, {"step": step, "what": what, "batches": rows})
        raise ModelError(
            f"{what} after step {step}.{where} Checkpoints are from before; continue from one with a lower learning rate, "
            "a longer warm-up, or trainer.precision 32-true"
        )


def _write(path: Path, content: dict[str, Any]) -> str:
    """A sentence on where the names are. A disk that is full must not hide what happened."""
    try:
        if world()[0] == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(content, indent=1, allow_nan=False).encode())
    except (TokError, OSError) as error:
        return f" The names of its images could not be written ({error})."
    return f" {path} names the images of that step."


def _number(value: Tensor) -> float | str:
    """As JSON has it: it knows no nan and no infinity."""
    number = value.item()
    return float(f"{number:.6g}") if math.isfinite(number) else str(number)
