"""TokenSequence: shapes, prefixes, stacking, cost, and what it refuses."""

import subprocess
import sys

import pytest
import torch

from tok1d.errors import TokenError
from tok1d.tokens import Geometry, TokenSequence, bits_for_vocab


def make(rows: int = 3, tokens: int = 5, vocab: int = 1000, **kwargs) -> TokenSequence:
    return TokenSequence(torch.arange(1, rows * tokens + 1).view(rows, tokens), vocab, **kwargs)


def make_bits(rows: int = 2, tokens: int = 3, d: int = 70) -> TokenSequence:
    bits = (torch.arange(rows * tokens * d) % 3 == 0).to(torch.uint8).view(rows, tokens, d)
    return TokenSequence(None, 2**d, bits=bits)


@pytest.mark.parametrize(
    ("vocab", "bits"), [(1, 1), (2, 1), (3, 2), (4096, 12), (4097, 13), (64000, 16), (2**62, 62), (2**255, 255)]
)
def test_bits_for_vocab(vocab, bits):
    assert bits_for_vocab(vocab) == bits


def test_lengths_default_to_every_token():
    seq = make()
    assert (seq.shape, len(seq), seq.lengths.tolist()) == ((3, 5), 3, [5, 5, 5])
    assert seq.bits_per_token == 10 and seq.bits_per_image == [50, 50, 50]
    assert seq.mask.all() and seq.mask.shape == (3, 5)


def test_prefix_slicing_shortens_lengths_only_where_longer():
    seq = make(lengths=torch.tensor([5, 2, 4]))
    short = seq[:, :3]
    assert short.ids.tolist() == [[1, 2, 3], [6, 7, 8], [11, 12, 13]]
    assert short.lengths.tolist() == [3, 2, 3] and short.bits_per_image == [30, 20, 30]
    assert short.mask.tolist() == [[True] * 3, [True, True, False], [True] * 3]
    assert seq[:, :99].shape == (3, 5) and seq[:, :-1].shape == (3, 4)


@pytest.mark.parametrize(
    ("rows", "kept"), [(0, [0]), (2, [2]), (-1, [2]), (slice(1, None), [1, 2]), ([2, 0], [2, 0]), (torch.tensor([1]), [1])]
)
def test_row_selection_takes_lengths_and_geometry_along(rows, kept):
    seq = make(lengths=torch.tensor([5, 2, 4]), geometry=tuple(Geometry(10 + i, 20) for i in range(3)), model_id=7, nested=False)
    part = seq[rows]
    assert torch.equal(part.ids, seq.ids[kept]) and part.lengths.tolist() == [[5, 2, 4][i] for i in kept]
    assert [g.height for g in part.geometry] == [10 + i for i in kept]
    assert (part.model_id, part.vocab_size, part.nested) == (7, 1000, False)


@pytest.mark.parametrize("key", [(slice(None), slice(1, None)), (slice(None), slice(None, None, 2)), (0, 3), 3, -4])
def test_slices_that_are_not_a_prefix_or_not_there(key):
    with pytest.raises(TokenError, match=r"prefix|does not exist"):
        make()[key]


def test_tiles_stay_together():
    seq = make(rows=4, geometry=(Geometry(300, 500, "tile", 2, 2),))
    assert seq[:, :2].geometry == seq.geometry and seq.bits_per_image == [200]
    with pytest.raises(TokenError, match="tiled image belong together"):
        seq[0]


def test_stack_pads_with_zeros():
    joined = TokenSequence.stack([make(1, 2), make(2, 4)])
    assert joined.ids.tolist() == [[1, 2, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert joined.lengths.tolist() == [2, 4, 4] and joined.geometry is None and joined.nested
    codes = TokenSequence.stack([make_bits(), make_bits()[:, :1]])
    assert codes.bits.shape == (4, 3, 70) and codes.lengths.tolist() == [3, 3, 1, 1]
    assert not codes.bits[2:, 1:].any() and codes.bits_per_token == 70


def test_stack_joins_geometry_and_is_nested_only_if_all_are():
    a, b = Geometry(1, 2), Geometry(3, 4, "resize")
    joined = TokenSequence.stack([make(1, geometry=(a,)), make(1, geometry=(b,), nested=False)])
    assert joined.geometry == (a, b) and joined.nested is False


@pytest.mark.parametrize("other", [make(vocab=999), make(model_id=1), make_bits()])
def test_stack_refuses_other_models(other):
    with pytest.raises(TokenError, match="of one model"):
        TokenSequence.stack([make(), other])
    with pytest.raises(TokenError, match="nothing to stack"):
        TokenSequence.stack([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": None}, "exactly one"),
        ({"ids": torch.zeros(1, 2, dtype=torch.int64), "bits": torch.zeros(1, 2, 3, dtype=torch.uint8)}, "exactly one"),
        ({"ids": torch.zeros(2, dtype=torch.int64)}, "2 dimensions"),
        ({"ids": torch.zeros(1, 2, dtype=torch.int32)}, "int64"),
        ({"ids": None, "bits": torch.zeros(1, 2, 3)}, "uint8"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64), "lengths": torch.tensor([1])}, "lengths must be"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64), "geometry": (Geometry(1, 1),)}, "geometry describes 1 rows"),
    ],
)
def test_refuses_what_is_not_a_sequence(arguments, message):
    with pytest.raises(TokenError, match=message):
        TokenSequence(vocab_size=8, **arguments)


def test_to_and_save_load(tmp_path):
    seq = make(model_id=5, geometry=tuple(Geometry(9, 8, "pad") for _ in range(3)))
    assert torch.equal(seq.to("cpu").ids, seq.ids) and seq.device.type == "cpu"
    size = seq.save(tmp_path / "x.tok")
    assert size == (tmp_path / "x.tok").stat().st_size == 3 * (32 + 7 + 4)
    back = TokenSequence.load(tmp_path / "x.tok")
    assert torch.equal(back.ids, seq.ids) and (back.geometry, back.model_id, back.vocab_size) == (seq.geometry, 5, 1000)


def test_reading_token_files_needs_no_torch():
    code = "import sys, tok1d.tokfile; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
