"""Losses in the features of a frozen image model: logits of a classifier (TiTok), or chosen layers of any timm model.

:class:`Backbone` is that model for all losses and discriminators: it takes pictures in [0, 1] of any size, and gradients pass
through it to the picture, never to its weights. Papers: TiTok https://arxiv.org/abs/2406.07550 (its released training code compares
classifier logits), perceptual losses https://arxiv.org/abs/1603.08155.

Shapes: B pictures of H × W pixels, K classes, C channels of a layer on a grid of h × w.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.extras import require
from tok1d.training.frozen import Frozen
from tok1d.training.losses.base import ImageLoss

OFFLINE = "offline"


class Backbone:
    """A frozen timm model behind its own resize and normalisation; not a module, so it is in no state dict.

    Args:
        model: timm name, or ``offline``: EfficientNet-Lite0 with the weights of a small package, as the evaluator has it.
        weights: file of its weights (safetensors, or a pickle of nothing but tensors; those of torchvision fit if their order does);
            None takes timm's pretrained ones from the hub.
        size: side of its input, None for the one it was trained at. Vision transformers resample their position tables.

    Raises:
        MissingExtraError: timm is not installed.
        ModelError: unknown model, or weights that cannot be had or do not fit.
    """

    def __init__(self, model: str, weights: str | None = None, size: int | None = None) -> None:
        if model == OFFLINE:
            from tok1d.eval.features import efficientnet_lite0

            shared = efficientnet_lite0(Path(weights) if weights else None)
            self.net, self.mean, self.std, self.size = shared.net, shared.mean, shared.std, size or shared.size
            self.name = "tf_efficientnet_lite0"
            return
        timm = require("timm", "eval")
        try:
            net = timm.create_model(model, pretrained=weights is None)
        except Exception as error:  # timm and the hub raise whatever they like
            raise ModelError(
                f"timm model {model!r} cannot be had ({str(error).splitlines()[0][:200]}). Give weights: FILE, or model: {OFFLINE} for the classifier "
                "that a package ships"
            ) from error
        if weights is not None:
            load_weights(net, Path(weights))
        config = timm.data.resolve_model_data_config(net)
        self.name, self.size = model, size or config["input_size"][-1]
        if self.size != config["input_size"][-1] and hasattr(net, "set_input_size"):
            net.set_input_size(img_size=(self.size, self.size))
        self.net: nn.Module = net.eval().requires_grad_(False)
        self.mean, self.std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))

    def to(self, device: torch.device | str) -> Backbone:
        self.net.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def prepare(self, images: Tensor) -> Tensor:
        """Float (B, 3, H, W), about [0, 1] → float (B, 3, size, size) as the network takes it: bilinear with antialiasing."""
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        return (images - self.mean) / self.std

    def logits(self, images: Tensor) -> Tensor:
        """Float (B, 3, H, W) → float32 (B, K)."""
        if not getattr(self.net, "num_classes", 0):
            raise ModelError(f"{self.name} has no classifier, so it has no logits to compare; take a model trained on labels, or compare features")
        return self.net(self.prepare(images)).float()

    def pooled(self, images: Tensor) -> Tensor:
        """Float (B, 3, H, W) → float32 (B, C), what its classifier would read."""
        last = self.net.forward_features(self.prepare(images))  # type: ignore[operator]
        return self.net.forward_head(last, pre_logits=True).float()  # type: ignore[operator]

    def layers(self, images: Tensor, indices: Sequence[int] | None = None, norm: bool = False) -> list[Tensor]:
        """Float (B, 3, H, W) → float (B, C, h, w) of each layer; all of them if None, counted from the end below 0.

        Args:
            images: about [0, 1].
            indices: stages of a convolutional network, blocks of a transformer.
            norm: apply the last norm of a transformer, whose patch features are known with it.
        """
        forward = getattr(self.net, "forward_intermediates", None)
        if forward is None:
            raise ModelError(f"timm cannot take features out of {self.name} midway; choose another model")
        wanted = None if indices is None else list(indices)
        try:
            found: list[Tensor] = forward(self.prepare(images), indices=wanted, norm=norm, stop_early=wanted is not None, intermediates_only=True)
        except AssertionError as error:
            raise ModelError(f"{self.name} at {self.size} pixels has no layers {wanted}: {str(error)[:160]}") from error
        return found

    def channels(self, indices: Sequence[int] | None = None) -> list[int]:
        """C of each layer."""
        with torch.no_grad():
            return [f.shape[1] for f in self.layers(self.mean.expand(1, 3, self.size, self.size), indices)]


def load_weights(net: nn.Module, weights: Path) -> None:
    """Load a state dict by names; one with other names but as many numbers in each tensor, in the same order, by order.

    Raises:
        ModelError: it cannot be read or does not fit.
    """
    from tok1d.eval.features import _read_state

    state, own = _read_state(weights), net.state_dict()
    if state.keys() != own.keys():
        if [v.numel() for v in state.values()] != [v.numel() for v in own.values()]:
            raise ModelError(f"{weights} holds {len(state)} tensors that are not those of {type(net).__name__} ({len(own)})")
        state = {name: value.reshape(mine.shape) for (name, mine), value in zip(own.items(), state.values())}
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{weights} does not fit {type(net).__name__} ({str(error).splitlines()[-1].strip()[:200]})") from error


class ClassifierLoss(ImageLoss):
    """Mean squared error between the logits that a classifier gives a reconstruction and its original.

    TiTok takes torchvision's ConvNeXt-Small: ``model="convnext_small.fb_in1k"`` with ``weights`` set to torchvision's file
    ``convnext_small-0c510722.pth`` is that network; without, its weights are those of the ConvNeXt authors.

    Args:
        model, weights, size: see :class:`Backbone`; TiTok's size is 224.

    Raises:
        ModelError: see :class:`Backbone`; or the model has no classifier.
    """

    def __init__(self, model: str = "convnext_small.fb_in1k", weights: str | None = None, size: int | None = 224) -> None:
        super().__init__()
        self.frozen = Frozen(net=Backbone(model, weights, size))
        if not getattr(self.frozen["net"].net, "num_classes", 0):
            raise ModelError(f"{model} has no classifier; take a model trained on labels, or FeatureLoss")

    def forward(self, reconstruction: Tensor, target: Tensor, batch: dict[str, Any]) -> Tensor:
        """See :class:`ImageLoss`."""
        net: Backbone = self.frozen.on(reconstruction.device)["net"]
        with torch.no_grad():
            wanted = net.logits(target)
        return F.mse_loss(net.logits(reconstruction), wanted)


class FeatureLoss(ImageLoss):
    """Squared distance between features of unit length, mean over positions and layers: 2 − 2 cos, so in [0, 4].

    LPIPS without its learned channel weights, over any network.

    Args:
        model, weights, size: see :class:`Backbone`.
        layers: which to compare; all if None.
    """

    def __init__(self, model: str = OFFLINE, layers: list[int] | None = None, weights: str | None = None, size: int | None = None) -> None:
        super().__init__()
        self.frozen, self.layers = Frozen(net=Backbone(model, weights, size)), layers
        self.frozen["net"].channels(layers)  # refuses layers that do not exist

    def forward(self, reconstruction: Tensor, target: Tensor, batch: dict[str, Any]) -> Tensor:
        """See :class:`ImageLoss`."""
        net: Backbone = self.frozen.on(reconstruction.device)["net"]
        with torch.no_grad():
            wanted = [F.normalize(f.float(), dim=1) for f in net.layers(target, self.layers)]
        found = [F.normalize(f.float(), dim=1) for f in net.layers(reconstruction, self.layers)]
        return torch.stack([(a - b).square().sum(1).mean() for a, b in zip(found, wanted)]).mean()
