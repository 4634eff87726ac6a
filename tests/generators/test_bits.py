"""Bit diffusion: closed forms of its steps, oracles, samples that follow from their seeds alone, and a language learned in seconds."""

import pytest
import torch

from tests.generators import tiny
from tok1d.errors import ModelError, TokenError
from tok1d.generators import bits as module
from tok1d.generators.bits import BitDiffusion, clean_logits, clean_probability, noised, posterior, step_bits
from tok1d.generators.condition import ClassCondition, Unconditional
from tok1d.generators.generator import Generator
from tok1d.generators.row_noise import RowNoise
from tok1d.generators.space import TokenSpace


def made(space=tiny.IDS, condition=None, **arguments) -> BitDiffusion:
    torch.manual_seed(0)
    model = BitDiffusion(space, condition or ClassCondition(3), **{"width": 32, "depth": 2, "heads": 2, "hidden": 64, **arguments})
    return tiny.awake(model).eval()


# steps ---------------------------------------------------------------------------------------------------------------


def test_flips_become_what_is_clean():
    flips, x = torch.tensor([2.0, 2.0, -1.0]), torch.tensor([False, True, True])
    assert clean_logits(flips, x).tolist() == [2.0, -2.0, 1.0]
    s, bit = flips.sigmoid(), x.float()
    torch.testing.assert_close(clean_probability(flips, x), bit * (1 - s) + (1 - bit) * s)
    assert clean_probability(flips, x, 0).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(("t", "after"), [(1.0, 0.7), (0.6, 0.3), (0.9, 0.05)])
def test_posterior_leads_from_one_noise_to_the_next(t, after):
    """Sum over x_t of q(x_t | x_0) q(x_after | x_t, x_0) is q(x_after | x_0), and tosses of both spans make that of the whole."""
    for clean in (0.0, 1.0):
        p, at_t = torch.tensor(clean), noised(torch.tensor(clean), t)
        both = [posterior(p, torch.tensor(x), t, after) for x in (0, 1)]
        torch.testing.assert_close((1 - at_t) * both[0] + at_t * both[1], noised(p, after))
    # With a belief, the steps average over what is believed: the true belief of a fair bit keeps it fair.
    believed = [noised(torch.tensor(float(x)), t) for x in (0, 1)]  # P(x_0 = 1 | x_t = x) if both values were as likely
    parts = [posterior(b, torch.tensor(x), t, after) for x, b in enumerate(believed)]
    torch.testing.assert_close(sum(parts) / 2, torch.tensor(0.5))
    # And bit by bit it is what counting all cases (x_0, x_after, x_t) gives.
    toss = (t - after) / (1 - after)
    for x in (0, 1):
        cases = torch.zeros(2)
        for clean in (0, 1):
            for y in (0, 1):
                q = noised(torch.tensor(float(clean)), after)
                q_y = q if y else 1 - q
                to_x = noised(torch.tensor(float(y)), toss)
                cases[y] += 0.5 * q_y * (to_x if x else 1 - to_x)
        torch.testing.assert_close(parts[x], cases[1] / cases.sum())


@pytest.mark.parametrize("sampler", module.SAMPLERS)
def test_an_oracle_ends_at_its_bits_and_has_the_right_noise_on_the_way(sampler):
    clean = torch.rand(4, 64, 64, generator=torch.Generator().manual_seed(0)) < 0.3
    noise = RowNoise(range(4))
    x = noise.uniform(64, 64) < 0.5
    times = [1.0, 0.8, 0.5, 0.2, 0.0]
    for t, after in zip(times, times[1:]):
        x = step_bits(clean.float(), x, t, after, sampler, noise)
        assert abs((x != clean).float().mean().item() - after / 2) < 4 * (0.25 / x.numel()) ** 0.5
    assert torch.equal(x, clean)


def test_steps_of_the_posterior_keep_bits_that_fresh_noise_tosses_again():
    p, x = torch.full((2, 64, 64), 0.5), torch.rand(2, 64, 64) < 0.5
    kept = {s: (step_bits(p, x, 0.50, 0.48, s, RowNoise([0, 1])) == x).float().mean().item() for s in module.SAMPLERS}
    assert kept["posterior"] > 0.95 and 0.45 < kept["fresh"] < 0.55


# samples -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [tiny.IDS, tiny.WIDE], ids=["ids", "bits"])
@pytest.mark.parametrize("sampler", module.SAMPLERS)
def test_a_row_is_the_same_alone_in_a_batch_and_shorter(space, sampler):
    model = made(space)
    options = {"steps": 3, "guidance": 2.0, "schedule": "linear", "sampler": sampler}
    whole = model.generate(3, label=[0, 1, 2], seeds=[5, 6, 9], **options)
    assert whole.data.dtype == space.dtype and whole.shape == (3, 8)
    assert torch.equal(model.generate(1, label=2, seeds=[9], **options).data, whole.data[2:])
    assert torch.equal(model.generate(3, label=[0, 1, 2], seeds=[5, 6, 9], tokens=3, **options).data, whole.data[:, :3])
    assert not torch.equal(model.generate(3, label=[0, 1, 2], seeds=[5, 6, 8], **options).data[2], whole.data[2])


def test_guided_in_one_batch_is_two_forwards_mixed(monkeypatch):
    model, seen = made(), []
    monkeypatch.setattr(module, "guided", lambda both, rows, g: seen.append((both, g)) or both[:rows])
    model.generate(2, label=[0, 2], guidance=3.0, steps=1)
    x = RowNoise([0, 1]).uniform(8, 4) < 0.5
    expected = [
        model.net(x * 2.0 - 1, torch.ones(2), model.condition({"label": torch.tensor(label)}, 2)) for label in ([0, 2], [-1, -1])
    ]
    torch.testing.assert_close(seen[0][0], torch.cat(expected), atol=1e-5, rtol=0)
    assert seen[0][1] == 3.0 and not torch.allclose(*expected, atol=1e-3)


def test_given_tokens_stay():
    model = made(prefix_share=0.5)
    first = torch.tensor([[3, 15, 0]])
    out = model.generate(2, label=0, prefix=first, steps=3)
    assert out.ids[:, :3].tolist() == [[3, 15, 0]] * 2
    assert torch.equal(model.generate(2, label=0, prefix=torch.zeros(1, 0, dtype=torch.int64), steps=3).ids, model.generate(2, label=0, steps=3).ids)
    with pytest.raises(TokenError, match="prefix_share"):
        made().generate(1, label=0, prefix=first)


# training ------------------------------------------------------------------------------------------------------------


def test_a_language_is_learned():
    torch.manual_seed(0)
    space = TokenSpace(tokens=6, vocab_size=8)
    words = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 0, 7, 0, 7, 0]])
    model = BitDiffusion(space, ClassCondition(2), width=32, depth=1, heads=2, hidden=64, prefix_share=0.3)
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    for _ in range(50):
        label = torch.randint(2, (64,), generator=draw)
        losses, stats = model.losses({"ids": words[label], "label": label}, draw)
        optimizer.zero_grad()
        losses["bit"].backward()
        optimizer.step()
    assert losses["bit"] < 0.25 and stats["accuracy"] > 0.9
    label = torch.arange(20) % 2
    for sampler in module.SAMPLERS:
        made = model.eval().generate(20, label=label, steps=8, sampler=sampler, guidance=1.5)
        assert (made.ids == words[label]).all(1).float().mean() > 0.75  # by chance: one in 262,144


def test_losses_count_what_lengths_say_and_begin_at_a_coin_toss():
    torch.manual_seed(0)
    model = BitDiffusion(tiny.IDS, Unconditional(), width=16, depth=1, heads=2).eval()
    ids, lengths = tiny.tokens(tiny.IDS, 4), torch.tensor([2, 8, 5, 1])
    assert model.losses({"ids": ids})[0]["bit"].item() == pytest.approx(0.6931, abs=1e-3)
    tiny.awake(model)
    other = torch.where(torch.arange(8) < lengths[:, None], ids, 15 - ids)
    short, same, whole = (
        model.losses(batch, torch.Generator().manual_seed(1))[0]["bit"]
        for batch in ({"ids": ids, "lengths": lengths}, {"ids": other, "lengths": lengths}, {"ids": ids})
    )
    torch.testing.assert_close(short, same)
    assert not torch.allclose(short, whole)


def test_what_is_saved_comes_back(tmp_path):
    model = made(tiny.WIDE)
    model.save_pretrained(tmp_path)
    back = Generator.from_pretrained(tmp_path)
    assert torch.equal(back.generate(1, label=1, steps=2).data, model.generate(1, label=1, steps=2).data)


def test_what_is_refused():
    with pytest.raises(ModelError, match="2\\^d ids"):
        made(TokenSpace(tokens=4, vocab_size=9))
    with pytest.raises(ModelError, match="2\\^d ids"):
        made(TokenSpace(tokens=4, kind="latents", channels=2))
    with pytest.raises(ModelError, match="time_std"):
        made(time_std=0)
    for name, value in (("sampler", "b"), ("power", 0), ("top_k", 3)):
        with pytest.raises(TokenError, match=name):
            made().generate(1, label=0, **{name: value})
    with pytest.raises(TokenError, match="lengths must be"):
        made().losses({"ids": tiny.tokens(tiny.IDS, 2), "label": torch.zeros(2).long(), "lengths": torch.ones(3).long()})
