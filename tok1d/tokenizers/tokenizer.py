"""Tokenizer1D: encoder × quantizer × decoder × length rule; its folder on disk is :mod:`tok1d.tokenizers.folder`.

Shapes: B images, N tokens, n ≤ N kept tokens, D latent width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.border import Border, per_row
from tok1d.tokenizers.fitting import check_parts
from tok1d.tokenizers.folder import (
    CONFIG_NAME,
    HALTING,
    as_stored,
    chunks_of,
    fingerprint,
    plain_state,
    read_folder,
    split_state,
    write_folder,
)
from tok1d.tokenizers.halting import HaltingHead, check_head
from tok1d.tokenizers.lengths import FixedLength, LengthRule
from tok1d.tokenizers.part import Decoder, Encoder, Quantizer, QuantizerOutput, build_part, token_mask
from tok1d.tokens import TokenSequence

if TYPE_CHECKING:
    from tok1d.tokenizers.budget import Auto, Budget


@dataclass
class TokenizerOutput:
    """What a training forward returns.

    Attributes:
        reconstruction: float (B, 3, H, W), not clamped; None in training with a decoder that learns by losses of its own.
        ids: int64 (B, N), or None for continuous bottlenecks.
        lengths: int64 (B,) tokens kept of each image.
        losses: unweighted scalar losses of the quantizer, and of the decoder if it has its own, by log name.
        stats: detached scalars for logging.
        z: float (B, N, D) latents before the quantizer.
        q: float32 (B, N, C) codes.
        mask: bool (B, N) which latents were kept, None for all of them.
    """

    reconstruction: Tensor | None
    ids: Tensor | None
    lengths: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    z: Tensor | None = None
    q: Tensor | None = None
    mask: Tensor | None = None


class Tokenizer1D(Border, nn.Module):
    """A discrete 1D image tokenizer.

    Args:
        encoder, quantizer, decoder: the parts; widths, numbers of tokens and image sizes must agree
            (:mod:`tok1d.tokenizers.fitting`).
        lengths: length rule; ``FixedLength()`` if None.
        image_size: (height, width) the model works at.
        name: shown in messages, files and cards.
        halting: says how many tokens an image needs (``tokens="auto"``); models may go without.

    Example:
        >>> import tok1d, torch
        >>> tok = tok1d.load("default")
        >>> seq = tok.encode(torch.rand(1, 3, 256, 256), tokens=32)
        >>> seq.shape, tok.decode(seq).shape
        ((1, 32), torch.Size([1, 3, 256, 256]))
    """

    def __init__(
        self,
        encoder: Encoder,
        quantizer: Quantizer,
        decoder: Decoder,
        lengths: LengthRule | None = None,
        image_size: tuple[int, int] = (256, 256),
        name: str = "tokenizer",
        halting: HaltingHead | None = None,
    ) -> None:
        super().__init__()
        self.image_size = (int(image_size[0]), int(image_size[1]))
        check_parts(encoder, quantizer, decoder, self.image_size)
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        decoder.attach(encoder)
        self.lengths = FixedLength() if lengths is None else lengths
        self.name = name
        self.halting = halting
        if halting is not None:
            check_head(self)
        self._model_id: int | None = None
        self._stored: dict[str, torch.dtype] = {}

    # what it is --------------------------------------------------------------------------------------------------

    @property
    def max_tokens(self) -> int:
        return self.quantizer.tokens_made(self.encoder.tokens)

    @property
    def token_lengths(self) -> list[int]:
        """Every number of tokens this model can be asked for."""
        return self.lengths.allowed(self.max_tokens)

    @property
    def is_nested(self) -> bool:
        return self.lengths.nested

    @property
    def is_discrete(self) -> bool:
        return self.quantizer.vocab_size > 0

    @property
    def any_size(self) -> bool:
        """Whether it takes other image sizes than ``image_size`` as they are (multiples of ``encoder.size_step``)."""
        return self.encoder.size_step > 0 and "size" in self.decoder.options

    @property
    def vocab_size(self) -> int:
        return self.quantizer.vocab_size

    @property
    def bits_per_token(self) -> int:
        return self.quantizer.bits_per_token

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    @property
    def model_id(self) -> int:
        """64-bit id of configuration and weights; .tok files carry it so that a foreign file is noticed."""
        if self._model_id is not None:
            return self._model_id
        model_id = fingerprint(self.to_config(), chunks_of(split_state(plain_state(self))[0]))
        if not self.training:
            self._model_id = model_id
        return model_id

    def train(self, mode: bool = True) -> Tokenizer1D:
        if mode:
            self._model_id = None
        super().train(mode)
        return self

    # images ⇄ tokens ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(
        self, images: Tensor, tokens: int | Budget | Auto | str | None = None, *, policy: str = "none"
    ) -> TokenSequence:
        """Images to tokens.

        Args:
            images: float (B, 3, H, W) or (3, H, W) in [0, 1], or uint8 in 0..255.
            tokens: how many to keep; None for all, a :class:`tok1d.tokenizers.budget.Budget` (quality or byte target, searched
                for), or ``"auto"`` for the number that the halting head of this model says is enough, for the quality stored with
                it (:class:`tok1d.tokenizers.budget.Auto` for another).
            policy: what to do with another size than ``image_size``: ``none`` (refuse), ``resize``, ``crop``, ``pad``, ``tile``.
                The original size is recorded and undone by :meth:`decode`. A model of any size takes allowed sizes as they
                are with ``none``.

        Returns:
            TokenSequence with ids (B, n); for a budget or ``"auto"``, per-image lengths.

        Raises:
            ImageError: wrong size with ``policy="none"``, wrong shape, or NaN.
            TokenError: a number of tokens this model does not make, or ``"auto"`` and it has no halting head.
        """
        from tok1d.image_io import fit

        if isinstance(tokens, str):
            tokens = self._check_word(tokens)
        if not self.is_discrete:
            raise TokenError(f"{self.name} has a continuous bottleneck and no token ids; use encode_latents()")
        keep = self._check_tokens(tokens) if isinstance(tokens, int) else self.max_tokens
        images = self._check_images(images)
        fitted, geometry = fit(images, self._working_size(images.shape[-2:], policy), policy)
        if fitted.dtype == torch.uint8:  # only now: resizing bytes is several times faster
            fitted = fitted.float().div_(255)
        output = self.quantizer(self.encode_latents(fitted, keep))
        data = {"ids": output.ids} if output.bits is None else {"bits": output.bits}
        seq = TokenSequence(
            **{"ids": None, **data},
            vocab_size=self.vocab_size,
            model_id=self.model_id,
            geometry=geometry,
            nested=self.is_nested,
        )
        if tokens is None or isinstance(tokens, int):
            return seq[:, :keep]
        return tokens.apply(self, fitted, seq)

    @torch.inference_mode()
    def decode(
        self,
        tokens: TokenSequence | Tensor,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        solver: str | None = None,
        seeds: int | Sequence[int] | Tensor | None = None,
        size: tuple[int, int] | None = None,
        text: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Tokens to images.

        Args:
            tokens: a TokenSequence (its size policy is undone), or int64 ids (B, n), or uint8 bits (B, n, d).
            steps, guidance, solver: of decoders that sample (flow); their defaults if None.
            seeds: of decoders with noise: one for every image, or one an image (a row of the batch); 0 if None. An image
                comes out the same alone and in any batch.
            size: (height, width) of the pictures, for decoders of any size; the size that was encoded if None.
            text: float (B, T, W) encoded text, for decoders that read it.

        Returns:
            float32 (B, 3, H, W) in [0, 1]; where the originals differ in size, a list of B tensors (3, H, W).

        Raises:
            TokenError: ids outside the vocabulary, too many tokens, tokens of another model, or an argument this decoder
                has no use for.
        """
        from tok1d.image_io import check_restorable, unfit

        seq = tokens if isinstance(tokens, TokenSequence) else self._as_sequence(tokens)
        self._check_sequence(seq)
        check_restorable(seq.geometry or (), self.image_size)
        options = {"steps": steps, "guidance": guidance, "solver": solver, "seeds": per_row(seeds, len(seq)), "text": text}
        sizes = self._sizes(seq, size)
        if len(set(sizes)) > 1:
            return self._decode_apart(seq, sizes, options)
        seq = seq.to(self.device)
        lengths = seq.lengths
        assert lengths is not None
        seq = seq[:, : int(lengths.max()) if len(lengths) else 0]
        q = self.codes_of(seq.data, lengths)
        images = self.decode_latents(q, lengths, size=sizes[0] if sizes else None, **options).float().clamp(0, 1)
        return images if seq.geometry is None else unfit(images, seq.geometry)

    def _decode_apart(
        self, seq: TokenSequence, sizes: list[tuple[int, int] | None], options: dict[str, Any]
    ) -> Tensor | list[Tensor]:
        """Images of several sizes: those of one size together."""
        from tok1d.tokenizers.budget import rows_of_images

        assert seq.geometry is not None
        images: dict[int, Tensor] = {}
        spans = rows_of_images(seq)
        for size in dict.fromkeys(sizes):
            chosen = [i for i, rows in enumerate(spans) if sizes[rows.start] == size]
            rows = [r for i in chosen for r in spans[i]]
            part = replace(replace(seq, geometry=None)[rows], geometry=tuple(seq.geometry[i] for i in chosen))
            some = {k: v[rows] if isinstance(v, Tensor) else v for k, v in options.items()}
            images |= zip(chosen, self.decode(part, **some))
        ordered = [images[i] for i in range(len(images))]
        return torch.stack(ordered) if len({image.shape for image in ordered}) == 1 else ordered

    def encode_latents(self, images: Tensor, tokens: int | None = None) -> Tensor:
        """Float (B, 3, H, W) in [0, 1] at ``image_size`` → float (B, N, D) before quantization.

        Args:
            images: as above.
            tokens: how many will be kept: encoders that can then compute no more than those.
        """
        only = {"tokens": tokens} if self.encoder.prefix and tokens is not None and not self.quantizer.whole else {}
        dtype = torch.float32 if self.encoder.float32_input else self.dtype
        return self.encoder(images.to(self.device, dtype), **only).float()

    def codes_of(self, data: Tensor, lengths: Tensor) -> Tensor:
        """Codes for the decoder.

        Args:
            data: int64 ids (B, n) or uint8 bits (B, n, d).
            lengths: int64 (B,) how many of them count in each row.

        Returns:
            float32 (B, n, D), or (B, N, D) from a quantizer whose tokens refine all latents.
        """
        if not self.quantizer.whole or len(data) == 0:
            return self.quantizer.ids_to_codes(data)
        rows = [self.quantizer.ids_to_codes(row[None, :n]) for row, n in zip(data, lengths.tolist())]
        return torch.cat(rows)

    def prefix_codes(self, output: QuantizerOutput, tokens: int) -> Tensor:
        """What the quantizer returned for all tokens → codes of the first so many, float (B, n, D); (B, N, D) if it is ``whole``."""
        if not self.quantizer.whole:
            return output.q[:, :tokens]
        data = output.ids if output.bits is None else output.bits
        return self.quantizer.ids_to_codes(data[:, :tokens])

    def decode_latents(self, q: Tensor, lengths: Tensor | None = None, **options: Any) -> Tensor:
        """Float (B, n, D) codes, int64 (B,) lengths → float (B, 3, H, W), not clamped.

        Args:
            q: codes.
            lengths: how many count in each row; all if None.
            options: of the decoder (``Decoder.options``); None means its default.

        Raises:
            TokenError: an option this decoder does not have.
        """
        mask = None if lengths is None or self.quantizer.whole else token_mask(lengths, q.shape[1])
        return self.decoder(q.to(self.dtype), mask, **self._check_options(options))

    def forward(
        self,
        images: Tensor,
        lengths: Tensor | None = None,
        window: tuple[int, int, int] | None = None,
        generator: torch.Generator | None = None,
        text: Tensor | None = None,
    ) -> TokenizerOutput:
        """Reconstruct with gradient; in training mode the length rule draws how many tokens each image keeps.

        Args:
            images: float (B, 3, H, W) in [0, 1] at ``image_size``.
            lengths: int64 (B,) to keep instead of drawing them.
            window: (top, left, size) to render only that square, for decoders that can.
            generator: of what a decoder with losses of its own draws (times, noise); the global one if None.
            text: float (B, T, W) encoded text, for decoders that read it.
        """
        batch, device = len(images), images.device
        if lengths is None:
            full = torch.full((batch,), self.max_tokens, dtype=torch.int64)
            lengths = self.lengths.sample(batch, self.max_tokens) if self.training else full
        # Questions about lengths that were drawn on the CPU are answered there: the GPU is never waited for.
        mask = token_mask(lengths, self.max_tokens)
        z = self.encoder(images)
        output = self.quantizer(z, None if mask is None else mask.to(device))
        if self.quantizer.whole:
            q, given = output.q.to(self.dtype), None
        else:
            longest = int(lengths.max())
            given = token_mask(lengths, longest)
            q, given = output.q[:, :longest].to(self.dtype), None if given is None else given.to(device)
        losses, reconstruction = output.losses, None
        if self.training and self.decoder.objective == "own":
            losses = {**losses, **self.decoder.own_losses(q, given, images, generator)}
        else:
            size = tuple(images.shape[-2:]) if self.any_size else None
            reconstruction = self.decoder(q, given, **self._check_options({"window": window, "size": size, "text": text}))
        kept = None if mask is None or self.quantizer.whole else mask.to(device)
        return TokenizerOutput(reconstruction, output.ids, lengths.to(device), losses, output.stats, z, output.q, kept)

    # disk --------------------------------------------------------------------------------------------------------

    def to_config(self) -> dict[str, Any]:
        """Plain data that :meth:`from_config` builds the same model from (weights aside)."""
        return {
            "_class_name": "Tokenizer1D",
            "name": self.name,
            "image_size": list(self.image_size),
            "encoder": self.encoder.to_config(),
            "quantizer": self.quantizer.to_config(),
            "decoder": self.decoder.to_config(),
            "lengths": self.lengths.to_config(),
            **({} if self.halting is None else {HALTING: self.halting.to_config()}),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Tokenizer1D:
        """Build from :meth:`to_config` data; nothing but classes of ``tok1d.tokenizers`` can be named.

        Raises:
            ModelError: not the configuration of a Tokenizer1D, or a part cannot be built.
        """
        if not isinstance(config, dict) or config.get("_class_name") != "Tokenizer1D":
            raise ModelError("this config.json does not describe a Tokenizer1D (no \"_class_name\": \"Tokenizer1D\")")
        size = config.get("image_size", [256, 256])
        if not (isinstance(size, list) and len(size) == 2 and all(isinstance(s, int) and 0 < s <= 65535 for s in size)):
            raise ModelError(f"config.json: image_size must be [height, width] in pixels, got {size!r:.100}")
        return cls(
            encoder=build_part(config.get("encoder"), Encoder),  # type: ignore[arg-type]
            quantizer=build_part(config.get("quantizer"), Quantizer),  # type: ignore[arg-type]
            decoder=build_part(config.get("decoder"), Decoder),  # type: ignore[arg-type]
            lengths=build_part(config.get("lengths"), LengthRule),  # type: ignore[arg-type]
            image_size=(size[0], size[1]),
            name=str(config.get("name", "tokenizer")),
            halting=build_part(config[HALTING], HaltingHead) if HALTING in config else None,  # type: ignore[arg-type]
        )

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write config.json and weights, each atomically.

        Args:
            folder: made if missing.
            dtype: cast floating-point weights (``torch.float16`` halves the file); they load back as float32. If None, weights that
                are still those that were loaded are written as they were stored, so that the model keeps its id; others in float32.
        """
        write_folder(folder, self.to_config(), as_stored(plain_state(self), self._stored) if dtype is None else plain_state(self, dtype))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer1D:
        """Load a folder written by :meth:`save_pretrained`, in eval mode, float32, on the CPU.

        Raises:
            ModelError: files missing or damaged, or weights that do not fit the configuration.
        """
        config, state, weights = read_folder(folder)
        model = cls.from_config(config)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ModelError(f"{folder}: the weights do not fit {CONFIG_NAME}: {error}") from error
        model.eval().requires_grad_(False)
        model._model_id = fingerprint(model.to_config(), [weights])
        model._stored = {key: value.dtype for key, value in state.items()}
        return model
