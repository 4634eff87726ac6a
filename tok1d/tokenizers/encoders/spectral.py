"""SpectralEncoder: each token looks at a few low-frequency DCT coefficients of the whole image.

Linear, parameter-light and nested by construction: tokens are ordered by how much of the image they explain. Which
coefficients belong to which token (``support``) and the colour axes are measured on training images by
:mod:`tok1d.training.spectral_fit`; the defaults need no data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tok1d.tokenizers.part import Encoder
from tok1d.tokenizers.spectral import analyse, dct_matrix, zigzag_support

OPPONENT = [[0.577, 0.577, 0.577], [0.707, 0.0, -0.707], [-0.408, 0.816, -0.408]]


class SpectralEncoder(Encoder):
    """Images to DCT coefficients, ``dim`` of them a token.

    Args:
        tokens: N tokens.
        dim: D coefficients of a token; a coefficient may appear in several tokens, to be refined.
        grid: G, lowest frequencies kept along each axis.
        image_size: (height, width) of the input.
    """

    def __init__(self, tokens: int, dim: int, grid: int = 64, image_size: tuple[int, int] = (256, 256)) -> None:
        super().__init__()
        self.tokens, self.dim, self.grid = tokens, dim, grid
        self.register_buffer("colour", torch.tensor(OPPONENT))
        self.register_buffer("mean", torch.zeros(3 * grid * grid))
        self.register_buffer("support", zigzag_support(tokens, dim, grid))
        self.register_buffer("rows", dct_matrix(grid, image_size[0]), persistent=False)
        self.register_buffer("cols", dct_matrix(grid, image_size[1]), persistent=False)

    def spectrum(self, images: Tensor) -> Tensor:
        """Float (B, 3, H, W) → centred coefficients (B, 3·G·G)."""
        return analyse(images, self.colour, self.rows, self.cols).flatten(1) - self.mean

    def forward(self, images: Tensor) -> Tensor:
        return self.spectrum(images)[:, self.support]
