"""Block flows: cached = uncached, blocks see what they may, samples follow from their seeds alone, and a chain is learned."""

import pytest
import torch

from tests.generators import tiny
from tok1d.errors import ModelError, TokenError
from tok1d.generators import block_flow as module
from tok1d.generators.block_flow import BlockFlow
from tok1d.generators.condition import ClassCondition, Condition, Given, Unconditional
from tok1d.generators.generator import Generator
from tok1d.generators.space import TokenSpace

SPACE = TokenSpace(tokens=8, kind="latents", channels=3, nested=True)


class Words(ClassCondition):
    """Three places, of which the last is empty, as texts have; and a vector."""

    def attach(self, width, tokens=True, vector=False):
        super().attach(width, tokens=True, vector=True)
        self.places = 3

    def _given(self, label):
        states = self.table(label)
        tokens = torch.stack([states, states.flip(-1), torch.full_like(states, 100.0)], dim=1)
        return Given(tokens, states, torch.tensor([[True, True, False]]).expand(len(label), -1))


def made(condition: Condition | None = None, blocks=(1, 3, 4), **arguments) -> BlockFlow:
    torch.manual_seed(0)
    model = BlockFlow(SPACE, condition or ClassCondition(3), list(blocks), **{"width": 32, "depth": 2, "heads": 2, "hidden": 64, **arguments})
    tiny.awake(model.net), tiny.awake(model.condition)
    model.scale.measure([torch.tensor([[[1.0, -2.0, 5.0], [3.0, 0.0, 5.5]]])])
    return model.eval()


@pytest.mark.parametrize("condition", [ClassCondition, Words])
def test_cached_equals_uncached_and_guided_equals_two_forwards(condition, monkeypatch):
    model, seen = made(condition(3)), []
    whole = module.guided
    monkeypatch.setattr(module, "guided", lambda both, rows, g: seen.append((both, g)) or whole(both, rows, g))
    out = model.scale(model.generate(2, label=[0, 2], guidance=3.0, steps=1, solver="euler").data)
    assert [g for _, g in seen] == [1.0, 2.0, 3.0]  # from 1 in the first block to what was asked for in the last
    for (start, end), (both, g) in zip(((0, 1), (1, 4), (4, 8)), seen):
        # After the only step x = e - v, so what the block started from is known.
        x = torch.cat([out[:, :start], out[:, start:end] + whole(both, 2, g)], dim=1)
        t = torch.zeros(2, model.condition.places + end)
        t[:, model.condition.places + start :] = 1
        expected = [model.velocity(x, t, model.condition({"label": torch.tensor(y)}, 2))[:, start:] for y in ([0, 2], [-1, -1])]
        torch.testing.assert_close(both, torch.cat(expected), atol=1e-4, rtol=0)
        assert not torch.allclose(*expected, atol=1e-3)


def test_a_block_sees_itself_and_those_before_it():
    model = made()
    given = model.condition({"label": torch.zeros(1).long()}, 1)
    x, t = torch.randn(1, 8, 3), model.of_places(torch.tensor([[0.2, 0.5, 0.9]]), 8)
    assert t.tolist()[0] == pytest.approx([0.2] + [0.5] * 3 + [0.9] * 4)
    whole = model.velocity(x, t, given)
    for i, (start, _) in enumerate([(0, 1), *[(1, 4)] * 3, *[(4, 8)] * 4]):
        other = x.clone()
        other[:, i] += 1
        moved = (model.velocity(other, t, given) - whole).abs().amax(-1)[0] > 1e-6
        assert moved.tolist() == [k >= start for k in range(8)]


@pytest.mark.parametrize("solver", ["euler", "heun", "maruyama"])
def test_a_row_is_the_same_alone_in_a_batch_shorter_and_completed(solver):
    model = made()
    options = {"steps": 3, "guidance": 2.0, "solver": solver}
    whole = model.generate(3, label=[0, 1, 2], seeds=[5, 6, 9], **options).data
    torch.testing.assert_close(model.generate(1, label=2, seeds=[9], **options).data, whole[2:], atol=1e-4, rtol=1e-4)
    for k in (1, 3, 4):
        torch.testing.assert_close(model.generate(3, label=[0, 1, 2], seeds=[5, 6, 9], tokens=k, **options).data, whole[:, :k], atol=1e-4, rtol=1e-4)
    for k in (0, 1, 4, 8):
        again = model.generate(3, label=[0, 1, 2], seeds=[5, 6, 9], prefix=whole[:, :k], **options).data
        assert torch.equal(again[:, :k], whole[:, :k])
        torch.testing.assert_close(again, whole, atol=1e-4, rtol=1e-4)
    other = model.generate(3, label=[0, 1, 2], seeds=[5, 6, 9], prefix=whole[:, :4] + 1, **options).data
    assert not torch.allclose(other[:, 4:], whole[:, 4:], atol=1e-3)
    told = []
    model.generate(1, label=0, steps=2, tokens=3, prefix=whole[:1, :1], on_step=lambda i, n, x: told.append((i, n, x.shape[1])))
    assert told == [(0, 2, 1), (1, 2, 3)]


def test_losses_have_a_time_for_each_block_and_count_what_lengths_say(monkeypatch):
    model, times = made(), []
    whole = model.velocity
    monkeypatch.setattr(model, "velocity", lambda x, t, *rest: times.append(t) or whole(x, t, *rest))
    draw = torch.Generator().manual_seed(2)
    x, lengths, label = torch.randn(4, 8, 3, generator=draw), torch.tensor([2, 8, 5, 1]), torch.tensor([0, 1, 2, -1])
    other = torch.where((torch.arange(8) < lengths[:, None])[..., None], x, 9.0)
    short, same, full = (
        model.losses({"latents": data, "label": label, **more}, torch.Generator().manual_seed(1))[0]["flow"]
        for data, more in ((x, {"lengths": lengths}), (other, {"lengths": lengths}), (x, {}))
    )
    torch.testing.assert_close(short, same)
    assert not torch.allclose(short, full)
    assert all(len(row.unique()) == 3 for row in times[0])


def test_a_chain_is_learned():
    """The first token is -1 or 1, all others are the first times their own factor: later blocks have to look at it."""
    torch.manual_seed(0)
    model = BlockFlow(SPACE, Unconditional(), [1, 3, 4], width=32, depth=1, heads=2, hidden=64, measured=5)
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    factor = torch.randn(8, 3, generator=draw).sign() * 3
    for _ in range(80):
        sign = torch.randint(2, (64, 1, 1), generator=draw) * 2 - 1
        latents = sign * factor + 0.1 * torch.randn(64, 8, 3, generator=draw)
        loss = model.losses({"latents": latents}, draw)[0]["flow"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert int(model.scale.measured) == 5
    out = model.eval().generate(40, steps=10).data * factor.sign()
    sign = out[:, 0].mean(-1).sign()
    assert 8 < int((sign > 0).sum()) < 32
    assert ((out.sign() == sign[:, None, None]).float().mean((1, 2)) > 0.9).float().mean() > 0.8


def test_what_is_saved_comes_back(tmp_path):
    model = made(blocks=(2, 6))
    model.save_pretrained(tmp_path)
    back = Generator.from_pretrained(tmp_path)
    assert back.ends == [2, 8]
    assert torch.equal(back.generate(1, label=1, steps=2).data, model.generate(1, label=1, steps=2).data)


def test_what_is_refused():
    assert BlockFlow(SPACE, Unconditional(), width=16, depth=1, heads=2).ends == [2, 4, 6, 8]
    with pytest.raises(ModelError, match="a flow makes latents"):
        BlockFlow(tiny.IDS, Unconditional())
    with pytest.raises(ModelError, match="8 tokens in all"):
        made(blocks=(1, 3))
    with pytest.raises(ModelError, match="every block"):
        made(blocks=(0, 8))
    with pytest.raises(TokenError, match="whole blocks, 1, 4, 8"):
        made().generate(1, label=0, prefix=torch.zeros(1, 2, 3))
