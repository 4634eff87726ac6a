"""Transformer of the flow decoder: blocks modulated by time, patches and registers each in their own way (adaLN-zero).

Several groups of sequences of different lengths run through a block together: the linears see all their positions in one
matrix, attention sees each group by itself. Nothing is padded. Papers: https://arxiv.org/abs/2212.09748 (adaLN-zero),
https://arxiv.org/abs/2502.13967 (separate modulation).

Shapes: b sequences in a group, P patches, n registers, W width; modulation rows (b or 1, 2, 6, W): 0 for patches, 1 for
registers; gate, gate (attention, MLP), shift, scale (attention), shift, scale (MLP).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.tokenizers.flextok_blocks import Attention, GatedMLP, norm


@dataclass
class Group:
    """Sequences of equal length: float (b, P + n, W) states, and additive key logits (P + n,), None for zeros."""

    x: Tensor
    bias: Tensor | None = None


class TimeEmbedding(nn.Module):
    """Times to vectors: 128 cosines and sines with frequencies 1000 / max_timestep · 256 ** (-i / 128), then an MLP.

    The longest period is 256, not the usual 10,000.

    Args:
        width: W.
        max_timestep: what upstream's times are measured in, 1 or 1000.
    """

    def __init__(self, width: int, max_timestep: float) -> None:
        super().__init__()
        powers = torch.arange(128, device="cpu", dtype=torch.float32) / 128
        self.register_buffer("frequency", torch.exp(-math.log(256) * powers) * (1000 / max_timestep), persistent=False)
        self.fc1 = nn.Linear(256, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """Float32 (M,) in [0, 1] → float (M, W)."""
        angle = t.float()[:, None] * self.frequency.float()
        code = torch.cat([angle.cos(), angle.sin()], dim=1)
        return self.fc2(F.silu(self.fc1(code.to(self.fc1.weight.dtype))))


class ModulatedBlock(nn.Module):
    """``x + gate · attention(modulated norm(x))``, then the same with the MLP; zero-initialised gates make it the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = GatedMLP(width)
        self.modulation = nn.Linear(width, 12 * width)

    def rows(self, time: Tensor) -> Tensor:
        """Float (M, W), silu of the time embedding → modulation rows (M, 2, 6, W)."""
        return self.modulation(time).unflatten(-1, (2, 6, -1))

    def forward(self, groups: list[Group], rows: Tensor, patches: int, last: bool = False) -> list[Group]:
        """One block over all groups; rows (b, 2, 6, W) for a single group, or (1, 2, 6, W) shared by all sequences.

        With ``last``, only patches come out: nothing reads the registers of the last block.
        """
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = rows.unbind(2)
        qkv = apply_packed(self.attn.qkv, [modulate(g.x, patches, shift_attn, scale_attn) for g in groups])
        ys = []
        for group, part in zip(groups, qkv):
            q, k, v = self.attn.heads_of(part)
            mask = None if group.bias is None else group.bias.to(q.dtype)[None, None, None]
            ys.append(self.attn.attend(q[:, :, :patches] if last else q, k, v, mask))
        ys = apply_packed(self.attn.proj, ys)
        xs = [gated(g.x[:, :patches] if last else g.x, patches, gate_attn, y) for g, y in zip(groups, ys)]
        ys = apply_packed(self.mlp, [modulate(x, patches, shift_mlp, scale_mlp) for x in xs])
        return [Group(gated(x, patches, gate_mlp, y), g.bias) for g, x, y in zip(groups, xs, ys)]


def apply_packed(layer: nn.Module, xs: list[Tensor]) -> list[Tensor]:
    """A layer that treats positions alike, applied to all groups (b, T, W) at once."""
    if len(xs) == 1:
        return [layer(xs[0])]
    y = layer(torch.cat([x.flatten(0, 1) for x in xs]))
    return [part.unflatten(0, x.shape[:2]) for part, x in zip(y.split([len(x) * x.shape[1] for x in xs]), xs)]


def modulate(x: Tensor, patches: int, shift: Tensor, scale: Tensor) -> Tensor:
    """``norm(x) (1 + scale) + shift``, float (b, T, W), with rows (b or 1, 2, W): 0 for the first P positions, 1 for the rest."""
    h, scale = norm(x), scale + 1
    first = torch.addcmul(shift[:, :1], h[:, :patches], scale[:, :1])
    if h.shape[1] == patches:
        return first
    return torch.cat([first, torch.addcmul(shift[:, 1:], h[:, patches:], scale[:, 1:])], dim=1)


def gated(x: Tensor, patches: int, gate: Tensor, y: Tensor) -> Tensor:
    """``x + gate · y``, the gate (b or 1, 2, W) chosen as in :func:`modulate`."""
    first = torch.addcmul(x[:, :patches], gate[:, :1], y[:, :patches])
    if x.shape[1] == patches:
        return first
    return torch.cat([first, torch.addcmul(x[:, patches:], gate[:, 1:], y[:, patches:])], dim=1)
