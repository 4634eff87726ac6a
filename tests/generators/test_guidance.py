"""Guidance schedules against their formulas, and the one way to combine."""

import math

import pytest
import torch

from tok1d.errors import TokenError
from tok1d.generators.guidance import combine, guided, strengths


def test_formulas():
    w, steps = 5.0, 8
    r = [i / steps for i in range(steps)]
    assert strengths(w, "constant", steps) == [w] * steps
    assert strengths(w, "linear", steps) == pytest.approx([1 + (w - 1) * x for x in r])
    assert strengths(w, "power_cosine(2.75)", steps) == pytest.approx([1 + (w - 1) * (1 - math.cos(math.pi * x**2.75)) / 2 for x in r])
    assert strengths(w, "power_cosine", steps) == strengths(w, "power_cosine(3)", steps)
    assert strengths(w, "interval(0.25, 0.5)", steps) == [1, 1, w, w, w, 1, 1, 1]


def test_power_zero_is_constant():
    assert strengths(4.0, "power_cosine(0)", 5) == pytest.approx([4.0] * 5)


def test_maskgit_formula_is_ours_with_one_added():
    given, without = torch.randn(2, 3, 4)
    torch.testing.assert_close(given + 2.5 * (given - without), combine(given, without, 3.5))
    torch.testing.assert_close(guided(torch.cat([given, without]), 3, 3.5), combine(given, without, 3.5))
    assert guided(given, 3, 7.0) is given


@pytest.mark.parametrize("schedule", ["cosine", "", "linear(1)", "interval(1)", "interval(0.6,0.2)", "interval(0,2)", "power_cosine(x)", "power_cosine(-1)", 3, "__import__('os')"])  # fmt: skip
def test_unknown_schedules(schedule):
    with pytest.raises(TokenError):
        strengths(2.0, schedule, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, "3", True])
def test_bad_strengths(value):
    with pytest.raises(TokenError, match="finite number"):
        strengths(value, "constant", 4)
