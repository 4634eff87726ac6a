"""TokenSpace: which tokens a generator makes, and for which tokenizer; the border where both are checked.

Shapes: B rows, N tokens, d bits of one token, C channels of one latent.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.blocks import check_range
from tok1d.tokens import TokenSequence, bits_for_vocab

if TYPE_CHECKING:
    from tok1d.tokenizers.tokenizer import Tokenizer1D

KINDS = ("ids", "bits", "latents")


@dataclass(frozen=True)
class TokenSpace:
    """What a generator was made for; plain data.

    Attributes:
        tokens: the most tokens of a row.
        kind: ``ids`` (int64 below ``vocab_size``), ``bits`` (uint8, d a token, for codes of more than 62 bits) or ``latents``
            (float, C a token).
        vocab_size: number of ids; 0 unless the kind is ``ids``.
        bits: d, bits of one token; 0 for ids means ceil(log2(vocab_size)).
        channels: C; 0 unless the kind is ``latents``.
        before: of latents: they are those of the encoder, before quantization, and their tokens what the quantizer makes of them;
            else they are codes, what the decoder takes.
        nested: whether any prefix of a row decodes.
        lengths: every number of tokens that may be asked for; None: 1..tokens if nested, else tokens alone.
        tokenizer: name of the tokenizer, for messages.
        model_id: 16 hex digits, id of its architecture and weights; empty: not known, nothing is compared.

    Example:
        >>> space = TokenSpace(tokens=32, vocab_size=4096)
        >>> space.bits, space.nested, space.allowed
        (12, False, [32])
    """

    tokens: int
    kind: str = "ids"
    vocab_size: int = 0
    bits: int = 0
    channels: int = 0
    before: bool = False
    nested: bool = False
    lengths: tuple[int, ...] | None = None
    tokenizer: str = "tokenizer"
    model_id: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ModelError(f"kind of a token space must be one of {', '.join(KINDS)}, got {self.kind!r:.100}")
        check_range("tokens", self.tokens, 1, 65536)
        if self.kind == "ids":
            check_range("vocab_size", self.vocab_size, 2, 2**62)
            object.__setattr__(self, "bits", bits_for_vocab(self.vocab_size))
        if self.kind == "bits":
            check_range("bits", self.bits, 1, 4096)
        if self.kind == "latents":
            check_range("channels", self.channels, 1, 65536)
        if self.before and self.kind != "latents":
            raise ModelError(f"before: latents come before or after quantization, {self.kind} after; leave it out")
        if self.lengths is not None:
            for n in self.lengths:
                check_range("every entry of lengths", n, 1, self.tokens)
            object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))
        if self.model_id and not (len(self.model_id) == 16 and set(self.model_id) <= set("0123456789abcdef")):
            raise ModelError(f"model_id must be 16 hex digits or empty, got {self.model_id!r:.100}")

    @classmethod
    def of(cls, tokenizer: Tokenizer1D, kind: str | None = None) -> TokenSpace:
        """The tokens of a tokenizer.

        Args:
            tokenizer: any.
            kind: ``latents`` to generate the codes of a discrete tokenizer as numbers, ``encoder`` to generate what its encoder
                makes, before quantization; its own kind if None.

        Raises:
            TokenError: a kind this tokenizer does not have.
        """
        own = "latents" if not tokenizer.is_discrete else "ids" if tokenizer.vocab_size <= 2**62 else "bits"
        before = kind == "encoder" and tokenizer.is_discrete
        kind = own if kind is None else "latents" if before else kind
        if kind not in (own, "latents"):
            further = ", latents, encoder" if tokenizer.is_discrete else ""
            raise TokenError(f"{tokenizer.name} makes {own}, not {kind}; the kinds it has: {own}{further}")
        if before and tokenizer.quantizer.whole:
            raise TokenError(f"tokens of {tokenizer.name} each refine all latents, so no latent belongs to a token; take latents or {own}")
        most = tokenizer.max_tokens
        allowed = tokenizer.token_lengths
        return cls(
            tokens=most,
            kind=kind,
            vocab_size=tokenizer.vocab_size if kind == "ids" else 0,
            bits=tokenizer.bits_per_token if kind == "bits" else 0,
            channels=0 if kind != "latents" else tokenizer.quantizer.dim if before else tokenizer.quantizer.code_dim,
            before=before,
            nested=tokenizer.is_nested,
            lengths=None if allowed == (list(range(1, most + 1)) if tokenizer.is_nested else [most]) else tuple(allowed),
            tokenizer=tokenizer.name,
            model_id=f"{tokenizer.model_id:016x}",
        )

    @classmethod
    def from_config(cls, config: Any) -> TokenSpace:
        """Build from :meth:`to_config` data.

        Raises:
            ModelError: not such data.
        """
        try:
            lengths = config.get("lengths")
            return cls(**{**config, "lengths": None if lengths is None else tuple(lengths)})
        except (AttributeError, TypeError) as error:
            raise ModelError(f"config.json does not describe a token space: {config!r:.300} ({error})") from error

    def to_config(self) -> dict[str, Any]:
        """Plain data."""
        values = asdict(self)
        return {**values, "lengths": None if self.lengths is None else list(self.lengths)}

    def first(self, tokens: int) -> TokenSpace:
        """The same with fewer tokens, the first ones.

        Raises:
            TokenError: the tokenizer does not decode so few, or so many.
        """
        self.check_tokens(tokens)
        lengths = None if self.lengths is None else tuple(n for n in self.lengths if n <= tokens)
        return replace(self, tokens=tokens, lengths=lengths)

    @property
    def allowed(self) -> list[int]:
        """Every number of tokens that may be asked for, ascending."""
        if self.lengths is not None:
            return list(self.lengths)
        return list(range(1, self.tokens + 1)) if self.nested else [self.tokens]

    @property
    def bits_per_image(self) -> int:
        """Bits of a full row; 0 for latents."""
        return self.tokens * self.bits if self.kind != "latents" else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one token: () for ids, (d,) for bits, (C,) for latents."""
        return {"ids": (), "bits": (self.bits,), "latents": (self.channels,)}[self.kind]

    @property
    def dtype(self) -> torch.dtype:
        """Of the data."""
        return {"ids": torch.int64, "bits": torch.uint8, "latents": torch.float32}[self.kind]

    def check_tokens(self, tokens: int | None) -> int:
        """How many tokens to make; all of them for None.

        Raises:
            TokenError: a number the tokenizer does not decode.
        """
        if tokens is None:
            return self.allowed[-1]
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens not in self.allowed:
            allowed = f"1 to {self.tokens}" if self.lengths is None and self.nested else ", ".join(map(str, self.allowed))
            raise TokenError(f"{self.tokenizer} has rows of {allowed} tokens, got tokens={tokens!r:.100}")
        return tokens

    def check(self, data: Tensor) -> Tensor:
        """Refuse what is not a batch of such tokens; returns it unchanged.

        Args:
            data: int64 (B, n) ids, uint8 (B, n, d) bits or float (B, n, C) latents, n up to ``tokens``. Values of ids and bits on
                the CPU are looked at; on other devices only shapes, because looking would wait for the device.

        Raises:
            TokenError: another shape, dtype, or values out of range.
        """
        wanted = {"ids": "int64 ids (B, n)", "bits": f"uint8 bits (B, n, {self.bits})", "latents": f"float latents (B, n, {self.channels})"}[self.kind]
        floats = self.kind == "latents" and data.is_floating_point()
        if data.shape[2:] != self.shape or data.ndim < 2 or not (floats or data.dtype == self.dtype):
            raise TokenError(f"tokens of {self.tokenizer} are {wanted}, got {data.dtype} {tuple(data.shape)}")
        if data.shape[1] > self.tokens:
            raise TokenError(f"{self.tokenizer} has at most {self.tokens} tokens, got {data.shape[1]}")
        if self.kind != "latents" and data.device.type == "cpu" and data.numel():
            low, high = (int(v) for v in data.aminmax())
            most = self.vocab_size if self.kind == "ids" else 2
            if low < 0 or high >= most:
                raise TokenError(f"{self.kind} of {self.tokenizer} must be in [0, {most}), got {low}..{high}: another model made them")
        return data

    def data_of(self, batch: dict[str, Any]) -> Tensor:
        """The checked tokens of a training batch, entry ``ids``, ``bits`` or ``latents``.

        Raises:
            TokenError: there is no such entry, or it does not fit.
        """
        if self.kind not in batch:
            raise TokenError(f"a batch for this generator needs {self.kind!r}, got only {', '.join(sorted(batch)) or 'nothing'}")
        return self.check(batch[self.kind])

    def check_sequence(self, seq: TokenSequence) -> Tensor:
        """The data of a sequence of rows of one length, ids or bits (B, n[, d]).

        Raises:
            TokenError: another model made it, it does not fit, or its rows differ in length.
        """
        if seq.model_id and self.model_id and f"{seq.model_id:016x}" != self.model_id:
            raise TokenError(
                f"these tokens were made by model {seq.model_id:016x}, this generator makes those of {self.tokenizer} "
                f"{self.model_id}. Encode with the tokenizer it was trained for"
            )
        if self.kind == "ids" and seq.vocab_size != self.vocab_size:
            raise TokenError(f"these tokens have a vocabulary of {seq.vocab_size}, {self.tokenizer} has {self.vocab_size}: another model made them")
        if seq.lengths is not None and bool((seq.lengths != seq.shape[1]).any()):
            raise TokenError(f"all rows must have the same number of tokens, got {seq.lengths.tolist()!r:.100}; slice them: seq[:, :k]")
        return self.check(seq.data)

    def matches(self, tokenizer: Tokenizer1D) -> None:
        """Refuse a tokenizer this generator was not trained for.

        Raises:
            TokenError: its tokens have another form, or its weights are others.
        """
        kind = "encoder" if self.before and tokenizer.is_discrete else "latents" if self.kind == "latents" else None
        other = TokenSpace.of(tokenizer, kind)
        if other.nested and self.tokens in other.allowed:  # made for its first tokens
            other = other.first(self.tokens)
        for name in ("kind", "tokens", "vocab_size", "bits", "channels", "before"):
            if getattr(self, name) != getattr(other, name):
                raise TokenError(
                    f"this generator makes tokens of {self.tokenizer} with {name} {getattr(self, name)}, {tokenizer.name} has "
                    f"{name} {getattr(other, name)}. Use {self.tokenizer}, or train a generator for {tokenizer.name}"
                )
        if self.model_id and self.model_id != other.model_id:
            raise TokenError(
                f"this generator was trained on tokens of {self.tokenizer} {self.model_id}, this is {tokenizer.name} {other.model_id}: "
                "same form, other weights, so its pictures would be noise. Use the tokenizer it was trained for"
            )

    def sequence(self, data: Tensor, lengths: Tensor | None = None) -> TokenSequence:
        """Generated ids or bits as a TokenSequence, entries beyond the lengths zeroed.

        Args:
            data: (B, n) ids or (B, n, d) bits.
            lengths: int64 (B,); all n if None.
        """
        if self.kind == "latents":
            raise TokenError("latents are no TokenSequence; quantize them with the tokenizer's quantizer first")
        if lengths is not None:
            beyond = torch.arange(data.shape[1], device=data.device) >= lengths[:, None]
            data = data.masked_fill(beyond.view(*beyond.shape, *[1] * (data.ndim - 2)), 0)
        size = self.vocab_size if self.kind == "ids" else 2**self.bits
        fields = {"ids": data} if self.kind == "ids" else {"ids": None, "bits": data}
        return TokenSequence(**fields, vocab_size=size, lengths=lengths, model_id=int(self.model_id or "0", 16), nested=self.nested)
