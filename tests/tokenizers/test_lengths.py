"""Length rules: what is drawn, how often, and what may be asked for."""

import pytest
import torch

from tok1d.errors import TokenError
from tok1d.tokenizers.lengths import FixedLength, LengthRule, TailDrop
from tok1d.tokenizers.part import build_part, token_mask


def draw(rule: LengthRule, tokens: int, n: int = 20_000, seed: int = 0) -> torch.Tensor:
    return rule.sample(n, tokens, torch.Generator().manual_seed(seed))


def test_fixed_length():
    rule = FixedLength()
    assert draw(rule, 7, 3).tolist() == [7, 7, 7] and rule.allowed(7) == [7] and not rule.nested


def test_uniform_is_uniform_over_one_to_all():
    lengths = draw(TailDrop("uniform"), 8)
    assert lengths.dtype == torch.int64
    share = torch.bincount(lengths, minlength=9) / len(lengths)
    assert share[0] == 0
    torch.testing.assert_close(share[1:], torch.full((8,), 1 / 8), atol=0.01, rtol=0)


@pytest.mark.parametrize(("tokens", "expected"), [(8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12]), (1, [1])])
def test_powers_of_two_include_all_tokens(tokens, expected):
    lengths = draw(TailDrop("powers_of_two"), tokens)
    values, counts = lengths.unique(return_counts=True)
    assert values.tolist() == expected
    torch.testing.assert_close(counts / len(lengths), torch.full((len(expected),), 1 / len(expected)), atol=0.02, rtol=0)


def test_log_uniform_gives_each_octave_its_share():
    lengths = draw(TailDrop("log_uniform"), 255)
    octaves = torch.bincount(lengths.float().log2().long(), minlength=8) / len(lengths)
    torch.testing.assert_close(octaves, torch.full((8,), 1 / 8), atol=0.01, rtol=0)
    assert lengths.min() == 1 and lengths.max() == 255


@pytest.mark.parametrize("distribution", ["uniform", "powers_of_two", "log_uniform"])
def test_bounds(distribution):
    for tokens in (1, 2, 3, 64):
        for minimum in (1, 2, 5, 100):
            lengths = draw(TailDrop(distribution, minimum=minimum), tokens, 500)
            assert min(minimum, tokens) <= lengths.min() and lengths.max() <= tokens


def test_per_sample_or_per_batch():
    assert len(draw(TailDrop(per_sample=True), 64, 16).unique()) > 1
    assert len(draw(TailDrop(per_sample=False), 64, 16).unique()) == 1
    assert len({draw(TailDrop(per_sample=False), 64, 2, seed)[0].item() for seed in range(20)}) > 1


def test_full_keeps_everything_that_often():
    share = (draw(TailDrop(full=0.5), 64) == 64).float().mean().item()
    assert share == pytest.approx(0.5 + 0.5 / 64, abs=0.02)


def test_same_generator_same_lengths():
    assert torch.equal(draw(TailDrop(), 64, 10), draw(TailDrop(), 64, 10))
    assert not torch.equal(draw(TailDrop(), 64, 10), draw(TailDrop(), 64, 10, seed=1))


def test_any_prefix_may_be_asked_for():
    assert TailDrop("powers_of_two", minimum=4).allowed(5) == [1, 2, 3, 4, 5] and TailDrop().nested


def test_config_round_trip_and_refusal():
    rule = TailDrop("powers_of_two", per_sample=False, minimum=2, full=0.25)
    assert build_part(rule.to_config(), LengthRule).to_config() == rule.to_config()
    with pytest.raises(TokenError, match="distribution"):
        TailDrop("gaussian")


def test_token_mask():
    assert token_mask(torch.tensor([3, 3]), 3) is None
    assert token_mask(torch.tensor([1, 3]), 3).tolist() == [[True, False, False], [True, True, True]]
