"""Length rules: what is drawn, how often, and what may be asked for."""

import math

import pytest
import torch
from scipy import stats

from tok1d.errors import TokenError
from tok1d.tokenizers.lengths import FixedLength, LengthRule, NormalDrop, TailDrop, ZipfDrop
from tok1d.tokenizers.part import build_part, token_mask


def draw(rule: LengthRule, tokens: int, n: int = 20_000, seed: int = 0) -> torch.Tensor:
    return rule.sample(n, tokens, torch.Generator().manual_seed(seed))


def uniform(k: int, minimum: int, tokens: int) -> float:
    return float(k >= min(minimum, tokens))


def powers(k: int, minimum: int, tokens: int) -> float:
    return float(k == tokens or (k >= minimum and k.bit_count() == 1))


def rounded_up(k: int, minimum: int, tokens: int) -> float:
    """How many of minimum..tokens round up to k."""
    return float(sum(min(2 ** math.ceil(math.log2(j)), tokens) == k for j in range(min(minimum, tokens), tokens + 1)))


def log_uniform(k: int, minimum: int, tokens: int) -> float:
    return math.log(k + 1) - math.log(k) if k >= min(minimum, tokens) else 0.0


def normal(mean: float, sd: float):
    return lambda k, minimum, tokens: stats.norm.pdf(k, mean, sd) * (k >= min(minimum, tokens))


def zipf(exponent: float):
    return lambda k, minimum, tokens: k**-exponent * (k >= min(minimum, tokens))


# Rules, and the weight of each length written down from the definition, not from the code.
RULES = {
    "uniform": (TailDrop("uniform"), uniform),
    "powers": (TailDrop("powers_of_two"), powers),
    "rounded": (TailDrop("uniform_powers_of_two"), rounded_up),
    "log_uniform": (TailDrop("log_uniform"), log_uniform),
    "normal": (NormalDrop(mean=20, sd=7.5), normal(20, 7.5)),
    "normal cut": (NormalDrop(mean=-3, sd=10, minimum=2), normal(-3, 10)),
    "zipf": (ZipfDrop(exponent=1.3), zipf(1.3)),
    "zipf long": (ZipfDrop(exponent=-1, minimum=4), zipf(-1)),
    "minimum": (TailDrop("uniform", minimum=5), uniform),
    "full": (NormalDrop(mean=8, sd=2, full=0.25), normal(8, 2)),
}


@pytest.mark.parametrize("tokens", [1, 12, 32])
@pytest.mark.parametrize("name", RULES)
def test_shares_are_those_of_the_definition(name, tokens):
    """Chi-square at a fixed seed; lengths that are rare are counted together."""
    rule, weight = RULES[name]
    p = torch.tensor([weight(k, rule.minimum, tokens) for k in range(1, tokens + 1)], dtype=torch.float64)
    p = (1 - rule.full) * p / p.sum()
    p[-1] += rule.full
    lengths = draw(rule, tokens)
    assert lengths.dtype == torch.int64 and lengths.min() >= 1 and lengths.max() <= tokens
    seen = torch.bincount(lengths, minlength=tokens + 1)[1:].double()
    assert seen[p == 0].sum() == 0
    common = p * len(lengths) >= 10
    expected = torch.cat([p[common], p[~common].sum(0, keepdim=True)]) * len(lengths)
    found = torch.cat([seen[common], seen[~common].sum(0, keepdim=True)])
    chi2 = ((found - expected).square() / expected.clamp(min=1e-9)).sum().item()
    assert stats.chi2.sf(chi2, max(1, len(expected) - 2)) > 1e-3, (chi2, expected, found)


@pytest.mark.parametrize("name", ["normal", "normal cut", "zipf", "zipf long"])
def test_probabilities_are_those_of_the_definition(name):
    rule, weight = RULES[name]
    p = torch.tensor([weight(k, rule.minimum, 32) for k in range(1, 33)], dtype=torch.float64)
    torch.testing.assert_close(rule.probabilities(32), p / p.sum())


def test_a_mean_far_outside_still_draws():
    assert draw(NormalDrop(mean=1e6, sd=1), 8, 50).tolist() == [8] * 50
    assert draw(NormalDrop(mean=-1e6, sd=1), 8, 50).tolist() == [1] * 50
    assert draw(ZipfDrop(exponent=500), 256, 50).tolist() == [1] * 50


def test_fixed_length():
    rule = FixedLength()
    assert draw(rule, 7, 3).tolist() == [7, 7, 7] and rule.allowed(7) == [7] and not rule.nested


def test_log_uniform_gives_each_octave_its_share():
    lengths = draw(TailDrop("log_uniform"), 255)
    octaves = torch.bincount(lengths.float().log2().long(), minlength=8) / len(lengths)
    torch.testing.assert_close(octaves, torch.full((8,), 1 / 8), atol=0.01, rtol=0)
    assert lengths.min() == 1 and lengths.max() == 255


@pytest.mark.parametrize(
    "make",
    [
        lambda m: TailDrop("uniform", minimum=m),
        lambda m: TailDrop("powers_of_two", minimum=m),
        lambda m: TailDrop("uniform_powers_of_two", minimum=m),
        lambda m: TailDrop("log_uniform", minimum=m),
        lambda m: NormalDrop(10, 30, minimum=m),
        lambda m: ZipfDrop(2, minimum=m),
    ],
)
def test_bounds(make):
    for tokens in (1, 2, 3, 64):
        for minimum in (1, 2, 5, 100):
            lengths = draw(make(minimum), tokens, 500)
            assert min(minimum, tokens) <= lengths.min() and lengths.max() <= tokens


@pytest.mark.parametrize("make", [lambda per: TailDrop(per_sample=per), lambda per: NormalDrop(30, 20, per_sample=per)])
def test_per_sample_or_per_batch(make):
    assert len(draw(make(True), 64, 16).unique()) > 1
    assert len(draw(make(False), 64, 16).unique()) == 1
    assert len({draw(make(False), 64, 2, seed)[0].item() for seed in range(20)}) > 1


def test_full_keeps_everything_that_often():
    share = (draw(TailDrop(full=0.5), 64) == 64).float().mean().item()
    assert share == pytest.approx(0.5 + 0.5 / 64, abs=0.02)
    assert draw(ZipfDrop(full=1.0), 64, 9).tolist() == [64] * 9


@pytest.mark.parametrize("name", RULES)
def test_same_generator_same_lengths(name):
    rule = RULES[name][0]
    assert torch.equal(draw(rule, 64, 40), draw(rule, 64, 40))
    assert not torch.equal(draw(rule, 64, 40), draw(rule, 64, 40, seed=1))


def test_any_prefix_may_be_asked_for():
    assert TailDrop("powers_of_two", minimum=4).allowed(5) == [1, 2, 3, 4, 5] and TailDrop().nested
    assert NormalDrop(3, 1, minimum=3).allowed(5) == [1, 2, 3, 4, 5] and ZipfDrop().nested


@pytest.mark.parametrize(
    "rule",
    [
        TailDrop("powers_of_two", per_sample=False, minimum=2, full=0.25),
        NormalDrop(96, sd=32.5, per_sample=False, minimum=2, full=0.25),
        ZipfDrop(0.5, minimum=3),
    ],
)
def test_config_round_trip(rule):
    again = build_part(rule.to_config(), LengthRule)
    assert again.to_config() == rule.to_config() and torch.equal(draw(again, 128, 100), draw(rule, 128, 100))


def test_models_that_exist_keep_their_configuration():
    """Their ids are hashes of it: a new argument here would make every stored token file a foreign one."""
    assert set(TailDrop().to_config()) == {"class", "distribution", "per_sample", "minimum", "full"}
    assert set(FixedLength().to_config()) == {"class"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TailDrop("gaussian"), "distribution"),
        (lambda: TailDrop(minimum=0), "minimum=0"),
        (lambda: ZipfDrop(full=1.5), "full=1.5"),
        (lambda: NormalDrop(8, 0), "sd=0"),
        (lambda: NormalDrop(math.nan, 1), "mean=nan"),
        (lambda: ZipfDrop(math.inf), "exponent"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(TokenError, match=words):
        make()


def test_token_mask():
    assert token_mask(torch.tensor([3, 3]), 3) is None
    assert token_mask(torch.tensor([1, 3]), 3).tolist() == [[True, False, False], [True, True, True]]
