"""LPIPS and DISTS of originals and their pictures at all rates, in one go.

Both look at VGG16 with the same weights and normalisation; LPIPS takes maxima between its stages, DISTS root mean squares. So the first stage is
computed once for both, each original once for all rates, and what a stage gives is forgotten as soon as it was compared: on a CPU an image at
a time, which fits the caches. LPIPS: https://arxiv.org/abs/1801.03924; DISTS: https://arxiv.org/abs/2004.07728.
Shapes: R pictures of each of n originals, H × W pixels, C channels last; R + 1 where the originals go first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.eval.perceptual import Perceptual, load_dists, load_lpips
from tok1d.eval.threads import each
from tok1d.eval.winograd import LEAST_CHANNELS, Winograd

NAMES = ("lpips_vgg", "lpips_alex", "dists")
HELD = 1 << 21  # numbers that a stage gives at once, if one set of pictures has no more
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Distances:
    """Perceptual distances by name. On a CPU a distance does not depend on the other originals given with it.

    Args:
        names: of :data:`NAMES`.
        device: where they are computed.

    Raises:
        ModelError: an unknown name, or a network that cannot be had.
        MissingExtraError: a package that is not installed.
    """

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu") -> None:
        for name in names:
            if name not in NAMES:
                raise ModelError(f"perceptual distances are {', '.join(NAMES)}; got {name!r}")
        self.names, self.device = tuple(names), torch.device(device)
        self.alex = Perceptual("alex").to(self.device) if "lpips_alex" in names else None
        self.vggs: list[Vgg] = []
        if "lpips_vgg" in names:
            lpips = load_lpips("vgg").to(self.device)
            self._head("lpips_vgg", _Lpips(lpips), lpips.net)  # type: ignore[arg-type]
        if "dists" in names:
            dists = load_dists().to(self.device)
            self._head("dists", _Dists(dists), dists)

    def _head(self, name: str, head: _Lpips | _Dists, trunk: nn.Module) -> None:
        """Put a head on the trunk of these weights, a new one if there is none."""
        convs = [m for m in trunk.modules() if isinstance(m, nn.Conv2d)]
        if not any(vgg.is_of(convs) for vgg in self.vggs):
            self.vggs.append(Vgg(convs))
        next(vgg for vgg in self.vggs if vgg.is_of(convs)).heads[name] = head

    def __call__(self, originals: Tensor, rates: Sequence[Tensor]) -> dict[str, Tensor]:
        """uint8 (n, 3, H, W), and R times as much → float64 (R, n) by name, on the CPU."""
        if self.device.type != "cpu":
            with torch.inference_mode():
                return self._some(torch.stack([originals, *rates]))
        found = each(lambda i: self._some(torch.stack([x[i : i + 1] for x in (originals, *rates)])), len(originals))
        return {name: torch.cat([f[name] for f in found], 1) for name in self.names}

    def _some(self, whole: Tensor) -> dict[str, Tensor]:
        """uint8 (R + 1, n, 3, H, W), originals first."""
        x = whole.to(self.device).float() / 255
        found: dict[str, Tensor] = {}
        if self.alex is not None:
            first = self.alex.features(x[0])
            found["lpips_alex"] = torch.stack([self.alex.compare(self.alex.features(pictures), first).flatten() for pictures in x[1:]])
        for vgg in self.vggs:
            found |= vgg(x.permute(0, 1, 3, 4, 2).contiguous())
        return {name: values.double().cpu() for name, values in found.items()}


class Vgg:
    """The trunk of VGG16, with heads that compare what its five stages give.

    Args:
        convs: its 13 convolutions.
    """

    def __init__(self, convs: Sequence[nn.Conv2d]) -> None:
        self.heads: dict[str, _Lpips | _Dists] = {}
        self.convs = list(convs)
        layers = [_Layer(c) for c in convs]
        self.stages = [layers[a:b] for a, b in ((0, 2), (2, 4), (4, 7), (7, 10), (10, 13))]
        self.mean, self.std = (torch.tensor(v, device=convs[0].weight.device) for v in (MEAN, STD))

    def is_of(self, convs: Sequence[nn.Conv2d]) -> bool:
        """Whether these are its weights."""
        return all(torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias) for a, b in zip(self.convs, convs, strict=True))  # type: ignore[arg-type]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Float (R + 1, n, H, W, 3) in [0, 1] → float64 (R, n) by head."""
        total = {name: head.images(images.flatten(2, 3)) for name, head in self.heads.items()}
        entering = self._stage(0, (images - self.mean) / self.std, list(self.heads), total)  # common to all heads
        for name in self.heads:
            x = entering.pop(name)
            for level in range(1, len(self.stages)):
                x = self._stage(level, x, [name], total).get(name, x)
        return total

    def _stage(self, level: int, x: Tensor, names: Sequence[str], total: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add what the heads find at a stage of (R + 1, n, h, w, c) to ``total``; returns what enters the next stage, by head."""
        layers, last = self.stages[level], level == len(self.stages) - 1
        sets = max(1, HELD // (x[0, ..., 0].numel() * layers[-1].channels))
        originals: dict[str, Any] = {}
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        pooled: dict[str, list[Tensor]] = {name: [] for name in names}
        for start in range(0, len(x), sets):
            part = x[start : start + sets]
            taps = part.flatten(0, 1)
            for layer in layers:
                taps = layer(taps)
            places = taps.unflatten(0, part.shape[:2]).flatten(2, 3)  # (sets, n, h · w, c)
            for name in names:
                head = self.heads[name]
                if start == 0:
                    originals[name] = head.prepare(places[0])
                found[name].append(head.compare(level, originals[name], places[1:] if start == 0 else places))
                if not last:
                    pooled[name].append(head.pool(taps).unflatten(0, part.shape[:2]))
        for name in names:
            total[name] = total[name] + torch.cat(found[name])
        return {} if last else {name: torch.cat(pooled[name]) for name in names}


class _Layer:
    """A convolution and its ReLU, channels last; by Winograd's algorithm where that is faster."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.weight, self.bias, self.channels = conv.weight.detach().contiguous(memory_format=torch.channels_last), conv.bias, conv.out_channels
        fast = self.weight.device.type == "cpu" and conv.in_channels >= LEAST_CHANNELS
        self.winograd = Winograd(self.weight, self.bias) if fast else None  # type: ignore[arg-type]

    def __call__(self, x: Tensor) -> Tensor:
        """Float (N, h, w, C) → (N, h, w, K)."""
        if self.winograd is not None and x.shape[1] % 4 == 0 == x.shape[2] % 4:
            return self.winograd(x)
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, padding=1).relu_().permute(0, 2, 3, 1)


class _Lpips:
    """Weighted squared differences of unit vectors, mean over places."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = [m.weight.flatten() for lin in module.lins for m in lin.modules() if isinstance(m, nn.Conv2d)]

    def images(self, images: Tensor) -> Tensor:
        """Of (R + 1, n, H · W, 3): nothing yet."""
        return images.new_zeros((len(images) - 1, images.shape[1]), dtype=torch.float64)

    def prepare(self, x: Tensor) -> Tensor:
        """(…, places, c) → vectors of length 1."""
        return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-10)

    def compare(self, level: int, original: Tensor, x: Tensor) -> Tensor:
        """Prepared (n, places, c) and (r, n, places, c) → float64 (r, n)."""
        return (self.prepare(x).sub_(original).square_() @ self.weights[level]).mean(-1, dtype=torch.float64)

    def pool(self, x: Tensor) -> Tensor:
        """(N, h, w, c) → (N, h / 2, w / 2, c)."""
        return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


class _Dists:
    """1 - weighted mean over channels of the similarity of means and of the correlation (DISTS, equations 3 to 6)."""

    def __init__(self, module: nn.Module) -> None:
        both = torch.stack([module.alpha.flatten(), module.beta.flatten()]).double()  # type: ignore[operator, union-attr]
        self.weights = (both / both.sum()).split(module.chns, 1)  # type: ignore[arg-type]
        tap = torch.tensor([0.25, 0.5, 0.25], device=both.device)
        self.window = (tap[:, None] * tap).expand(512, 1, 3, 3)

    def images(self, images: Tensor) -> Tensor:
        """Of (R + 1, n, H · W, 3): the pixels are compared, too."""
        return 1 + self.compare(-1, self.prepare(images[0]), images[1:])

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(…, places, c) → mean and variance (…, c), and what deviates from the mean."""
        mean = x.mean(-2)
        apart = x - mean[..., None, :]
        return mean, apart.square().mean(-2), apart

    def compare(self, level: int, original: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        """Prepared (n, places, c) and (r, n, places, c) → float64 (r, n), negative."""
        (mean_a, variance_a, a), (mean_b, variance_b, b) = original, self.prepare(x)
        means = (2 * mean_a * mean_b + 1e-6) / (mean_a.square() + mean_b.square() + 1e-6)
        shapes = (2 * b.mul_(a).mean(-2) + 1e-6) / (variance_a + variance_b + 1e-6)
        alpha, beta = self.weights[level + 1]
        return -(means.double() @ alpha + shapes.double() @ beta)

    def pool(self, x: Tensor) -> Tensor:
        """(N, h, w, c) → (N, h / 2, w / 2, c)."""
        squares = x.square().permute(0, 3, 1, 2)
        return F.conv2d(squares, self.window[: x.shape[-1]], stride=2, padding=1, groups=x.shape[-1]).add_(1e-12).sqrt_().permute(0, 2, 3, 1)
