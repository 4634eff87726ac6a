import math
from collections import Counter

import pytest
import torch

from tok1d.eval.codebook import Codes
from tok1d.eval.systems import Pictures, Rate


def take(measure: Codes, codes: torch.Tensor | None, rate: str = "k4") -> None:
    measure.pictures(None, Pictures(Rate(rate), torch.zeros(0), [], [], [], codes))


def entropy(values) -> float:
    counts = Counter(values)
    n = sum(counts.values())
    return -sum(c / n * math.log2(c / n) for c in counts.values())


def ids(count: int, tokens: int = 5, vocab: int = 7, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (torch.rand(count, tokens, generator=rng) ** torch.arange(1, tokens + 1) * vocab).long()


def test_numbers_are_those_of_a_plain_loop():
    measure, codes = Codes(), ids(40)
    take(measure, codes[:13])
    take(measure, codes[13:])
    row = measure.results(measure.state(), "k4")
    flat = codes.flatten().tolist()
    assert row["tokens"] == 200 and row["distinct"] == len(set(flat))
    assert row["entropy_bits"] == pytest.approx(entropy(flat)) and row["perplexity"] == pytest.approx(2 ** entropy(flat))
    assert row["bits_by_position"] == pytest.approx([entropy(codes[:, p].tolist()) for p in range(5)], abs=1e-4)
    assert row["static_bits_per_image"] == pytest.approx(sum(entropy(codes[:, p].tolist()) for p in range(5)), abs=1e-3)
    assert "bit_entropy_mean" not in row
    assert measure.state() == {} and measure.results({}, "k4") == {}


def test_bits_are_codes_and_bits():
    rng = torch.Generator().manual_seed(1)
    bits = (torch.rand(30, 3, 4, generator=rng) < torch.tensor([0.5, 0.9, 0.2, 1.0])).to(torch.uint8)
    measure = Codes()
    take(measure, bits[:7])
    take(measure, bits[7:])
    row = measure.results(measure.state(), "k4")
    words = [tuple(v) for v in bits.flatten(0, 1).tolist()]
    assert row["distinct"] == len(set(words)) and row["entropy_bits"] == pytest.approx(entropy(words))
    assert row["bits_by_position"] == pytest.approx([entropy(map(tuple, bits[:, p].tolist())) for p in range(3)], abs=1e-4)
    plain = [entropy(bits[:, p, d].tolist()) for p in range(3) for d in range(4)]
    assert row["bit_entropy_mean"] == pytest.approx(sum(plain) / len(plain))


def test_codes_of_many_bits_stay_apart():
    """All 2^12 codes of 12 bits in an alphabet of 80: as many distinct ones as there are."""
    number = torch.arange(4096)
    bits = torch.zeros(4096, 1, 80, dtype=torch.uint8)
    for d in range(12):
        bits[:, 0, 79 - 7 * d if d else 79] = (number >> d) % 2
    measure = Codes()
    take(measure, bits)
    row = measure.results(measure.state(), "k4")
    assert row["distinct"] == 4096 and row["entropy_bits"] == pytest.approx(12)


@pytest.mark.parametrize("wide", [False, True])
def test_parts_together_are_the_whole(wide):
    codes = (ids(30)[..., None] >> torch.arange(3) & 1).to(torch.uint8) if wide else ids(30) + 2**61
    whole, parts = Codes(), []
    take(whole, codes)
    for start, stop in ((0, 1), (1, 20), (20, 30)):
        part = Codes()
        take(part, codes[start:stop])
        take(part, codes[start:stop, :2], "k2")
        parts.append(part.state())
    add = Codes().add
    left, right = add(add(parts[0], parts[1]), parts[2]), add(parts[2], add(parts[1], parts[0]))
    state = whole.state()
    for key, value in state.items():
        assert torch.equal(left[key], value) and torch.equal(right[key], value)
    assert whole.results(left, "k4") == whole.results(state, "k4")
    assert whole.results(left, "k2")["tokens"] == 60


def test_systems_without_codes():
    measure = Codes()
    take(measure, None)
    take(measure, torch.full((9, 2), 3))
    row = measure.results(measure.state(), "k4")
    assert (row["tokens"], row["distinct"], row["perplexity"], row["bits_by_position"]) == (18, 1, 1.0, [0.0, 0.0])
