"""Published masked generators to ours and back: of TiTok-L-32, B-64 and One-D-Piece (BERT) and of TiTok-S-128 (U-ViT).

On the Hub: yucornetto/generator_titok_{l32,b64,s128}_imagenet and fun-research/TiTok (code bytedance/1d-tokenizer),
turing-motors/MaskGIT_One-D-Piece-{S,B,L}-256 (code turingmotors/One-D-Piece); all code Apache-2.0.
"""

from __future__ import annotations

from typing import Any

from tok1d.errors import ModelError
from tok1d.generators.generator import Generator
from tok1d.generators.masked import MaskedGenerator
from tok1d.generators.masked_bert import BertBody
from tok1d.generators.masked_uvit import UViTBody
from tok1d.generators.official.sizes import check_classes, ends, heads_of, layers, named, table_places, table_sizes
from tok1d.tokenizers.official.layout import Layout, Place, Shapes, module_path, shape_of

BERT_NAME, UVIT_NAME = "maskgit-bert", "maskgit-uvit"
WORDS = "model.embeddings.word_embeddings.weight"

# published name → ours; a name that ends with a dot stands for its weight and bias
LAYER = {
    "attention.output.dense.": "attn.proj.",
    "attention.output.LayerNorm.": "norm1.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
    "output.LayerNorm.": "norm2.",
}
BLOCK = {
    "norm1.": "norm1.",
    "attn.qkv.weight": "attn.qkv.weight",
    "attn.proj.": "attn.proj.",
    "norm2.": "norm2.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
}


def bert_config(
    tokenizer: str, tokens: int, codes: int, classes: int = 1000, width: int = 768, depth: int = 24, heads: int = 16,
    hidden: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """``Generator.from_config`` data of such a generator."""
    body = {"class": module_path(BertBody), "width": width, "depth": depth, "heads": heads, "hidden": hidden or 4 * width}
    return {"class": module_path(MaskedGenerator), **ends(tokens, codes, classes, tokenizer), "body": {**body, "dropout": 0.0}}


def uvit_config(
    tokenizer: str, tokens: int, codes: int, classes: int = 1000, width: int = 1024, depth: int = 20, heads: int = 16,
    hidden: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """``Generator.from_config`` data of such a generator."""
    body = {"class": module_path(UViTBody), "width": width, "depth": depth, "heads": heads, "hidden": hidden or 4 * width}
    return {"class": module_path(MaskedGenerator), **ends(tokens, codes, classes, tokenizer), "body": {**body, "dropout": 0.0}}


def _bert(shapes: Shapes, published: dict[str, Any], tokenizer: str) -> dict[str, Any]:
    codes, classes, width = table_sizes(shapes, WORDS, "model.lm_head.weight", BERT_NAME)
    tokens = shape_of(shapes, "model.embeddings.position_embeddings.weight", 2, BERT_NAME)[0] - 1
    depth = layers(shapes, "model.encoder.layer.", ".intermediate.dense.weight")
    hidden = shape_of(shapes, "model.encoder.layer.0.intermediate.dense.weight", 2, BERT_NAME)[0]
    return bert_config(tokenizer, tokens, codes, classes, width, depth, heads_of(published), hidden)


def _bert_places(config: dict[str, Any]) -> dict[str, Place | tuple[Place, ...]]:
    width, codes = config["body"]["width"], config["space"]["vocab_size"]
    places: dict[str, Place | tuple[Place, ...]] = {
        WORDS: table_places(config, Place("body.table.weight", part=(0, codes + 1))),
        "model.embeddings.position_embeddings.weight": Place("body.positions"),
        "model.embeddings.token_type_embeddings.weight": Place("body.types"),
        **named({"embeddings.LayerNorm.": "norm.", "lm_head.": "head."}, "model.", "body."),
    }
    for i in range(config["body"]["depth"]):
        layer, ours = f"model.encoder.layer.{i}.", f"body.layers.{i}."
        places |= named(LAYER, layer, ours)
        for j, name in enumerate(("query", "key", "value")):
            for ending in ("weight", "bias"):
                rows = (j * width, (j + 1) * width)
                places[f"{layer}attention.self.{name}.{ending}"] = Place(f"{ours}attn.qkv.{ending}", rows=rows)
    return places


def _uvit(shapes: Shapes, published: dict[str, Any], tokenizer: str) -> dict[str, Any]:
    codes, classes, width = table_sizes(shapes, "embeddings.weight", "lm_head.weight", UVIT_NAME)
    tokens = shape_of(shapes, "pos_embed", 3, UVIT_NAME)[1] - 1
    depth = 2 * layers(shapes, "in_blocks.", ".mlp.fc1.weight")
    hidden = shape_of(shapes, "mid_block.mlp.fc1.weight", 2, UVIT_NAME)[0]
    return uvit_config(tokenizer, tokens, codes, classes, width, depth, heads_of(published), hidden)


def _uvit_places(config: dict[str, Any]) -> dict[str, Place | tuple[Place, ...]]:
    width, codes, half = config["body"]["width"], config["space"]["vocab_size"], config["body"]["depth"] // 2
    places: dict[str, Place | tuple[Place, ...]] = {
        "embeddings.weight": table_places(config, Place("body.table.weight", part=(0, codes + 1))),
        "pos_embed": Place("body.positions", shape=(1, config["space"]["tokens"] + 1, width)),
        **named({"norm.": "norm.", "lm_head.": "head."}, "", "body."),
        **named(BLOCK, "mid_block.", "body.middle."),
    }
    for i in range(half):
        places |= named(BLOCK, f"in_blocks.{i}.", f"body.first.{i}.")
        places |= named({**BLOCK, "skip_linear.": "skip."}, f"out_blocks.{i}.", f"body.second.{i}.")
    return places


def _exports(body: type, family: str) -> Any:
    def check(generator: Generator) -> None:
        if not isinstance(generator, MaskedGenerator) or not isinstance(generator.body, body):
            what = type(generator.body).__name__ if isinstance(generator, MaskedGenerator) else type(generator).__name__
            raise ModelError(f"the layout {family} is of a MaskedGenerator with a {body.__name__}, got {what}")
        check_classes(generator, family)

    return check


BERT = Layout(
    name=BERT_NAME,
    recognises=lambda shapes: {WORDS, "model.lm_head.weight"} <= shapes.keys(),
    config=_bert,
    places=_bert_places,
    exports=_exports(BertBody, BERT_NAME),
    ignored=("model.embeddings.position_ids",),  # 0, 1, 2 …, in files of older versions of transformers
)
UVIT = Layout(
    name=UVIT_NAME,
    recognises=lambda shapes: {"in_blocks.0.attn.qkv.weight", "mid_block.attn.qkv.weight"} <= shapes.keys(),
    config=_uvit,
    places=_uvit_places,
    exports=_exports(UViTBody, UVIT_NAME),
)
