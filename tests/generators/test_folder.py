"""A generator's folder: everything comes back, and nothing but classes of tok1d.generators is built from a file."""

import json

import pytest
import torch

from tests.generators import tiny
from tests.training import tiny as tokenizers
from tok1d.errors import ModelError, TokenError
from tok1d.generators.ar import AutoregressiveGenerator
from tok1d.generators.condition import ClassCondition
from tok1d.generators.generator import Generator
from tok1d.generators.space import TokenSpace


@pytest.mark.parametrize("name", tiny.HEADS)
def test_what_is_saved_comes_back(name, tmp_path):
    model = tiny.ar(name, condition=ClassCondition(3, ["a", "b", "c"]), variable="stop")
    model.save_pretrained(tmp_path)
    back = Generator.from_pretrained(tmp_path)
    assert type(back) is AutoregressiveGenerator and back.space == model.space and back.to_config() == model.to_config()
    assert back.model_id == model.model_id and not back.training
    made, again = (m.generate(2, label="b", guidance=2.0) for m in (model, back))
    assert torch.equal(made.data, again.data)


def test_samples_are_tokens_of_the_tokenizer_it_was_made_for():
    tokenizer = tokenizers.fsq().eval()
    model = tiny.awake(AutoregressiveGenerator(TokenSpace.of(tokenizer), ClassCondition(2), width=16, depth=1, heads=2)).eval()
    made = model.generate(3, label=1, tokens=2)
    assert made.model_id == tokenizer.model_id and made.nested and tokenizer.decode(made).shape == (3, 3, 16, 16)
    with pytest.raises(TokenError, match="another model made them|were made by model"):
        tokenizers.vq_ema().eval().decode(made)


def test_half_the_bytes(tmp_path):
    model = tiny.ar()
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / name / "diffusion_pytorch_model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    assert next(Generator.from_pretrained(tmp_path / "half").parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("class",), "os.system"),
        (("class",), "torch.nn.modules.linear.Linear"),
        (("class",), "tok1d.generators.generator.Generator"),
        (("class",), "tok1d.generators.condition.ClassCondition"),
        (("condition", "class"), "subprocess.Popen"),
        (("condition", "class"), "tok1d.generators.generator.Path"),
        (("condition", "class"), "tok1d.generators.heads.Softmax"),
        (("head", "class"), "tok1d.tokenizers.lengths.TailDrop"),
        (("condition",), None),
        (("width",), 10**9),
        (("depth",), -1),
        (("surprise",), 1),
        (("space", "vocab_size"), 10**30),
        (("space",), 3),
        (("head", "class"), 3),
    ],
)
def test_hostile_configurations(path, value, tmp_path):
    tiny.ar().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError):
        Generator.from_pretrained(tmp_path)


def test_weights_of_another_model(tmp_path):
    tiny.ar().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 3}))
    with pytest.raises(ModelError, match="do not fit config"):
        Generator.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="does not describe a generator"):
        Generator.from_pretrained(tmp_path)
