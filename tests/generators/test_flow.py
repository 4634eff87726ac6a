"""Flows: steps against closed forms and diffusers, samples that follow from their seeds alone, scales, codes, and learning."""

import pytest
import torch

from tests.generators import tiny
from tests.training import tiny as tokenizers
from tok1d.errors import ModelError, TokenError
from tok1d.generators import flow as module
from tok1d.generators.condition import ClassCondition, Unconditional
from tok1d.generators.flow import FlowGenerator
from tok1d.generators.generator import Generator
from tok1d.generators.latents import Latents, Scale
from tok1d.generators.row_noise import RowNoise
from tok1d.generators.space import TokenSpace
from tok1d.generators.times import integrate, sampling_times

SPACE = TokenSpace(tokens=6, kind="latents", channels=3, nested=True)


def made(condition=None, **arguments) -> FlowGenerator:
    torch.manual_seed(0)
    model = FlowGenerator(SPACE, condition or ClassCondition(3), **{"width": 32, "depth": 2, "heads": 2, "hidden": 64, **arguments})
    tiny.awake(model.net), tiny.awake(model.condition)
    model.scale.measure([torch.tensor([[[1.0, -2.0, 5.0], [3.0, 0.0, 5.5]]])])
    return model.eval()


# steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_and_steps_are_those_of_diffusers(shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / 7 for i in range(7)])
    times = sampling_times(7, shift)
    torch.testing.assert_close(torch.tensor(times), scheduler.sigmas.cpu(), atol=1e-6, rtol=0)
    x = y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        y = scheduler.step(torch.sin(y), t, y).prev_sample
    torch.testing.assert_close(integrate(lambda x, t, i: torch.sin(x), x, times), y, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("solver", "steps"), [("euler", 100), ("heun", 16), ("maruyama", 100)])
def test_the_velocity_of_a_gaussian_leads_to_it(solver, steps):
    """x ~ N(m, s²): E[e - x | x_t] is known, and noise must become that Gaussian."""
    m, s = 1.5, 0.4

    def velocity(x, t, i):
        spread = ((1 - t) * s) ** 2 + t**2
        return -m + (t - (1 - t) * s**2) / spread * (x - (1 - t) * m)

    noise = RowNoise(range(4))
    kicks = noise.normal(steps - 1, 1000, 1) if solver == "maruyama" else None
    out = integrate(velocity, noise.normal(1000, 1), sampling_times(steps, solver=solver), solver, kicks)
    assert abs(out.mean().item() - m) < 0.04
    assert abs(out.std().item() / s - 1) < (0.10 if solver == "maruyama" else 0.05)  # its last step goes to the mean


def test_heun_is_of_second_order():
    """x' = x over [1, 0] from 1: errors fall with the square of the step; its last step is Euler's, so that is left out."""
    ends = {n: integrate(lambda x, t, i: x, torch.ones(1, 1, 1, dtype=torch.float64), sampling_times(n)[:-1], "heun") for n in (8, 16)}
    errors = {n: abs(ends[n].item() - torch.tensor(-(1 - 1 / n)).exp().item()) for n in ends}
    assert 3.2 < errors[8] / errors[16] < 4.8


def test_steps_are_told():
    told = []
    made().generate(1, label=0, steps=3, tokens=2, on_step=lambda i, n, x: told.append((i, n, tuple(x.shape))))
    assert told == [(0, 3, (1, 2, 3)), (1, 3, (1, 2, 3)), (2, 3, (1, 2, 3))]


# samples -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun", "maruyama"])
def test_a_row_is_the_same_alone_in_a_batch_and_shorter(solver):
    model = made(shift=2.0)
    options = {"steps": 3, "guidance": 2.0, "schedule": "interval(0.3, 1)", "solver": solver}
    whole = model.generate(3, label=[0, 1, 2], seeds=[5, 6, 9], **options)
    assert whole.shape == (3, 6) and whole.data.dtype == torch.float32
    torch.testing.assert_close(model.generate(1, label=2, seeds=[9], **options).data, whole.data[2:], atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(3, label=[0, 1, 2], seeds=[5, 6, 9], tokens=2, **options).data, whole.data[:, :2])
    assert not torch.allclose(model.generate(1, label=1, seeds=[9], **options).data, whole.data[2:], atol=1e-3)


def test_guided_in_one_batch_is_two_forwards_mixed(monkeypatch):
    model, seen = made(), []
    whole = module.guided
    monkeypatch.setattr(module, "guided", lambda both, rows, g: seen.append((both, g)) or whole(both, rows, g))
    model.generate(2, label=[0, 2], guidance=3.0, schedule="interval(0.5, 0.5)", steps=2)
    (first, strength), (both, other) = seen
    assert len(first) == 2 and strength == 1 and len(both) == 4 and other == 3  # a step without guidance has half of the rows
    x = RowNoise([0, 1]).normal(6, 3) - 0.5 * first
    expected = [model.net(x, torch.full((2,), 0.5), model.condition({"label": torch.tensor(y)}, 2)) for y in ([0, 2], [-1, -1])]
    torch.testing.assert_close(both, torch.cat(expected), atol=1e-5, rtol=0)
    assert not torch.allclose(*expected, atol=1e-3)


@pytest.mark.parametrize("solver", ["euler", "maruyama"])
def test_given_tokens_stay_and_are_looked_at(solver):
    model = made(prefix_share=0.5)
    first = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(3))
    out, other = (model.generate(2, label=0, prefix=p, steps=3, solver=solver).data for p in (first, first + 1))
    assert torch.equal(out[:, :2], first.expand(2, -1, -1)) and not torch.allclose(out[:, 2:], other[:, 2:], atol=1e-4)
    told = []
    model.generate(1, label=0, prefix=first, steps=3, solver=solver, on_step=lambda i, n, x: told.append(x[:, :2]))
    assert len(told) == 3 and all(torch.equal(x, first) for x in told)
    with pytest.raises(TokenError, match="prefix_share"):
        made().generate(1, label=0, prefix=first)


# scale and codes -----------------------------------------------------------------------------------------------------


def test_scale_of_training_batches_is_that_of_all_of_them():
    draw, scale = torch.Generator().manual_seed(0), Scale(3, batches=3)
    data = [torch.randn(4, 5, 3, generator=draw) * torch.tensor([1.0, 3.0, 0.0]) + torch.tensor([100.0, -2.0, 7.0]) + i for i in range(4)]
    data = [torch.cat([x[..., :2], torch.full((4, 5, 1), 7.0)], dim=-1) for x in data]
    kept = torch.arange(5) < torch.tensor([5, 1, 3, 2])[:, None]
    for x in data:  # the fourth is too late
        scale.learn(x, kept)
    every = torch.cat([x[kept] for x in data[:3]])
    torch.testing.assert_close(scale.mean, every.mean(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(scale.std[:2], every.std(0, correction=0)[:2], atol=1e-4, rtol=0)
    assert scale.std[2] == 0 and scale.unit[2] == 1 and int(scale.values) == 33
    torch.testing.assert_close(scale.inverse(scale(data[0])), data[0], atol=1e-4, rtol=0)
    with pytest.raises(TokenError, match="no latents"):
        scale.measure([])


def test_codes_of_a_discrete_tokenizer_come_back_as_its_tokens():
    tokenizer = tokenizers.fsq().eval()
    space = TokenSpace.of(tokenizer, "latents")
    ids = torch.arange(2 * space.tokens).view(2, -1) % tokenizer.vocab_size
    near = Latents(tokenizer.quantizer.ids_to_codes(ids) + 0.01, space)
    seq = near.tokens(tokenizer)
    assert torch.equal(seq.ids, ids) and seq.model_id == tokenizer.model_id
    torch.testing.assert_close(near.images(tokenizer), tokenizer.decode(seq), atol=1e-5, rtol=0)
    model = FlowGenerator(space, Unconditional(), width=16, depth=1, heads=2).eval()
    assert model.generate(1, steps=2).images(tokenizer).shape == (1, 3, 16, 16)
    with pytest.raises(TokenError, match="other weights|this generator makes"):
        near.tokens(tokenizers.vq_ema().eval())


# training ------------------------------------------------------------------------------------------------------------


def test_a_distribution_is_learned():
    """Two classes far from each other and of other spread than noise; every token has a mean of its own."""
    torch.manual_seed(0)
    model = FlowGenerator(SPACE, ClassCondition(2), width=32, depth=1, heads=2, hidden=64, measured=5, prefix_share=0.2)
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    centre = torch.randn(2, 6, 3, generator=draw) * 10 + 30
    for _ in range(60):
        label = torch.randint(2, (64,), generator=draw)
        latents = centre[label] + torch.randn(64, 6, 3, generator=draw)
        loss = model.losses({"latents": latents, "label": label}, draw)[0]["flow"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert int(model.scale.measured) == 5 and abs(model.scale.mean.mean().item() - centre.mean().item()) < 2
    label = torch.arange(40) % 2
    out = model.eval().generate(40, label=label, steps=10).data
    assert (out - centre[label]).square().mean() < 0.1 * (out - centre[1 - label]).square().mean()


def test_losses_count_what_lengths_say():
    model = made()
    draw = torch.Generator().manual_seed(2)
    x, lengths, label = torch.randn(4, 6, 3, generator=draw), torch.tensor([2, 6, 5, 1]), torch.tensor([0, 1, 2, -1])
    other = torch.where((torch.arange(6) < lengths[:, None])[..., None], x, 9.0)
    short, same, whole = (
        model.losses({"latents": data, "label": label, **more}, torch.Generator().manual_seed(1))[0]["flow"]
        for data, more in ((x, {"lengths": lengths}), (other, {"lengths": lengths}), (x, {}))
    )
    torch.testing.assert_close(short, same)
    assert not torch.allclose(short, whole)


def test_what_is_saved_comes_back(tmp_path):
    model = made(shift=3.0)
    model.save_pretrained(tmp_path)
    back = Generator.from_pretrained(tmp_path)
    assert torch.equal(back.scale.mean, model.scale.mean)
    assert torch.equal(back.generate(1, label=1, steps=2).data, model.generate(1, label=1, steps=2).data)


def test_what_is_refused():
    with pytest.raises(ModelError, match="a flow makes latents"):
        FlowGenerator(tiny.IDS, Unconditional())
    with pytest.raises(ModelError, match="shift"):
        made(shift=0.0)
    for name, value in (("solver", "rk"), ("shift", -1.0), ("temperature", 0.5), ("steps", 0)):
        with pytest.raises(TokenError, match=name):
            made().generate(1, label=0, **{name: value})
    with pytest.raises(TokenError, match="float latents"):
        made().losses({"latents": torch.zeros(2, 6, 4), "label": torch.zeros(2).long()})
