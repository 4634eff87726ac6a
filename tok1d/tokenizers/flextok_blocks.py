"""What the FlexTok encoder and its flow decoder share: attention with normalised queries and keys, gated MLP, tables.

Paper: https://arxiv.org/abs/2502.13967. No norm has weights; linears inside blocks have no bias; projections that read the
same input are fused (q, k, v; both inputs of the gate).

Shapes: B images, T positions, W width, h heads, c = W / h head width, P patches, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import ModelError
from tok1d.tokenizers.blocks import check_range


def norm(x: Tensor) -> Tensor:
    """Layer norm without weights over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


def check_trunk(width: int, depth: int, heads: int | None) -> int:
    """Number of heads, ``width // 64`` if None.

    Raises:
        ModelError: sizes no model has.
    """
    check_range("width", width, 1, 16384)
    check_range("depth", depth, 1, 256)
    heads = max(1, width // 64) if heads is None else heads
    check_range("heads", heads, 1, 1024)
    if width % heads:
        raise ModelError(f"width {width} cannot be split into {heads} heads; choose heads that divide the width")
    if width % 4:
        raise ModelError(f"width {width} is not a multiple of 4, which the sine position table needs")
    return heads


class Attention(nn.Module):
    """Attention whose queries and keys are normalised head by head; scale 8 / c, which is 1 / √c at the usual c = 64.

    Args:
        width, heads: W and h.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = 8 * heads / width
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def heads_of(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output of ``qkv``, float (B, T, 3 · W) → queries, keys and values, each (B, h, T, c)."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        return norm(q).transpose(1, 2), norm(k).transpose(1, 2), v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries (B, h, S, c), keys and values (B, h, T, c), mask of scaled_dot_product_attention → (B, S, W)."""
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return y.transpose(1, 2).flatten(2)


class GatedMLP(nn.Module):
    """``fc2(silu(gate) · up)`` with a hidden width of floor(8 W / 3); ``fc1`` makes gate and up at once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * width // 3
        self.fc1 = nn.Linear(width, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fc1(x).chunk(2, dim=-1)
        if torch.is_grad_enabled():
            return self.fc2(F.silu(gate) * up)
        return self.fc2(F.silu(gate, inplace=True).mul_(up))  # saves fetching two fresh tables: 6 % of sampling on a CPU


def sine_table(width: int, rows: int, cols: int) -> Tensor:
    """Fixed 2D position code, float (W, rows, cols): sin and cos of the row index, then of the column index, W / 4 each.

    Frequencies are 10000 ** (-i / (W / 4)), as in MoCo v3.

    Example:
        >>> [round(value, 4) for value in sine_table(8, 3, 5)[::2, 1, 2].tolist()]  # sin 1, cos 1, sin 2, cos 2
        [0.8415, 0.5403, 0.9093, -0.4161]
    """
    frequency = 10000 ** (-torch.arange(width // 4, device="cpu", dtype=torch.float64) / (width // 4))
    row = torch.arange(rows, device="cpu", dtype=torch.float64) * frequency[:, None]  # (W / 4, rows)
    col = torch.arange(cols, device="cpu", dtype=torch.float64) * frequency[:, None]
    down = [f[:, :, None].expand(-1, -1, cols) for f in (row.sin(), row.cos())]
    across = [f[:, None, :].expand(-1, rows, -1) for f in (col.sin(), col.cos())]
    return torch.cat(down + across).float()


def patches_of(latents: Tensor, patch: int) -> Tensor:
    """Float (B, C, H, W) → float (B, P, p · p · C), channel fastest inside a patch; ``blocks.unpatchify`` is the inverse."""
    x = latents.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, rows, p, cols, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def small(*shape: int) -> nn.Parameter:
    """A learned vector or table, truncated normal with deviation 0.02."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))
