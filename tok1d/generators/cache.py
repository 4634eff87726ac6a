"""Keys and values of a whole sequence, allocated once: sampling a token costs one position, and memory never grows.

Shapes: L layers, B rows, h heads of d channels, S places, T new positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """A static cache (L, 2, B, h, S, d) with one pointer.

    Every layer appends the same new positions, then :meth:`advance` moves the pointer. Attention reads a view up to the
    pointer, so no mask over empty places is needed. For inference: gradients do not pass through it.

    Args:
        layers, rows, heads, places, head_width: L, B, h, S, d.
        dtype, device: of the tensors.
        keys: bool (B, at most S), which of the first places may be attended to (padding of texts may not); None for all.

    Example:
        >>> cache = KVCache(2, 1, 4, 16, 8)
        >>> cache.bytes == KVCache.predicted_bytes(2, 1, 4, 16, 8), cache.bytes
        (True, 8192)
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        places: int,
        head_width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        keys: Tensor | None = None,
    ) -> None:
        self.buffer = torch.empty(layers, 2, rows, heads, places, head_width, dtype=dtype, device=device)
        self.position = 0
        self.keys = None
        if keys is not None:
            self.keys = torch.ones(rows, places, dtype=torch.bool, device=device)
            self.keys[:, : keys.shape[1]] = keys

    @staticmethod
    def predicted_bytes(
        layers: int, rows: int, heads: int, places: int, head_width: int, dtype: torch.dtype = torch.float32
    ) -> int:
        """What a cache of this shape takes: 2 · L · B · h · S · d numbers."""
        return 2 * layers * rows * heads * places * head_width * dtype.itemsize

    @property
    def bytes(self) -> int:
        """What it takes."""
        return self.buffer.untyped_storage().nbytes()

    @property
    def places(self) -> int:
        return self.buffer.shape[4]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, T, h, d) of the new positions → views (B, h, position + T, d) of all so far."""
        start, end = self.position, self.position + k.shape[1]
        assert end <= self.places, (end, self.places)
        keys, values = self.buffer[layer].unbind(0)
        keys[:, :, start:end] = k.transpose(1, 2)
        values[:, :, start:end] = v.transpose(1, 2)
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, positions: int) -> None:
        """All layers have appended so many positions."""
        self.position += positions
