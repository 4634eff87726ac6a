"""GroupedLFQ: contract, entropy per group, group ids."""

import pytest
import torch

from tests.contract.parts import QuantizerContract
from tok1d.errors import ModelError
from tok1d.tokenizers.quantizers.grouped_lfq import GroupedLFQ
from tok1d.tokenizers.quantizers.lfq import LFQ

CLASS = {"class": "tok1d.tokenizers.quantizers.grouped_lfq.GroupedLFQ"}


class TestGroupedLFQ(QuantizerContract):
    config = {**CLASS, "groups": 3, "group_bits": 4, "temperature": 1.0}


class TestBits(QuantizerContract):
    config = {**CLASS, "groups": 8, "group_bits": 8, "temperature": 1.0}


def test_collapsed_groups_are_seen():
    """Four groups, each stuck at a code of its own: the codebook entropy is 0, not that of four codes."""
    stuck = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1]]).flatten().expand(2, 50, 8)
    gq = GroupedLFQ(groups=4, group_bits=2)
    collapsed = gq(stuck)
    assert collapsed.stats["codebook_entropy"].item() == pytest.approx(0, abs=1e-6)
    torch.manual_seed(0)
    diverse = gq(torch.randn(2, 5000, 8))
    assert diverse.stats["codebook_entropy"].item() == pytest.approx(4 * torch.tensor(4.0).log().item(), rel=1e-3)
    assert diverse.losses["entropy"] < collapsed.losses["entropy"] - 1


def test_the_loss_is_a_mean_over_groups():
    z = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
    one, grouped = LFQ(12, entropy_groups=3, temperature=1.0)(z), GroupedLFQ(3, 4, temperature=1.0)(z)
    torch.testing.assert_close(grouped.losses["entropy"] * 3, one.losses["entropy"])
    alone = [LFQ(4, temperature=1.0)(part).losses["entropy"] for part in z.split(4, -1)]
    torch.testing.assert_close(grouped.losses["entropy"], torch.stack(alone).mean())
    torch.testing.assert_close(grouped.losses["commitment"], one.losses["commitment"])
    assert torch.equal(grouped.q, one.q) and torch.equal(grouped.ids, one.ids)


@pytest.mark.parametrize(("groups", "bits"), [(4, 8), (8, 8), (6, 20), (3, 1)])
def test_group_ids(groups, bits):
    gq = GroupedLFQ(groups, bits)
    out = gq(torch.randn(2, 7, groups * bits, generator=torch.Generator().manual_seed(0)))
    tokens = out.ids if out.bits is None else out.bits
    ids = gq.group_ids(tokens)
    assert ids.shape == (2, 7, groups) and ids.min() >= 0 and ids.max() < 2**bits
    for g, part in enumerate(out.q.split(bits, -1)):
        assert torch.equal(LFQ(bits).codes_to_ids(part), ids[..., g])
    assert torch.equal(gq.from_group_ids(ids), tokens)


def test_arguments_are_checked():
    for arguments in ((0, 8), (4, 0), (4, 21), (17, 8), (2.0, 8)):
        with pytest.raises(ModelError):
            GroupedLFQ(*arguments)
