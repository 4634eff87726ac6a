"""FlexTok's published configurations as plain data: nothing they name is imported, built or run.

config.json holds trees of constructor arguments with a ``_target_`` (a dotted Python path) in each node; safetensors files
carry the same trees in their header, each as the text of a Python literal. Of a path only the last name is read, and only
names of the published package are known; the values that tensor shapes do not show are picked from their nodes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from tok1d.errors import ModelError

KEYS = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")
MOST_CHARACTERS = 10_000  # of one literal in a header, as the published reader has it
MOST_DEPTH = 32

# what the published reader allows in a file, by last name; whatever is of another shape than ours misses tensors later
# fmt: off
KNOWN = frozenset((
    "FlexTok", "FlexTokFromHub", "StableDiffusionVAE", "MinRFPipeline", "MinRFNoiseModule", "MomentumBuffer",
    "SequentialModuleDictWrapper", "PositionalEmbedding", "PositionalEmbeddingAdder", "DictKeyFilter", "PerSampleOp",
    "PerSampleReducer", "channels_first_to_last", "channels_last_to_first", "FlexTransformer",
    "FlexTransformerDecoder", "MaskedNestedDropout", "TimestepEmbedder", "Registers1D", "PatchEmbedder",
    "ZeroNullCond", "LearnedNullCond", "MaskTokenModule", "LinearLayer", "BlockWiseSequencePacker",
    "SequenceUnpacker", "LinearHead", "ToPatchesLinearHead", "MLPHead", "FlexBlock", "FlexBlockAdaLN",
    "FlexDecoderBlock", "FlexDecoderBlockAdaLN", "Fp32LayerNorm", "MuReadoutFSDP", "Mlp", "GatedMlp", "DropPath",
    "FlexAttention", "FlexSelfAttention", "FlexCrossAttention", "FSQ",
))
# fmt: on
LENGTHS = {"uniform": "uniform", "pow2": "powers_of_two", "uniform_pow2": "uniform_powers_of_two"}
# what we understand; anything else in these places is another architecture under the same names
SUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "FlexTransformer": {
        "qkv_bias": (False,), "proj_bias": (False,), "mlp_bias": (False,), "gated_mlp": (True,), "qk_norm": (True,),
        "mlp_ratio": (4,),
        "rope_forward_read_key": (None,), "score_mod_read_key": (None,),
    },
    "TimestepEmbedder": {"frequency_embedding_size": (256,), "temb_as_tokens": (False,)},
    "LearnedNullCond": {"replace_with_single_token": (False,)},
    "BlockWiseSequencePacker": {"mask_mode": ("full", "causal_last")},
    "StableDiffusionVAE": {"learnable_logvar": (False,)},
}


def trees(published: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration trees by top-level key, from config.json or, where that has none, from a safetensors header.

    Args:
        published: content of config.json (the trees themselves, or under ``config``); ``__metadata__`` may hold the header.

    Returns:
        {} if there are none.

    Raises:
        ModelError: a literal that is too long or damaged, or a ``_target_`` that is not FlexTok's.
    """
    plain = published.get("config") if isinstance(published.get("config"), dict) else published
    found = {key: plain[key] for key in KEYS if isinstance(plain.get(key), dict)}
    header = published.get("__metadata__")
    if not found and isinstance(header, Mapping):
        found = {key: literal(key, header[key]) for key in KEYS if isinstance(header.get(key), str)}
        found = {key: value for key, value in found.items() if isinstance(value, dict)}
    for key, tree in found.items():
        for node in nodes(tree):
            check_node(key, node)
    return found


def literal(key: str, text: str) -> Any:
    """A Python literal as data: dicts, lists, tuples, text, numbers, booleans and None.

    Raises:
        ModelError: longer than 10,000 characters, or not such a literal.
    """
    if len(text) > MOST_CHARACTERS:
        raise ModelError(f"the header's {key!r} has {len(text):,} characters, a configuration at most {MOST_CHARACTERS:,}")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ModelError(f"the header's {key!r} is no plain data ({type(error).__name__}), nothing of it was run") from error


def nodes(tree: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Every dict in a tree, outermost first.

    Raises:
        ModelError: it is nested deeper than any configuration.
    """
    if depth > MOST_DEPTH:
        raise ModelError(f"a configuration nested deeper than {MOST_DEPTH} levels is not FlexTok's")
    if isinstance(tree, dict):
        yield tree
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    for child in children:
        yield from nodes(child, depth + 1)


def check_node(where: str, node: dict[str, Any]) -> None:
    """Refuse a node of a class we do not know, or of a known one with arguments that make it another architecture."""
    if "_target_" not in node:
        return
    name = last_name(node)
    if name not in KNOWN:
        raise ModelError(
            f"the configuration's {where!r} names {node['_target_']!r:.100}, which is no part of FlexTok. It was not imported; "
            "only tokenizers of the published architecture load"
        )
    for argument, allowed in SUPPORTED.get(name, {}).items():
        if argument in node and node[argument] not in allowed:
            raise ModelError(
                f"the configuration's {where!r} sets {argument}={node[argument]!r:.50} in {name}; we know {argument} of "
                f"{' or '.join(repr(a) for a in allowed)} only"
            )


def last_name(node: dict[str, Any]) -> str:
    """``MinRFPipeline`` of a node with ``"_target_": "flextok.flow_matching.pipelines.MinRFPipeline"``."""
    target = node.get("_target_")
    return target.rpartition(".")[2] if isinstance(target, str) else ""


def settings(published: Mapping[str, Any]) -> dict[str, Any]:
    """What a published configuration says and tensors do not, by our names; absent where it says nothing.

    A node's missing arguments have the defaults of the published classes.

    Returns:
        Some of ``scaling_factor``, ``levels``, ``max_timestep``, ``lengths``, ``null_prob``, ``noise``, ``mode_scale``,
        ``stratified``, ``encoder_head_dim``, ``decoder_head_dim``.

    Raises:
        ModelError: as :func:`trees`, or values of another type.
    """
    found: dict[str, Any] = {}
    all_trees = trees(published)
    for key, tree in all_trees.items():
        for node in nodes(tree):
            name = last_name(node)
            if name == "StableDiffusionVAE" and node.get("scaling_factor") is not None:
                found["scaling_factor"] = number(node, "scaling_factor")
            elif name == "FSQ" and isinstance(node.get("levels"), list | tuple):
                found["levels"] = list(node["levels"])
            elif name == "TimestepEmbedder":
                found["max_timestep"] = number(node, "max_timestep", 1000.0)
            elif name == "MaskedNestedDropout":
                found["lengths"] = choice(node, "size_sampling_mode", "uniform", LENGTHS)
            elif name == "LearnedNullCond":
                found["null_prob"] = number(node, "dropout_prob", 0.0)
            elif name == "FlexTransformer":
                found[f"{key}_head_dim"] = int(number(node, "head_dim", 64))
            elif name == "MinRFNoiseModule":
                scale = number(node, "mode_scale", 0.0)
                if flag(node, "ln", True):
                    found |= {"noise": "logit_normal", "stratified": flag(node, "stratisfied", False)}
                else:
                    found |= {"noise": "mode", "mode_scale": scale} if scale else {"noise": "uniform"}
    return found


def number(node: dict[str, Any], key: str, default: float | None = None) -> float:
    """A number of a node, its default if absent."""
    value = node.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ModelError(f"the configuration of {last_name(node)} needs a number as {key}, got {value!r:.100}")
    return value


def flag(node: dict[str, Any], key: str, default: bool) -> bool:
    """A boolean of a node, its default if absent."""
    value = node.get(key, default)
    if not isinstance(value, bool):
        raise ModelError(f"the configuration of {last_name(node)} needs true or false as {key}, got {value!r:.100}")
    return value


def choice(node: dict[str, Any], key: str, default: str, known: Mapping[str, str]) -> str:
    """Our word for one of the words a node may use."""
    value = node.get(key, default)
    if not isinstance(value, str) or value not in known:
        raise ModelError(f"the configuration of {last_name(node)} has {key}={value!r:.50}; known are {', '.join(known)}")
    return known[value]
