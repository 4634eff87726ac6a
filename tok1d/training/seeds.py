"""Initial weights that follow from a seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Modules built inside get the weights of ``seed``; the global random state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):  # torch.manual_seed would reach the generators of other devices, too
        torch.default_generator.manual_seed(seed)
        yield
