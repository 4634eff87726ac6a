"""3 × 3 convolutions with a quarter of the multiplications, for wide layers on a CPU.

Winograd's F(4×4, 3×3) of Lavin & Gray (https://arxiv.org/abs/1509.09308): a tile of 4 × 4 results is made from 6 × 6 inputs with 36
multiplications for each pair of channels instead of 144. All three steps are matrix products. The price is rounding: about 3e-6 of the size
of the activations in float32, where a direct convolution has 1e-6. Shapes: N pictures of H × W pixels, C channels to K, T tiles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILES = 128  # at once: what lies between the steps stays in the caches
LEAST_CHANNELS = 128  # fewer, and the transforms cost what the products save

# Interpolation at 0, 1, -1, 2, -2 and infinity: of the input, the filter and the result.
_INPUT = ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0), (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1))
_FILTER = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))
_RESULT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


class Winograd:
    """A 3 × 3 convolution of padding 1 with bias, and the ReLU after it.

    Args:
        weight: float (K, C, 3, 3).
        bias: float (K,).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        enter, leave, filters = (torch.tensor(m, dtype=torch.float64) for m in (_INPUT, _RESULT, _FILTER))
        taps_9CK = weight.cpu().permute(2, 3, 1, 0).reshape(9, -1).double()
        self.weight = (torch.kron(filters, filters) @ taps_9CK).float().view(36, weight.shape[1], weight.shape[0])
        self.bias = bias.float().cpu()
        self.enter, self.leave = (torch.kron(m, m).float() for m in (enter, leave))  # (36, 36), (16, 36)

    def __call__(self, x_NHWC: Tensor) -> Tensor:
        """Float32 (N, H, W, C), H and W multiples of 4 → (N, H, W, K)."""
        n, height, width, _ = x_NHWC.shape
        assert height % 4 == 0 == width % 4, (height, width)
        padded = F.pad(x_NHWC, (0, 0, 1, 1, 1, 1))
        y = x_NHWC.new_empty(n, height, width, len(self.bias))
        lines = max(1, 4 * TILES // width)  # of tiles, at once
        images = max(1, lines // (height // 4))
        for i in range(0, n, images):
            for top in range(0, height, 4 * lines):
                bottom = min(height, top + 4 * lines)
                self._strip(padded[i : i + images, top : bottom + 2], y[i : i + images, top:bottom])
        return y

    def _strip(self, x: Tensor, out: Tensor) -> None:
        """(n, h + 2, w + 2, C) → ``out`` (n, h, w, K)."""
        n, h, w, k = out.shape
        shape, (a, b, c, d) = (n, h // 4, w // 4), x.stride()
        tiles = x.as_strided((6, 6, *shape, x.shape[-1]), (b, c, a, 4 * b, 4 * c, d)).reshape(36, -1)
        tiles = (self.enter @ tiles).view(36, -1, x.shape[-1])  # (36, T, C)
        tiles = self.leave @ torch.bmm(tiles, self.weight).view(36, -1)  # (16, T · K)
        result = tiles.view(4, 4, *shape, k).permute(2, 3, 0, 4, 1, 5)
        view = out.as_strided((n, h // 4, 4, w // 4, 4, k), _split(out))
        torch.add(result, self.bias, out=view)
        out.relu_()


def _split(x: Tensor) -> tuple[int, ...]:
    """Strides of (n, h, w, k) seen as (n, h / 4, 4, w / 4, 4, k)."""
    a, b, c, d = x.stride()
    return a, 4 * b, b, 4 * c, c, d
