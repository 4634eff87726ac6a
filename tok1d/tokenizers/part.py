"""The four kinds of part a tokenizer is made of, and what passes between them.

    image (B, 3, H, W) in [0, 1] → Encoder → z (B, N, D) → Quantizer → q (B, N, D), ids (B, N) → Decoder → image

A part remembers the arguments it was built with (``part.config``), so a tokenizer can be written to config.json and
built again. Configurations are plain data; only classes that live in ``tok1d.tokenizers`` are ever built from a file.

Shapes: B batch, N tokens, D latent width, H × W pixels.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tok1d.errors import ModelError


class Part(nn.Module):
    """A module that records its constructor arguments in ``config`` (JSON-able values only).

    Attributes:
        training_only: names of buffers that checkpoints of a training run need and exported weights leave out; loading
            weights without them must work.
    """

    config: dict[str, Any]
    training_only: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        build = cls.__init__
        signature = inspect.signature(build)

        @functools.wraps(build)
        def recorded(self: Part, *args: Any, **kw: Any) -> None:
            if type(self) is cls:
                bound = signature.bind(self, *args, **kw)
                bound.apply_defaults()
                values = {k: v for k, v in bound.arguments.items() if k != "self"}
                object.__setattr__(self, "config", json.loads(json.dumps(values, default=_plain)))
            build(self, *args, **kw)

        cls.__init__ = recorded  # type: ignore[method-assign]

    def to_config(self) -> dict[str, Any]:
        """``{"class": import path, **arguments}``, plain data."""
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **self.config}


def _plain(value: Any) -> dict[str, Any]:
    """An argument that is a part, or plain data in a class, as JSON."""
    if not hasattr(value, "to_config"):
        raise TypeError(f"arguments of parts must be plain data or parts, got {type(value).__name__}")
    return value.to_config()


def build_part(config: dict[str, Any], kind: type[Part], package: str = "tok1d.tokenizers") -> Part:
    """Build a part from its ``to_config()`` data.

    Only subclasses of ``kind`` defined under ``package`` are accepted: a hostile file can name nothing else.

    Raises:
        ModelError: the class is unknown, of the wrong kind, or the arguments do not fit.
    """
    if not isinstance(config, dict) or not isinstance(config.get("class"), str):
        raise ModelError(f"a {kind.__name__.lower()} in config.json needs a 'class' entry, got {config!r:.200}")
    module_name, _, name = config["class"].rpartition(".")
    found = None
    if module_name.startswith(f"{package}."):
        try:
            found = getattr(importlib.import_module(module_name), name, None)
        except ImportError:
            found = None
    if not (inspect.isclass(found) and issubclass(found, kind)) or found is kind:
        raise ModelError(
            f"config.json names {config['class']!r}, which is not a {kind.__name__.lower()} of tok1d. "
            "Parts of your own are passed as objects: Tokenizer1D(encoder=MyEncoder(...), ...)"
        )
    arguments = {k: v for k, v in config.items() if k != "class"}
    try:
        inspect.signature(found.__init__).bind(None, **arguments)
        return found(**arguments)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: torch cannot allocate that much
        raise ModelError(f"config.json: {name} cannot be built from {arguments!r:.300}: {error}") from error


@dataclass
class QuantizerOutput:
    """What a quantizer returns.

    Attributes:
        q: float32 (B, N, D) quantized latents with straight-through gradient; zero where the mask is False.
        ids: int64 (B, N), or None for continuous (KL) bottlenecks and codes of more than 62 bits.
        losses: unweighted scalar losses by log name (``commitment``, ``codebook``, ``entropy``, ``kl`` …).
        stats: detached scalars for logging.
        bits: uint8 (B, N, d) for codes of more than 62 bits.
    """

    q: Tensor
    ids: Tensor | None
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    bits: Tensor | None = None


class Encoder(Part):
    """Images → latents, one per token.

    Attributes:
        tokens: number N of latents it makes.
        dim: width D of a latent.
        prefix: whether ``forward`` takes ``tokens=n`` and computes the first n latents alone, exactly and for less work.
        size_step: 0 if it works at one image size; else it takes every (height, width) of multiples of ``size_step``
            up to ``size_limit`` pixels a side.
        float32_input: whether images come in float32 whatever the dtype of its weights (a VAE inside stays float32).
    """

    tokens: int
    dim: int
    prefix: bool = False
    size_step: int = 0
    size_limit: int = 0
    float32_input: bool = False

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Float (B, 3, H, W) in [0, 1] → float (B, N, D)."""


class Quantizer(Part):
    """Latents → discrete codes and back; float32 inside with autocast off.

    A token is one integer below ``vocab_size``. Vocabularies beyond 2^62 do not fit int64: such a quantizer has
    ``vocab_size = 2**d``, returns ``bits`` (B, N, d) instead of ``ids``, and its ``ids_to_codes`` and ``codes_to_ids`` take
    and give those bits.

    Attributes:
        dim: width D of latents.
        code_dim: width of codes, D unless the quantizer says otherwise (KL: latents are mean and variance, codes half).
        vocab_size: number of ids, or 0 for a continuous bottleneck.
        loss_weights: published weights of its losses by log name, for training that does not set its own.
        picture_gradient: whether its parameters also learn from the gradient of the codes that it makes, without any loss of its own.
        whole: codes of any prefix of the tokens are codes for all latents (residual scales: late tokens refine all of them);
            else token i is the code of latent i.
    """

    dim: int
    vocab_size: int
    loss_weights: dict[str, float] = {}  # noqa: RUF012
    picture_gradient: bool = False
    whole: bool = False

    @property
    def code_dim(self) -> int:
        return self.dim

    @property
    def bits_per_token(self) -> int:
        from tok1d.tokens import bits_for_vocab

        return bits_for_vocab(self.vocab_size) if self.vocab_size else 0

    def tokens_made(self, latents: int) -> int:
        """Number of tokens that so many latents become."""
        return latents

    @abstractmethod
    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Float (B, N, D), bool mask over tokens (B, N) True = keep → QuantizerOutput.

        Masked tokens never enter losses, statistics or codebook updates; their ids are 0 and their q is zero.
        """

    @abstractmethod
    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """int64 (B, n) ids, or uint8 (B, n, d) bits, of the first n tokens → float32 (B, n, D); (B, N, D) if ``whole``."""

    @abstractmethod
    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """float (B, n, D) codes of the first n tokens → int64 (B, n), or uint8 (B, n, d) bits."""


class Decoder(Part):
    """Codes → images.

    Attributes:
        dim: width of the codes it takes.
        options: keyword arguments of ``forward`` beyond codes and mask, of these names and meanings:
            ``window`` (top, left, size) renders only that square; ``size`` (height, width) of the image, for decoders of any
            size; ``steps`` int, ``guidance`` float and ``solver`` str, for samplers; ``seeds`` int64 (B,), what makes the noise of each image,
            so that an image is the same alone and in any batch; ``text`` float (B, T, W) encoded text.
        objective: what training compares: ``pixels`` (the picture it returns), or ``own``: pictures are sampled and
            training minimises :meth:`own_losses`.
        loss_weights: published weights of those losses by log name, for training that does not set its own.
        painter: name of its last layer that learns, of decoders that return pictures.
    """

    dim: int
    options: tuple[str, ...] = ()
    objective: str = "pixels"
    loss_weights: dict[str, float] = {}  # noqa: RUF012
    painter: str = ""

    @property
    def last_layer(self) -> Tensor:
        """The weight of its last layer that learns, where losses of pictures compare their gradients.

        Raises:
            ModelError: it names none.
        """
        if not self.painter:
            raise ModelError(f"{type(self).__name__} does not say which of its layers is the last that learns (painter)")
        return self.get_submodule(self.painter).weight

    @property
    def stochastic(self) -> bool:
        """Whether ``seeds`` change the picture."""
        return "seeds" in self.options

    @abstractmethod
    def forward(self, q: Tensor, mask: Tensor | None = None) -> Tensor:
        """Float (B, n, D) codes of the first n tokens, bool mask (B, n) True = given → float (B, 3, H, W), about [0, 1].

        ``mask=None`` means that all n tokens are given. A masked position must not influence the image.
        """

    def attach(self, encoder: Encoder) -> None:
        """Called once by the tokenizer with the encoder beside this decoder, which may hold what training needs."""

    def own_losses(
        self, q: Tensor, mask: Tensor | None, images: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Losses of a decoder with ``objective = "own"``, scalars by log name, with gradient to q.

        Args:
            q, mask: as :meth:`forward`.
            images: float (B, 3, H, W) in [0, 1], what should come out.
            generator: of times and noise; a CPU generator.
        """
        raise TypeError(f"{type(self).__name__} is trained on the pictures it returns")


def token_mask(lengths: Tensor, tokens: int) -> Tensor | None:
    """int64 (B,) lengths → bool (B, tokens), or None when every token counts."""
    if bool((lengths >= tokens).all()):
        return None
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]
