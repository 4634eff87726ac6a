"""Discriminators: TiTok's, PatchGAN, and small heads on a frozen image model.

All take float (B, 3, H, W), about [0, 1], and return logits (B, …), every number a verdict of its own. None has batch statistics by
default: they would differ between ranks and mix the two sides. Weights follow from ``seed`` and leave the global random state alone,
so that every rank starts alike. Papers: TiTok https://arxiv.org/abs/2406.07550, PatchGAN https://arxiv.org/abs/1611.07004,
projected GAN https://arxiv.org/abs/2111.01007.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import UsageError
from tok1d.training.frozen import Frozen
from tok1d.training.losses.discriminators_augment import augment, check_augmentations
from tok1d.training.losses.features import OFFLINE, Backbone
from tok1d.training.seeds import seeded


class Blur(nn.Module):
    """Binomial blur [1, 3, 3, 1] in both directions with a stride of 2, zeros outside: float (B, C, H, W) → (B, C, ⌈H/2⌉, ⌈W/2⌉)."""

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", row[:, None] * row, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = (2 + side % 2 for side in x.shape[2:])  # as many zeros as ⌈side / 2⌉ outputs need
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        channels = x.shape[1]
        return F.conv2d(x, self.kernel.to(x.dtype).expand(channels, 1, -1, -1), stride=2, groups=channels)


class TiTokDiscriminator(nn.Module):
    """The discriminator of TiTok's second stage: 3 × (convolution, blur to half size, group norm), max-pooled to 16 × 16 verdicts.

    Args:
        width: channels of the first stage.
        stages: each but the first doubles the channels.
        grid: side of the map of logits.
        seed: of its weights.

    Example:
        >>> net = TiTokDiscriminator()
        >>> sum(p.numel() for p in net.parameters()), net(torch.rand(1, 3, 128, 128)).shape
        (1909889, torch.Size([1, 1, 16, 16]))
    """

    def __init__(self, width: int = 128, stages: int = 3, grid: int = 16, seed: int = 0) -> None:
        super().__init__()
        if width < 32 or width % 32 or stages < 1 or grid < 1:
            raise UsageError(f"TiTok's discriminator needs a width in steps of 32 and a stage, got width={width}, stages={stages}")
        with seeded(seed):
            layers: list[nn.Module] = [nn.Conv2d(3, width, 5, padding=2), nn.LeakyReLU(0.1)]
            before = width
            for stage in range(stages):
                after = width * 2**stage
                layers += [nn.Conv2d(before, after, 3, padding=1), Blur(), nn.GroupNorm(32, after), nn.LeakyReLU(0.1)]
                before = after
            self.body = nn.Sequential(*layers, nn.AdaptiveMaxPool2d((grid, grid)))
            self.head = nn.Sequential(nn.Conv2d(before, before, 1), nn.LeakyReLU(0.1), nn.Conv2d(before, 1, 5, padding=2))

    def forward(self, images: Tensor) -> Tensor:
        """Float (B, 3, H, W) → float (B, 1, grid, grid)."""
        return self.head(self.body(images))


class PatchDiscriminator(nn.Module):
    """PatchGAN: every logit sees a patch (70 × 70 pixels with 3 layers).

    Args:
        width: channels of the first layer, doubled by each further one up to eight times as many.
        layers: convolutions of stride 2.
        norm: ``group`` (of 32 channels, fewer where there are not as many) or ``none``. The paper's batch norm is left out: see above.
        seed: of its weights, normal with deviation 0.02 as in the paper.

    Example:
        >>> PatchDiscriminator()(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 1, 6, 6])
    """

    def __init__(self, width: int = 64, layers: int = 3, norm: str = "group", seed: int = 0) -> None:
        super().__init__()
        if norm not in ("group", "none") or width < 1 or layers < 1:
            raise UsageError(f"PatchGAN takes norm group or none, width and layers from 1; got norm={norm!r}, width={width}, layers={layers}")
        sizes = [width * min(2**i, 8) for i in range(layers + 1)]
        with seeded(seed):
            found: list[nn.Module] = [nn.Conv2d(3, sizes[0], 4, 2, 1), nn.LeakyReLU(0.2)]
            for i, (before, after) in enumerate(zip(sizes, sizes[1:])):
                found.append(nn.Conv2d(before, after, 4, 1 if i == layers - 1 else 2, 1, bias=norm == "none"))
                found += [nn.GroupNorm(max(1, after // 32), after)] if norm == "group" else []
                found.append(nn.LeakyReLU(0.2))
            found.append(nn.Conv2d(sizes[-1], 1, 4, 1, 1))
            for layer in found:
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, std=0.02)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
        self.body = nn.Sequential(*found)

    def forward(self, images: Tensor) -> Tensor:
        """Float (B, 3, H, W) → float (B, 1, h, w)."""
        return self.body(images * 2 - 1)


class FeatureDiscriminator(nn.Module):
    """A small convolutional head on each of several layers of a frozen timm model; only the heads learn.

    Args:
        model, weights, size: see :class:`tok1d.training.losses.features.Backbone`.
        layers: which layers; None takes four, spread to the last.
        width: channels of a head.
        grid: every layer is pooled to so many verdicts a side, so that all heads count alike.
        augment: any of ``color``, ``translation``, ``cutout``.
        seed: of the weights of the heads.
    """

    def __init__(
        self,
        model: str = OFFLINE,
        layers: list[int] | None = None,
        weights: str | None = None,
        size: int | None = None,
        width: int = 64,
        grid: int = 8,
        augment: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if width < 8 or width % 8 or grid < 1:
            raise UsageError(f"heads need a width that is a multiple of 8 and a grid of at least 1, got width={width}, grid={grid}")
        self.frozen = Frozen(net=Backbone(model, weights, size))
        self.augment, self.grid = check_augmentations(augment or []), grid
        channels = self.frozen["net"].channels(layers)
        if layers is None:
            last = len(channels) - 1
            layers = sorted({round(last * i / 4) for i in (1, 2, 3, 4)})
            channels = [channels[i] for i in layers]
        self.layers = layers
        with seeded(seed):
            self.heads = nn.ModuleList(_head(c, width) for c in channels)

    def forward(self, images: Tensor) -> Tensor:
        """Float (B, 3, H, W) → float (B, heads, grid, grid)."""
        net: Backbone = self.frozen.on(images.device)["net"]
        features = net.layers(augment(images, self.augment), self.layers)
        return torch.cat([head(F.adaptive_avg_pool2d(f, self.grid)) for head, f in zip(self.heads, features)], dim=1)


def _head(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 1),
        nn.GroupNorm(8, width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, width, 3, padding=1),
        nn.GroupNorm(8, width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 1, 1),
    )
