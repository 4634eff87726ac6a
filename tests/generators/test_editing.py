"""Completion, variations, splices and interpolations: shared first tokens are shared, ends are ends, the middle is between."""

import pytest
import torch

from tests.dct_model import make_model
from tests.generators.tiny import ar, tokens
from tok1d.errors import TokenError
from tok1d.generators.ar import AutoregressiveGenerator
from tok1d.generators.condition import Unconditional
from tok1d.generators.editing import complete, interpolate, splice, variations
from tok1d.generators.space import TokenSpace
from tok1d.tokens import TokenSequence


@pytest.mark.parametrize("head", ["softmax", "wide bits"])
def test_completions_keep_what_they_are_given(head):
    model = ar(head)
    seq = model.space.sequence(tokens(model.space, 3))
    made = complete(model, seq, 5, seeds=4, label=1)
    assert made.shape == (3, 8) and torch.equal(made.data[:, :5], seq.data[:, :5]) and not torch.equal(made.data[:, 5:], seq.data[:, 5:])
    alone = complete(model, seq[1], 5, seeds=5, label=1, tokens=6)
    assert torch.equal(alone.data[0], made.data[1, :6]), "a row alone, and fewer tokens"
    assert torch.equal(complete(model, seq, 0, label=1).data, model.generate(3, label=1).data)
    assert torch.equal(complete(model, seq, 8, label=1).data, seq.data)


def test_variations_share_the_beginning():
    model = ar()
    seq = model.space.sequence(tokens(model.space, 2))
    made = variations(model, seq[0], 3, 5, label=2, temperature=1.5)
    assert torch.equal(made.ids[:, :3], seq.ids[:1, :3].expand(5, 3)) and len({tuple(row) for row in made.ids.tolist()}) == 5
    assert torch.equal(variations(model, seq[0], 3, 1, label=2, temperature=1.5, seeds=3).ids[0], made.ids[3])
    with pytest.raises(TokenError, match="of one picture, got 2 rows"):
        variations(model, seq, 3, 2, label=0)


def test_splices():
    a, b = (TokenSequence(torch.arange(6).view(2, 3) + 10 * i, vocab_size=64, model_id=i and 7) for i in (0, 1))
    assert splice(a, b, 2).ids.tolist() == [[0, 1, 12], [3, 4, 15]] and splice(a, b, 2).model_id == 7
    assert torch.equal(splice(a, b, 0).ids, b.ids) and torch.equal(splice(a, b, 3).ids, a.ids)
    assert splice(a[1], b, 1).ids.tolist() == [[3, 11, 12], [3, 14, 15]]
    wide = TokenSequence(None, vocab_size=2**66, bits=torch.ones(1, 3, 66, dtype=torch.uint8))
    assert splice(wide, wide, 1).bits.shape == (1, 3, 66)


def test_interpolation_of_a_linear_decoder_is_linear():
    tokenizer = make_model()
    draw = torch.Generator().manual_seed(0)
    data = torch.randint(124, 133, (2, 32), generator=draw)  # small coefficients: nothing is clamped
    a, b = (TokenSequence(row[None], vocab_size=256, model_id=tokenizer.model_id) for row in data)
    pictures = interpolate(tokenizer, a, b, 5, keep=4)
    torch.testing.assert_close(pictures[0], tokenizer.decode(a)[0])
    torch.testing.assert_close(pictures[4], tokenizer.decode(splice(a, b, 4))[0])
    for i in range(1, 4):
        torch.testing.assert_close(pictures[i], torch.lerp(pictures[0], pictures[4], i / 4), atol=1e-5, rtol=0)
    short = interpolate(tokenizer, a[:, :8], b[:, :8], 2)
    torch.testing.assert_close(short, torch.cat([tokenizer.decode(a[:, :8]), tokenizer.decode(b[:, :8])]))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m, t, a, b: complete(m, a, 9, label=0), "keep must be an integer in 0..8, how many first tokens stay, got 9"),
        (lambda m, t, a, b: complete(m, a, -1, label=0), "keep must be"),
        (lambda m, t, a, b: complete(m, TokenSequence(a.ids, vocab_size=32), 1, label=0), "vocabulary of 32"),
        (lambda m, t, a, b: complete(m, a, 6, tokens=4, label=0), "up to 4 tokens"),
        (lambda m, t, a, b: splice(a, a[:, :4], 1), "same number of tokens, got .4, 8."),
        (lambda m, t, a, b: splice(a, b, 1), "are of two models"),
        (lambda m, t, a, b: splice(m.space.sequence(a.ids.repeat(2, 1)), m.space.sequence(a.ids.repeat(3, 1)), 1), "as many on both sides"),
        (lambda m, t, a, b: interpolate(t, b, b, 1), "at least 2, both ends included, got 1"),
        (lambda m, t, a, b: interpolate(t, TokenSequence.stack([b, b]), b), "between two pictures, got 2 and 1"),
        (lambda m, t, a, b: interpolate(t, a, a), "vocabulary of 16"),
    ],
)
def test_what_cannot_be_edited(edit, said):
    model, tokenizer = ar(), make_model()
    a = model.space.sequence(tokens(model.space, 1))
    b = TokenSequence(torch.full((1, 8), 128), vocab_size=256, model_id=tokenizer.model_id)
    with pytest.raises(TokenError, match=said):
        edit(model, tokenizer, a, b)


def test_generators_that_cannot_continue():
    class Whole(AutoregressiveGenerator):
        def sample(self, request, *, temperature: float = 1.0):
            return super().sample(request, temperature=temperature)

    model = Whole(TokenSpace(tokens=4, vocab_size=8, nested=True), Unconditional(), width=16, depth=1, heads=2)
    with pytest.raises(TokenError, match="Whole cannot continue given tokens; its options: temperature"):
        complete(model, model.space.sequence(torch.zeros(1, 4, dtype=torch.int64)), 2)
