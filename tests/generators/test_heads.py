"""Heads: probabilities that sum to one, samples that follow them, unbiased losses, noise, and what they refuse."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tests.generators import tiny
from tok1d.errors import ModelError
from tok1d.generators.chance import Chance
from tok1d.generators.heads import Softmax
from tok1d.generators.heads_bits import Bits, MaskedBits, revealed
from tok1d.generators.heads_factors import Channels, SubCodes
from tok1d.generators.sampling import uniforms
from tok1d.generators.space import TokenSpace

SIXTEEN = [name for name, (_, _, space) in tiny.HEADS.items() if space is tiny.IDS]


def attached(name: str, width: int = 8):
    torch.manual_seed(1)
    head, space = tiny.head(name)
    head.attach(width, space)
    return tiny.awake(head), space


def nats(head, state: torch.Tensor, repeats: int = 1) -> torch.Tensor:
    """float (16,): nats of every id after one state (W,)."""
    ids = torch.arange(16)[:, None].expand(16, repeats)
    return head.loss(state.expand(16, repeats, -1), ids, Chance(16, torch.Generator().manual_seed(0))).mean(1)


@pytest.mark.parametrize("name", tiny.HEADS)
def test_an_untrained_head_finds_every_token_equally_likely(name):
    head, space = tiny.head(name)
    head.attach(8, space)
    loss = head.loss(torch.randn(2, 8, 8), tiny.tokens(space, 2), Chance(2))
    assert loss.shape == (2, 8) and loss.dtype == torch.float32
    expected = torch.full((2, 8), space.bits * math.log(2))
    if isinstance(head, MaskedBits):  # one random round stands for all
        per_round = torch.tensor([(b - a) * (len(head.known) - 1) for a, b in itertools.pairwise(head.known)]) * math.log(2)
        assert ((loss[..., None] - per_round).abs().min(-1).values < 1e-4).all()
    else:
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", [n for n in SIXTEEN if "masked" not in n])
@torch.inference_mode()
def test_samples_follow_the_probabilities_of_the_loss(name):
    head, _ = attached(name)
    state = torch.randn(8)
    probability = (-nats(head, state).double()).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    many = 4000
    drawn = head.sample(state.expand(many, -1), uniforms([0], many, head.draws)[0]).bincount(minlength=16)
    chi = ((drawn - many * probability).square() / (many * probability)).sum()
    assert chi < 37.7  # of 15 degrees of freedom, one in a thousand


@torch.inference_mode()
def test_masked_bits_against_all_orders():
    """The exact probabilities of the sampler, by enumeration; the loss is their mean logarithm over orders and rounds."""
    torch.manual_seed(0)
    head = MaskedBits(2, 16, 1)
    head.attach(8, TokenSpace(tokens=4, vocab_size=8))
    tiny.awake(head)
    state, bits = torch.randn(8), head.to_bits(torch.arange(8))  # (8, 3)
    orders = torch.tensor(list(itertools.permutations(range(3))))
    log_p = torch.zeros(6, 8, dtype=torch.float64)
    for o, rank in enumerate(orders):
        for before, now in itertools.pairwise(head.known):
            logits = head.logits(state.expand(8, -1), bits, (rank < before).expand(8, 3)).double()
            each = -F.binary_cross_entropy_with_logits(logits, bits.double(), reduction="none")
            log_p[o] += (each * ((rank >= before) & (rank < now))).sum(1)
    probability = log_p.exp().mean(0)
    assert probability.sum().item() == pytest.approx(1, abs=1e-6) and head.known == [0, 1, 3]
    many = 6000
    drawn = head.sample(state.expand(many, -1), uniforms([0], many, head.draws)[0]).bincount(minlength=8)
    assert ((drawn - many * probability).square() / (many * probability)).sum() < 24.3
    repeats = 3000
    ids = torch.arange(8)[:, None].expand(8, repeats)
    loss = head.loss(state.expand(8, repeats, -1), ids, Chance(8, torch.Generator().manual_seed(0)))
    error = loss.std(1) / repeats**0.5
    assert ((loss.mean(1) + log_p.mean(0)).abs() < 4.5 * error).all() and (error < 0.1).all()


def test_masked_bits_in_one_round_are_independent_bits():
    head = MaskedBits(1, 16, 1)
    head.attach(8, tiny.IDS)
    tiny.awake(head)
    states, ids = torch.randn(2, 8, 8), tiny.tokens(tiny.IDS, 2)
    bits = head.to_bits(ids).float()
    logits = head.logits(states, bits, torch.zeros_like(bits, dtype=torch.bool))
    expected = F.binary_cross_entropy_with_logits(logits, bits, reduction="none").sum(-1)
    torch.testing.assert_close(head.loss(states, ids, Chance(2)), expected)


@pytest.mark.parametrize(("bits", "rounds"), [(1, 1), (16, 4), (18, 18), (66, 7), (5, 64)])
def test_rounds_reveal_every_bit_once(bits, rounds):
    counts = revealed(bits, rounds)
    assert counts[0] == 0 and counts[-1] == bits and len(counts) == min(bits, rounds) + 1
    steps = [b - a for a, b in itertools.pairwise(counts)]
    assert min(steps) >= 1 and (rounds > bits // 2 or steps == sorted(steps))


@pytest.mark.parametrize("name", ["sub-codes", "channels", "wide channels"])
@torch.inference_mode()
def test_digits_chosen_with_a_cache_see_what_the_loss_sees(name, monkeypatch):
    head, space = attached(name)
    states, seen = torch.randn(5, 8), []
    whole = type(head).digit_logits
    monkeypatch.setattr(type(head), "digit_logits", lambda self, x, g: seen.append(whole(self, x, g)) or seen[-1])
    drawn = head.sample(states, uniforms(range(5), head.draws))
    digits = head.to_digits(drawn[:, None])[:, 0]
    inner = head.small_states(states, digits)
    assert len(seen) == len(head.sizes)
    for g, logits in enumerate(list(seen)):
        torch.testing.assert_close(logits, whole(head, inner[:, g], g), atol=1e-5, rtol=1e-5)
    assert torch.equal(head.to_tokens(digits), drawn) and drawn.shape == (5, *space.shape)


@pytest.mark.parametrize("name", tiny.HEADS)
def test_different_tokens_enter_the_trunk_differently(name):
    head, space = attached(name)
    data = tiny.tokens(space, 1, 8) if space.kind == "bits" else torch.arange(16).view(2, 8)
    x = head.embed(data).flatten(0, 1)
    assert x.shape[1] == 8 and torch.cdist(x, x).fill_diagonal_(9).min() > 1e-3


@pytest.mark.parametrize("name", [n for n in tiny.HEADS if "bits" in n])
def test_noise_flips_bits_of_a_row_at_a_rate_of_its_own(name):
    head, _ = attached(name)
    space = TokenSpace(tokens=4000, vocab_size=16) if head.packed else TokenSpace(tokens=4000, kind="bits", bits=66)
    data = tiny.tokens(space, 8)
    assert head.corrupt(data, Chance(8)) is data
    head.noise = 0.3
    noisy = head.corrupt(data, Chance(8, torch.Generator().manual_seed(0)))
    space.check(noisy)
    rate = (head.to_bits(noisy) != head.to_bits(data)).float().mean((1, 2))
    expected = torch.rand(8, 1, 1, generator=torch.Generator().manual_seed(0)).view(8) * 0.3
    assert (rate - expected).abs().max() < 0.015 and expected.max() - expected.min() > 0.1


@pytest.mark.parametrize("name", tiny.HEADS)
def test_every_parameter_learns(name):
    head, space = attached(name)
    data = tiny.tokens(space, 2)
    (head.loss(head.embed(data), data, Chance(2, torch.Generator().manual_seed(0))).sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())


@pytest.mark.parametrize(
    ("head", "space", "message"),
    [
        (Softmax(), tiny.WIDE, "softmax head has a logit for each"),
        (Softmax(), TokenSpace(tokens=1, vocab_size=2**24), "16777216 ids"),
        (SubCodes([4, 5]), tiny.IDS, "make 20 tokens"),
        (Channels([2, 3]), tiny.IDS, "make 32 tokens"),
        (SubCodes([3] * 33), tiny.WIDE, "powers of two"),
        (Bits(), TokenSpace(tokens=1, vocab_size=15), "2\\^d ids"),
        (Bits(), TokenSpace(tokens=1, kind="latents", channels=3), "latents"),
    ],
)
def test_spaces_a_head_cannot_make(head, space, message):
    with pytest.raises(ModelError, match=message):
        head.attach(8, space)


@pytest.mark.parametrize(
    "build",
    [lambda: SubCodes([]), lambda: SubCodes(4), lambda: SubCodes([1, 4]), lambda: Channels(6), lambda: Channels([13]), lambda: MaskedBits(0)],
)
def test_bad_arguments(build):
    with pytest.raises(ModelError):
        build()
