"""FlowTok: sources of texts, their losses in closed form, samples that follow from text and seed alone, and learning."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.generators import tiny
from tok1d.errors import ModelError, TokenError
from tok1d.generators import flowtok as module
from tok1d.generators.condition import Unconditional
from tok1d.generators.flowtok import FlowTok, divergence
from tok1d.generators.generator import Generator
from tok1d.generators.space import TokenSpace
from tok1d.generators.text import TextCondition

SPACE = TokenSpace(tokens=4, kind="latents", channels=3)
SIZES = {"width": 32, "depth": 1, "heads": 2, "hidden": 64, "source_width": 16, "source_depth": 1, "source_heads": 2}


@pytest.fixture(autouse=True)
def encoder(monkeypatch):
    """A text encoder without a network: a piece for each word, a fixed state for each piece."""
    table = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    def encode(self, texts):
        states, mask = torch.zeros(len(texts), self.length, 8), torch.zeros(len(texts), self.length, dtype=torch.bool)
        for row, pieces in enumerate(self._pieces(texts, cut=True)):
            states[row, : len(pieces)], mask[row, : len(pieces)] = table[pieces], True
        return states, mask

    monkeypatch.setattr(TextCondition, "_pieces", lambda self, texts, cut: [[1, *(2 + len(w) for w in t.split())][: self.length if cut else None] for t in texts])
    monkeypatch.setattr(TextCondition, "encode", encode)


def made(**arguments) -> FlowTok:
    torch.manual_seed(0)
    model = FlowTok(SPACE, TextCondition("nowhere", dim=8, length=4), **{**SIZES, **arguments})
    tiny.awake(model.net), tiny.awake(model.source)
    model.scale.measure([torch.tensor([[[1.0, -2.0, 5.0], [3.0, 0.0, 5.5]]])])
    return model.eval()


def test_divergence_is_that_of_torch_and_the_wall_lets_means_be():
    mean, logvar = torch.tensor([0.0, 1.5, -3.0]), torch.tensor([0.0, -1.0, 0.5])
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(divergence(mean, logvar), expected)
    wall = -0.5 * (1 + logvar - (0.3 * mean) ** 6 - logvar.exp())  # as published
    torch.testing.assert_close(divergence(mean, logvar, "wall"), wall)
    at = divergence(torch.tensor([1.0, 2.0, 6.0]), torch.zeros(3), "wall")
    assert at[0] < 0.001 and at[1] < 0.03 and at[2] > 15


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_row_is_the_same_alone_and_in_a_batch_and_follows_from_text_and_seed(solver):
    model = made()
    options = {"steps": 3, "guidance": 2.0, "solver": solver}
    texts = ["a red cat", "a", "blue"]
    whole = model.generate(3, text=texts, seeds=[5, 6, 9], **options)
    assert whole.shape == (3, 4)
    torch.testing.assert_close(model.generate(1, text="blue", seeds=9, **options).data, whole.data[2:], atol=1e-4, rtol=1e-4)
    for other in ({"text": "blue", "seeds": 8}, {"text": "a", "seeds": 9}):
        assert not torch.allclose(model.generate(1, **other, **options).data, whole.data[2:], atol=1e-3)
    cold = [model.generate(1, text="blue", seeds=s, temperature=0, **options).data for s in (8, 9)]
    assert torch.equal(*cold)  # only the text is left


def test_guided_in_one_batch_is_two_forwards_by_the_indicator(monkeypatch):
    model, seen = made(), []
    monkeypatch.setattr(module, "guided", lambda both, rows, g: seen.append((both, g)) or both[:rows])
    model.generate(2, text=["a cat", ""], guidance=3.0, steps=1, temperature=0)
    mean, _ = model.source(model.condition({"text": ["a cat", ""]}, 2))
    expected = [model.net(mean, torch.ones(2), module.Given(vector=model.indicator(torch.full((2,), i)))) for i in (0, 1)]
    torch.testing.assert_close(seen[0][0], torch.cat(expected), atol=1e-5, rtol=0)
    assert seen[0][1] == 3.0 and not torch.allclose(*expected, atol=1e-3)


def test_alignment_compares_each_source_with_the_texts_of_all_rows():
    model = made()
    given = model.condition({"text": ["a red cat", "blue", "a"]}, 3)
    mean, _ = model.source(given)
    meant = model.meaning(given.tokens)
    table = torch.zeros(3, 3)
    for i in range(3):
        for j in range(3):
            a, b = mean[i][given.mask[i]], meant[j][given.mask[j]]
            n = min(len(a), len(b))
            table[i, j] = (a[:n] * b[:n]).sum() / a.norm() / b.norm() / 0.07
    expected = (F.cross_entropy(table, torch.arange(3)) + F.cross_entropy(table.T, torch.arange(3))) / 2
    torch.testing.assert_close(model.alignment(mean, given), expected, atol=1e-5, rtol=1e-4)
    model.meaning[0].weight.data.zero_(), model.meaning[2].weight.data.zero_()
    same = model.condition({"text": ["a", "a", "a"]}, 3)  # texts that are all the same cannot be told apart
    assert model.alignment(model.source(same)[0], same).item() == pytest.approx(math.log(3), abs=1e-5)


def test_pictures_are_learned_and_losses_follow_from_their_generator():
    torch.manual_seed(0)
    model = FlowTok(SPACE, TextCondition("nowhere", dim=8, length=4), **SIZES, measured=5, time_mean=1.5, time_std=1.5)
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    words, centre = ["a", "red", "blue"], torch.randn(3, 4, 3, generator=draw) * 10 + 30
    for _ in range(50):
        which = torch.randint(3, (48,), generator=draw)
        batch = {"latents": centre[which] + torch.randn(48, 4, 3, generator=draw), "text": [words[i] for i in which]}
        losses, _ = model.losses(batch, draw)
        optimizer.zero_grad()
        sum(model.loss_weights[name] * loss for name, loss in losses.items()).backward()
        optimizer.step()
    assert set(losses) == {"flow", "kl", "alignment"} and int(model.scale.measured) == 5
    which = torch.arange(30) % 3
    out = model.eval().generate(30, text=[words[i] for i in which], steps=8, guidance=1.5).data
    off = (out[:, None] - centre).square().mean((2, 3))
    assert (off.argmin(1) == which).float().mean() > 0.9  # by chance: a third
    given = torch.stack([model.losses(batch, torch.Generator().manual_seed(1))[0]["flow"] for _ in range(2)])
    assert torch.equal(given[0], given[1])  # the same choices from the same state


def test_swapped_rows_learn_pictures_of_others(monkeypatch):
    model, seen = made(shuffled=1.0, measured=0).train(), []
    whole = model.scale.forward
    monkeypatch.setattr(model.scale, "forward", lambda x: seen.append(x) or whole(x))
    x = torch.arange(6.0)[:, None, None].expand(6, 4, 3).contiguous()
    batch = {"latents": x, "text": ["a"] * 6, "lengths": torch.tensor([1, 2, 3, 4, 4, 4])}
    model.losses(batch, torch.Generator().manual_seed(1))
    model.eval().losses(batch, torch.Generator().manual_seed(1))
    assert sorted(seen[0][:, 0, 0].tolist()) == list(range(6)) and not torch.equal(seen[0], x)
    assert torch.equal(seen[1], x)


def test_what_is_saved_comes_back(tmp_path):
    model = made(divergence="wall")
    model.save_pretrained(tmp_path)
    back = Generator.from_pretrained(tmp_path)
    assert back.divergence == "wall" and back.loss_weights["kl"] == 0.01
    assert torch.equal(*(m.generate(1, text="a cat", steps=2).data for m in (model, back)))


def test_what_is_refused():
    with pytest.raises(ModelError, match="length=4"):
        FlowTok(SPACE, TextCondition("nowhere", dim=8, length=7), **SIZES)
    with pytest.raises(ModelError, match="this condition has 0"):
        FlowTok(SPACE, Unconditional(), **SIZES)
    with pytest.raises(ModelError, match="a flow makes latents"):
        FlowTok(tiny.IDS, TextCondition("nowhere", dim=8, length=8))
    with pytest.raises(ModelError, match="divergence"):
        made(divergence="none")
    for options, message in (({"solver": "maruyama"}, "need noise"), ({"prefix": torch.zeros(1, 1, 3)}, "no option 'prefix'"), ({"text": "a b c d"}, "5 pieces")):
        with pytest.raises(TokenError, match=message):
            made().generate(1, **{"text": "a", **options})
