"""TokenSequence: what every tokenizer makes and takes — ids or bits, how many of them count, and what they cost.

Shapes: B images (or tiles of images), N tokens, d bits of one token.
torch is imported where it is used: reading what a .tok file says (`tok info`, `tok truncate`) does not need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tok1d.errors import TokenError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

POLICIES = ("none", "resize", "crop", "pad", "tile")


@dataclass(frozen=True)
class Geometry:
    """Size of one original image and how it was brought to the model's size, so that decoding can undo it.

    Attributes:
        height, width: original size in pixels.
        policy: ``none`` | ``resize`` | ``crop`` | ``pad`` | ``tile``.
        rows, cols: tiles of the image (1 × 1 except for ``tile``); they are rows of the batch in raster order.
    """

    height: int
    width: int
    policy: str = "none"
    rows: int = 1
    cols: int = 1

    @property
    def tiles(self) -> int:
        """Rows of the batch this image takes."""
        return self.rows * self.cols


def bits_for_vocab(vocab_size: int) -> int:
    """Bits that hold one id of a vocabulary: ceil(log2(vocab_size)), at least 1.

    Example:
        >>> bits_for_vocab(4096), bits_for_vocab(4097), bits_for_vocab(1)
        (12, 13, 1)
    """
    return max(1, (int(vocab_size) - 1).bit_length())


@dataclass(frozen=True)
class TokenSequence:
    """A batch of 1D token sequences.

    Attributes:
        ids: int64 (B, N) in [0, vocab_size), or None for bit codes.
        bits: uint8 (B, N, d) of 0/1 for codes of more than 62 bits, or None.
        lengths: int64 (B,) tokens that count in each row; entries beyond are zero.
        vocab_size: number of distinct tokens (2**d for bit codes).
        model_id: 64-bit id of the model and weights that made them, 0 if unknown.
        geometry: one entry per original image (tiles share one), or None.
        nested: whether any prefix of a row decodes; files of other sequences refuse to be truncated.
    """

    ids: Tensor | None
    vocab_size: int
    lengths: Tensor | None = None
    bits: Tensor | None = None
    model_id: int = 0
    geometry: tuple[Geometry, ...] | None = None
    nested: bool = True

    def __post_init__(self) -> None:
        import torch

        if (self.ids is None) == (self.bits is None):
            raise TokenError("a TokenSequence holds either ids (B, N) or bits (B, N, d), exactly one of them")
        data = self.data
        wanted = 2 if self.bits is None else 3
        if data.ndim != wanted:
            raise TokenError(f"{'ids' if wanted == 2 else 'bits'} need {wanted} dimensions, got shape {tuple(data.shape)}")
        if self.ids is not None and self.ids.dtype != torch.int64:
            raise TokenError(f"ids must be int64, got {self.ids.dtype}; use ids.long()")
        if self.bits is not None and self.bits.dtype != torch.uint8:
            raise TokenError(f"bits must be uint8, got {self.bits.dtype}")
        if self.lengths is None:
            full = torch.full((data.shape[0],), data.shape[1], dtype=torch.int64, device=data.device)
            object.__setattr__(self, "lengths", full)
        elif self.lengths.shape != (data.shape[0],):
            raise TokenError(f"lengths must be ({data.shape[0]},), got {tuple(self.lengths.shape)}")
        if self.geometry is not None and sum(g.tiles for g in self.geometry) != data.shape[0]:
            raise TokenError(
                f"geometry describes {sum(g.tiles for g in self.geometry)} rows (tiles included), the batch has {data.shape[0]}; "
                "give one Geometry per original image, or geometry=None"
            )

    @property
    def data(self) -> Tensor:
        """The ids (B, N) or the bits (B, N, d), whichever is there."""
        return self.ids if self.ids is not None else self.bits  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        """(B, N)."""
        return self.data.shape[0], self.data.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.data.device

    @property
    def bits_per_token(self) -> int:
        """Stored bits of one token: ceil(log2(vocab_size))."""
        return self.bits.shape[2] if self.bits is not None else bits_for_vocab(self.vocab_size)

    @property
    def bits_per_image(self) -> list[int]:
        """Payload bits of each original image (all its tiles together)."""
        cost = [n * self.bits_per_token for n in self.lengths.tolist()]  # type: ignore[union-attr]
        if self.geometry is None:
            return cost
        ends, start = [], 0
        for g in self.geometry:
            ends.append(sum(cost[start : start + g.tiles]))
            start += g.tiles
        return ends

    @property
    def mask(self) -> Tensor:
        """bool (B, N), True where a token counts."""
        import torch

        return torch.arange(self.shape[1], device=self.device) < self.lengths[:, None]  # type: ignore[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> TokenSequence:
        """``seq[rows]`` or ``seq[rows, :k]``: choose rows (int, slice, list or tensor), keep the first k tokens of each.

        Raises:
            TokenError: the token slice is not a prefix (``[:, 3:]``, ``[:, ::2]``), a row that does not exist, or
                some of the tiles of an image.

        Example:
            >>> import torch
            >>> seq = TokenSequence(torch.arange(8).view(1, 8), vocab_size=16)
            >>> seq[:, :3].ids.tolist(), seq[:, :3].bits_per_image
            ([[0, 1, 2]], [12])
        """
        rows, cols = key if isinstance(key, tuple) else (key, slice(None))
        if not isinstance(cols, slice) or cols.start not in (None, 0) or cols.step not in (None, 1):
            raise TokenError("tokens are sliced as a prefix only: seq[:, :k]")
        if isinstance(rows, int):
            if not -len(self) <= rows < len(self):
                raise TokenError(f"row {rows} does not exist: there are {len(self)}, counted from 0")
            rows = slice(rows, rows + 1 or None)
        geometry = self.geometry
        if geometry is not None and not (isinstance(rows, slice) and rows == slice(None)):
            import torch

            if any(g.tiles != 1 for g in geometry):
                raise TokenError("rows of a tiled image belong together; slice tokens only: seq[:, :k]")
            index = torch.arange(len(geometry))[rows].tolist()
            geometry = tuple(geometry[i] for i in index)
        data = self.data[rows, cols]
        lengths = self.lengths[rows].clamp(max=data.shape[1])  # type: ignore[index]
        fields = {"ids": data} if self.bits is None else {"bits": data}
        return replace(self, **fields, lengths=lengths, geometry=geometry)  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> TokenSequence:
        """The same tokens on another device."""
        fields = {"ids": self.data.to(device)} if self.bits is None else {"bits": self.data.to(device)}
        return replace(self, **fields, lengths=self.lengths.to(device))  # type: ignore[union-attr, arg-type]

    @staticmethod
    def stack(parts: Sequence[TokenSequence]) -> TokenSequence:
        """Join sequences of one model along the batch, padding short ones with zeros.

        Raises:
            TokenError: nothing to join, or the parts come from different models or vocabularies.
        """
        import torch

        if not parts:
            raise TokenError("nothing to stack")
        first = parts[0]
        for p in parts[1:]:
            if (p.vocab_size, p.model_id, p.bits is None) != (first.vocab_size, first.model_id, first.bits is None):
                raise TokenError(
                    f"only sequences of one model can be stacked, got model {first.model_id:016x} with a vocabulary of "
                    f"{first.vocab_size} and model {p.model_id:016x} with {p.vocab_size}"
                )
        longest = max(p.shape[1] for p in parts)
        name = "ids" if first.bits is None else "bits"
        padded = []
        for p in parts:
            data = p.data
            room = data.new_zeros((data.shape[0], longest - data.shape[1], *data.shape[2:]))
            padded.append(torch.cat([data, room], dim=1))
        geometry = None
        if all(p.geometry is not None for p in parts):
            geometry = tuple(g for p in parts for g in p.geometry)  # type: ignore[union-attr]
        return replace(
            first,
            **{name: torch.cat(padded)},  # type: ignore[arg-type]
            lengths=torch.cat([p.lengths for p in parts]),  # type: ignore[misc]
            geometry=geometry,
            nested=all(p.nested for p in parts),
        )

    def save(self, path: str | Path, *, overwrite: bool = True) -> int:
        """Write a .tok file (atomically) and return its size in bytes; see :mod:`tok1d.tokfile`."""
        from tok1d import tokfile

        return tokfile.save(self, path, overwrite=overwrite)

    @staticmethod
    def load(path: str | Path) -> TokenSequence:
        """Read a .tok file; see :mod:`tok1d.tokfile`."""
        from tok1d import tokfile

        return tokfile.load(path)
