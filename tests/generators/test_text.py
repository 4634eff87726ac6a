"""Text conditions over tiny random encoders of transformers made here: padding, nothing, drops, long prompts, samples."""

import json

import pytest
import torch

from tests.generators import tiny
from tok1d.errors import MissingExtraError, ModelError, TokenError
from tok1d.generators.chance import Chance
from tok1d.generators.generator import Generator
from tok1d.generators.text import TextCondition

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "blue", "dog"]


@pytest.fixture(scope="module")
def transformers():
    from tok1d.extras import require

    try:
        return require("transformers", "text")
    except MissingExtraError as error:
        pytest.skip(str(error))


def folder_of(transformers, model, path) -> str:
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def encoder(transformers, tmp_path_factory) -> str:
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes)
    return folder_of(transformers, transformers.BertModel(config), tmp_path_factory.mktemp("bert"))


def attached(encoder, **arguments) -> TextCondition:
    torch.manual_seed(0)
    condition = TextCondition(encoder, **{"dim": 12, "length": 6, **arguments})
    condition.attach(8, vector=True)
    return condition.requires_grad_(False)


def test_states_of_the_text_and_nothing_behind_it(encoder, transformers):
    condition = attached(encoder)
    states, mask = condition.encode(["a red cat", "dog"])
    assert mask.tolist() == [[True] * 5 + [False], [True] * 3 + [False] * 3]
    model = transformers.AutoModel.from_pretrained(encoder).eval()
    expected = model(torch.tensor([[2, 9, 3]])).last_hidden_state
    torch.testing.assert_close(states[1:, :3], expected, atol=1e-5, rtol=1e-5)
    given = condition({"text": ["a red cat", "dog"]}, 2)
    torch.testing.assert_close(given.tokens[1, :3], condition.proj(condition.norm(expected))[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(given.vector[1], condition.pooled(condition.norm(expected).mean(1))[0], atol=1e-5, rtol=1e-5)


def test_no_text_is_the_learned_nothing(encoder):
    condition = attached(encoder, drop=1.0)
    null = condition.null(2)
    for given in (condition({"text": ["", ""]}, 2), condition({"text": ["a", "cat"]}, 2, Chance(2))):
        assert torch.equal(given.tokens, null.tokens) and torch.equal(given.mask, null.mask) and torch.equal(given.vector, null.vector)
    assert null.mask.sum(1).tolist() == [1, 1]
    torch.testing.assert_close(null.vector[0], condition.pooled(condition.nothing))


def test_the_encoder_is_neither_saved_nor_trained_nor_copied(encoder):
    import copy

    condition = attached(encoder)
    condition.encode(["a"])
    assert not any("model" in name for name in condition.state_dict()) and len(list(condition.parameters())) == 6
    assert copy.deepcopy(condition).frozen is condition.frozen
    assert not any(p.requires_grad for p in condition.frozen["model"].parameters())


def test_encoders_with_a_decoder_and_with_eyes(transformers, tmp_path):
    t5 = transformers.T5Config(vocab_size=len(WORDS), d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2)
    (tmp_path / "t5").mkdir()
    states, _ = attached(folder_of(transformers, transformers.T5Model(t5), tmp_path / "t5")).encode(["a cat"])
    assert states.shape == (1, 6, 12)
    sides = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 8, "eos_token_id": 3, **sides}
    clip = transformers.CLIPConfig(text_config=text, vision_config={"image_size": 8, "patch_size": 4, **sides}, projection_dim=4)
    (tmp_path / "clip").mkdir()
    states, _ = attached(folder_of(transformers, transformers.CLIPModel(clip), tmp_path / "clip")).encode(["a cat"])
    assert states.shape == (1, 6, 12)


def test_a_generator_follows_texts_and_its_folder_names_the_encoder(encoder, tmp_path):
    model = tiny.ar(condition=TextCondition(encoder, dim=12, length=6))
    options = {"text": ["a red cat", "", "dog"], "seeds": [4, 4, 4], "guidance": 2.0}
    made = model.generate(3, **options)
    assert len({tuple(row) for row in made.ids.tolist()}) > 1
    for i in range(3):  # padding beside longer texts changes nothing
        alone = model.generate(1, text=options["text"][i], seeds=[4], guidance=2.0)
        assert torch.equal(alone.ids, made.ids[i : i + 1])
    assert torch.equal(model.generate(3, tokens=3, **options).ids, made.ids[:, :3])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["condition"]["encoder"] == encoder
    assert torch.equal(Generator.from_pretrained(tmp_path).generate(3, **options).ids, made.ids)
    loss = model.train().losses({"ids": made.ids.clone(), "text": options["text"]}, torch.Generator())[0]["token"]
    assert loss.isfinite()


def test_long_prompts(encoder):
    condition = attached(encoder)
    with pytest.raises(TokenError, match=r"has 7 pieces, this generator reads 6 at most"):
        condition.request(1, text="a red cat a dog")
    assert condition.encode(["a red cat a dog"])[1].all()  # captions in training are cut


def test_what_does_not_fit(encoder):
    condition = attached(encoder)
    with pytest.raises(TokenError, match="takes a text, not a class"):
        condition.request(1, label=1)
    for wrong in (None, ["a", "b", "c"], [1, 2]):
        with pytest.raises(TokenError, match="text must be one description"):
            condition.request(2, text=wrong)
    with pytest.raises(TokenError, match="needs 'text', 2 strings"):
        condition({"text": ["a"]}, 2)
    with pytest.raises(ModelError, match="states of width 12, this condition was made with dim=16"):
        attached(encoder, dim=16).encode(["a"])


def test_no_such_encoder(tmp_path, transformers):
    with pytest.raises(ModelError, match="text encoder cannot be loaded"):
        attached(str(tmp_path)).encode(["a"])
