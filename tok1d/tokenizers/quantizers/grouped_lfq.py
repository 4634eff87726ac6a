"""GroupedLFQ: lookup-free quantization in groups of channels, each with a small codebook and an entropy of its own.

Paper: WeTok, https://arxiv.org/abs/2508.05599 (GQ). Published code averages the use of codes over the groups before it takes
the entropy, which hides groups that are stuck at different codes; here each group keeps its own average.

Shapes: B images, N tokens, G groups of k bits, d = G · k.
"""

from __future__ import annotations

from torch import Tensor

from tok1d.tokenizers.blocks import check_range
from tok1d.tokenizers.quantizers.lfq import LFQ
from tok1d.tokenizers.quantizers.packing import bits_to_digits, bits_to_tokens, digits_to_bits, tokens_to_bits


class GroupedLFQ(LFQ):
    """Group-wise lookup-free quantization.

    Args:
        groups: G.
        group_bits: k, bits of a group; G · k is at most 128. Latents are G · k wide.
        temperature, gamma, entropy, commitment: as :class:`LFQ`.

    The ``entropy`` loss is the mean over groups, as the published weight expects; the entropies among the stats are sums.
    A token is an id (its bits, from 63 on); generators that predict group by group use ``group_ids``.

    Example:
        >>> import torch
        >>> gq = GroupedLFQ(groups=4, group_bits=8)
        >>> out = gq(torch.randn(1, 3, 32))
        >>> gq.bits_per_token, gq.group_ids(out.ids).shape
        (32, torch.Size([1, 3, 4]))
    """

    def __init__(
        self,
        groups: int = 4,
        group_bits: int = 8,
        temperature: float = 0.01,
        gamma: float = 1.0,
        entropy: float = 0.1,
        commitment: float = 0.25,
    ) -> None:
        check_range("groups", groups, 1, 128)
        check_range("group_bits", group_bits, 1, 20)
        check_range("groups x group_bits", groups * group_bits, 1, 128)
        super().__init__(groups * group_bits, groups, temperature, gamma, entropy, commitment)
        self.group_bits, self.entropy_scale = group_bits, 1 / groups

    def group_ids(self, ids: Tensor) -> Tensor:
        """Tokens, int64 (B, n) or uint8 (B, n, d), → int64 (B, n, G), the code of each group below 2^k."""
        return bits_to_digits(tokens_to_bits(ids, self.bits), [2**self.group_bits] * self.groups)

    def from_group_ids(self, group_ids: Tensor) -> Tensor:
        """int64 (B, n, G) → tokens, int64 (B, n) or uint8 (B, n, d)."""
        return bits_to_tokens(digits_to_bits(group_ids, [2**self.group_bits] * self.groups))
