"""Published RAR generators to ours and back.

On the Hub: yucornetto/RAR, files rar_{b,l,xl,xxl}.bin, without configuration (code bytedance/1d-tokenizer, Apache-2.0).
Their tables of positions and steps have rows that no token uses, and a mask that nothing reads; all are kept.
"""

from __future__ import annotations

from typing import Any

from tok1d.errors import ModelError
from tok1d.generators.generator import Generator
from tok1d.generators.heads import Softmax
from tok1d.generators.official.sizes import check_classes, ends, layers, named, table_places, table_sizes
from tok1d.generators.rar import RARGenerator
from tok1d.tokenizers.official.layout import Layout, Place, Shapes, module_path, shape_of

NAME = "rar"
POSITIONS, TIMES = 1024, 100  # rows of the tables beyond the number of tokens
FRONT = 2  # start and class

# published name → ours; a name that ends with a dot stands for its weight and bias
BLOCK = {
    "norm1.": "norm1.",
    "attn.qkv.": "attn.qkv.",
    "attn.q_norm.": "attn.norm_q.",
    "attn.k_norm.": "attn.norm_k.",
    "attn.proj.": "attn.proj.",
    "norm2.": "norm2.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
    "adaLN_modulation.1.": "modulation.",
}
ENDS = {"adaln_before_head.adaLN_modulation.1.": "trunk.modulation.", "lm_head.": "head.out."}


def rar_config(
    tokenizer: str, tokens: int, codes: int, classes: int = 1000, width: int = 768, depth: int = 24, heads: int = 16,
    hidden: int | None = None, spare: tuple[int, int] = (POSITIONS - FRONT, TIMES - FRONT),
) -> dict[str, Any]:  # fmt: skip
    """``Generator.from_config`` data of such a generator; ``spare`` rows of the tables of positions and steps."""
    sizes = {"width": width, "depth": depth, "heads": heads, "hidden": hidden or 4 * width, "dropout": 0.0}
    tables = {"spare_positions": spare[0], "spare_times": spare[1]}
    return {"class": module_path(RARGenerator), **ends(tokens, codes, classes, tokenizer), **sizes, **tables}


def _config(shapes: Shapes, published: dict[str, Any], tokenizer: str) -> dict[str, Any]:
    codes, classes, width = table_sizes(shapes, "embeddings.weight", "lm_head.weight", NAME)
    tokens = shape_of(shapes, "timesteps_embeddings", 3, NAME)[1] - TIMES
    positions = shape_of(shapes, "pos_embed", 3, NAME)[1]
    if positions != tokens + POSITIONS:
        raise ModelError(f"'timesteps_embeddings' is of {tokens} tokens, 'pos_embed' of {positions - POSITIONS}: not a {NAME} state dict")
    head_width = shape_of(shapes, "blocks.0.attn.q_norm.weight", 1, NAME)[0]
    depth = layers(shapes, "blocks.", ".mlp.fc1.weight")
    hidden = shape_of(shapes, "blocks.0.mlp.fc1.weight", 2, NAME)[0]
    return rar_config(tokenizer, tokens, codes, classes, width, depth, width // head_width, hidden)


def _places(config: dict[str, Any]) -> dict[str, Place | tuple[Place, ...]]:
    codes, tokens, width = config["space"]["vocab_size"], config["space"]["tokens"], config["width"]
    table = table_places(
        config,
        Place("head.table.weight", part=(0, codes)),
        Place("hidden_token", shape=(1, width), part=(codes, codes + 1)),
    )
    positions = (1, FRONT + tokens + config["spare_positions"], width)
    places: dict[str, Place | tuple[Place, ...]] = {
        "cls_token": Place("start", shape=(1, 1, width)),
        "embeddings.weight": table,
        "pos_embed": Place("positions", shape=positions),
        "target_aware_pos_embed": Place("targets", shape=positions),
        "timesteps_embeddings": Place("trunk.times", shape=(1, FRONT + tokens + config["spare_times"], width)),
        **named(ENDS, "", ""),
    }
    for i in range(config["depth"]):
        places |= named(BLOCK, f"blocks.{i}.", f"trunk.blocks.{i}.")
    return places


def _exports(generator: Generator) -> None:
    if not isinstance(generator, RARGenerator) or not isinstance(generator.head, Softmax):
        raise ModelError(f"the layout {NAME} is of a RARGenerator with a Softmax head, got {type(generator).__name__}")
    check_classes(generator, NAME)
    spare = {"spare_positions": POSITIONS - FRONT, "spare_times": TIMES - FRONT}
    if any(generator.config[name] != rows for name, rows in spare.items()):
        raise ModelError(f"published code wants tables with more rows than tokens use: make the RARGenerator with {spare}")


RAR = Layout(
    name=NAME,
    recognises=lambda shapes: {"target_aware_pos_embed", "timesteps_embeddings"} <= shapes.keys(),
    config=_config,
    places=_places,
    exports=_exports,
)
