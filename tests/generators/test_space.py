"""Token spaces: made from tokenizers, plain data, and the border where foreign tokens are refused."""

import pytest
import torch

from tests.training import tiny as tokenizers
from tok1d.errors import ModelError, TokenError
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.quantizers.post_training import PerChannel
from tok1d.tokens import TokenSequence


def test_of_a_discrete_tokenizer_and_its_codes_as_numbers():
    tokenizer = tokenizers.fsq().eval()
    space = TokenSpace.of(tokenizer)
    assert (space.kind, space.tokens, space.vocab_size, space.bits, space.nested) == ("ids", 4, 512, 9, True)
    assert space.allowed == [1, 2, 3, 4] == tokenizer.token_lengths and space.lengths is None
    assert space.model_id == f"{tokenizer.model_id:016x}" and space.bits_per_image == 36
    space.matches(tokenizer)
    numbers = TokenSpace.of(tokenizer, "latents")
    assert (numbers.kind, numbers.channels, numbers.shape, numbers.vocab_size) == ("latents", 3, (3,), 0)
    numbers.matches(tokenizer)
    with pytest.raises(TokenError, match="makes ids, not bits"):
        TokenSpace.of(tokenizer, "bits")


def test_of_long_codes_and_of_a_continuous_tokenizer():
    wide = tokenizers.titok(PerChannel(16, 6)).eval()
    space = TokenSpace.of(wide)
    assert (space.kind, space.bits, space.shape, space.vocab_size) == ("bits", 96, (96,), 0)
    made = space.sequence(torch.ones(2, 4, 96, dtype=torch.uint8), torch.tensor([4, 2]))
    assert made.vocab_size == 2**96 and made.bits[1, 2:].sum() == 0 and made.bits[1, :2].all()
    assert wide.decode(made[:1]).shape == (1, 3, 16, 16)
    continuous = TokenSpace.of(tokenizers.kl().eval())
    assert (continuous.kind, continuous.channels) == ("latents", 4)


def test_another_tokenizer_is_refused():
    space = TokenSpace.of(tokenizers.fsq().eval())
    with pytest.raises(TokenError, match=r"with vocab_size 512, tiny has vocab_size 64"):
        space.matches(tokenizers.vq_ema().eval())
    other = tokenizers.fsq().eval()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(TokenError, match="same form, other weights"):
        space.matches(other)


def test_plain_data_and_back():
    space = TokenSpace(tokens=8, vocab_size=100, nested=True, lengths=(8, 2), model_id="00000000000000ab")
    assert space.lengths == (2, 8) and space.bits == 7
    assert TokenSpace.from_config(space.to_config()) == space


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": 0, "vocab_size": 4}, {"tokens": 4, "vocab_size": 1}, {"tokens": 4, "kind": "words", "vocab_size": 4},
        {"tokens": 4, "kind": "bits"}, {"tokens": 4, "kind": "latents"}, {"tokens": 4, "vocab_size": 4, "lengths": [5]},
        {"tokens": 4, "vocab_size": 4, "model_id": "xyz"}, {"tokens": 4, "vocab_size": 4, "colour": 1}, [], None,
    ],
)  # fmt: skip
def test_bad_descriptions(fields):
    with pytest.raises(ModelError):
        TokenSpace.from_config(fields)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.tensor([[0, 16]]), r"must be in \[0, 16\), got 0..16"),
        (torch.tensor([[-1, 3]]), "got -1..3"),
        (torch.zeros(1, 9, dtype=torch.int64), "at most 8 tokens, got 9"),
        (torch.zeros(1, 2, dtype=torch.int32), "int64 ids"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), "int64 ids"),
        (torch.zeros(2, dtype=torch.int64), "int64 ids"),
    ],
)
def test_ids_that_do_not_fit(data, message):
    with pytest.raises(TokenError, match=message):
        TokenSpace(tokens=8, vocab_size=16).check(data)


def test_bits_and_latents_that_do_not_fit():
    bits = TokenSpace(tokens=2, kind="bits", bits=3)
    with pytest.raises(TokenError, match=r"in \[0, 2\), got 0..2"):
        bits.check(torch.tensor([[[0, 1, 2]]], dtype=torch.uint8))
    with pytest.raises(TokenError, match=r"uint8 bits \(B, n, 3\)"):
        bits.check(torch.zeros(1, 2, 4, dtype=torch.uint8))
    with pytest.raises(TokenError, match=r"float latents \(B, n, 5\)"):
        TokenSpace(tokens=2, kind="latents", channels=5).check(torch.zeros(1, 2, 5, dtype=torch.int64))


def test_sequences_of_other_models_are_refused():
    space = TokenSpace(tokens=8, vocab_size=16, model_id="00000000000000ab")
    ids = torch.zeros(2, 3, dtype=torch.int64)
    assert torch.equal(space.check_sequence(TokenSequence(ids, 16, model_id=0xAB)), ids)
    with pytest.raises(TokenError, match="made by model 00000000000000ac"):
        space.check_sequence(TokenSequence(ids, 16, model_id=0xAC))
    with pytest.raises(TokenError, match="vocabulary of 17"):
        space.check_sequence(TokenSequence(ids, 17))
    with pytest.raises(TokenError, match="same number"):
        space.check_sequence(TokenSequence(ids, 16, lengths=torch.tensor([3, 2])))


def test_batches():
    space = TokenSpace(tokens=8, vocab_size=16)
    with pytest.raises(TokenError, match="needs 'ids', got only label"):
        space.data_of({"label": torch.zeros(2)})


@pytest.mark.parametrize("tokens", [0, 3, 9, True, "4"])
def test_lengths_that_do_not_decode(tokens):
    with pytest.raises(TokenError, match="rows of 2, 8 tokens, got"):
        TokenSpace(tokens=8, vocab_size=16, lengths=(2, 8)).check_tokens(tokens)
