"""A tokenizer small enough for tests and good enough to be measured: one DCT coefficient a token, 8 bits each.

16 × 16 pixels, 32 tokens, nested or fixed; more tokens give a better picture, so targets and budgets mean something.
"""

import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from tok1d.errors import TokenError
from tok1d.tokenizers.lengths import FixedLength, TailDrop
from tok1d.tokenizers.part import Decoder, Encoder, Quantizer, QuantizerOutput
from tok1d.tokenizers.tokenizer import Tokenizer1D

SIZE, TOKENS, STEP = 16, 32, 16 / 255
HOME = "tok1d.tokenizers.dct_for_tests"  # config.json may only name classes below tok1d.tokenizers
sys.modules[HOME] = sys.modules[__name__]


def basis() -> Tensor:
    """(TOKENS, 3 · SIZE · SIZE) orthonormal: luminance first among equal frequencies."""
    i = torch.arange(SIZE, dtype=torch.float64)
    dct = torch.stack([(math.pi * (i + 0.5) * u / SIZE).cos() * math.sqrt((1 if u == 0 else 2) / SIZE) for u in range(SIZE)])
    colours = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    colours = colours / colours.norm(dim=1, keepdim=True)
    order = sorted((u + v + 3 * (c > 0), c, u, v) for c in range(3) for u in range(8) for v in range(8))[:TOKENS]
    return torch.stack([torch.einsum("c,h,w->chw", colours[c], dct[u], dct[v]).flatten() for _, c, u, v in order]).float()


class DctEncoder(Encoder):
    __module__ = HOME
    tokens, dim = TOKENS, 1

    def __init__(self) -> None:
        super().__init__()
        self.basis = nn.Parameter(basis())

    def forward(self, images: Tensor) -> Tensor:
        return ((images - 0.5).flatten(1) @ self.basis.T)[..., None]


class ScalarQuantizer(Quantizer):
    __module__ = HOME
    dim, vocab_size = 1, 256

    def __init__(self) -> None:
        super().__init__()

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        ids = self.codes_to_ids(z)
        return QuantizerOutput(self.ids_to_codes(ids), ids)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        return (ids[..., None].float() - 128) * STEP

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        return (codes[..., 0] / STEP).round().long().add(128).clamp(0, 255)


class DctDecoder(Decoder):
    __module__ = HOME

    def __init__(self) -> None:
        super().__init__()
        self.basis = nn.Parameter(basis())

    def forward(self, q: Tensor, mask: Tensor | None = None) -> Tensor:
        if q.shape[1] > TOKENS:
            raise TokenError("too many tokens")
        if mask is not None:
            q = q * mask[..., None]
        return (q[..., 0] @ self.basis[: q.shape[1]]).unflatten(1, (3, SIZE, SIZE)) + 0.5


def make_model(nested: bool = True, name: str = "dct") -> Tokenizer1D:
    lengths = TailDrop() if nested else FixedLength()
    model = Tokenizer1D(DctEncoder(), ScalarQuantizer(), DctDecoder(), lengths, (SIZE, SIZE), name)
    return model.eval().requires_grad_(False)


def save_model(folder: Path, **options) -> Path:
    make_model(**options).save_pretrained(folder)
    return folder


def picture(seed: int = 0, height: int = SIZE, width: int = SIZE, detail: float = 1.0) -> Tensor:
    """A smooth picture with some texture, float (1, 3, height, width) in [0, 1]."""
    rng = torch.Generator().manual_seed(seed)
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None]
    image = torch.zeros(3, height, width)
    for frequency in range(1, 6):
        a, b, phase = torch.rand(3, 3, 1, 1, generator=rng) * torch.tensor([6.0, 6.0, 6.28]).view(3, 1, 1, 1)
        image += (frequency * (a * y + b * x) + phase).sin() * (detail if frequency > 1 else 1.0) / frequency**1.5
    return (image * 0.18 + 0.5).clamp(0, 1)[None]
