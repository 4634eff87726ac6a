"""Image tokens in a language model's vocabulary: both directions, what may follow, and everything that does not fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tok1d.errors import ModelError, TokenError
from tok1d.generators.space import TokenSpace
from tok1d.generators.vocab import ImageVocabulary
from tok1d.tokens import TokenSequence

SPACE = TokenSpace(tokens=6, vocab_size=16, nested=True, tokenizer="t", model_id="00000000000000ab")
WORDS = ImageVocabulary(SPACE, text_size=50)


def seq(*rows: list[int]) -> TokenSequence:
    data = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return SPACE.sequence(data, torch.tensor([len(row) for row in rows]))


ROWS = st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=6), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(ROWS, st.data())
def test_there_and_back_with_words_around(rows, data):
    texts = [data.draw(st.lists(st.integers(0, 49), max_size=3)) for _ in range(len(rows) + 1)]
    streams = WORDS.encode(seq(*rows))
    assert [s.tolist() for s in streams] == [[50, *(52 + i for i in row), 51] for row in rows]
    whole = torch.cat([torch.tensor(texts[0], dtype=torch.int64), *(torch.cat([s, torch.tensor(t, dtype=torch.int64)]) for s, t in zip(streams, texts[1:]))])
    back = WORDS.decode(whole)
    assert [row[:n].tolist() for row, n in zip(back.ids, back.lengths.tolist())] == rows and back.model_id == 0xAB and back.nested
    assert [t.tolist() for t in WORDS.text(whole)] == texts
    for i in range(len(whole)):
        assert WORDS.allowed_next(whole[:i])[whole[i]], "what was written may be written"


def test_what_may_follow():
    ids = set(range(52, 68))
    follow = {name: set(WORDS.allowed_next(stream).nonzero().flatten().tolist()) for name, stream in {
        "start": [], "word": [3], "begin": [3, 50], "inside": [50, 52], "full": [50, 52, 53, 54, 55, 56, 57], "behind": [50, 52, 51],
    }.items()}  # fmt: skip
    outside = set(range(51))
    assert follow == {"start": outside, "word": outside, "begin": ids, "inside": ids | {51}, "full": {51}, "behind": outside}
    fixed = ImageVocabulary(TokenSpace(tokens=2, vocab_size=4), 10)
    assert fixed.allowed_next([10, 12]).nonzero().flatten().tolist() == [12, 13, 14, 15] and fixed.allowed_next([10, 12, 13]).nonzero().flatten().tolist() == [11]


def test_layouts():
    assert (WORDS.begin, WORDS.end, WORDS.offset, WORDS.size) == (50, 51, 52, 68)
    other = ImageVocabulary(SPACE, text_size=50, offset=50, begin=7, end=8)  # reserved words as markers
    assert other.size == 66 and other.encode(seq([1]))[0].tolist() == [7, 51, 8] and other.decode([7, 51, 8]).ids.tolist() == [[1]]
    assert not other.allowed_next([])[8] and other.allowed_next([])[7]
    behind = ImageVocabulary(SPACE, text_size=50, offset=50, begin=66, end=67)
    assert behind.size == 68
    for wrong in ({"offset": 49}, {"begin": -1}):
        with pytest.raises((ModelError, TokenError), match="offset|begin"):
            ImageVocabulary(SPACE, 50, **wrong)
    for wrong in ({"begin": 52}, {"end": 67}, {"begin": 51}, {"offset": 50}):
        with pytest.raises(TokenError, match="overlap"):
            ImageVocabulary(SPACE, 50, **wrong)
    with pytest.raises(TokenError, match="reads ids; tokenizer makes bits"):
        ImageVocabulary(TokenSpace(tokens=4, kind="bits", bits=66), 50)


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        ([1, 2], "no image in this stream of 2 ids"),
        ([50, 52], "begins at place 0 does not end"),
        ([1, 51], "place 1 holds the end marker where a begin was due"),
        ([50, 52, 50], "place 2 holds the begin marker where an end was due"),
        ([50, 3, 51], "inside an image ids are 52 to 67, got 3"),
        ([52, 50, 52, 51], "place 0 holds 52, which is no word"),
        ([50, 51], "tokens, got tokens=0"),
        ([50, *[52] * 7, 51], "tokens, got tokens=7"),
        ([50, 68, 51], r"ids of the stream must be in \[0, 68\), got 50..68"),
        ([-1], r"must be in \[0, 68\)"),
        ([[1]], "a stream is int64"),
        ([0.5], "a stream is int64"),
    ],
)
def test_streams_that_do_not_decode(stream, said):
    with pytest.raises(TokenError, match=said):
        WORDS.decode(stream)


def test_tokens_that_do_not_encode():
    for wrong, said in (
        (TokenSequence(torch.tensor([[16]]), vocab_size=16), "must be in"),
        (TokenSequence(torch.tensor([[1]]), vocab_size=32), "vocabulary of 32"),
        (TokenSequence(torch.tensor([[1]]), vocab_size=16, model_id=5), "made by model 0000000000000005"),
        (TokenSequence(torch.zeros(1, 7, dtype=torch.int64), vocab_size=16), "at most 6 tokens"),
    ):
        with pytest.raises(TokenError, match=said):
            WORDS.encode(wrong)
    with pytest.raises(TokenError, match="at most 6 tokens, the open image has 7"):
        WORDS.allowed_next([50, *[52] * 7])
    with pytest.raises(TokenError, match="inside an image"):
        WORDS.allowed_next([50, 3])
