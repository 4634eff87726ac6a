"""RAR: random orders, target-aware positions, cached = uncached, prefixes, seeds, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from tests.generators import tiny
from tests.generators.test_masked import Padded
from tok1d.errors import ModelError, TokenError
from tok1d.generators.chance import Chance
from tok1d.generators.condition import ClassCondition, Condition, Unconditional
from tok1d.generators.generator import Generator
from tok1d.generators.rar import RARGenerator
from tok1d.generators.rar_blocks import RARTrunk
from tok1d.generators.space import TokenSpace

CONDITIONS = {"class": lambda: ClassCondition(3), "none": Unconditional, "padded": Padded}


def rar(name: str = "softmax", condition: Condition | None = None, **arguments) -> RARGenerator:
    """An awake model in eval mode: 8 tokens, 3 classes."""
    torch.manual_seed(0)
    made, space = tiny.head(name)
    arguments = {"width": 32, "depth": 2, "heads": 2, **arguments}
    return tiny.awake(RARGenerator(arguments.pop("space", space), condition or ClassCondition(3), head=made, **arguments)).eval()


# orders --------------------------------------------------------------------------------------------------------------


def test_share_of_random_orders_falls_between_two_steps():
    model = rar(random_until=100, natural_from=300)
    assert [model.random_share(step) for step in (0, 99, 100, 150, 200, 299, 300, 10**9)] == [1, 1, 1, 0.75, 0.5, 0.0050000000000000044, 0, 0]
    assert rar(random_until=100, natural_from=100).random_share(99) == 1 and rar().random_share(0) == 0


def test_orders():
    model, tokens = rar(), torch.arange(8)
    lengths = torch.full((3000,), 8)

    def draw(share, lengths=lengths, n=8):
        return model.draw_orders(lengths, n, share, Chance(len(lengths), torch.Generator().manual_seed(0)))

    order = draw(1.0)
    assert torch.equal(order.sort(1).values, tokens.expand(3000, -1))
    counts = torch.stack([(order == t).double().mean(0) for t in range(8)])
    assert (counts - 1 / 8).abs().max() < 0.03  # every token is as often everywhere
    assert torch.equal(draw(0.0), tokens.expand(3000, -1))
    natural = (draw(0.25) == tokens).all(1).double().mean()
    assert abs(natural - 0.75) < 0.03
    short = draw(1.0, torch.tensor([3, 8, 1] * 100))
    assert torch.equal(short[::3, 3:], tokens[3:].expand(100, -1)) and torch.equal(short[2::3], tokens.expand(100, -1))
    assert torch.equal(short[::3, :3].sort(1).values, tokens[:3].expand(100, -1)) and len(short[::3, :3].unique(dim=0)) == 6
    model = rar(groups=[1, 2, 5])
    order = draw(1.0)
    assert (order[:, 0] == 0).all() and torch.equal(order[:, 1:3].sort(1).values, tokens[1:3].expand(3000, -1))
    assert len(order[:, 3:].unique(dim=0)) == 120
    assert draw(1.0, torch.full((4,), 6), 6).shape == (4, 6)


@pytest.mark.parametrize("condition", CONDITIONS)
@torch.inference_mode()
def test_a_state_sees_what_came_before_and_where_the_next_token_is(condition):
    model = rar(condition=CONDITIONS[condition]())
    given, ids = model.condition({"label": torch.tensor([0])}, 1), tiny.tokens(model.space, 1)

    def states(order, data=ids):
        order = torch.tensor([order])
        return model.states(given, data.gather(1, order), order)[0]

    base = states([3, 1, 6, 0, 2, 7, 4, 5])
    assert base.shape == (9, 32)
    other = states([3, 1, 6, 5, 2, 7, 4, 0])  # the fourth is another one: seen where it is to be predicted, and after
    assert torch.equal(base[:3], other[:3]) and (base[3:8] != other[3:8]).any(-1).all()
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 16  # the fourth in the first order
    other = states([3, 1, 6, 0, 2, 7, 4, 5], changed)
    assert torch.equal(base[:4], other[:4]) and (base[4:] != other[4:]).any(-1).all()
    natural = model.states(given, ids)
    torch.testing.assert_close(states(list(range(8))), natural[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(model.states(given, ids[:, :3])[0], natural[0, :4], atol=1e-5, rtol=1e-5)
    if condition == "padded":
        model.condition.states[2] *= -1
        torch.testing.assert_close(model.states(model.condition({}, 1), ids), natural, atol=1e-5, rtol=0)


def test_the_last_norm_takes_scale_before_shift():
    trunk = RARTrunk(8, 1, 2, 16, 4)
    torch.nn.init.zeros_(trunk.blocks[0].modulation.weight)
    trunk.modulation.bias.data = torch.cat([torch.full((8,), 2.0), torch.full((8,), 0.5)])
    x = torch.randn(1, 3, 8)
    made = trunk(x, trunk.modulations(torch.zeros(1, 8), 0, 3))
    torch.testing.assert_close(made, F.layer_norm(x, [8], eps=1e-6) * 3 + 0.5)


# sampling ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.HEADS)
@pytest.mark.parametrize("condition", CONDITIONS)
@torch.inference_mode()
def test_cached_equals_uncached_and_guided_equals_two_forwards(name, condition, monkeypatch):
    model, seen = rar(name, CONDITIONS[condition]()), []
    sample = model.head.sample
    monkeypatch.setattr(model.head, "sample", lambda states, *rest: seen.append(states) or sample(states, *rest))
    guidance = 2.5 if condition == "class" else 1.0
    asked = {"label": [0, 2]} if condition == "class" else {}
    made = model.generate(2, seeds=5, guidance=guidance, schedule="linear", **asked)
    sides = [model.condition({"label": torch.tensor([0, 2])}, 2), *([model.condition.null(2)] if guidance != 1 else [])]
    whole = torch.cat([model.states(side, made.data)[:, :8] for side in sides])
    torch.testing.assert_close(torch.stack(seen, 1), whole, atol=1e-4, rtol=0)
    if condition == "class":
        assert not torch.allclose(whole[:2], whole[2:], atol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_short_row_is_the_beginning_of_the_long_one(guidance):
    model = rar()
    options = {"label": [0, 1, 2], "seeds": 3, "guidance": guidance, "schedule": "power_cosine"}
    whole = model.generate(3, **options)
    for k in (1, 3, 7):
        assert torch.equal(model.generate(3, tokens=k, **options).ids, whole.ids[:, :k])
        assert torch.equal(model.generate(3, prefix=whole[:, :k], **options).ids, whole.ids)
    assert torch.equal(model.generate(3, prefix=whole, **options).ids, whole.ids)
    other = model.generate(3, prefix=torch.tensor([[3, 1]]), **options)
    assert other.ids[:, :2].tolist() == [[3, 1]] * 3


def test_a_row_is_the_same_alone_and_in_any_batch_and_chunk(monkeypatch):
    model = rar()
    many = model.generate(5, label=[0, 1, 2, 1, 0], seeds=[9, 8, 7, 8, 1], guidance=1.5)
    for i, (label, seed) in enumerate([(0, 9), (1, 8), (2, 7), (1, 8), (0, 1)]):
        assert torch.equal(model.generate(1, label=label, seeds=[seed], guidance=1.5).ids[0], many.ids[i])
    assert torch.equal(many.ids[1], many.ids[3]) and not torch.equal(many.ids[0], many.ids[4])
    assert rar().trunk.chunk(2, 10**4) == 10**4 // (2 * 14 * 32) and rar().trunk.chunk(2, 1) == 1
    for chunk in (1, 3):
        monkeypatch.setattr(RARTrunk, "chunk", lambda self, rows, chunk=chunk: chunk)
        again = model.generate(5, label=[0, 1, 2, 1, 0], seeds=[9, 8, 7, 8, 1], guidance=1.5)
        assert torch.equal(again.ids, many.ids)


def test_modulations_are_computed_once_for_rows_of_one_class(monkeypatch):
    model, rows = rar(), []
    whole = RARTrunk.modulations
    monkeypatch.setattr(RARTrunk, "modulations", lambda self, vector, *x: rows.append((len(vector), *x)) or whole(self, vector, *x))
    model.generate(4, label=[0, 1, 0, 1], guidance=2.0)
    assert rows == [(3, 0, 10)]  # two classes and none, all places at once


def test_the_order_of_steps_and_reports():
    seen = []
    made = rar().generate(2, label=0, tokens=4, on_step=lambda *x: seen.append((x[0], x[1], x[2].clone())))
    assert [x[:2] for x in seen] == [(i, 4) for i in range(4)]
    assert all(torch.equal(x[2], made.ids[:, : i + 1]) for i, x in enumerate(seen))


# training ------------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_tokens_that_count():
    model = rar(random_until=5, natural_from=10)
    ids, label, lengths = tiny.tokens(model.space, 3), torch.tensor([0, 2, -1]), torch.tensor([8, 3, 1])
    batch = {"ids": ids, "label": label, "lengths": lengths}
    natural = model.losses(batch)[0]["token"]  # in evaluation
    logits = model.head.logits(model.states(model.condition({"label": label}, 3), ids))
    rows = [F.cross_entropy(logits[i, :k], ids[i, :k], reduction="sum") for i, k in enumerate(lengths.tolist())]
    torch.testing.assert_close(natural, sum(rows) / 12)

    model.condition.drop = 0.0
    losses, stats = model.train().losses({**batch, "step": 0}, torch.Generator().manual_seed(3))
    order = model.draw_orders(lengths, 8, 1.0, Chance(3, torch.Generator().manual_seed(3)))
    shuffled = ids.gather(1, order)
    logits = model.head.logits(model.states(model.condition({"label": label}, 3), shuffled, order))
    rows = [F.cross_entropy(logits[i, :k], shuffled[i, :k], reduction="sum") for i, k in enumerate(lengths.tolist())]
    torch.testing.assert_close(losses["token"], sum(rows) / 12)
    assert stats["random"] == 1 and losses["token"] != natural
    losses, stats = model.losses({**batch, "step": 10}, torch.Generator().manual_seed(3))
    torch.testing.assert_close(losses["token"], natural)
    assert stats["random"] == 0


@pytest.mark.parametrize("name", ["softmax", "masked bits"])
def test_processes_together_do_what_one_does_on_the_joined_batch(name, monkeypatch):
    from tok1d.generators import chance

    model = rar(name, condition=ClassCondition(3, drop=0.5), random_until=5, natural_from=10, token_drop=0.3).train()
    batch = {"ids": tiny.tokens(model.space, 4), "label": torch.tensor([0, 1, 2, 0])}

    def loss(seed, rank=0, world=1, rows=slice(4)):
        monkeypatch.setattr(chance, "world", lambda: (rank, world))
        part = {k: v[rows] for k, v in batch.items()}
        return model.losses({**part, "step": 7}, torch.Generator().manual_seed(seed))[0]["token"]

    assert torch.equal(loss(1), loss(1)) and len({loss(s).item() for s in range(4)}) == 4
    torch.testing.assert_close((loss(2, 0, 2, slice(2)) + loss(2, 1, 2, slice(2, 4))) / 2, loss(2))


def test_every_parameter_learns():
    model = rar(token_drop=0.3).train()
    model.losses({"ids": tiny.tokens(model.space, 32), "label": torch.arange(32) % 3}, torch.Generator().manual_seed(0))[0]["token"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_it_learns_in_random_orders_and_then_in_the_natural_one():
    """Rows of class c count up by c + 1 from any first token."""
    torch.manual_seed(0)
    space = TokenSpace(tokens=6, vocab_size=6)
    model = RARGenerator(space, ClassCondition(2), width=32, depth=1, heads=2, random_until=20, natural_from=60)
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(1)
    for step in range(100):
        first, label = torch.randint(6, (32,), generator=draw), torch.randint(2, (32,), generator=draw)
        ids = (first[:, None] + (1 + 4 * label)[:, None] * torch.arange(6)) % 6
        optimizer.zero_grad()
        model.losses({"ids": ids, "label": label, "step": step}, draw)[0]["token"].backward()
        optimizer.step()
    label = torch.arange(60) % 2
    made = model.eval().generate(60, label=label).ids
    assert (made == (made[:, :1] + (1 + 4 * label)[:, None] * torch.arange(6)) % 6).all(1).float().mean() > 0.8
    assert len(made[:, 0].unique()) >= 5


# folders and refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "bits", "sub-codes"])
def test_what_is_saved_comes_back(name, tmp_path):
    model = rar(name, groups=[3, 5], natural_from=7)
    model.save_pretrained(tmp_path)
    back = Generator.from_pretrained(tmp_path)
    assert type(back) is RARGenerator and back.model_id == model.model_id and back.to_config() == model.to_config()
    made, again = (m.generate(2, label=1, guidance=2.0) for m in (model, back))
    assert torch.equal(made.data, again.data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": 3}, "classes are 0 to 2"),
        ({"label": 0, "tokens": 9}, "rows of 1 to 8 tokens"),
        ({"label": 0, "steps": 8}, "has no option 'steps'; its options: guidance, schedule, temperature, top_k"),
        ({"label": 0, "prefix": torch.tensor([[16]])}, "another model made them"),
        ({"label": 0, "schedule": "sometimes"}, "schedule must be"),
    ],
)
def test_what_sampling_refuses(options, message):
    with pytest.raises(TokenError, match=message):
        rar().generate(2, **options)


def test_more_that_is_refused():
    batch = {"ids": tiny.tokens(tiny.IDS, 2), "label": torch.tensor([0, 1])}
    for step in (None, -1, 1.0, True):
        with pytest.raises(TokenError, match="orders depend on the step of training: the batch needs 'step', an integer from 0"):
            rar(natural_from=5).train().losses({**batch, "step": step})
    assert rar().train().losses(batch)[1]["random"] == 0  # never random: no step needed
    with pytest.raises(TokenError, match="top_k and top_p choose among ids"):
        rar("bits").generate(1, label=0, top_k=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"space": TokenSpace(tokens=4, kind="latents", channels=2)}, "makes ids or bits"),
        ({"random_until": 5, "natural_from": 4}, r"natural_from must be an integer in 5\.\."),
        ({"groups": [4, 3]}, "groups must be sizes from 1 that sum to 8 tokens"),
        ({"groups": [9, -1]}, "groups must be sizes from 1"),
        ({"width": 33}, "cannot be split"),
        ({"spare_times": -1}, "spare_times must be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ModelError, match=message):
        rar(**arguments)
