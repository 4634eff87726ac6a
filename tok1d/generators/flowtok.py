"""FlowTok: from a text straight to a picture — the text becomes tokens of the picture's shape, and a flow leads from these to it.

https://arxiv.org/abs/2503.10772. A small transformer makes mean and variance of the source z of every text; the flow goes from z
(t = 1) to the latents x (t = 0), x_t = (1 - t) x + t z, v = z - x. There is no noise beside the variance of the source, and the
network is told nothing else about the text. For guidance a share of the rows learns to reach the picture of another row, told so
by an indicator. (Published code leaves 1e-5 of the source in the target; here none is left.)

Shapes: B rows, N tokens (as many as places of the text), C channels, W width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError, TokenError
from tok1d.generators.bits import row_mask
from tok1d.generators.chance import Chance
from tok1d.generators.condition import Condition, Given, check_share
from tok1d.generators.denoiser import Denoiser
from tok1d.generators.flow import check_latents
from tok1d.generators.generator import Generator, OnStep, Request
from tok1d.generators.guidance import guided, strengths
from tok1d.generators.latents import Latents, Scale
from tok1d.generators.row_noise import RowNoise
from tok1d.generators.space import TokenSpace
from tok1d.generators.times import check_times, draw_times, integrate, sampling_times
from tok1d.generators.trunk import Trunk
from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.quantizers.binary import all_rows
from tok1d.tokenizers.quantizers.common import token_mean, world

WALLS = ("standard", "wall")


class TextSource(nn.Module):
    """Texts → Gaussians in the shape of the latents.

    Args:
        tokens, channels: N, C.
        width, depth, heads: of its transformer.
    """

    def __init__(self, tokens: int, channels: int, width: int, depth: int, heads: int | None) -> None:
        super().__init__()
        self.trunk = Trunk(width, depth, tokens, heads, positions="learned")
        self.out = nn.Linear(width, 2 * channels)

    def forward(self, given: Given) -> tuple[Tensor, Tensor]:
        """Tokens of a condition (B, N, W) → mean and log-variance float32 (B, N, C), the latter in [-30, 20]."""
        mean, logvar = self.out(self.trunk(given.tokens, mask=given.mask)).float().chunk(2, dim=-1)
        return mean, logvar.clamp(-30, 20)


class FlowTok(Generator):
    """Latents of all tokens, from those of a text.

    Args:
        space: of kind ``latents``.
        condition: texts with as many places as there are tokens: ``TextCondition(..., length=N)``. Its ``drop`` is not used.
        width, depth, heads, hidden, positions: of the trunk, see :class:`tok1d.generators.trunk.Trunk`.
        source_width, source_depth, source_heads: of the transformer that makes the source.
        time_mean, time_std, shift: see :class:`tok1d.generators.flow.FlowGenerator`.
        measured: how many first training batches the scale of the channels is measured on.
        shuffled: share of training rows that learn to reach the picture of another row.
        divergence: of the source: ``standard``, from the unit Gaussian; ``wall``, as in published code, with (0.3 mean)^6 in place of
            mean^2: means are free up to about 3.

    Attributes:
        loss_weights: as published in code: ``kl`` 0.01 (the paper says 0.0001), ``alignment`` 1.
    """

    loss_weights = {"flow": 1.0, "kl": 0.01, "alignment": 1.0}  # noqa: RUF012

    def __init__(
        self,
        space: TokenSpace,
        condition: Condition,
        width: int = 768,
        depth: int = 12,
        heads: int | None = None,
        hidden: int | None = None,
        positions: str = "learned",
        source_width: int = 512,
        source_depth: int = 6,
        source_heads: int | None = None,
        time_mean: float = 0.0,
        time_std: float = 1.0,
        shift: float = 1.0,
        measured: int = 100,
        shuffled: float = 0.1,
        divergence: str = "standard",
    ) -> None:
        super().__init__(space, condition)
        check_latents(space)
        check_times(time_mean, time_std, shift)
        if divergence not in WALLS:
            raise ModelError(f"divergence must be one of {', '.join(WALLS)}, got {divergence!r:.100}")
        check_range("source_width", source_width, 1, 16384)
        check_range("width", width, 1, 16384)
        condition.attach(source_width)
        if condition.places != space.tokens:
            raise ModelError(
                f"FlowTok goes from texts of {space.tokens} places to {space.tokens} tokens, this condition has {condition.places}. "
                f"Give TextCondition(..., length={space.tokens})"
            )
        channels = space.channels
        self.source = TextSource(space.tokens, channels, source_width, source_depth, source_heads)
        self.net = Denoiser(channels, channels, 0, space.tokens, width, depth, heads, hidden, positions)
        self.indicator = nn.Embedding(2, width)  # 0: the picture of this text, 1: any picture
        self.scale = Scale(channels, measured)
        self.meaning = nn.Sequential(nn.Linear(source_width, source_width), nn.GELU(), nn.Linear(source_width, channels))
        self.sharpness = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.time_mean, self.time_std, self.shift = time_mean, time_std, shift
        self.shuffled, self.divergence = check_share("shuffled", shuffled), divergence

    # training ----------------------------------------------------------------------------------------------------

    def losses(
        self, batch: dict[str, Any], generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of the velocity, and of the source.

        ``flow``: mean squared error of the velocity. ``kl``: divergence of the source, mean nats of a channel. ``alignment``: each
        source has to be told from those of the other rows of all processes by its text, and the other way round (nats).
        """
        data = self.space.data_of(batch).to(self.device)
        rows, tokens = data.shape[:2]
        chance = Chance(rows, generator, self.device)
        step = self.training and torch.is_grad_enabled()
        kept = row_mask(batch, rows, tokens, self.device)
        if step:
            self.scale.learn(data, kept)
        given = self.condition(batch, rows)
        mean, logvar = self.source(given)
        z = (mean + (0.5 * logvar).exp() * chance.normal(*mean.shape[1:]))[:, :tokens]
        other = chance.draw(lambda rows: torch.randperm(rows, generator=generator, device="cpu"))
        swapped = chance.uniform() < self.shuffled
        if step:
            data = torch.where(swapped[:, None, None], all_rows(data)[other], data)
            kept = None if kept is None else torch.where(swapped[:, None], all_rows(kept.byte())[other].bool(), kept)
        else:
            swapped = torch.zeros_like(swapped)
        x = self.scale(data)
        t = draw_times(chance, mean=self.time_mean, std=self.time_std, shift=self.shift)
        vector = Given(vector=self.indicator(swapped.long()))
        v = self.net(torch.lerp(x, z, t[:, None, None]), t, vector, kept)
        losses = {
            "flow": token_mean((v - (z - x)).square().mean(-1), kept, step),
            "kl": divergence(mean, logvar, self.divergence).mean(),
            "alignment": self.alignment(mean, given, step),
        }
        return losses, {"source_std": (0.5 * logvar.detach()).exp().mean()}

    def alignment(self, mean: Tensor, given: Given, step: bool = False) -> Tensor:
        """Contrastive loss between sources and texts, over all places of a text at once.

        Args:
            mean: float (B, N, C), of the sources.
            given: the texts.
            step: whether this is a training step: then rows of all processes are compared (in validation some may have none).
        """
        mask = given.tokens.new_ones(given.tokens.shape[:2]) if given.mask is None else given.mask.to(mean.dtype)
        meant = self.meaning(given.tokens).float()
        source, text = (F.normalize((x * mask[..., None]).flatten(1), dim=1) for x in (mean, meant))
        sharpness = self.sharpness.clamp(max=math.log(100.0)).exp()
        target = torch.arange(len(mean), device=mean.device) + (world()[0] * len(mean) if step else 0)
        pairs = ((source, text), (text, source))
        nats = [F.cross_entropy(sharpness * a @ (all_rows(b) if step else b).T, target) for a, b in pairs]
        return (nats[0] + nats[1]) / 2

    # sampling ----------------------------------------------------------------------------------------------------

    def sample(
        self,
        request: Request,
        *,
        guidance: float = 1.0,
        schedule: str = "constant",
        temperature: float = 1.0,
        steps: int = 20,
        solver: str = "euler",
        shift: float | None = None,
        on_step: OnStep | None = None,
    ) -> Latents:
        """From the source of a text to latents.

        Args:
            guidance, schedule: away from any picture towards that of the text, over the steps.
            temperature: of the source; 0 takes its mean, so a text has one picture.
            solver: ``euler`` or ``heun``.
            shift: of the times; that of training if None.
        """
        if solver == "maruyama":
            raise TokenError("maruyama steps need noise as the source, here it is a text; take euler or heun")
        times = sampling_times(steps, self.shift if shift is None else shift, solver)
        g = strengths(guidance, schedule, steps)
        rows, noise = request.rows, RowNoise(request.seeds, self.device)
        mean, logvar = self.source(request.given)
        z = mean + temperature * (0.5 * logvar).exp() * noise.normal(*mean.shape[1:])

        def velocity(x: Tensor, t: float, i: int) -> Tensor:
            many = 2 if g[i] != 1 else 1
            which = torch.arange(many, device=self.device).repeat_interleave(rows)
            time = torch.full((rows * many,), t, device=self.device)
            return guided(self.net(x.repeat(many, 1, 1), time, Given(vector=self.indicator(which))), rows, g[i])

        def given_out(x: Tensor) -> Tensor:
            return self.scale.inverse(x)[:, : request.tokens]

        tell = None if on_step is None else lambda i, of, x: on_step(i, of, given_out(x))
        return Latents(given_out(integrate(velocity, z, times, solver, on_step=tell)), self.space)


def divergence(mean: Tensor, logvar: Tensor, kind: str = "standard") -> Tensor:
    """Nats of each Gaussian from the unit one; ``wall``: with (0.3 mean)^6 in place of mean^2.

    Example:
        >>> divergence(torch.tensor([0.0, 2.0]), torch.zeros(2)).tolist()
        [0.0, 2.0]
    """
    moved = mean.square() if kind == "standard" else (0.3 * mean).pow(6)
    return 0.5 * (moved + logvar.exp() - 1 - logvar)
