"""Solvers and guidance on velocities known in closed form."""

import pytest
import torch

from tok1d.tokenizers.decoders.flow_sampler import SOLVERS, Guidance, evaluation_times, integrate, seeded_noise

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
V = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 3, 25])
def test_a_constant_velocity_is_followed_exactly(solver, steps):
    torch.testing.assert_close(integrate(lambda x, i: V, X, steps, solver), X - V, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_orders(solver, order):
    """dx/dt = x + t from 1 to 0: halving the step divides the error by 2 ** order."""
    exact = (2 + X.double()) * torch.e**-1 - 1  # x + t + 1 grows like e^t
    errors = []
    for steps in (20, 40):
        times = evaluation_times(steps, solver)
        found = integrate(lambda x, i, times=times: x + times[i], X.double(), steps, solver)
        errors.append((found - exact).abs().mean().item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


def test_every_evaluation_is_asked_for_in_order():
    for solver in SOLVERS:
        asked = []
        integrate(lambda x, i, asked=asked: asked.append(i) or V, X, 5, solver)
        assert asked == list(range(len(evaluation_times(5, solver))))


def test_plain_guidance_starts_without_the_condition():
    torch.testing.assert_close(Guidance(3.0, normalised=False)(X, V), V + 3 * (X - V))


def test_normalised_guidance():
    guide = Guidance(5.0)
    first = guide(X, V)
    push = (first - X).double().flatten(1)
    assert (push * X.double().flatten(1)).sum(1).abs().max() < 1e-4, "only what is across the given velocity is kept"
    assert push.norm(dim=1).max() <= 4 * 2.5 + 1e-5
    assert torch.equal(guide.last, X - V), "the buffer keeps what was not clipped"
    guide(X, V)
    torch.testing.assert_close(guide.last, 0.5 * (X - V))


def test_normalised_guidance_without_a_difference():
    assert torch.equal(Guidance(5.0)(X, X), X)
    zero = torch.zeros_like(X)
    assert torch.equal(Guidance(5.0)(zero, zero), zero)
    assert torch.equal(Guidance(1.0)(X, V), X)


def test_guidance_treats_images_apart():
    guide, alone = Guidance(5.0), Guidance(5.0)
    for scale in (1.0, 0.01):
        torch.testing.assert_close(guide(X, scale * V)[1:], alone(X[1:], scale * V[1:]))


def test_noise_is_of_the_seed():
    noise = seeded_noise([3, 4, 3], (3, 4, 4))
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert seeded_noise([], (3, 4, 4)).shape == (0, 3, 4, 4)
