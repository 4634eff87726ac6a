"""The autoregressive generator: cached = uncached, guided = two forwards, prefixes, seeds, lengths, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from tests.generators import tiny
from tok1d.errors import ModelError, TokenError
from tok1d.generators import heads, heads_bits, heads_factors
from tok1d.generators.cache import KVCache
from tok1d.generators.chance import Chance
from tok1d.generators.condition import ClassCondition, Unconditional
from tok1d.generators.space import TokenSpace
from tok1d.generators.trunk import Trunk
from tok1d.tokens import TokenSequence


def same(a: TokenSequence, b: TokenSequence) -> bool:
    return torch.equal(a.data, b.data) and torch.equal(a.lengths, b.lengths)


@pytest.fixture
def raw(monkeypatch):
    """Every batch of logits, with and without the condition, before they are combined."""
    seen = []
    for module in (heads, heads_bits, heads_factors):
        whole = module.guided
        monkeypatch.setattr(module, "guided", lambda both, rows, g, whole=whole: seen.append(both) or whole(both, rows, g))
    return seen


@pytest.mark.parametrize(
    ("name", "variable"),
    [*((name, "none") for name in tiny.HEADS), *((name, v) for name in ("softmax", "wide masked bits") for v in ("announced", "stop"))],
)
@torch.inference_mode()
def test_cached_equals_uncached_and_guided_equals_two_forwards(name, variable, raw):
    model = tiny.ar(name, variable=variable)
    made = model.generate(2, label=[0, 2], seeds=5, guidance=2.5, schedule="linear")
    length, cached = made.shape[1], list(raw)
    raw.clear()
    announced = made.lengths * 0 + 8 if variable == "announced" else None
    for label in ([0, 2], [-1, -1]):  # one forward with the condition, one without
        given = model.condition({"label": torch.tensor(label)}, 2)
        for i in range(length):
            states = model.states(given, made.data[:, : i + 1], announced)[:, i]
            if "masked" in name:  # later rounds look at bits already chosen
                known = torch.zeros(2, model.head.bits, dtype=torch.bool)
                model_logits = [model.head.logits(states, torch.zeros(2, model.head.bits), known)]
            elif hasattr(model.head, "digit_logits"):
                inner = model.head.small_states(states, model.head.to_digits(made.data[:, i]))
                model_logits = [model.head.digit_logits(inner[:, g], g) for g in range(len(model.head.sizes))]
            else:
                model_logits = [model.head.out(states)]
            raw.append(model_logits)
    stages = len(cached) // length
    for i in range(length):
        for stage, (a, b) in enumerate(zip(raw[i], raw[length + i])):
            expected = torch.cat([a, b])
            torch.testing.assert_close(cached[i * stages + stage], expected, atol=1e-4, rtol=0)
            if name in ("softmax", "channels") or stage == 0:
                assert not torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("variable", ["none", "announced", "stop"])
def test_a_short_row_is_the_beginning_of_the_long_one(variable, guidance):
    model = tiny.ar(variable=variable)
    options = {"label": [0, 1, 2], "seeds": 3, "guidance": guidance, "schedule": "power_cosine"}
    said = {"announce": 8} if variable == "announced" else {}
    whole = model.generate(3, **options, **said)
    for k in (1, 3, 7):
        assert same(model.generate(3, tokens=k, **options, **said), whole[:, :k])
    if variable == "announced":
        silent = model.generate(3, announce=0, **options)
        assert same(model.generate(3, tokens=4, announce=0, **options), silent[:, :4])
        assert not same(silent, whole)


@pytest.mark.parametrize("name", tiny.HEADS)
def test_a_row_is_the_same_alone_and_in_any_batch(name):
    model = tiny.ar(name)
    many = model.generate(5, label=[0, 1, 2, 1, 0], seeds=[9, 8, 7, 8, 1], guidance=1.5)
    for i, (label, seed) in enumerate([(0, 9), (1, 8), (2, 7), (1, 8), (0, 1)]):
        assert same(model.generate(1, label=label, seeds=[seed], guidance=1.5), many[i])
    assert torch.equal(many.data[1], many.data[3]) and not torch.equal(many.data[0], many.data[4])


def test_prefixes_are_kept_and_gone_on_from():
    model = tiny.ar()
    options = {"label": [0, 1], "seeds": 4, "guidance": 2.0}
    whole = model.generate(2, **options)
    for k in (1, 5, 8):
        assert same(model.generate(2, prefix=whole[:, :k], **options), whole)
    other = model.generate(2, prefix=torch.tensor([[3, 1]]), **options)
    assert other.ids[:, :2].tolist() == [[3, 1], [3, 1]]


def test_states_do_not_see_what_comes_later():
    model = tiny.ar(variable="announced")
    ids = tiny.tokens(model.space, 2)
    changed = torch.cat([ids[:, :4], (ids[:, 4:] + 1) % 16], 1)
    given = model.condition.null(2)
    a, b = model.states(given, ids), model.states(given, changed)
    assert torch.equal(a[:, :5], b[:, :5]) and (a[:, 5:] != b[:, 5:]).any(-1).all()
    torch.testing.assert_close(model.states(given, ids[:, :3]), a[:, :3], atol=1e-5, rtol=1e-5)


def test_the_cache_is_allocated_once_and_as_large_as_predicted(monkeypatch):
    made = []
    whole = Trunk.cache
    monkeypatch.setattr(Trunk, "cache", lambda *a, **k: made.append(whole(*a, **k)) or made[-1])
    tiny.ar().generate(3, label=0, tokens=5, guidance=2.0)
    assert len(made) == 1 and made[0].position == 6  # class, start, all tokens but the last
    assert made[0].bytes == KVCache.predicted_bytes(2, 6, 2, 7, 16)


def test_loss_is_the_mean_over_tokens_that_count():
    model = tiny.ar()
    ids, label = tiny.tokens(model.space, 3), torch.tensor([0, 2, -1])
    lengths = torch.tensor([8, 3, 1])
    losses, stats = model.losses({"ids": ids, "label": label, "lengths": lengths})
    logits = model.head.logits(model.states(model.condition({"label": label}, 3), ids))
    rows = [F.cross_entropy(logits[i, :k], ids[i, :k], reduction="sum") for i, k in enumerate(lengths.tolist())]
    torch.testing.assert_close(losses["token"], sum(rows) / 12)
    torch.testing.assert_close(stats["bits_per_token"], sum(rows) / 12 / torch.tensor(2.0).log())
    # padding beyond a row's length means nothing
    padded = ids.masked_fill(torch.arange(8) >= lengths[:, None], 0)
    torch.testing.assert_close(model.losses({"ids": padded, "label": label, "lengths": lengths})[0]["token"], losses["token"])


def test_ends_are_learned_where_a_row_may_end():
    model = tiny.ar(variable="stop")
    ids, label, lengths = tiny.tokens(model.space, 2), torch.tensor([0, 1]), torch.tensor([8, 3])
    loss = model.losses({"ids": ids, "label": label, "lengths": lengths})[0]["stop"]
    logits = model.stop(model.states(model.condition({"label": label}, 2), ids)).squeeze(-1)
    nats = [F.softplus(logits[0, i]) for i in range(1, 8)] + [F.softplus(logits[1, i]) for i in (1, 2)] + [F.softplus(-logits[1, 3])]
    torch.testing.assert_close(loss, torch.stack(nats).mean())


def test_rows_end_on_their_own():
    model = tiny.ar(variable="stop")
    model.stop.bias.data.fill_(1.0)
    made = model.generate(40, label=0, seeds=0)
    assert len(set(made.lengths.tolist())) > 2 and made.shape[1] == made.lengths.max() and made.lengths.min() >= 1
    assert (made.ids.masked_fill(made.mask, 0) == 0).all()
    model.stop.bias.data.fill_(-100.0)
    assert set(model.generate(4, label=0).lengths.tolist()) == {8}
    model.stop.bias.data.fill_(100.0)
    assert model.generate(4, label=0).shape == (4, 1)


def test_training_draws_from_the_generator_alone():
    model = tiny.ar("bits", condition=ClassCondition(3, drop=0.5), variable="announced", token_drop=0.5, length_drop=0.5).train()
    model.head.noise = 0.3
    batch = {"ids": tiny.tokens(model.space, 16), "label": torch.arange(16) % 3}

    def loss(seed, **change):
        return model.losses(batch | change, torch.Generator().manual_seed(seed))[0]["token"].item()

    assert loss(1) == loss(1) and len({loss(s) for s in range(4)}) == 4
    model.eval()
    assert loss(1) == loss(2)
    assert loss(1) != loss(1, label=torch.full((16,), -1))


def test_what_training_drops():
    model = tiny.ar(condition=ClassCondition(3, drop=1.0), token_drop=1.0).train()
    ids = tiny.tokens(model.space, 2)
    batch = {"ids": ids, "label": torch.tensor([0, 1])}
    hidden = model.losses(batch, torch.Generator())[0]["token"]
    other = model.losses({**batch, "label": torch.tensor([2, 2])}, torch.Generator())[0]["token"]
    assert torch.equal(hidden, other)
    states = model.states(model.condition.null(2), ids, noise=Chance(2))
    torch.testing.assert_close(states, model.states(model.condition.null(2), ids.flip(1), noise=Chance(2)))


def test_processes_together_do_what_one_does_on_the_joined_batch(monkeypatch):
    from tok1d.generators import chance

    model = tiny.ar("masked bits", variable="announced").train()
    batch = {"ids": tiny.tokens(model.space, 4), "label": torch.tensor([0, 1, 2, 0]), "lengths": torch.tensor([8, 8, 8, 8])}

    def loss(rank, world, rows):
        monkeypatch.setattr(chance, "world", lambda: (rank, world))
        return model.losses({k: v[rows] for k, v in batch.items()}, torch.Generator().manual_seed(2))[0]["token"]

    torch.testing.assert_close((loss(0, 2, slice(2)) + loss(1, 2, slice(2, 4))) / 2, loss(0, 1, slice(4)))


def test_every_parameter_learns():
    model = tiny.ar(variable="announced").train()
    model.losses({"ids": tiny.tokens(model.space, 32), "label": torch.arange(32) % 3}, torch.Generator().manual_seed(0))[0]["token"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_steps_are_reported():
    seen = []
    made = tiny.ar().generate(2, label=0, tokens=4, on_step=lambda *x: seen.append((x[0], x[1], x[2].clone())))
    assert [x[:2] for x in seen] == [(i, 4) for i in range(4)]
    assert all(torch.equal(x[2], made.ids[:, : i + 1]) for i, x in enumerate(seen))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": 3}, r"classes are 0 to 2 \(-1: none in particular\), got 3"),
        ({"label": [0, 7]}, "got 7"),
        ({"label": [0, 1, 2]}, "one for each of the 2 rows, got 3"),
        ({"label": "cat"}, "no class is called 'cat'"),
        ({}, "needs a class"),
        ({"text": "a cat"}, "not a text"),
        ({"label": 0, "tokens": 9}, "rows of 1 to 8 tokens"),
        ({"label": 0, "steps": 8}, "has no option 'steps'; its options: guidance, schedule"),
        ({"label": 0, "colour": "red"}, "no option 'colour'"),
        ({"label": 0, "announce": 8}, "announces no lengths"),
        ({"label": 0, "temperature": -1.0}, "temperature"),
        ({"label": 0, "schedule": "sometimes"}, "schedule must be"),
        ({"label": 0, "seeds": [1]}, "seeds must be"),
        ({"label": 0, "prefix": torch.tensor([[16]])}, "another model made them"),
        ({"label": 0, "prefix": torch.zeros(1, 5, dtype=torch.int64), "tokens": 4}, "of up to 4 tokens"),
        ({"label": 0, "prefix": TokenSequence(torch.zeros(1, 5, dtype=torch.int64), 17)}, "vocabulary of 17"),
    ],
)
def test_what_sampling_refuses(options, message):
    with pytest.raises(TokenError, match=message):
        tiny.ar().generate(2, **options)


def test_more_that_sampling_refuses():
    with pytest.raises(TokenError, match="n must be an integer"):
        tiny.ar().generate(0, label=0)
    with pytest.raises(TokenError, match="unconditional generator has nothing to be guided by"):
        tiny.ar(condition=Unconditional()).generate(1, guidance=2.0)
    with pytest.raises(TokenError, match="unconditional, got label=1"):
        tiny.ar(condition=Unconditional()).generate(1, label=1)
    with pytest.raises(TokenError, match="top_k and top_p choose among ids"):
        tiny.ar("bits").generate(1, label=0, top_k=3)
    with pytest.raises(TokenError, match=r"announce must be 0 \(nothing\) or in 4..8"):
        tiny.ar(variable="announced").generate(1, label=0, tokens=4, announce=2)
    assert tiny.ar(condition=Unconditional()).generate(2).shape == (2, 8)


def test_what_training_refuses():
    model = tiny.ar()
    ids = tiny.tokens(model.space, 2)
    with pytest.raises(TokenError, match="another model made them"):
        model.losses({"ids": ids + 16, "label": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(TokenError, match="got 0..3"):
        model.losses({"ids": ids, "label": torch.tensor([0, 3])})
    with pytest.raises(TokenError, match="needs 'label'"):
        model.losses({"ids": ids})
    with pytest.raises(TokenError, match=r"lengths must be \(2,\)"):
        model.losses({"ids": ids, "label": torch.tensor([0, 1]), "lengths": torch.tensor([3])})
    with pytest.raises(TokenError, match="the batch has no lengths"):
        tiny.ar(variable="stop").losses({"ids": ids, "label": torch.tensor([0, 1])})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"space": TokenSpace(tokens=4, kind="latents", channels=2)}, "makes ids or bits"),
        ({"variable": "maybe"}, "variable must be one of"),
        ({"space": TokenSpace(tokens=4, vocab_size=16), "variable": "stop"}, "needs several lengths"),
        ({"width": 33}, "cannot be split"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ModelError, match=message):
        tiny.ar(**arguments)
