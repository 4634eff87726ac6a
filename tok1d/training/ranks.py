"""What the processes of a run tell each other outside of gradients. Everything here works without a process group, too."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

from tok1d.tokenizers.quantizers.common import world

__all__ = ["gather", "world"]
T = TypeVar("T")


def gather(value: T) -> list[T]:
    """The plain values of all ranks, in their order; every rank must call it.

    Example:
        >>> gather(3)
        [3]
    """
    if world()[1] == 1:
        return [value]
    found: list[Any] = [None] * world()[1]
    dist.all_gather_object(found, value)
    return found
