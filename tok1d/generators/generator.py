"""Generator: what all kinds share — the tokens they make, conditions, checks of what is asked, and a folder on disk.

Shapes: B rows, N tokens of the space, n ≤ N made.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tok1d.errors import ModelError, TokenError
from tok1d.generators.condition import Condition, Given
from tok1d.generators.guidance import strengths
from tok1d.generators.latents import Latents
from tok1d.generators.sampling import check_choice, row_seeds
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.folder import CONFIG_NAME, chunks_of, fingerprint, plain_state, read_folder, write_folder
from tok1d.tokenizers.part import Part, build_part
from tok1d.tokens import TokenSequence

PACKAGE = "tok1d.generators"
MAX_ROWS = 65536
MAX_STEPS = 10_000
OnStep = Callable[[int, int, Tensor], None]  # (step from 0, number of steps, tokens so far (B, n, ...))


@dataclass(frozen=True)
class Request:
    """What :meth:`Generator.generate` was asked for, checked.

    Attributes:
        rows: B.
        tokens: n.
        seeds: one a row.
        given: the condition of each row.
        null: the same without a condition, or None if there is nothing to leave out.
    """

    rows: int
    tokens: int
    seeds: list[int]
    given: Given
    null: Given | None

    def both(self, guided: bool) -> Given:
        """Rows for one forward: (with, without) if guided, 2B of them; else with alone."""
        if not guided:
            return self.given
        if self.null is None:
            raise TokenError("an unconditional generator has nothing to be guided by; leave guidance at 1")
        return self.given.join(self.null)


class Generator(Part):
    """A model of token sequences. Subclasses have losses and a sampler; the constructor arguments are kept in ``config``.

    Args:
        space: the tokens it makes.
        condition: what they can be asked to show.

    Attributes:
        options: keyword arguments of :meth:`generate` this kind of generator takes.
        loss_weights: weights of its losses by log name, for training that does not set its own; 1 for the others.
        sampling: options that :meth:`generate` takes where it is given none, {} for those of this kind; kept in config.json, and no
            part of ``model_id``.
    """

    options: tuple[str, ...] = ()
    loss_weights: dict[str, float] = {}  # noqa: RUF012

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parameters = inspect.signature(cls.sample).parameters.values()
        cls.options = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)

    def __init__(self, space: TokenSpace, condition: Condition) -> None:
        super().__init__()
        if not isinstance(space, TokenSpace) or not isinstance(condition, Condition):
            raise ModelError(f"a generator needs a TokenSpace and a Condition, got {type(space).__name__} and {type(condition).__name__}")
        self.space, self.condition = space, condition
        self.sampling: dict[str, Any] = {}
        self._model_id: int | None = None

    # what subclasses have ----------------------------------------------------------------------------------------

    @abstractmethod
    def losses(
        self, batch: dict[str, Any], generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Unweighted scalar losses by log name, and detached scalars for logging.

        Conditions, tokens and bits are dropped or flipped in training mode only.

        Args:
            batch: ``ids`` int64 (B, N), ``bits`` uint8 (B, N, d) or ``latents`` float (B, N, C), as the space says; optional
                ``lengths`` int64 (B,), how many tokens of a row count; ``label`` int64 (B,) or ``text``, as the condition says.
            generator: of every random choice, a CPU generator in the same state in every process.
        """

    def prepare(self, batches: Callable[[], Iterable[dict[str, Any]]]) -> None:
        """Look at training data before the first step, for what is measured and not learned; every process sees the same.

        Args:
            batches: begins to give batches, as :meth:`losses` takes them, of every training image once.
        """

    @abstractmethod
    def sample(self, request: Request) -> TokenSequence | Latents:
        """Make tokens; keyword-only arguments of a subclass, all with defaults, are its ``options``."""

    # sampling ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        n: int,
        *,
        label: Any = None,
        text: str | Sequence[str] | None = None,
        tokens: int | None = None,
        seeds: int | Sequence[int] | Tensor = 0,
        guidance: float | None = None,
        schedule: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        steps: int | None = None,
        prefix: TokenSequence | Tensor | None = None,
        on_step: OnStep | None = None,
        **more: Any,
    ) -> TokenSequence | Latents:
        """Sample token sequences.

        Args:
            n: B, how many.
            label: class, by number or name, or one for each row; -1 for none in particular.
            text: description, or one for each row.
            tokens: how many to make; all if None.
            seeds: one for each row; an int s stands for s, s + 1, … A row is the same alone and in any batch.
            guidance: strength, 1 for none; u + g (c - u).
            schedule: of guidance over the steps, see :mod:`tok1d.generators.guidance`.
            temperature, top_k, top_p: see :mod:`tok1d.generators.sampling`.
            steps: of samplers with steps to choose.
            prefix: first tokens, kept as they are: a sequence or data (B or 1, k[, d]).
            on_step: called after every step with its number from 0, the number of steps, and the tokens so far.
            more: further ``options`` of this kind of generator.

        Options that are None are those of ``sampling``, or else have the defaults of this kind.

        Returns:
            TokenSequence of B rows, or Latents from a generator of latents.

        Raises:
            TokenError: an option this generator does not take, or a value out of range.
        """
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_ROWS:
            raise TokenError(f"n must be an integer in 1..{MAX_ROWS}, got {n!r:.100}")
        known = {"guidance": guidance, "schedule": schedule, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        known |= {"steps": steps, "prefix": prefix, "on_step": on_step}
        options = self.sampling | {name: value for name, value in {**known, **more}.items() if value is not None}
        for name in options:
            if name not in self.options:
                raise TokenError(f"{type(self).__name__} has no option {name!r}; its options: {', '.join(self.options)}")
        check_choice(options.get("temperature", 1.0), options.get("top_k", 0), options.get("top_p", 1.0))
        self._check_guidance(options)
        steps = options.get("steps", 1)
        if not (type(steps) is int and 1 <= steps <= MAX_STEPS):
            raise TokenError(f"steps must be an integer in 1..{MAX_STEPS}, got {steps!r:.100}")
        tokens = self.space.check_tokens(tokens)
        if "prefix" in options:
            options["prefix"] = self._prefix(options["prefix"], n, tokens)
        seeds = row_seeds(seeds, n)
        asked = self.condition.request(n, label, text)
        return self.sample(Request(n, tokens, seeds, self.condition(asked, n), self.condition.null(n)), **options)

    def check_sampling(self, sampling: Any) -> dict[str, Any]:
        """The same, as ``sampling`` may hold it.

        Raises:
            ModelError: options this kind of generator does not take, or values that are not plain.
        """
        plain = isinstance(sampling, Mapping) and all(isinstance(value, str | int | float) for value in sampling.values())
        if not plain or not set(sampling) <= set(self.options) - {"prefix", "keep", "on_step"}:
            raise ModelError(f"sampling must be options of {type(self).__name__} ({', '.join(self.options)}) with plain values, got {sampling!r:.200}")
        return dict(sampling)

    def _check_guidance(self, options: dict[str, Any]) -> None:
        strength = options.get("guidance", 1.0)
        strengths(strength, options.get("schedule", "constant"), 1)
        if strength != 1 and not self.condition.guidable:
            raise TokenError(f"an unconditional generator has nothing to be guided by, got guidance={strength}; leave it at 1")

    def _prefix(self, prefix: TokenSequence | Tensor, rows: int, tokens: int) -> Tensor:
        data = self.space.check_sequence(prefix) if isinstance(prefix, TokenSequence) else self.space.check(prefix)
        if len(data) not in (1, rows) or data.shape[1] > tokens:
            raise TokenError(f"prefix must be 1 or {rows} rows of up to {tokens} tokens, got {tuple(data.shape)}")
        return data.expand(rows, *data.shape[1:]).to(self.device)

    # disk --------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def model_id(self) -> int:
        """64-bit id of configuration and weights, as tokenizers have."""
        if self._model_id is not None:
            return self._model_id
        model_id = fingerprint(self.to_config(), chunks_of(plain_state(self)))
        if not self.training:
            self._model_id = model_id
        return model_id

    def train(self, mode: bool = True) -> Generator:
        if mode:
            self._model_id = None
        super().train(mode)
        return self

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Generator:
        """Build from ``to_config()`` data; nothing but classes of ``tok1d.generators`` can be named.

        Raises:
            ModelError: not the configuration of a generator of this class, or a part cannot be built.
        """
        if isinstance(config, dict) and config.get("_class_name") == "Tokenizer1D":
            raise ModelError("this is a tokenizer, which encodes and decodes; a generator for its tokens is needed (tok fit with GeneratorTask)")
        if not isinstance(config, dict) or "space" not in config:
            raise ModelError("this config.json does not describe a generator (it has no 'space')")
        values = {name: _part(value) for name, value in config.items() if name != "sampling"}
        model = build_part({**values, "space": TokenSpace.from_config(config["space"])}, Generator, PACKAGE)
        model.sampling = model.check_sampling(config.get("sampling", {}))
        if not isinstance(model, cls):
            raise ModelError(f"this config.json describes a {type(model).__name__}, not a {cls.__name__}; use Generator.from_pretrained")
        return model

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write config.json and weights, each atomically.

        Args:
            folder: made if missing.
            dtype: cast floating-point weights; they load back as float32.
        """
        write_folder(folder, self.to_config() | ({"sampling": self.sampling} if self.sampling else {}), plain_state(self, dtype))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Generator:
        """Load a folder written by :meth:`save_pretrained`, in eval mode, float32, on the CPU.

        Raises:
            ModelError: files missing or damaged, weights that do not fit, or another kind of generator than this class.
        """
        config, state, _ = read_folder(folder)
        model = cls.from_config(config)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ModelError(f"{folder}: the weights do not fit {CONFIG_NAME}: {error}") from error
        return model.eval().requires_grad_(False)


def _part(value: Any) -> Any:
    """An argument of a generator: parts are described by a class, everything else is plain."""
    if not isinstance(value, dict) or "class" not in value:
        return value
    return build_part({name: _part(v) for name, v in value.items()}, Part, PACKAGE)
