"""Discriminators: published sizes, verdicts by hand, seeds, differentiable augmentation, and frozen features that stay frozen."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tok1d.errors import UsageError
from tok1d.extras import ensure_torchvision_ops
from tok1d.training.losses.adversarial import Adversary
from tok1d.training.losses.discriminators import Blur, FeatureDiscriminator, PatchDiscriminator, TiTokDiscriminator
from tok1d.training.losses.discriminators_augment import AUGMENTATIONS, augment

ensure_torchvision_ops()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    timm, path = pytest.importorskip("timm"), tmp_path_factory.mktemp("net") / "test_vit.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return str(path)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_sizes_are_the_published_ones() -> None:
    assert count(TiTokDiscriminator()) == 1_909_889
    # pix2pix: 2,768,705 with six input channels, of which three are left out here
    assert count(PatchDiscriminator()) == 2_768_705 - 3 * 64 * 16
    assert count(PatchDiscriminator(norm="none")) == count(PatchDiscriminator()) - (128 + 256 + 512)
    assert len(TiTokDiscriminator().state_dict()) == len(list(TiTokDiscriminator().parameters()))


def test_blur_by_hand() -> None:
    x = torch.rand(1, 2, 8, 11)
    kernel = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    padded = np.pad(x[0].numpy(), ((0, 0), (1, 1), (1, 2)))
    wanted = [[[(padded[c, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] * kernel).sum() for j in range(6)] for i in range(4)] for c in range(2)]
    np.testing.assert_allclose(Blur()(x)[0].numpy(), np.array(wanted), rtol=1e-5)


def test_titoks_is_the_published_chain() -> None:
    net = TiTokDiscriminator(width=32, stages=2, grid=4)
    state, images = list(net.parameters()), torch.rand(2, 3, 32, 32)
    x = F.leaky_relu(F.conv2d(images, state[0], state[1], padding=2), 0.1)
    for i in (2, 6):
        x = Blur()(F.conv2d(x, state[i], state[i + 1], padding=1))
        x = F.leaky_relu(F.group_norm(x, 32, state[i + 2], state[i + 3]), 0.1)
    x = F.adaptive_max_pool2d(x, 4)
    x = F.conv2d(F.leaky_relu(F.conv2d(x, state[10], state[11]), 0.1), state[12], state[13], padding=2)
    torch.testing.assert_close(net(images), x)
    assert x.shape == (2, 1, 4, 4)


def test_patchgan_sees_a_patch_of_70_pixels() -> None:
    net = PatchDiscriminator(width=8, norm="none")  # a norm over the image would let every pixel matter a little
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    logits = net(images)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    seen = images.grad.abs().sum((0, 1)).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


def test_a_picture_is_judged_alike_in_any_company(weights: str) -> None:
    images = torch.rand(3, 3, 48, 48)
    for net in (TiTokDiscriminator(32, 2), PatchDiscriminator(32, 2), FeatureDiscriminator("test_vit", None, weights, 48, 16, 3)):
        torch.testing.assert_close(net(images)[1:2], net(images[1:2]), atol=1e-5, rtol=1e-4)


def test_seeds_give_equal_weights_and_leave_the_random_state_alone(weights: str) -> None:
    makers = [
        lambda seed: TiTokDiscriminator(32, 1, seed=seed), lambda seed: PatchDiscriminator(8, 2, seed=seed),
        lambda seed: FeatureDiscriminator("test_vit", [1], weights, 48, 8, seed=seed),
    ]  # fmt: skip
    for make in makers:
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        a, b, c = make(1), make(1), make(2)
        if not isinstance(a, FeatureDiscriminator):  # timm draws weights before a file replaces them
            assert torch.equal(torch.rand(1), expected)
        same = [torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters())]
        assert all(same) and not torch.equal(next(a.parameters()), next(c.parameters()))


def test_frozen_features_learn_in_their_heads_only(weights: str) -> None:
    net = FeatureDiscriminator("test_vit", None, weights, 48, 16, 3, ["color", "translation", "cutout"])
    assert net.layers == [1, 2, 4, 5] and net(torch.rand(2, 3, 40, 40)).shape == (2, 4, 3, 3)
    assert all(name.startswith("heads.") for name in net.state_dict())
    backbone = net.frozen["net"].net
    before = copy.deepcopy(backbone.state_dict())
    adversary = Adversary(net, lr=1e-2, r1=1.0)
    fake = torch.rand(2, 3, 40, 40, requires_grad=True)
    adversary.generator_loss(fake).backward()
    assert fake.grad.abs().max() > 0  # through the frozen network and the augmentation
    heads = copy.deepcopy(net.heads.state_dict())
    found = adversary.backward(torch.rand(2, 3, 40, 40), fake)
    adversary.step(5)
    assert found["r1"] > 0
    assert any(not torch.equal(v, heads[k]) for k, v in net.heads.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters()) and not backbone.training


def test_a_discriminator_learns_to_tell_two_sets_apart() -> None:
    adversary, generator = Adversary(TiTokDiscriminator(32, 1, 4), lr=3e-3, gradient_clip=0), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(16):
        real = torch.rand(4, 3, 16, 16, generator=generator)
        fake = F.avg_pool2d(real, 3, 1, 1)
        losses.append(adversary.backward(real, fake)["discriminator"].item())
        adversary.step(16)
    assert losses[0] > 0.8
    assert losses[-1] < 0.5 * losses[0]


def test_augmentations_by_hand() -> None:
    x = torch.rand(6, 3, 16, 24)
    torch.manual_seed(1)
    colored = AUGMENTATIONS["color"](x)
    torch.manual_seed(1)
    brightness, saturation, contrast = torch.rand(3, 6).numpy()
    for i, image in enumerate(x.numpy()):
        y = image + (brightness[i] - 0.5) / 2
        y = y.mean(0) + (y - y.mean(0)) * 2 * saturation[i]
        np.testing.assert_allclose(colored[i].numpy(), y.mean() + (y - y.mean()) * (contrast[i] + 0.5), atol=1e-5)
    torch.manual_seed(2)
    moved = AUGMENTATIONS["translation"](x)
    torch.manual_seed(2)
    down, right = torch.randint(-2, 3, (6, 1)).flatten().tolist(), torch.randint(-3, 4, (6, 1)).flatten().tolist()
    assert len(set(down)) > 1
    padded = F.pad(x, (3, 3, 2, 2))
    for i in range(6):
        assert torch.equal(moved[i], padded[i, :, 2 + down[i] : 18 + down[i], 3 + right[i] : 27 + right[i]])
    ones = torch.ones(200, 3, 16, 24)
    black = (AUGMENTATIONS["cutout"](ones) == 0).all(1)
    assert torch.equal(black.flatten(1).sum(1), black.any(2).sum(1) * black.any(1).sum(1))  # rectangles
    assert black.any(2).sum(1).max() == 8 and black.any(1).sum(1).max() == 12
    assert black[:, :, 0].any() and black[:, :, -1].any()


def test_augmented_pictures_have_gradients_and_seeds() -> None:
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    torch.manual_seed(3)
    a = augment(x, ["color", "translation", "cutout"])
    torch.manual_seed(3)
    assert torch.equal(a, augment(x, ["color", "translation", "cutout"]))
    a.square().sum().backward()
    assert x.grad.abs().sum((1, 2, 3)).min() > 0


def test_refusals(weights: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="augmentations are color, translation, cutout; got blur"):
        FeatureDiscriminator("test_vit", None, weights, augment=["blur"])
    for make in (lambda: TiTokDiscriminator(48), lambda: PatchDiscriminator(norm="batch"), lambda: FeatureDiscriminator("test_vit", None, weights, width=12)):
        with pytest.raises(UsageError, match="multiple of|steps of|group or none"):
            make()
