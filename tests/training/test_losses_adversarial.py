"""Adversarial formulas against closed forms, and the Adversary against a discriminator trained by hand, alone and on two ranks."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError, UsageError
from tok1d.training.losses.adversarial import (
    Adversary,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    lecam,
)
from tok1d.training.losses.alignment import all_rows, image_relation


def small(seed: int = 0) -> nn.Module:
    """Smooth, so that comparisons are not at the mercy of a kink; logits (B, 1, 4, 4)."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.SiLU(), nn.Conv2d(4, 1, 3, 1, 1))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return net


def pictures(seed: int, batch: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, 8, 8, generator=generator), torch.rand(batch, 3, 8, 8, generator=generator) * 0.8


def weights(adversary: Adversary) -> Tensor:
    return torch.cat([p.detach().flatten() for p in adversary.params])


def test_formulas_are_the_papers() -> None:
    real, fake = torch.randn(5, 1, 3, 3), torch.randn(5, 1, 3, 3)
    hinge = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    torch.testing.assert_close(discriminator_loss(real, fake, "hinge"), hinge)
    torch.testing.assert_close(generator_loss(fake, "hinge"), -fake.mean())
    entropy = F.binary_cross_entropy_with_logits
    both = 0.5 * (entropy(real, torch.ones_like(real)) + entropy(fake, torch.zeros_like(fake)))
    torch.testing.assert_close(discriminator_loss(real, fake, "non_saturating"), both)
    torch.testing.assert_close(generator_loss(fake, "non_saturating"), -fake.sigmoid().log().mean())


@pytest.mark.parametrize(
    ("real", "fake", "expected"),
    [(0.9, -0.5, (0.9 + 0.2) ** 2 + (0.4 + 0.5) ** 2), (-0.5, -0.5, 0.9**2), (0.1, 0.7, 0.3**2), (-0.3, 0.5, 0.0)],
)
def test_lecam_by_hand(real: float, fake: float, expected: float) -> None:
    found = lecam(torch.tensor([real, fake]), torch.tensor([0.4, -0.2]))
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_gradient_penalty_of_a_linear_and_of_a_quadratic_discriminator() -> None:
    class Plane(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.w).sum((1, 2, 3))[:, None].expand(-1, 7)  # seven equal verdicts are as steep as one

    plane, real = Plane(), pictures(0)[0]
    penalty = gradient_penalty(plane, real)
    assert penalty.item() == pytest.approx(plane.w.square().sum().item(), rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(plane.w.grad, 2 * plane.w.detach())  # it can be learned from
    square = gradient_penalty(lambda x: x.square().sum((1, 2, 3)) / 2, real)  # type: ignore[arg-type]
    assert square.item() == pytest.approx(real.square().sum((1, 2, 3)).mean().item(), rel=1e-5)


def test_gradient_penalty_goes_through_attention() -> None:
    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(3, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x.flatten(2).mT).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v).mean((1, 2, 3))

    net = Attentive()
    gradient_penalty(net, pictures(0)[0]).backward()
    assert net.qkv.weight.grad is not None
    assert net.qkv.weight.grad.abs().max() > 0


def test_adaptive_weight_by_hand_and_before_the_start() -> None:
    last = nn.Conv2d(4, 3, 1).weight
    features, target, slope = torch.randn(2, 4, 5, 5), torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    picture = F.conv2d(features, last)
    rec, gan = F.mse_loss(picture, target), (picture * slope).mean()
    found = adaptive_weight(rec, gan, last)
    pull = torch.einsum("bohw,bihw->oi", 2 * (picture - target) / picture.numel(), features).norm()
    push = torch.einsum("bohw,bihw->oi", slope / picture.numel(), features).norm()
    assert found.item() == pytest.approx((pull / (push + 1e-4)).item(), rel=1e-4)
    assert not found.requires_grad
    (rec + found * gan).backward()  # the graph is still there
    assert adaptive_weight(rec, torch.zeros(()), last) == 0
    picture = F.conv2d(features, last)
    assert adaptive_weight((1e9 * picture).sum(), (1e-9 * picture).sum(), last) == 1e4
    with pytest.raises(UsageError, match="does not depend on the last layer"):
        adaptive_weight(picture.sum(), picture.sum(), nn.Parameter(torch.ones(1)))


def test_the_discriminator_learns_as_one_trained_by_hand() -> None:
    adversary = Adversary(small(), lr=1e-2, weight_decay=0.1, warmup_steps=2, final_lr=0.2, lecam=0.5, r1=3.0, r1_every=2, gradient_clip=0.7)
    net, averages = small(), [0.0, 0.0]
    decayed, plain = [p for p in net.parameters() if p.ndim > 1], [p for p in net.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=1e-2, weight_decay=0.1)
    for step in range(6):
        real, fake = pictures(step)
        found = adversary.backward(real, fake)
        adversary.step(6)

        real = real.requires_grad_(True)
        on_real, on_fake = net(real), net(fake)
        loss = 0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())
        assert found["discriminator"].item() == pytest.approx(loss.item(), rel=1e-4)
        stray = F.relu(on_real.mean() - averages[1]) ** 2 + F.relu(averages[0] - on_fake.mean()) ** 2
        loss = loss + 0.5 * stray
        if step % 2 == 0:
            (slope,) = torch.autograd.grad(on_real.mean((1, 2, 3)).sum(), real, create_graph=True)
            loss = loss + 3.0 / 2 * 2 * slope.square().sum((1, 2, 3)).mean()
        assert ("r1" in found) == (step % 2 == 0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.7)
        factor = (step + 1) / 2 if step < 2 else 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 2) / 4)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor
        optimizer.step()
        averages = [0.999 * a + 0.001 * m.item() for a, m in zip(averages, (on_real.mean(), on_fake.mean()))]
        torch.testing.assert_close(weights(adversary), torch.cat([p.detach().flatten() for p in net.parameters()]), atol=1e-6, rtol=1e-5)
    assert adversary.averages.tolist() == pytest.approx(averages, abs=1e-7)


def test_accumulated_batches_make_one_step_of_their_mean() -> None:
    real, fake = pictures(3, 6)
    whole, halves = Adversary(small(), lr=1e-2), Adversary(small(), lr=1e-2)
    whole.backward(real, fake)
    whole.step(10)
    for part in (slice(0, 3), slice(3, 6)):
        halves.backward(real[part], fake[part])
    halves.step(10)
    assert halves.steps == 1
    torch.testing.assert_close(weights(whole), weights(halves), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(whole.averages, halves.averages)


def test_generator_loss_teaches_the_picture_and_not_the_discriminator() -> None:
    adversary, (_, fake) = Adversary(small()), pictures(0)
    fake.requires_grad_(True)
    loss = adversary.generator_loss(fake)
    (wanted,) = torch.autograd.grad(-small()(fake).mean(), fake)
    loss.backward()
    torch.testing.assert_close(fake.grad, wanted)
    assert all(p.grad is None and p.requires_grad for p in adversary.params)


def test_nothing_happens_before_the_start() -> None:
    calls = []

    class Counting(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x)

    adversary, (real, fake) = Adversary(Counting(3, 1, 1), start=3, lr=0.1), pictures(0)
    before = weights(adversary)
    for step in range(5):
        assert adversary.active == (step >= 3)
        loss = adversary.generator_loss(fake.requires_grad_(True))
        found = adversary.backward(real, fake)
        assert (float(loss.detach()) == 0 and found == {} and not calls) == (step < 3)
        adversary.step(5)
        assert torch.equal(before, weights(adversary)) == (step < 3)


def test_resume_is_exact() -> None:
    def make() -> Adversary:
        return Adversary(small(), start=1, lr=1e-2, warmup_steps=3, lecam=0.3, r1=1.0, r1_every=2)

    def train(adversary: Adversary, steps: range) -> None:
        for step in steps:
            adversary.backward(*pictures(step))
            adversary.step(8)

    straight, first, second = make(), make(), make()
    train(straight, range(8))
    train(first, range(5))
    saved = copy.deepcopy(first.state_dict())
    train(first, range(5, 8))  # what was saved is not what goes on learning
    second.load_state_dict(saved)
    train(second, range(5, 8))
    assert torch.equal(weights(straight), weights(second))
    assert torch.equal(straight.averages, second.averages)
    assert second.steps == 8
    with pytest.raises(ModelError, match="not of this Conv2d"):
        Adversary(nn.Conv2d(3, 1, 1)).load_state_dict(saved)


def test_bfloat16_and_float16_follow_the_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Watching(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((y := super().forward(x)).dtype)
            return y

    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        adversary, (real, fake) = Adversary(Watching(3, 1, 3), lr=1e-2), pictures(0)
        with torch.autocast("cpu", dtype):
            adversary.generator_loss(fake)
        adversary.backward(real, fake)
        assert seen == [dtype] * 3
        before = weights(adversary)
        adversary.step(5)
        assert not torch.equal(before, weights(adversary))
        assert adversary.state_dict()["scaler"].get("scale") == (65536.0 if dtype is torch.float16 else None)
        seen.clear()
    adversary.backward(real * float("inf"), fake)
    before = weights(adversary)
    adversary.step(5)  # float16 skips the step and scales less
    assert torch.equal(before, weights(adversary))
    assert adversary.state_dict()["scaler"]["scale"] == 32768.0
    again = Adversary(Watching(3, 1, 3))
    again.load_state_dict(adversary.state_dict())
    with torch.autocast("cpu", torch.float16):
        again.generator_loss(fake)
    again.backward(real, fake)
    assert again.state_dict()["scaler"]["scale"] == 32768.0


def test_gradients_that_are_not_finite_stop_before_the_weights() -> None:
    adversary, (real, fake) = Adversary(small()), pictures(0)
    adversary.backward(real * float("nan"), fake)
    with pytest.raises(ModelError, match="discriminator's gradient became nan"):
        adversary.step(5)
    assert weights(adversary).isfinite().all()


def test_refusals_and_copies() -> None:
    with pytest.raises(UsageError, match="hinge, non_saturating; got 'wasserstein'"):
        Adversary(small(), loss="wasserstein")
    with pytest.raises(UsageError, match="r1_every is 1 or more"):
        Adversary(small(), r1_every=0)
    adversary = Adversary(small())
    holder = nn.Module()
    holder.adversary = adversary
    assert copy.deepcopy(holder).adversary is adversary
    assert not holder.state_dict()


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net = small(seed=rank)  # of different weights: the first exchange makes them those of rank 0
    adversary = Adversary(net, lr=1e-2, lecam=2.0, r1=1.0, r1_every=2)
    rows, last, found = slice(2 * rank, 2 * rank + 2), nn.Parameter(torch.ones(3, 1, 1)), []
    for step in range(4):
        real, fake = (x[rows] for x in pictures(step))
        found.append(adversary.backward(real, fake))
        adversary.step(4)
    picture = real * last
    weight = adaptive_weight((picture - fake).square().mean(), picture.sin().mean(), last)
    x = (torch.arange(12.0).view(4, 3).cos()[rows]).requires_grad_(True)
    every = all_rows(x)
    image_relation(every).cos().sum().backward()
    saved = {"weights": weights(adversary), "averages": adversary.averages, "lecam": found[-1]["lecam"], "adaptive": weight, "rows": every.detach()}
    torch.save((saved, x.grad / 2), f"{folder}/{rank}.pt")  # data parallelism divides gradients by the ranks
    dist.destroy_process_group()


def test_two_ranks_are_one_on_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    (a, upper), (b, lower) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    adversary, last, found = Adversary(small(), lr=1e-2, lecam=2.0, r1=1.0, r1_every=2), nn.Parameter(torch.ones(3, 1, 1)), [dict[str, Any]()]
    for step in range(4):
        real, fake = pictures(step)
        found.append(adversary.backward(real, fake))
        adversary.step(4)
    picture = real * last
    weight = adaptive_weight((picture - fake).square().mean(), picture.sin().mean(), last)
    torch.testing.assert_close(a["weights"], weights(adversary), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(a["averages"], adversary.averages, atol=1e-8, rtol=1e-5)
    torch.testing.assert_close(a["lecam"], found[-1]["lecam"], atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(a["adaptive"], weight, atol=1e-6, rtol=1e-5)
    assert a["lecam"] > 0
    x = torch.arange(12.0).view(4, 3).cos().requires_grad_(True)  # relations are of the images of all ranks, too
    image_relation(x).cos().sum().backward()
    assert torch.equal(a["rows"], x.detach())
    torch.testing.assert_close(torch.cat([upper, lower]), x.grad, atol=1e-6, rtol=1e-5)
