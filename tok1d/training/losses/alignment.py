"""Losses that give codes the structure of a frozen image model's features: by relations (VF type), or by the decoder's states (REPA).

A 1D token has no place in the picture. Aligning token i with patch i of a teacher would pull the tokens back to raster order, and
nothing here does that (a warning of EOSTok, https://arxiv.org/abs/2605.00503). What can be compared honestly are
- pictures with pictures: :class:`ImageRelation`, which knows nothing of places;
- places with places, where the decoder has them: its states at the patches it is about to paint. :class:`GridRelation` compares the
  similarity of every two places (the matrix of VA-VAE, https://arxiv.org/abs/2501.01423), :class:`FeatureAlignment` each place with
  the teacher through a small head (REPA, https://arxiv.org/abs/2410.06940; FlexTok, https://arxiv.org/abs/2502.13967).

A decoder's states are read by a hook on a block that is named; decoders know nothing of it.

Short vectors turn fast: the gradient of a cosine is one over the length, without bound, and where codes hardly differ that is the length
of what is left of them without their mean. :func:`steady_cosine` has the same value and a bounded gradient.

Shapes: B images, N tokens, D code width, P = rows · cols places, W width of the decoder, C channels of the teacher.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError, UsageError
from tok1d.tokenizers.quantizers.binary import all_rows
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.frozen import Frozen
from tok1d.training.losses.base import LatentLoss
from tok1d.training.losses.features import OFFLINE, Backbone

SHORT = 0.01  # root mean square of what is compared, far below what occurs: 0.05 in a fresh head, 0.1 in relations, 1 in states


class BlockReader:
    """What a block of a decoder returned last, at the places of the picture, with its gradient. It is handed out once.

    Blocks of mask-token decoders begin with a class token and end with latents, those of flow decoders end with registers; a
    convolutional block returns a map. Evaluations without gradient are not kept.

    Args:
        tokenizer: whose decoder is read.
        block: name of the module inside of the tokenizer, such as ``decoder.net.blocks.1`` or ``decoder.transformer``.

    Raises:
        UsageError: there is no such module.
    """

    def __init__(self, tokenizer: Tokenizer1D, block: str) -> None:
        try:
            module = tokenizer.get_submodule(block)
        except AttributeError as error:
            names = [name for name, _ in tokenizer.named_modules() if name.startswith("decoder.") and name.count(".") <= 3]
            raise UsageError(f"the tokenizer has no module {block!r}; it has {', '.join(names[:40])} …") from error
        self.block, self.value = block, None
        self.grid: tuple[int, int] | None = getattr(tokenizer.decoder, "grid", None)
        self.leading = int(hasattr(tokenizer.decoder, "class_token"))
        module.register_forward_hook(self._keep)  # a bound method: a deep copy of the tokenizer reports to a copy of this

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockReader:
        copy = object.__new__(BlockReader)
        memo[id(self)] = copy
        copy.__dict__.update(self.__dict__, value=None)  # an activation has a history and cannot be copied
        return copy

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self.value = output

    def take(self) -> tuple[Tensor, tuple[int, int]]:
        """Float (B, P, W) and (rows, cols).

        Raises:
            ModelError: the block did not run since, or what it returned has no places.
        """
        value, self.value = self.value, None
        value = value[0] if isinstance(value, list | tuple) and value else value
        value = getattr(value, "x", value)  # a group of sequences of a flow decoder
        if not isinstance(value, Tensor):
            raise ModelError(f"the block {self.block} did not run in this step, or returns no tensor; name another block of the decoder")
        if value.dim() == 4:
            return value.flatten(2).mT, (value.shape[2], value.shape[3])
        places = self.grid[0] * self.grid[1] if self.grid else 0
        first = self.leading if value.dim() == 3 and value.shape[1] != places else 0
        if value.dim() != 3 or not places or value.shape[1] < first + places:
            raise ModelError(
                f"the block {self.block} returned {tuple(value.shape)}, which does not hold the decoder's places {self.grid}; name another block"
            )
        return value[:, first : first + places], self.grid  # type: ignore[return-value]


class Teacher:
    """Features of a frozen image model on another grid, and pooled, without gradient; arguments as :class:`Backbone`."""

    def __init__(self, model: str, weights: str | None, size: int | None, layer: int = -1) -> None:
        self.net, self.layer = Backbone(model, weights, size), layer
        self.channels = self.net.channels([layer])[0]

    def to(self, device: torch.device | str) -> Teacher:
        self.net.to(device)
        return self

    @torch.no_grad()
    def places(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Float (B, 3, H, W) in [0, 1] → float32 (B, P, C): the patch features, resized to ``grid``."""
        found = self.net.layers(images, [self.layer], norm=True)[0].float()
        if found.shape[-2:] != grid:
            found = F.interpolate(found, grid, mode="bilinear", antialias=True, align_corners=False)
        return found.flatten(2).mT

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """Float (B, 3, H, W) in [0, 1] → float32 (B, C)."""
        return self.net.pooled(images)


class GridRelation(LatentLoss):
    """Places of a picture should resemble each other in the decoder as in the teacher.

    Mean over images and pairs of places of ``relu(|cos(g_i, g_j) - cos(f_i, f_j)| - margin)``, with g the states of a decoder block and
    f the teacher's patch features on the same grid. Gradient reaches the codes through the decoder, so tokens keep any order.

    Args:
        model, weights, size: see :class:`tok1d.training.losses.features.Backbone`.
        block: whose states; ``decoder.transformer`` is the end of a mask-token decoder, ``decoder.net.blocks.1`` the second block of a
            flow.
        layer: of the teacher.
        margin: differences below it cost nothing; 0.25 in VA-VAE.
    """

    def __init__(
        self, model: str = OFFLINE, weights: str | None = None, size: int | None = None, block: str = "decoder.transformer",
        layer: int = -1, margin: float = 0.25,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 <= margin < 2:
            raise UsageError(f"margin is a difference of cosines in [0, 2), got {margin}")
        self.frozen, self.block, self.margin = Frozen(teacher=Teacher(model, weights, size, layer)), block, margin
        self.reader: BlockReader | None = None

    def attach(self, tokenizer: Tokenizer1D) -> None:
        self.reader = BlockReader(tokenizer, self.block)

    def forward(self, z: Tensor, q: Tensor, mask: Tensor | None, images: Tensor, batch: dict[str, Any]) -> Tensor:
        """See :class:`LatentLoss`."""
        states, grid = _read(self.reader)
        wanted = F.normalize(self.frozen.on(images.device)["teacher"].places(images, grid), dim=-1)
        with torch.autocast(images.device.type, enabled=False):  # cosines of 8 bits differ by more than a good fit does
            g = states.float()
            size = g.square().sum(-1, keepdim=True)
            found = steady_cosine(g @ g.mT, size, size.mT, SHORT * g.shape[-1] ** 0.5)
            return F.relu((found - wanted @ wanted.mT).abs() - self.margin).mean()


class ImageRelation(LatentLoss):
    """Images that resemble each other in the teacher should do so in their codes.

    One less the correlation of r_ab and s_ab over all pairs a ≠ b of images of all ranks (representational similarity analysis,
    https://doi.org/10.3389/neuro.06.004.2008). s is the cosine of the teacher's pooled features, less their mean over the batch; r
    that of the codes of the tokens that both images kept, less each token's mean over the images that kept it.

    Mean absolute differences of r and s would be least for codes that are all the same: r is 0 then, as s nearly is for most pairs, while a few
    coarse codes have r near 1 and -1. Here equal codes cost 1, as any that say nothing of s.

    Args:
        model, weights, size: see :class:`tok1d.training.losses.features.Backbone`.
        spread: root mean square distance of a token's codes from their mean below which the gradient is that at this distance; a code of
            a binary or normalised quantizer has length 1, one of FSQ about that.
    """

    def __init__(self, model: str = OFFLINE, weights: str | None = None, size: int | None = None, spread: float = 0.5) -> None:
        super().__init__()
        if spread <= 0:
            raise UsageError(f"spread is a distance of codes above 0, got {spread}")
        self.frozen, self.spread = Frozen(teacher=Teacher(model, weights, size)), spread

    def forward(self, z: Tensor, q: Tensor, mask: Tensor | None, images: Tensor, batch: dict[str, Any]) -> Tensor:
        """See :class:`LatentLoss`; 0 where all ranks together have fewer than three images, whose relations say nothing."""
        f = all_rows(self.frozen.on(images.device)["teacher"].pooled(images))
        kept = q.new_ones(q.shape[:2]) if mask is None else mask.to(q.dtype)
        q, kept = all_rows(q.float()), all_rows(kept.float())
        if len(q) < 3:
            return q.sum() * 0
        with torch.autocast(q.device.type, enabled=False):
            others = ~torch.eye(len(q), dtype=torch.bool, device=q.device)
            r, s = (relation[others] for relation in (code_relation(q, kept, self.spread), image_relation(f)))
            r, s = r - r.mean(), s - s.mean()
            least = SHORT * len(r) ** 0.5  # below it r falls short of s, which costs: a limit that drives relations apart
            return 1 - (r * s).sum() / (r.norm().clamp(min=least) * s.norm().clamp(min=least))


def image_relation(f: Tensor) -> Tensor:
    """Float (B, C) → (B, B) cosines of what is left of each row without the mean."""
    f = F.normalize(f - f.mean(0), dim=1)
    return f @ f.mT


def code_relation(q: Tensor, kept: Tensor, spread: float = 0.5) -> Tensor:
    """Cosines over the tokens that both images kept, each token without its mean over the images that kept it.

    Args:
        q: float (B, N, D).
        kept: float (B, N), 1 where a token was kept, else 0.
        spread: see :class:`ImageRelation`.

    Returns:
        Float (B, B), 0 where one side has nothing left.
    """
    mean = (kept[..., None] * q).sum(0) / kept.sum(0).clamp(min=1)[:, None]
    q = kept[..., None] * (q - mean)
    product = q.flatten(1) @ q.flatten(1).mT  # a token that one side dropped is zero there
    size = q.square().sum(2) @ kept.mT  # [a, b]: of a, over the tokens that b kept
    return steady_cosine(product, size, size.mT, spread * (kept @ kept.mT).clamp(min=1).sqrt())


def steady_cosine(product: Tensor, a: Tensor, b: Tensor, length: Tensor | float) -> Tensor:
    """The cosine, with a gradient that is scaled by the shorter vector over ``length`` where that is below 1: at most 1 / ``length``.

    An epsilon in the denominator would bound it too, and would pull vectors together, which lowers such a cosine.

    Args:
        product: float (…), a scalar product.
        a, b: float (…), squared lengths of the two vectors.
        length: above 0.

    Returns:
        Float (…), 0 where a vector is.
    """
    cosine = product / (a.clamp(min=1e-12).sqrt() * b.clamp(min=1e-12).sqrt())
    share = (torch.minimum(a, b).detach().sqrt() / length).clamp(max=1)
    return cosine.detach() + share * (cosine - cosine.detach())


class FeatureAlignment(LatentLoss):
    """REPA: 1 − cosine between the teacher's patch features and a trained head on the states of an early decoder block; mean over places.

    Args:
        width: W of the block.
        model, weights, size: see :class:`tok1d.training.losses.features.Backbone`; FlexTok takes DINOv2-L.
        block: whose states; FlexTok's is the second block of its flow.
        layer: of the teacher.
        hidden: width of the head, an MLP of three layers with SiLU, as in REPA.
    """

    def __init__(
        self, width: int, model: str = "vit_large_patch14_dinov2.lvd142m", weights: str | None = None, size: int | None = 224,
        block: str = "decoder.net.blocks.1", layer: int = -1, hidden: int = 2048,
    ) -> None:  # fmt: skip
        super().__init__()
        teacher = Teacher(model, weights, size, layer)
        self.frozen, self.width, self.block = Frozen(teacher=teacher), width, block
        self.head = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, teacher.channels)
        )
        self.reader: BlockReader | None = None

    def attach(self, tokenizer: Tokenizer1D) -> None:
        self.reader = BlockReader(tokenizer, self.block)

    def forward(self, z: Tensor, q: Tensor, mask: Tensor | None, images: Tensor, batch: dict[str, Any]) -> Tensor:
        """See :class:`LatentLoss`."""
        states, grid = _read(self.reader)
        if states.shape[-1] != self.width:
            raise UsageError(f"the block {self.block} is {states.shape[-1]} wide, the alignment head was built with width={self.width}")
        wanted = self.frozen.on(images.device)["teacher"].places(images, grid)
        found = self.head(states).float()
        product, a, b = ((x * y).sum(-1) for x, y in ((found, wanted), (found, found), (wanted, wanted)))
        return 1 - steady_cosine(product, a, b, SHORT * wanted.shape[-1] ** 0.5).mean()


def _read(reader: BlockReader | None) -> tuple[Tensor, tuple[int, int]]:
    if reader is None:
        raise ModelError("this loss reads the decoder: call attach(tokenizer) before training (tasks do)")
    return reader.take()
