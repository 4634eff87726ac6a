"""The network of a flow decoder: velocity of noised patches given the first tokens, plainly or by exact short cuts.

The short cuts of :meth:`FlowNetwork.fast_field` (same velocities up to rounding):
- dropped tokens are equal and stay equal through all layers: m of them are one whose key has log m added to its logits;
- so are the N null tokens of the branch without condition;
- both branches, and prefixes of different lengths, share the matrix products of one pass, unpadded;
- modulations depend on time only: they are made for many steps at once and shared by images, branches and positions;
- the last block computes patches only.

Paper: https://arxiv.org/abs/2502.13967.

Shapes: B images, n ≤ N given tokens, D code width, P patches, W width, C × h × w latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tok1d.errors import TokenError
from tok1d.tokenizers.blocks import init_weights, unpatchify
from tok1d.tokenizers.decoders.flow_blocks import Group, ModulatedBlock, TimeEmbedding, modulate
from tok1d.tokenizers.decoders.flow_sampler import Guidance
from tok1d.tokenizers.flextok_blocks import patches_of, sine_table, small

TIMES_AT_ONCE = 32  # modulations of that many steps are kept: 77 MB at width 1792 and depth 28


@dataclass
class Flow:
    """One evaluation of the network.

    Attributes:
        velocity: float32 (B, C, h, w).
        activation: float (B, P + N, W) after the second block, patches first; what REPA compares with image features.
        target: float32 (B, C, h, w) velocity that training wants, where there is one.
    """

    velocity: Tensor
    activation: Tensor
    target: Tensor | None = None


class FlowNetwork(nn.Module):
    """Velocity of noised latents under the given tokens.

    Args:
        tokens, dim: N and D.
        width, depth, heads: of the transformer.
        grid: rows and columns of patches.
        patch: side of a patch in latents.
        channels: C.
        max_timestep: as :class:`TimeEmbedding`.
    """

    def __init__(
        self,
        tokens: int,
        dim: int,
        width: int,
        depth: int,
        heads: int,
        grid: tuple[int, int],
        patch: int,
        channels: int,
        max_timestep: float,
    ) -> None:
        super().__init__()
        self.tokens, self.grid, self.patch = tokens, grid, patch
        self.dropped, self.null = small(width), small(width)
        self.token_positions = small(width, tokens)
        # never learned, yet kept with the weights: published files hold it
        self.register_buffer("positions", sine_table(width, *grid))
        self.embed = nn.Linear(dim, width)
        self.patch_embed = nn.Linear(patch**2 * channels, width)
        self.time = TimeEmbedding(width, max_timestep)
        self.blocks = nn.ModuleList(ModulatedBlock(width, heads) for _ in range(depth))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, patch**2 * channels)
        self.apply(init_weights)
        for layer in (*(block.modulation for block in self.blocks), self.final_modulation, self.head):
            nn.init.zeros_(layer.weight)

    def flow(
        self, x: Tensor, t: Tensor, q: Tensor, mask: Tensor | None = None, null: Tensor | None = None
    ) -> Flow:
        """One plain evaluation with all N registers and a time for each image, as in training.

        Args:
            x: float (B, C, h, w) noised scaled latents.
            t: float (B,) in [0, 1], 1 is pure noise.
            q, mask: codes and which are given, as :meth:`forward`.
            null: bool (B,) True = evaluate without any token.
        """
        self.check_codes(q, mask)
        registers = self._embed_tokens(q, mask)
        tail = self.dropped.expand(len(q), self.tokens - q.shape[1], -1)
        registers = torch.cat([registers, tail], dim=1)
        if null is not None:
            registers = torch.where(null[:, None, None], self.null, registers)
        blocks, final = self._rows(t)
        group = Group(torch.cat([self._embed_patches(x), registers], dim=1))
        velocities, activation = self._trunk([group], blocks, final)
        return Flow(velocities[0], activation)

    def plain_field(
        self, q: Tensor, mask: Tensor | None, times: list[float], guide: Guidance | None
    ) -> Callable[[Tensor, int], Tensor]:
        def field(x: Tensor, index: int) -> Tensor:
            t = torch.full((len(x),), times[index], device=x.device)
            given = self.flow(x, t, q, mask).velocity
            null = torch.ones(len(x), dtype=torch.bool, device=x.device)
            return given if guide is None else guide(given, self.flow(x, t, q, mask, null).velocity)

        return field

    def fast_field(
        self, q: Tensor, mask: Tensor | None, times: list[float], guide: Guidance | None
    ) -> Callable[[Tensor, int], Tensor]:
        conditions = list(self._conditions(q, mask))
        if guide is not None:
            null = self.null.expand(len(q), 1, -1)
            conditions.append((slice(None), null, self._key_bias(1, self.tokens)))
        rows = self._modulations(times, q.device)

        def field(x: Tensor, index: int) -> Tensor:
            modulation, final = next(rows)  # one evaluation a call, in the order of the times
            patches = self._embed_patches(x)
            groups = [Group(torch.cat([patches[where], r], dim=1), bias) for where, r, bias in conditions]
            velocities, _ = self._trunk(groups, modulation, final)
            if guide is None:
                return self._join(velocities, conditions, x)
            return guide(self._join(velocities[:-1], conditions[:-1], x), velocities[-1])

        return field

    def _conditions(
        self, q: Tensor, mask: Tensor | None
    ) -> Iterator[tuple[Tensor | slice, Tensor, Tensor | None]]:
        """Rows of the batch with equally many tokens, their registers with the dropped ones collapsed, and key logits."""
        registers = self._embed_tokens(q, mask)
        if mask is None:
            counts = [q.shape[1]] * len(q)
            mask = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
        else:
            counts = mask.sum(1).tolist()
        for count in sorted(set(counts)):
            rows = [row for row, c in enumerate(counts) if c == count]
            where: Tensor | slice = slice(None)
            if len(rows) < len(counts):
                where = torch.tensor(rows, device=q.device)
            kept = registers[where][mask[where]].view(len(rows), count, -1)
            tail = self.tokens - count
            if tail:
                kept = torch.cat([kept, self.dropped.expand(len(rows), 1, -1)], dim=1)
            yield where, kept, self._key_bias(count + 1, tail) if tail else None

    def _key_bias(self, registers: int, copies: int) -> Tensor:
        """Zeros for patches and registers, but log(copies) for the last register, which stands for so many."""
        bias = torch.zeros(self.grid[0] * self.grid[1] + registers, device=self.null.device)
        bias[-1] = math.log(copies)
        return bias

    def _modulations(self, times: list[float], device: torch.device) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Modulation rows of every block and of the head for one time after another."""
        for start in range(0, len(times), TIMES_AT_ONCE):
            t = torch.tensor(times[start : start + TIMES_AT_ONCE], device=device)
            blocks, final = self._rows(t)
            for i in range(len(t)):
                yield [rows[i : i + 1] for rows in blocks], final[i : i + 1]

    def _join(self, velocities: list[Tensor], conditions: list, x: Tensor) -> Tensor:
        if len(velocities) == 1:
            return velocities[0]
        order = torch.cat([where for where, _, _ in conditions])
        return torch.cat(velocities)[order.argsort()]

    def _trunk(self, groups: list[Group], modulation: list[Tensor], final: Tensor) -> tuple[list[Tensor], Tensor]:
        """Groups and modulation rows → velocities of each group, and states of the first one after the second block."""
        patches = self.grid[0] * self.grid[1]
        last = len(self.blocks) - 1
        activation = groups[0].x
        for i, (block, rows) in enumerate(zip(self.blocks, modulation)):
            groups = block(groups, rows, patches, last=i == last and i > 1)
            if i <= 1:
                activation = groups[0].x
        shift, scale = final.unbind(1)
        velocities = []
        for group in groups:
            y = self.head(modulate(group.x[:, :patches], patches, shift[:, None], scale[:, None]))
            velocities.append(unpatchify(y, self.grid, self.patch).float())
        return velocities, activation

    def _rows(self, t: Tensor) -> tuple[list[Tensor], Tensor]:
        """Float (M,) times → modulation rows of each block (M, 2, 6, W) and of the head (M, 2, W)."""
        time = F.silu(self.time(t))
        return [block.rows(time) for block in self.blocks], self.final_modulation(time).unflatten(-1, (2, -1))

    def _embed_patches(self, x: Tensor) -> Tensor:
        return self.patch_embed(patches_of(x, self.patch).to(self.null.dtype)) + self.positions.flatten(1).T

    def _embed_tokens(self, q: Tensor, mask: Tensor | None) -> Tensor:
        """Codes → registers (B, n, W) with their position; masked ones are the vector of dropped tokens."""
        if mask is not None:
            q = q.masked_fill(~mask[..., None], 0)  # what is masked may be nan, and 0 × nan would still be nan
        registers = self.embed(q.to(self.null.dtype)) + self.token_positions[:, : q.shape[1]].T
        return registers if mask is None else torch.where(mask[..., None], registers, self.dropped)

    def check_codes(self, q: Tensor, mask: Tensor | None) -> None:
        if q.shape[1] > self.tokens:
            raise TokenError(f"this decoder takes up to {self.tokens} tokens, got {q.shape[1]}")
        assert mask is None or mask.shape == q.shape[:2], (mask.shape, q.shape)
