"""What ids mean to a generator: features of all codes, computed from their codebooks, and inputs made of codes.

An id of a nested tokenizer is the number of a code in a codebook that few tokens share, thousands of codes each: a table with a
learned row for every id sees most rows once or never, and cannot know which ids look alike. The code of an id says that. Here
similar codes have similar features and inputs, so that what is learned of one holds for its neighbours, also for those that
were never seen.

Shapes: B rows, n of N tokens, S codebooks of K codes of width D, F features, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.generators.generator import Generator
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.part import Part
from tok1d.tokenizers.quantizers.code_books import MAX_CODES, CodeBooks

Places = int | Tensor | None  # which tokens: the first n, one, or int64 (B, n) in any order


class CodeTable(nn.Module):
    """Ids → inputs of a network, and its states → logits of ids, both by way of codes.

    The logit of id i as token t is q · φ(c) + b, where q is a linear map of the state, c the code in the codebook of t in units of
    that book, φ a small network all books share but for a learned offset inside, and b a learned number for each code of each book,
    first 0: how frequent it is beyond what φ tells. Untrained, all ids are equally likely.

    Args:
        space: the tokens; N and K.
        books, dim: S and D.
        width: W.
        features: F.
        hidden: width inside φ.

    Attributes:
        books: buffer float32 (S, K, D), each of unit mean square; nan until :meth:`fill` or loaded weights.
        book: buffer int64 (N,), the one each token uses.
    """

    books: Tensor
    book: Tensor

    def __init__(self, space: TokenSpace, books: int, dim: int, width: int, features: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("books", torch.full((books, space.vocab_size, dim), torch.nan))
        self.register_buffer("book", torch.zeros(space.tokens, dtype=torch.int64))
        self.query = nn.Linear(width, features)
        self.inner, self.outer, self.linear = nn.Linear(dim, hidden), nn.Linear(hidden, features), nn.Linear(dim, features, bias=False)
        self.offset = nn.Parameter(torch.zeros(books, 1, hidden))
        self.bias = nn.Parameter(torch.zeros(books, space.vocab_size))
        self.input, self.mix = nn.Linear(dim, width), nn.Linear(width, width)
        self.place = nn.Embedding(space.tokens, width)
        sizes = {self.inner: dim**-0.5, self.outer: hidden**-0.5, self.linear: dim**-0.5}
        sizes |= {self.input: 0.5 * dim**-0.5, self.mix: 0.5 * width**-0.5, self.place: 0.5}
        for layer, deviation in sizes.items():
            nn.init.trunc_normal_(layer.weight, std=deviation)
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.query.bias)
        self._kept: tuple[Any, Tensor] | None = None
        self._runs: list[tuple[int, int, int]] | None = None
        self.register_load_state_dict_post_hook(lambda module, _: module.forget())

    # codes -------------------------------------------------------------------------------------------------------

    def fill(self, codes: CodeBooks) -> None:
        """Take the codebooks; sizes have been compared."""
        books = codes.books / codes.books.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)
        self.books.copy_(books)
        self.book.copy_(codes.book)
        self.forget()

    @property
    def filled(self) -> bool:
        return not bool(self.books[0, 0, 0].isnan())

    def forget(self) -> None:
        self._kept = self._runs = None

    def train(self, mode: bool = True) -> CodeTable:
        self.forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> CodeTable:
        self.forget()  # moved or cast
        return super()._apply(fn, recurse)

    def runs(self) -> list[tuple[int, int, int]]:
        """(start, end, book) of neighbours with one book."""
        if self._runs is None:
            book = self.book.tolist()
            starts = [t for t in range(len(book)) if t == 0 or book[t] != book[t - 1]]
            self._runs = [(a, b, book[a]) for a, b in zip(starts, [*starts[1:], len(book)])]
        return self._runs

    def features(self) -> Tensor:
        """φ of all codes, float (S, K, F); without gradients and in eval mode they are kept until a parameter changes."""
        sources = [*self.inner.parameters(), *self.outer.parameters(), *self.linear.parameters(), self.offset, self.books]
        fixed = not (self.training or torch.is_grad_enabled() or any(s.is_inference() for s in sources))  # those have no version
        key = [(s.data_ptr(), s._version) for s in sources] if fixed else None
        if key is not None and self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        if key is None:
            return self._features()
        # Made in inference mode or in half precision, what is kept could not be used outside of either
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.books.device.type, enabled=False):
            self._kept = (key, self._features())
        return self._kept[1]

    def _features(self) -> Tensor:
        return self.outer(F.gelu(self.inner(self.books) + self.offset)) + self.linear(self.books)

    # inputs ------------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor, places: Places = None, blank: Tensor | None = None) -> Tensor:
        """int64 (B, n) ids of the tokens at these places → float (B, n, W); with a blank (W,) also id K, which it stands for."""
        where, many = self._where(ids.shape[1], places), self.books.shape[1]
        hidden = None if blank is None else ids == many
        ids = ids if hidden is None else ids.masked_fill(hidden, 0)
        x = self.input(F.embedding(ids + self.book[where] * many, self.books.flatten(0, 1)))
        x = (x if hidden is None else torch.where(hidden[..., None], blank, x)) + self.place(where)
        return x + self.mix(F.silu(x))

    def _where(self, n: int, places: Places) -> Tensor:
        """int64 (n,) or (B, n)."""
        if isinstance(places, Tensor):
            return places
        first = 0 if places is None else places
        return torch.arange(first, first + n, device=self.book.device)

    # logits ------------------------------------------------------------------------------------------------------

    def each(self, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Of the first n tokens, float (B, n, W): the tokens of a run and their logits, float (B, run, K)."""
        query = self.query(states)
        features, bias = self.features().unbind(0), self.bias.unbind(0)  # indexed one by one, each would have a gradient of full size
        for start, end, book in self.runs():
            here = slice(start, min(end, states.shape[1]))
            if here.start >= here.stop:
                break
            yield here, query[:, here] @ features[book].T + bias[book]

    def logits(self, states: Tensor, places: Places = None) -> Tensor:
        """Float (B, n, W) states of the tokens at these places → float (B, n, K), affine in the states."""
        if isinstance(places, int):
            book = next(book for _, end, book in self.runs() if places < end)  # known without waiting for the device
            return self.query(states) @ self.features()[book].T + self.bias[book]
        if places is None:
            return torch.cat([logits for _, logits in self.each(states)], dim=1)
        return torch.take_along_dim(self.logits(self._in_order(states, places)), places[..., None], 1)

    def _in_order(self, x: Tensor, places: Tensor) -> Tensor:
        """(B, n, ...) of any places → (B, N, ...) in natural order, so that tokens of one book are neighbours in all rows."""
        index = places.view(*places.shape, *[1] * (x.ndim - 2)).expand(x.shape)
        return x.new_zeros(len(x), len(self.book), *x.shape[2:]).scatter(1, index, x)

    def nats(self, states: Tensor, ids: Tensor, places: Places = None) -> Tensor:
        """Float (B, n, W), int64 (B, n) → float32 (B, n), cross entropy of each token; logits of a run at a time."""
        if isinstance(places, int):
            return cross_entropy(self.logits(states, places), ids)
        if places is None:
            return torch.cat([cross_entropy(logits, ids[:, here]) for here, logits in self.each(states)], dim=1)
        return self.nats(self._in_order(states, places), self._in_order(ids, places)).gather(1, places)


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Float (B, n, K), int64 (B, n) → float32 (B, n)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none").view(ids.shape)


class WithCodes(Part):
    """A head or body with a :class:`CodeTable`: how it comes to its sizes and codes.

    Both are those of the tokenizer, so neither is configured: a configuration leaves ``books`` and ``dim`` out, and
    :func:`give_codes` (in training the task does it) fills them in. In a saved config.json they are there, the codes are among
    the weights, and the tokenizer is not needed.

    Args:
        features: F of the table.
        hidden: width inside its φ.
        books, dim: sizes of the table; None: not known yet.

    Attributes:
        codes: the table; None until its sizes are known.
    """

    codes: CodeTable | None

    def __init__(self, features: int = 64, hidden: int = 128, books: int | None = None, dim: int | None = None) -> None:
        super().__init__()
        check_range("features", features, 1, 4096)
        check_range("hidden", hidden, 1, 16384)
        if (books is None) != (dim is None):
            raise ModelError(f"books and dim are sizes of the tokenizer's codes, both or none are given; got books={books!r:.100}, dim={dim!r:.100}")
        if books is not None and dim is not None:
            check_range("books", books, 1, 65536)
            check_range("dim", dim, 1, 65536)
        self.features, self.hidden, self.books, self.dim = features, hidden, books, dim
        self.codes = None
        self._given: CodeBooks | None = None
        self._form: tuple[int, TokenSpace] | None = None

    def attach_codes(self, width: int, space: TokenSpace) -> None:
        """Remember what the table is for, and make it if its sizes are known.

        Raises:
            ModelError: tokens that are no ids, or too many.
        """
        if space.kind != "ids" or space.vocab_size > MAX_CODES:
            many = f"{space.vocab_size} ids" if space.kind == "ids" else space.kind
            raise ModelError(f"{type(self).__name__} computes features of the codes of up to {MAX_CODES} ids, {space.tokenizer} has {many}. Take SubCodes or Bits")
        self._form = (width, space)
        if self._given is not None:
            self.take(self._given)
        elif self.books is not None:
            self._make()

    def take(self, codes: CodeBooks) -> None:
        """Codebooks of the tokens of the space; before or after it is attached.

        Raises:
            ModelError: they have other sizes.
        """
        if self._form is None:
            self._given = codes
            self._sized(codes)
            return
        self._given, (_, space) = None, self._form
        if len(codes.book) != space.tokens or codes.books.shape[1] != space.vocab_size:
            raise ModelError(
                f"these are codes of {len(codes.book)} tokens and {codes.books.shape[1]} ids, {type(self).__name__} is for "
                f"{space.tokens} tokens and {space.vocab_size} ids of {space.tokenizer}"
            )
        self._sized(codes)
        if self.codes is None:
            self._make()
        assert self.codes is not None
        self.codes.fill(codes)

    def _sized(self, codes: CodeBooks) -> None:
        sizes = (codes.books.shape[0], codes.books.shape[2])
        if self.books is not None and (self.books, self.dim) != sizes:
            raise ModelError(f"{type(self).__name__} has {self.books} codebooks of width {self.dim}, these are {sizes[0]} of width {sizes[1]}; leave books and dim out")
        self.books, self.dim = sizes
        self.config.update(books=self.books, dim=self.dim)

    def _make(self) -> None:
        assert self._form is not None and self.books is not None and self.dim is not None
        width, space = self._form
        self.codes = CodeTable(space, self.books, self.dim, width, self.features, self.hidden)

    def ready(self) -> CodeTable:
        """The table.

        Raises:
            ModelError: it has no codes yet.
        """
        if self.codes is None:
            raise ModelError(f"{type(self).__name__} has no codes yet: give_codes(generator, tokenizer), or {type(self).__name__}.of(tokenizer)")
        return self.codes


def wants_codes(generator: nn.Module) -> bool:
    """Whether something in it has no codes yet."""
    return any(isinstance(part, WithCodes) and (part.codes is None or not part.codes.filled) for part in generator.modules())


def give_codes(generator: Generator, tokenizer: Any) -> None:
    """Fill in the codes of a tokenizer wherever a generator wants them; its configuration then says their sizes.

    Args:
        generator: made for the tokens of this tokenizer, or its first ones.
        tokenizer: :class:`tok1d.tokenizers.tokenizer.Tokenizer1D`.

    Raises:
        TokenError: the generator is for another tokenizer.
        ModelError: a tokenizer whose ids have no codes, or with more than 65,536 of them.
    """
    generator.space.matches(tokenizer)
    codes = CodeBooks.of(tokenizer.quantizer, generator.space.tokens)
    for part in [*generator.modules()]:
        if isinstance(part, WithCodes):
            part.take(codes)
    parts = {name: getattr(generator, name, None) for name in generator.config}
    generator.config.update({name: part.to_config() for name, part in parts.items() if isinstance(part, WithCodes)})
