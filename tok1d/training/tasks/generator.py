"""GeneratorTask: a generator learns the tokens of a set of shards.

Which tokens these are, and which classes, the shards know: the generator is built for them when the run starts, so a
configuration says how large it is and nothing that could contradict its data. A generator that learns from codes
(:mod:`tok1d.generators.codes`) gets those of the tokenizer that the shards name. Shapes: B rows, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tok1d import hub
from tok1d.errors import ModelError, TokError, UsageError
from tok1d.generators.codes import CodeTable, give_codes, wants_codes
from tok1d.generators.condition import ClassCondition, Condition, Unconditional
from tok1d.generators.generator import Generator
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.seeds import seeded
from tok1d.training.tasks.step import TrainingTask


class GeneratorTask(TrainingTask):
    """Train a generator on tokens: its losses, AdamW, warm-up, cosine.

    Args:
        generator: a :class:`tok1d.generators.generator.Generator`, or how to make one of the space of the shards and a condition: in
            a configuration a class with all its arguments but these two.
        condition: what it is told; None: the class if the shards have classes, else nothing.
        tokens: how many first tokens of a nested tokenizer are learned; all if None.
        tokenizer: name or folder of the tokenizer that made the shards, where its name alone does not find it; only generators that
            learn from codes need it.
        init_from: folder of a generator (``tok export``) whose weights to start from.
        weights: weight of each loss by log name; those that are not named have the generator's ``loss_weights``, or 1, and 0 leaves
            one out.
        drop: probability that training leaves out the class, where ``condition`` is None.
        lr, warmup_steps, final_lr, betas, weight_decay, compile, compile_backend: see
            :class:`tok1d.training.tasks.step.TrainingTask`.
        seed: of the initial weights, hidden tokens, dropped conditions and whatever else a step draws.
    """

    def __init__(
        self,
        generator: Callable[[TokenSpace, Condition], Generator],
        condition: Condition | None = None,
        tokens: int | None = None,
        tokenizer: str | None = None,
        init_from: str | None = None,
        weights: dict[str, float] | None = None,
        drop: float = 0.1,
        lr: float = 3e-4,
        warmup_steps: int = 100,
        final_lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
        compile: list[str] | None = None,
        compile_backend: str = "inductor",
        seed: int = 0,
    ) -> None:
        super().__init__(lr, warmup_steps, final_lr, betas, weight_decay, compile, compile_backend, seed)
        ready = isinstance(generator, Generator)
        if ready and (condition is not None or tokens is not None):
            raise UsageError("a generator that is built already has its condition and tokens; leave condition and tokens out")
        self.generator: Generator | None = generator if ready else None
        # In a list, because an attribute that is a module would be one of the task's own
        self._plan: list[Any] = [generator, condition]
        self.tokens, self.drop, self.init_from, self.asked = tokens, drop, init_from, dict(weights or {})
        self.source = tokenizer

    # building ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if self.generator is None:
            self.generator = self._build(self.trainer.datamodule)
        self._check_data(self.trainer.datamodule)
        if wants_codes(self.generator):
            with seeded(self.seed):
                give_codes(self.generator, self._tokenizer(self.generator.space))
        if stage == "fit" and hasattr(self.trainer.datamodule, "every_image"):
            self.generator.prepare(lambda: map(self.shortened, self.trainer.datamodule.every_image()))
        if self.init_from and stage == "fit":
            _start_from(self.generator, self.init_from)
            self.init_from = None
        self._check_compiled()
        super().setup(stage)

    def _build(self, data: Any) -> Generator:
        make, condition = self._plan
        if not hasattr(data, "space"):
            raise UsageError(f"a generator learns from token shards (data: tok1d.data.tokens.TokenData), got {type(data).__name__}")
        space, names = data.space, data.classes
        if self.tokens is not None:
            space = space.first(self.tokens)
        if condition is None:
            condition = ClassCondition(len(names), names, self.drop) if names else Unconditional()
        with seeded(self.seed):  # the same start whatever has drawn numbers before
            generator = make(space, condition)
            if wants_codes(generator):
                give_codes(generator, self._tokenizer(space))
        return generator

    def _tokenizer(self, space: TokenSpace) -> Tokenizer1D:
        """The tokenizer of the shards, for its codes."""
        source = self.source or space.tokenizer
        try:
            with seeded(0):  # what loading draws does not count
                return hub.load(source)
        except TokError as error:
            raise ModelError(
                f"this generator learns from codes, so it needs the tokenizer that made the shards, {space.tokenizer} {space.model_id}: "
                f"{error}. Give its name or folder as model.tokenizer"
            ) from error

    def _check_data(self, data: Any) -> None:
        assert self.generator is not None
        space, condition = self.generator.space, self.generator.condition
        if not hasattr(data, "space"):
            return
        there = data.space.first(space.tokens) if data.space.nested and space.tokens < data.space.tokens else data.space
        if space != there:
            raise UsageError(f"the generator is made for {space.to_config()}, the shards hold {there.to_config()}")
        if isinstance(condition, ClassCondition) and data.classes and len(data.classes) != condition.classes:
            raise UsageError(f"the generator knows {condition.classes} classes, the shards have {len(data.classes)}")

    # steps -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        draw = self._seed_step()
        parts, stats = self.generator.losses({**self.shortened(batch), "step": self.global_step}, draw)
        self.weights = {**dict.fromkeys(parts, 1.0), **self.generator.loss_weights, **self.asked}
        return self.weighted(batch["key"], parts, stats)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Losses with the same random choices at every validation, on all tokens."""
        if not batch["key"]:  # of a rank that has no image to validate
            return
        parts, stats = self.generator.losses(self.shortened(batch), torch.Generator().manual_seed(batch_idx))
        self.tally({**parts, **stats}, len(batch["key"]))

    def shortened(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with the tokens the generator learns; latents as float32."""
        space = self.generator.space
        if space.kind not in batch:
            raise ModelError(f"a batch for this generator needs {space.kind!r}, got only {', '.join(sorted(batch))}")
        data = batch[space.kind][:, : space.tokens]
        found = {**batch, space.kind: data.float() if space.kind == "latents" else data}
        if "lengths" in found:
            found["lengths"] = found["lengths"].clamp(max=space.tokens)
        return found

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        owner = self.generator.get_submodule(name.rpartition(".")[0])
        return super().decays(name, parameter) and not isinstance(owner, nn.Embedding)

    # checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["generator_config"] = self.generator.to_config()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, here = checkpoint.get("generator_config"), self.generator.to_config()
        if not isinstance(saved, dict):
            raise ModelError("this checkpoint is not one of a generator (no generator_config in it)")
        for name in sorted({*saved, *here}):
            if saved.get(name) != here.get(name):
                raise ModelError(
                    f"the checkpoint is of another generator: it has {name}: {saved.get(name)!r:.200}, the configuration and its "
                    f"shards say {here.get(name)!r:.200}. Continue with the configuration of that run (config.yaml beside its logs)"
                )


def _start_from(generator: Generator, folder: str) -> None:
    """Load the weights of a generator with the same parts.

    Raises:
        ModelError: no generator there, or one of other sizes.
    """
    other = Generator.from_pretrained(folder)
    tables = ((path, part) for path, part in generator.named_modules() if isinstance(part, CodeTable))
    codes = {f"{path}.{name}": value for path, table in tables for name, value in table.named_buffers()}
    try:
        generator.load_state_dict({**other.state_dict(), **codes})  # ids mean what the shards say, whatever they meant before
    except RuntimeError as error:
        first = str(error).strip().split("\n")[1:2] or [str(error)]
        raise ModelError(f"init_from {folder}: a generator of other parts or sizes than the one configured ({first[0].strip()})") from error
