"""Choosing tokens: filters against a plain loop, the inverse of the distribution, seeds of rows, draws shared by processes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tok1d.errors import TokenError
from tok1d.generators import chance as chance_module
from tok1d.generators.chance import Chance
from tok1d.generators.sampling import check_choice, choose, distribution, flip, row_seeds, uniforms


def plain(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """What :func:`distribution` should be for one row."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    weight = {i: math.exp(logits[i] / temperature - max(logits) / temperature) for i in order}
    total, before, kept = sum(weight.values()), 0.0, {}
    for i in order:
        if kept and before / total >= top_p:
            break
        kept[i] = weight[i]
        before += weight[i]
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(len(logits))]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-80, 80), min_size=1, max_size=9, unique=True),
    st.floats(0.2, 3),
    st.integers(0, 10),
    st.floats(0.05, 1),
)
def test_filters_equal_a_plain_loop(values, temperature, top_k, top_p):
    logits = [v / 10 for v in values]
    found = distribution(torch.tensor([logits], dtype=torch.float64), temperature, top_k, top_p)[0]
    assert found.tolist() == pytest.approx(plain(logits, temperature, top_k, top_p), abs=1e-9)


def test_at_least_one_is_kept_and_temperature_zero_takes_the_likeliest():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    assert distribution(logits, top_p=1e-9).tolist() == [[0, 1, 0], [1, 0, 0]]
    for u in (0.0, 0.5, 1 - 2**-53):
        uniform = torch.full((2,), u, dtype=torch.float64)
        assert choose(logits, uniform, temperature=0).tolist() == [1, 0]
        assert choose(logits, uniform, top_k=1).tolist() == [1, 0]


def test_inverse_of_the_distribution():
    logits = torch.tensor([0.5, 0.2, 0.0, 0.3]).log().expand(1000, 4)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert choose(logits, uniform).bincount(minlength=4).tolist() == [500, 200, 0, 300]
    assert choose(logits, uniform, top_p=0.79).bincount(minlength=4).tolist() == [625, 0, 0, 375]


def test_an_id_without_probability_is_never_chosen():
    logits = torch.full((1, 5), -math.inf)
    logits[0, 1:3] = torch.tensor([0.3, 1.7])
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits.expand(2, 5), ends).tolist() == [1, 2]


def test_bits():
    uniform = torch.tensor([[0.49, 0.51, 0.1]], dtype=torch.float64)
    assert flip(torch.tensor([[0.0, 0.0, -9.0]]), uniform).tolist() == [[True, False, False]]
    assert flip(torch.tensor([[0.1, -0.1, 9.0]]), uniform, 0).tolist() == [[True, False, True]]


def test_numbers_of_a_row_depend_on_its_seed_alone():
    many = uniforms([5, 6, 7], 32, 3)
    assert torch.equal(many[2], uniforms([7], 256, 3)[0, :32])
    assert many.unique().numel() == many.numel()
    assert row_seeds(5, 3) == row_seeds([5, 6, 7], 3) == row_seeds(torch.tensor([5, 6, 7]), 3)


@pytest.mark.parametrize("seeds", [-1, [1, 2], [1, 2, -3], 2**63, "abc", [None] * 3])
def test_bad_seeds(seeds):
    with pytest.raises(TokenError, match="seeds must be"):
        row_seeds(seeds, 3)


@pytest.mark.parametrize("choice", [(-1, 0, 1), (math.nan, 0, 1), (1, -1, 1), (1, 2.5, 1), (1, 0, 0), (1, 0, 1.1), ("1", 0, 1)])
def test_bad_choices(choice):
    with pytest.raises(TokenError):
        check_choice(*choice)


def test_processes_draw_what_one_does_on_their_joined_batch(monkeypatch):
    def drawn(rank, world, rows):
        monkeypatch.setattr(chance_module, "world", lambda: (rank, world))
        chance = Chance(rows, torch.Generator().manual_seed(3))
        return chance.uniform(2), chance.normal(), chance.draw(lambda n: torch.arange(n))

    joined, first, second = drawn(0, 1, 6), drawn(0, 2, 3), drawn(1, 2, 3)
    for whole, a, b in zip(joined, first, second):
        assert torch.equal(whole, torch.cat([a, b]))
