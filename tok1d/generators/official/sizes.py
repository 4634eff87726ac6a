"""What the published generators have in common: one table of codes, mask and classes, and a configuration tree."""

from __future__ import annotations

from typing import Any

from tok1d.errors import ModelError
from tok1d.generators.condition import ClassCondition
from tok1d.generators.generator import Generator
from tok1d.tokenizers.official.layout import Place, Shapes, module_path, shape_of
from tok1d.tokenizers.official.maskgit_vqgan import branch

HEADS = 16  # in every release; no weight of the masked generators shows it


def table_sizes(shapes: Shapes, table: str, head: str, family: str) -> tuple[int, int, int]:
    """Codes K, classes C, width W. The table has K codes, the mask, C classes and "no class".

    Raises:
        ModelError: the tensors are not there or contradict each other.
    """
    rows, width = shape_of(shapes, table, 2, family)
    codes = shape_of(shapes, head, 2, family)[0]
    if rows < codes + 3:
        raise ModelError(f"{table!r} has {rows} rows, too few for {codes} codes, a mask, a class and none: not a {family}")
    return codes, rows - codes - 2, width


def table_places(config: dict[str, Any], *ours: Place) -> tuple[Place, ...]:
    """Places of that table: our parts of its first K + 1 rows, then the table of classes."""
    codes = config["space"]["vocab_size"]
    classes = config["condition"]["classes"] + 1
    return (*ours, Place("condition.table.weight", part=(codes + 1, codes + 1 + classes)))


def ends(tokens: int, codes: int, classes: int, tokenizer: str) -> dict[str, Any]:
    """The entries of a generator's configuration that describe tokens and classes."""
    space = {"tokens": tokens, "vocab_size": codes, "tokenizer": tokenizer}
    return {"space": space, "condition": {"class": module_path(ClassCondition), "classes": classes}}


def heads_of(published: dict[str, Any], default: int = HEADS) -> int:
    """Heads of attention as a published configuration says, else the default."""
    heads = branch(published, "model", "generator").get("num_attention_heads", default)
    return heads if isinstance(heads, int) and not isinstance(heads, bool) else default


def check_classes(generator: Generator, family: str) -> None:
    """Refuse a generator of anything but classes.

    Raises:
        ModelError: another condition.
    """
    if not isinstance(generator.condition, ClassCondition):
        raise ModelError(f"the layout {family} is of generators of classes, this one has {type(generator.condition).__name__}")


def named(names: dict[str, str], before: str, ours: str) -> dict[str, Place]:
    """The places of a table of names behind a common beginning."""
    places = {}
    for key, name in names.items():
        for ending in ("weight", "bias") if key.endswith(".") else ("",):
            places[f"{before}{key}{ending}"] = Place(f"{ours}{name}{ending}")
    return places


def layers(shapes: Shapes, before: str, after: str) -> int:
    """How many numbers n there are with a tensor called ``before n after``."""
    return sum(key.startswith(before) and key.endswith(after) for key in shapes)


def published_config(config: dict[str, Any], layout: str) -> dict[str, Any]:
    """The tree that the published code reads: its model, without data and optimizer."""
    sizes = config.get("body", config)
    width, depth = sizes["width"], sizes["depth"]
    generator = {
        "model_type": {"maskgit-bert": "ViT", "maskgit-uvit": "UViT", "rar": "RAR"}[layout],
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": sizes["heads"],
        "intermediate_size": sizes["hidden"] or 4 * width,
        "dropout": sizes["dropout"],
        "attn_drop": 0.0,
        "class_label_dropout": config["condition"].get("drop", 0.1),
        "image_seq_len": config["space"]["tokens"],
        "condition_num_classes": config["condition"]["classes"],
    }
    vq_model = {"codebook_size": config["space"]["vocab_size"], "num_latent_tokens": config["space"]["tokens"]}
    return {"experiment": {}, "model": {"vq_model": vq_model, "generator": generator}}
