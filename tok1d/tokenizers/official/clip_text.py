"""CLIP text vectors for TA-TiTok: what :class:`tok1d.tokenizers.decoders.grid.TextGridDecoder` was trained to read.

Two things differ from the usual recipe of transformers. All 77 vectors are used, and the places after the end of the text
hold the id 0, as open_clip fills them (transformers repeats the end token there): since every vector is read, another
filling guides the picture elsewhere. Attention is causal and no place is masked.
"""

from __future__ import annotations

import functools
import html
from typing import Any

import torch
from torch import Tensor

from tok1d.errors import ModelError, TokenError
from tok1d.extras import require

CLIP = "openai/clip-vit-large-patch14-336"


@torch.inference_mode()
def text_features(prompts: list[str], model: str = CLIP) -> Tensor:
    """Encode descriptions, such as ``A photo of a cat.``; the published evaluation names the class that way.

    Args:
        prompts: texts, longer ones than 75 pieces are cut; ``""`` for none.
        model: a hub name or a folder of a CLIP model in the format of transformers. The published weights need the default.

    Returns:
        float32 (B, 77, 768) for the default: the last hidden state after the final norm, at all places.

    Raises:
        MissingExtraError: transformers is not installed; the extra ``text`` brings it.
        ModelError: the model cannot be loaded.
        TokenError: prompts are not a list of strings.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TokenError(f'prompts must be a list of strings, one an image, got {prompts!r:.100}. Write ["A photo of a cat."]')
    tokenizer, encoder = load_clip(model)
    return encoder(input_ids=clip_ids(prompts, tokenizer, encoder.config.max_position_embeddings)).last_hidden_state


def clip_ids(prompts: list[str], tokenizer: Any, length: int = 77) -> Tensor:
    """Texts → int64 (B, length): start token, pieces, end token, zeros.

    Args:
        prompts: texts; HTML entities and runs of white space are cleaned first, as open_clip does.
        tokenizer: a CLIP tokenizer of transformers.
        length: number of places; longer texts are cut and still end with the end token.
    """
    clean = [" ".join(html.unescape(html.unescape(prompt)).split()) for prompt in prompts]
    ids = torch.zeros(len(clean), length, dtype=torch.int64)
    for row, pieces in zip(ids, tokenizer(clean, truncation=True, max_length=length)["input_ids"] if clean else [], strict=True):
        row[: len(pieces)] = torch.tensor(pieces)
    return ids


@functools.lru_cache(maxsize=1)
def load_clip(model: str) -> tuple[Any, Any]:
    """Tokenizer and frozen text tower of a CLIP model, kept for the next call; arguments and errors as :func:`text_features`."""
    transformers = require("transformers", "text")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        encoder = transformers.CLIPTextModel.from_pretrained(model).float()
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model}: the CLIP text encoder cannot be loaded ({error}). Give a hub name such as {CLIP} when online, "
            "or a folder with its config.json, weights and tokenizer files"
        ) from error
    return tokenizer, encoder.eval().requires_grad_(False)
