"""Write the recipes of published models, configs/tokenizer/*.yaml: their table is scripts/recipe_table.py.

    python scripts/write_recipes.py            # write them
    python scripts/write_recipes.py --check    # name the files that differ from the table, exit 1 if any does

One page for each model, complete in itself, so that ``tok fit --config tokenizer/NAME`` is all there is to a run. What they
share stands here once. Pages that are not in the table are left alone.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
from recipe_table import RECIPES, Recipe

FOLDER = Path(__file__).resolve().parents[1] / "configs/tokenizer"
WIDTH = 128


def page(recipe: Recipe) -> str:
    """The text of a recipe's file."""
    return "\n".join([*header(recipe), *trainer(recipe), *model(recipe), *data(recipe), ""])


def header(recipe: Recipe) -> list[str]:
    """What the page reproduces, with which data and hardware, how, and what to expect."""
    path, places = f"configs/tokenizer/{recipe.name}.yaml", f'--data.train "[{recipe.place}]" --data.val "[VAL/]"'
    share = f"{recipe.batch} = {recipe.gpus} × {recipe.per_gpu}" if recipe.gpus > 1 else str(recipe.batch)
    share += f" × {recipe.accumulate} accumulated" if recipe.accumulate > 1 else ""
    rows = {
        "Reproduces": recipe.reproduces,
        "Data": recipe.data,
        "Batch": f"{share}. Steps: {recipe.steps:,}",
        "Hardware": f"{recipe.gpus} GPU{'s' if recipe.gpus > 1 else ''}; time here: not measured. Published: {recipe.cost}",
        "Expected": recipe.expected,
        **recipe.notes,
        "Command": f"tok fit --config {path} {places}",
        "Then": f"tok export runs/{recipe.name} runs/{recipe.name}/model",
        "Run by us": "no (a step at tiny size, in the tests)",
    }
    lines = [f"# {recipe.title}", "#"]
    for label, text in rows.items():
        lead = f"# {label + ':':<12}"
        command = label in ("Command", "Before", "Then")
        pieces = [text] if command else textwrap.wrap(text, WIDTH - len(lead), break_long_words=False, break_on_hyphens=False)
        lines += [(lead if i == 0 else "# " + " " * 12) + piece for i, piece in enumerate(pieces)]
    return lines


def trainer(recipe: Recipe) -> list[str]:
    run, every = f"runs/{recipe.name}", min(10_000, recipe.steps)
    lines = [
        "seed_everything: 42",
        "trainer:",
        "  accelerator: auto",
        f"  devices: {min(8, recipe.gpus)}",
        *([f"  num_nodes: {recipe.gpus // 8}"] if recipe.gpus > 8 else []),
        f"  max_steps: {recipe.steps}",
        f"  precision: {'bf16-mixed' if recipe.trained else '32-true'}",
    ]
    lines += ["  gradient_clip_val: 1.0"] if recipe.trained else []
    lines += [f"  accumulate_grad_batches: {recipe.accumulate}"] if recipe.accumulate > 1 else []
    lines += [
        f"  val_check_interval: {every * recipe.accumulate}",
        "  check_val_every_n_epoch: null",
        "  num_sanity_val_steps: 0",
        f"  log_every_n_steps: {min(50, every)}",
        f"  default_root_dir: {run}",
        "  logger:",
        "    - class_path: lightning.pytorch.loggers.CSVLogger",
        f"      init_args: {{save_dir: {run}, name: csv}}",
        "    - class_path: lightning.pytorch.loggers.TensorBoardLogger",
        f"      init_args: {{save_dir: {run}, name: tb}}",
        "  callbacks:",
    ]
    lines += ["    - class_path: tok1d.training.averaging.EMA", "      init_args: {decay: 0.999}"] if recipe.trained else []
    checkpoints = f"dirpath: {run}/checkpoints, every_n_train_steps: {every}, save_last: true, save_top_k: 1, monitor: null"
    return [
        *lines,
        "    - class_path: lightning.pytorch.callbacks.ModelCheckpoint",
        f"      init_args: {{{checkpoints}}}",
        "    - class_path: tok1d.training.callbacks.Throughput",
        "    - class_path: tok1d.training.callbacks.ReconstructionGrid",
        "    - class_path: tok1d.training.callbacks.CodebookUsage",
    ]


def model(recipe: Recipe) -> list[str]:
    lines = ["model:", f"  class_path: tok1d.training.tasks.{recipe.task}", "  init_args:"]
    lines += [f"    {name}: {inline(value)}" for name, value in recipe.sources.items()]
    lines += [
        "    tokenizer:",
        "      class_path: tok1d.tokenizers.tokenizer.Tokenizer1D",
        "      init_args:",
        f"        name: {recipe.name}",
        f"        image_size: {inline(recipe.parts['image_size'])}",
    ]
    for slot in ("encoder", "quantizer", "decoder", "lengths"):
        arguments = dict(recipe.parts[slot])
        lines.append(f"        {slot}: {inline(built(arguments.pop('class'), arguments))}")
    if recipe.adversary:
        given = dict(recipe.adversary)
        lines += ["    adversary:", "      class_path: tok1d.training.losses.adversarial.Adversary", "      init_args:"]
        lines += [f"        discriminator: {inline(given.pop('discriminator'))}"]
        lines += [f"        {name}: {inline(value)}" for name, value in given.items()]
    if recipe.losses:
        lines += ["    losses:", *(f"      {name}: {inline(loss)}" for name, loss in recipe.losses.items())]
    return [*lines, *(f"    {name}: {inline(value)}" for name, value in recipe.settings.items())]


def data(recipe: Recipe) -> list[str]:
    kind = "StreamData" if recipe.streamed else "PhotoData"
    size = recipe.parts["image_size"][0]
    lines = ["data:", f"  class_path: tok1d.data.module.{kind}", "  init_args:", f'    train: ["{recipe.default_place}"]' if recipe.streamed else f"    train: [{recipe.default_place}]", f"    size: {size}"]
    return [
        *lines,
        "    area: [1.0, 1.0]",
        f"    batch_size: {recipe.per_gpu}",
        "    val_batch_size: 32",
        "    val_images: 1024",
        "    workers: 12",
    ]


def built(path: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": path, **({"init_args": arguments} if arguments else {})}


def inline(value: Any) -> str:
    """YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**9, allow_unicode=True).strip().removesuffix("\n...")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs from the table")
    check = parser.parse_args().check
    differ = []
    for recipe in RECIPES:
        path, text = FOLDER / f"{recipe.name}.yaml", page(recipe)
        if not path.is_file() or path.read_text() != text:
            differ.append(path.name)
            if not check:
                path.write_text(text)
    print(f"{len(RECIPES)} recipes, {len(differ)} {'differ' if check else 'written'}{': ' if differ else ''}{', '.join(differ)}")
    return 1 if check and differ else 0


if __name__ == "__main__":
    sys.exit(main())
