"""TokPipeline: a generator and its tokenizer as a pipeline of diffusers.

Both join through thin adapters whose folders are our own (config.json and safetensors, no pickle), so ``tok1d.load(FOLDER/tokenizer)`` and
``Generator.from_pretrained(FOLDER/generator)`` read a saved pipeline, and ``tok generate FOLDER/generator`` runs it. This is the only
file that imports diffusers. Shapes: B images of H × W pixels, n tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tok1d.errors import TokenError
from tok1d.extras import ensure_torchvision_ops, require
from tok1d.generators.generator import Generator
from tok1d.generators.images import paint
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.tokens import TokenSequence

ensure_torchvision_ops()
diffusers = require("diffusers", "flow")
ModelMixin = diffusers.ModelMixin  # diffusers looks for its base class in the module that holds a component
OUTPUTS = ("pil", "pt", "np", "tokens")
Seeds = torch.Generator | Sequence[torch.Generator] | int | Sequence[int] | None


class _Adapter(ModelMixin, diffusers.ConfigMixin):
    """A model of ours among those of diffusers; ``model`` is the model itself."""

    config_name = "config.json"
    kind: type

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.register_to_config(model_id=f"{model.model_id:016x}")

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None, dtype: torch.dtype | None = None, **ignored: Any) -> _Adapter:
        """Load a folder of ours; what diffusers says of its own weights files (variants, memory maps …) means nothing here."""
        return cls(cls.kind.from_pretrained(folder)).to(dtype or torch_dtype or torch.float32)

    def save_pretrained(self, folder: str, **ignored: Any) -> None:
        """Write a folder of ours.

        Raises:
            TokenError: the weights were rounded: a generator knows its tokenizer by the hash of its weights.
        """
        if self.dtype != torch.float32:
            raise TokenError(f"this pipeline was cast to {self.dtype}, and rounded weights are another model; save it before, or from_pretrained again")
        self.model.save_pretrained(folder)

    def to(self, *args: Any, **kwargs: Any) -> _Adapter:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None:
            self.model.to(device)
        for part in self.rounded() if dtype is not None else ():
            part.to(dtype)
        return self

    def rounded(self) -> Sequence[nn.Module]:
        """The parts that have another dtype after ``to(dtype)``."""
        return (self.model,)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.rounded()[0].parameters()).dtype


class TokenizerModel(_Adapter):
    """A tokenizer; ``to(dtype)`` leaves its quantizer in float32, where ids are decided.

    Args:
        model: the tokenizer.
    """

    kind = Tokenizer1D

    def rounded(self) -> Sequence[nn.Module]:
        return self.model.decoder, self.model.encoder


class GeneratorModel(_Adapter):
    """A generator.

    Args:
        model: the generator.
    """

    kind = Generator


@dataclass
class TokPipelineOutput(diffusers.utils.BaseOutput):
    """What a pipeline made.

    Attributes:
        images: list of B PIL images, float32 (B, 3, H, W) or (B, H, W, 3) in [0, 1]; None for ``output_type="tokens"``.
        tokens: TokenSequence or Latents of B rows.
    """

    images: Any
    tokens: Any


class TokPipeline(diffusers.DiffusionPipeline):
    """Images of a class or a description.

    Args:
        tokenizer: turns tokens into images; a plain tokenizer is wrapped.
        generator: makes tokens; a plain generator is wrapped.

    Raises:
        TokenError: the generator was trained for another tokenizer.

    Example:
        >>> pipe = TokPipeline(tok1d.load("default"), Generator.from_pretrained("models/flowers"))  # doctest: +SKIP
        >>> pipe(class_labels="daisy", num_images=4, generator=0).images[0].save("daisy.png")  # doctest: +SKIP
    """

    model_cpu_offload_seq = "generator->tokenizer"

    def __init__(self, tokenizer: TokenizerModel, generator: GeneratorModel) -> None:
        super().__init__()
        tokenizer = TokenizerModel(tokenizer) if isinstance(tokenizer, Tokenizer1D) else tokenizer
        generator = GeneratorModel(generator) if isinstance(generator, Generator) else generator
        generator.model.space.matches(tokenizer.model)
        self.register_modules(tokenizer=tokenizer, generator=generator)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: Any = None,
        num_images: int | None = None,
        tokens: int | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: Seeds = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], Any] | None = None,
        prefix: TokenSequence | Tensor | None = None,
        options: dict[str, Any] | None = None,
        decoder_options: dict[str, Any] | None = None,
    ) -> TokPipelineOutput | tuple[Any, Any]:
        """Make images.

        Args:
            prompt: description, or one for each image.
            class_labels: class by number or name, or one for each image.
            num_images: B; as many as prompts or classes if None.
            tokens: how many of each image are made; all if None.
            guidance_scale: strength, 1 for none; u + g (c - u).
            num_inference_steps: of generators with steps to choose.
            generator: what images depend on: seeds (an int s stands for s, s + 1, …), or torch generators, one for all or one for each, of
                which a seed each is drawn; drawn from the global one if None. An image is the same alone and in any batch.
            output_type: ``pil``, ``pt``, ``np``, or ``tokens`` for no pictures.
            return_dict: a :class:`TokPipelineOutput`, or else the tuple (images, tokens).
            callback_on_step_end: called with (pipeline, step, number of steps, {"tokens": so far}) after every step; what it
                returns is not looked at, and raising ends the call.
            prefix: first tokens, kept as they are.
            options: further options of this kind of generator: schedule, temperature, top_k …
            decoder_options: of decoders that sample.

        Raises:
            TokenError: something asked for does not exist here, or is out of range.
        """
        if output_type not in OUTPUTS:
            raise TokenError(f"output_type must be one of {', '.join(OUTPUTS)}, got {output_type!r:.100}")
        model, tokenizer = self.generator.model, self.tokenizer.model
        rows = _rows(num_images, prompt, class_labels)
        seeds = seeds_of(generator, rows)
        further = {"guidance": guidance_scale, "steps": num_inference_steps, "prefix": prefix, **(options or {})}
        with self.progress_bar(total=0) as bar:

            def on_step(step: int, steps: int, made: Tensor) -> None:
                bar.total = steps
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, steps, {"tokens": made})

            watched = {"on_step": on_step} if "on_step" in model.options else {}
            if callback_on_step_end is not None and not watched:
                raise TokenError(f"{type(model).__name__} makes all tokens at once: there are no steps for callback_on_step_end")
            made = model.generate(rows, label=class_labels, text=prompt, tokens=tokens, seeds=seeds, **watched, **further)
        pictures = None if output_type == "tokens" else paint(tokenizer, made, seeds=seeds, **(decoder_options or {}))
        images = None if pictures is None else _as(pictures, output_type)
        self.maybe_free_model_hooks()
        return TokPipelineOutput(images=images, tokens=made) if return_dict else (images, made)


def seeds_of(generator: Seeds, rows: int) -> list[int]:
    """A seed for each row.

    Example:
        >>> seeds_of(7, 3), seeds_of([5, 1], 2)
        ([7, 8, 9], [5, 1])
    """
    if isinstance(generator, bool) or (isinstance(generator, int) and generator < 0):
        raise TokenError(f"generator must be a seed of at least 0, torch generators, or one of either for each image, got {generator!r}")
    if isinstance(generator, int):
        return [generator + i for i in range(rows)]
    if generator is None or isinstance(generator, torch.Generator):
        return [_draw(generator) for _ in range(rows)]
    many = list(generator)
    if len(many) != rows:
        raise TokenError(f"generator must be one for all, or one for each of the {rows} images, got {len(many)}")
    return [_draw(g) if isinstance(g, torch.Generator) else g for g in many]


def _draw(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def _rows(num_images: int | None, *given: Any) -> int:
    many = {len(value) for value in given if isinstance(value, list | tuple) or (isinstance(value, Tensor) and value.ndim == 1)}
    return num_images if num_images is not None else max(many, default=1)


def _as(pictures: Tensor, output_type: str) -> Any:
    """float (B, 3, H, W) in [0, 1] as asked for."""
    if output_type == "pt":
        return pictures
    array = pictures.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    from PIL import Image

    return [Image.fromarray((image * 255).round().astype("uint8")) for image in array]
