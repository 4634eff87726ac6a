"""CLIP text vectors: ids padded with 0, all places kept, against a tiny random model made here; transformers if installed."""

import json

import pytest
import torch

from tok1d.errors import MissingExtraError, ModelError, TokenError
from tok1d.tokenizers.official import clip_text
from tok1d.tokenizers.official.clip_text import clip_ids, text_features

SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
PIECES = ["!</w>", "a", "b", "c", "ab", "a</w>", "b</w>", "c</w>", "ab</w>"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a CLIP text encoder of 10 places and a byte-pair vocabulary of eleven entries."""
    try:
        from tok1d.extras import require

        transformers = require("transformers", "text")
    except MissingExtraError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("clip")
    vocab = {piece: i for i, piece in enumerate([*PIECES, *SPECIAL])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\na b</w>\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=10, bos_token_id=9, eos_token_id=10, pad_token_id=10,
    )  # fmt: skip
    model = transformers.CLIPTextModel(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    yield str(folder)
    clip_text.load_clip.cache_clear()


def test_ids_are_padded_with_zero_after_the_end_token(clip):
    tokenizer, _ = clip_text.load_clip(clip)
    ids = clip_ids(["A  &amp;#97;B\n", "", "c " * 50], tokenizer, 10)
    a, ab, c, start, end = 5, 8, 7, 9, 10
    assert ids.dtype == torch.int64
    assert ids[0].tolist() == [start, a, ab, end] + [0] * 6
    assert ids[1].tolist() == [start, end] + [0] * 8
    assert ids[2].tolist() == [start, *[c] * 8, end]


def test_last_hidden_state_after_the_norm_at_all_places(clip):
    prompts = ["a b", "c ab a"]
    features = text_features(prompts, clip)
    assert features.shape == (2, 10, 16) and features.dtype == torch.float32
    tokenizer, encoder = clip_text.load_clip(clip)
    # without its scale and shift, what a layer norm returns has mean 0 and variance 1
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    plain = (features - norm.bias) / norm.weight
    torch.testing.assert_close(plain.mean(-1), torch.zeros(2, 10), atol=1e-4, rtol=0)
    torch.testing.assert_close(plain.var(-1, correction=0), torch.ones(2, 10), atol=1e-2, rtol=0)
    # causal, and what stands after the end token counts: the end token's id there gives other vectors
    ids = clip_ids(prompts, tokenizer, 10)
    padded = ids.masked_fill(ids == 0, 10)
    usual = encoder(input_ids=padded).last_hidden_state
    torch.testing.assert_close(features[0, :4], usual[0, :4])
    assert (features[0, 4:] - usual[0, 4:]).abs().amax(-1).min() > 0.01
    torch.testing.assert_close(text_features(["c ab a"], clip)[0], features[1])


def test_refusals(clip, tmp_path):
    with pytest.raises(TokenError, match="list of strings"):
        text_features("a cat", clip)
    with pytest.raises(TokenError, match="list of strings"):
        text_features([1], clip)
    with pytest.raises(ModelError, match="CLIP text encoder cannot be loaded"):
        text_features(["a"], str(tmp_path))


def test_missing_extra_is_named(monkeypatch):
    def missing(module, extra):
        raise MissingExtraError(f"{module} belongs to the extra '{extra}'")

    clip_text.load_clip.cache_clear()
    monkeypatch.setattr(clip_text, "require", missing)
    with pytest.raises(MissingExtraError, match="transformers belongs to the extra 'text'"):
        text_features(["a"])
