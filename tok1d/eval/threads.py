"""Work on a CPU shared out by image: each thread computes whole images alone.

Threads that share one operator wait for each other at its end, a hundred times an image, for long on a busy machine; and an image alone
fits the caches where a batch does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's operators run on the thread that calls them, for as long as this lasts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def each(work: Callable[[int], Result], count: int) -> list[Result]:
    """``[work(0), …, work(count - 1)]``, as many at a time as torch has threads; without gradients.

    Example:
        >>> each(lambda i: i * i, 4)
        [0, 1, 4, 9]
    """

    def alone(i: int) -> Result:
        with torch.inference_mode():  # of this thread only
            return work(i)

    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        return [alone(i) for i in range(count)]
    with one_thread(), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(alone, range(count)))
