"""Image tokens inside a language model's vocabulary: offsets, begin and end markers, and back, with every range checked.

    0 … text_size - 1 | begin | end | offset … offset + vocab_size - 1
    words               <image> </image>  image tokens

A stream is what a language model reads: int64 (m,), words and images one after the other, each image as
[begin, token 0 + offset, …, token n - 1 + offset, end].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tok1d.errors import TokenError
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.blocks import check_range
from tok1d.tokens import TokenSequence


@dataclass(frozen=True)
class ImageVocabulary:
    """Where image tokens lie in a vocabulary; plain data.

    Attributes:
        space: the image tokens.
        text_size: ids below are words.
        offset: of image token 0; right behind the markers if None.
        begin, end: markers, wherever a vocabulary has room for them; the first two ids behind the words if None.

    Raises:
        TokenError: tokens that are no ids, or ranges that overlap.

    Example:
        >>> words = ImageVocabulary(TokenSpace(tokens=4, vocab_size=16, nested=True), text_size=100)
        >>> words.begin, words.end, words.offset, words.size
        (100, 101, 102, 118)
        >>> stream = words.encode(words.space.sequence(torch.tensor([[3, 5]])))[0]
        >>> stream.tolist(), words.decode(stream).ids.tolist()
        ([100, 105, 107, 101], [[3, 5]])
    """

    space: TokenSpace
    text_size: int
    offset: int | None = None
    begin: int | None = None
    end: int | None = None

    def __post_init__(self) -> None:
        if self.space.kind != "ids":
            raise TokenError(f"a language model reads ids; {self.space.tokenizer} makes {self.space.kind}")
        check_range("text_size", self.text_size, 0, 2**40)
        for name, default in (("begin", self.text_size), ("end", self.text_size + 1), ("offset", self.text_size + 2)):
            value = default if getattr(self, name) is None else getattr(self, name)
            check_range(name, value, self.text_size if name == "offset" else 0, 2**62)
            object.__setattr__(self, name, value)
        images = range(self.first, self.first + self.space.vocab_size)
        if self.begin == self.end or self.begin in images or self.end in images:
            raise TokenError(f"markers and image tokens overlap: begin {self.begin}, end {self.end}, image tokens {images.start} to {images.stop - 1}")

    @property
    def first(self) -> int:
        """The id of image token 0."""
        assert self.offset is not None
        return self.offset

    @property
    def size(self) -> int:
        """Ids the language model needs: one more than the largest."""
        assert self.begin is not None and self.end is not None
        return max(self.text_size, self.first + self.space.vocab_size, self.begin + 1, self.end + 1)

    def encode(self, seq: TokenSequence) -> list[Tensor]:
        """A stream for each row: int64 (n + 2,), n its length.

        Raises:
            TokenError: tokens of another tokenizer, out of range, or a length that does not decode.
        """
        data, lengths = self.space.check(seq.data), seq.lengths
        if seq.model_id and self.space.model_id and f"{seq.model_id:016x}" != self.space.model_id:
            raise TokenError(f"these tokens were made by model {seq.model_id:016x}, the vocabulary is for {self.space.tokenizer} {self.space.model_id}")
        if seq.vocab_size != self.space.vocab_size:
            raise TokenError(f"these tokens have a vocabulary of {seq.vocab_size}, {self.space.tokenizer} has {self.space.vocab_size}")
        assert lengths is not None
        marks = [data.new_tensor([mark]) for mark in (self.begin, self.end)]
        return [torch.cat([marks[0], row[: self.space.check_tokens(n)] + self.first, marks[1]]) for row, n in zip(data, lengths.tolist())]

    def decode(self, stream: Tensor | Sequence[int]) -> TokenSequence:
        """All images of a stream, in order, rows of their own lengths.

        Args:
            stream: int64 (m,); words between the images are passed over.

        Raises:
            TokenError: no image, a marker without its partner, an id of another range inside or outside an image, or a number of tokens
                that does not decode.
        """
        ids = self._stream(stream)
        spans = self._spans(ids)
        if not spans:
            raise TokenError(f"no image in this stream of {len(ids)} ids: it has no begin marker ({self.begin})")
        lengths = torch.tensor([stop - start for start, stop in spans])
        rows = [ids[start:stop] - self.first for start, stop in spans]
        data = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return self.space.sequence(data, lengths)

    def text(self, stream: Tensor | Sequence[int]) -> list[Tensor]:
        """The runs of words before, between and behind the images of a stream: one more than there are images."""
        ids = self._stream(stream)
        edges = [0, *(edge for start, stop in self._spans(ids) for edge in (start - 1, stop + 1)), len(ids)]
        return [ids[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]

    def allowed_next(self, stream: Tensor | Sequence[int]) -> Tensor:
        """Which ids may follow, bool (size,): words or begin outside of images; inside, image tokens, and end where the row may end.

        For samplers that mask logits, such as ``prefix_allowed_tokens_fn`` of transformers (``.nonzero()``).
        """
        ids = self._stream(stream)
        allowed = torch.zeros(self.size, dtype=torch.bool)
        begins = (ids == self.begin).nonzero().flatten()
        last = int(begins[-1]) if len(begins) else -1
        open_ = last >= 0 and not bool((ids[last:] == self.end).any())
        if not open_:
            self._spans(ids)
            allowed[: self.text_size] = True
            allowed[self.begin], allowed[self.end] = True, False
            return allowed
        self._spans(ids[:last])
        inside = ids[last + 1 :]
        self._check_inside(inside)
        if len(inside) > self.space.tokens:
            raise TokenError(f"{self.space.tokenizer} has at most {self.space.tokens} tokens, the open image has {len(inside)}")
        allowed[self.first : self.first + self.space.vocab_size] = len(inside) < self.space.tokens
        allowed[self.end] = len(inside) in self.space.allowed
        return allowed

    def _stream(self, stream: Tensor | Sequence[int]) -> Tensor:
        ids = torch.as_tensor(stream)
        if ids.ndim != 1 or (ids.numel() and ids.dtype not in (torch.int64, torch.int32)):
            raise TokenError(f"a stream is int64 (m,), got {ids.dtype} {tuple(ids.shape)}")
        ids = ids.long().cpu()
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.size:
            raise TokenError(f"ids of the stream must be in [0, {self.size}), got {int(ids.min())}..{int(ids.max())}")
        return ids

    def _spans(self, ids: Tensor) -> list[tuple[int, int]]:
        """First place and the place behind the last of every image; refuses whatever is out of place."""
        marks = ((ids == self.begin) | (ids == self.end)).nonzero().flatten().tolist()
        for i, place in enumerate(marks):
            wanted = self.end if i % 2 else self.begin
            if int(ids[place]) != wanted:
                raise TokenError(f"place {place} holds the {'begin' if i % 2 else 'end'} marker where {'an end' if i % 2 else 'a begin'} was due")
        if len(marks) % 2:
            raise TokenError(f"the image that begins at place {marks[-1]} does not end")
        spans = [(a + 1, b) for a, b in zip(marks[::2], marks[1::2])]
        outside = torch.ones(len(ids), dtype=torch.bool)
        for start, stop in spans:
            outside[start - 1 : stop + 1] = False
            self._check_inside(ids[start:stop])
            self.space.check_tokens(stop - start)
        strangers = outside & (ids >= self.text_size)
        if bool(strangers.any()):
            place = int(strangers.nonzero()[0])
            raise TokenError(f"place {place} holds {int(ids[place])}, which is no word (below {self.text_size}), outside of an image")
        return spans

    def _check_inside(self, ids: Tensor) -> None:
        wrong = (ids < self.first) | (ids >= self.first + self.space.vocab_size)
        if bool(wrong.any()):
            most = self.first + self.space.vocab_size - 1
            raise TokenError(f"inside an image ids are {self.first} to {most}, got {int(ids[wrong][0])}")
