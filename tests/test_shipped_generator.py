"""The generator that ships: found by name, made for the shipped tokenizer, and its classes look like what they are called."""

import pytest
import torch

import tok1d
from tok1d.generators.images import paint
from tok1d.generators.presets import generator_named


@pytest.fixture(scope="module")
def pair():
    return tok1d.load_generator("default-flow"), tok1d.load("default")


def test_it_is_what_its_row_says(pair):
    generator, tokenizer = pair
    row = generator_named("default-flow")
    generator.space.matches(tokenizer)
    assert row.where == "package" and row.tokenizer == tokenizer.name and row.tokens == generator.space.tokens
    assert row.parameters == sum(v.numel() for v in generator.state_dict().values())
    assert dict(row.sampling) == generator.sampling and len(generator.condition.names) == 16


def test_samples_become_tokens_and_pictures_of_their_class(pair):
    """Sunflowers are yellow (more red and green than blue), trousers and t-shirts hardly."""
    generator, tokenizer = pair
    asked = ["sunflower"] * 4 + ["pants"] * 4
    made = generator.generate(8, label=asked, steps=8)
    tokens = made.tokens(tokenizer)
    assert tokens.shape == (8, generator.space.tokens) and tokens.model_id == tokenizer.model_id
    pictures = paint(tokenizer, made)
    assert pictures.shape == (8, 3, 256, 256)
    torch.testing.assert_close(pictures[:2], tokenizer.decode(tokens[:2]).clamp(0, 1), atol=1e-5, rtol=0)
    red, green, blue = pictures.mean((2, 3)).unbind(1)
    yellow = (red + green) / 2 - blue
    assert yellow[:4].mean() > yellow[4:].mean() + 0.1
    assert pictures[:4].std(0).mean() > 0.05  # not one picture four times
