"""Shared maths of sign quantizers: exact entropies, group marginals, several ranks, memory."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tok1d.errors import ModelError
from tok1d.tokenizers.part import Quantizer
from tok1d.tokenizers.quantizers.bernoulli import BernoulliBits
from tok1d.tokenizers.quantizers.binary import (
    bit_entropy,
    check_groups,
    codebook_entropy,
    coin_entropy,
    default_groups,
    group_marginals,
)
from tok1d.tokenizers.quantizers.bsq import BSQ
from tok1d.tokenizers.quantizers.grouped_lfq import GroupedLFQ
from tok1d.tokenizers.quantizers.lfq import LFQ


def table(z: torch.Tensor, inv_temperature: float = 1.0) -> torch.Tensor:
    """(M, d) latents → (M, 2^d) softmax over all codes ±1, first channel most significant, in double."""
    codes = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=z.shape[-1])), dtype=torch.float64)
    return (2 * inv_temperature * z.double() @ codes.T).softmax(-1)


def entropy(p: torch.Tensor) -> torch.Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


@pytest.mark.parametrize("bits", range(1, 13))
@pytest.mark.parametrize("inv_temperature", [0.3, 100.0])
def test_entropy_of_a_token_is_that_of_the_softmax_over_codes(bits, inv_temperature):
    z = torch.randn(40, bits, generator=torch.Generator().manual_seed(bits))
    ours = coin_entropy(4 * inv_temperature * z).sum(-1)
    torch.testing.assert_close(ours.double(), entropy(table(z, inv_temperature)), atol=1e-6, rtol=1e-5)


def test_entropy_of_a_coin_is_stable():
    logits = torch.tensor([0.0, 1e-8, 20.0, -20.0, 60.0, -1e30], requires_grad=True)
    wanted = torch.tensor([0.693147180559945, 0.693147180559945, 4.32842257e-8, 4.32842257e-8, 5.34135e-25, 0])
    ours = coin_entropy(logits)
    torch.testing.assert_close(ours.detach(), wanted, atol=1e-30, rtol=1e-4)
    ours.sum().backward()
    assert logits.grad.isfinite().all()
    assert torch.autograd.gradcheck(coin_entropy, torch.linspace(-6.1, 6, 30, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize(("bits", "groups"), [(1, 1), (10, 1), (10, 2), (11, 3), (7, 4), (8, 8)])
def test_marginals_are_averages_of_the_softmax_per_group(bits, groups):
    torch.manual_seed(bits)
    z, mask = torch.randn(3, 9, bits), torch.rand(3, 9) < 0.6
    sizes = [len(part) for part in torch.arange(bits).tensor_split(groups)]
    for kept, given in ((z.flatten(0, 1), None), (z[mask], mask)):
        marginals = group_marginals(4 * z, groups, given, False)
        rows = [row for m in marginals for row in m]
        assert [len(row) for row in rows] == [2**size for size in sizes]
        for row, part in zip(rows, kept.split(sizes, -1)):
            torch.testing.assert_close(row.double(), table(part).mean(0), atol=1e-7, rtol=1e-5)


def test_gradient_of_the_codebook_entropy():
    torch.manual_seed(0)
    z = torch.randn(2, 6, 7, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(codebook_entropy(group_marginals(4 * z, 1, None, False)), z)
    (wanted,) = torch.autograd.grad(entropy(table(z.flatten(0, 1)).mean(0)), z)
    torch.testing.assert_close(ours, wanted)
    certain = (1e4 * torch.randn(2, 6, 7)).requires_grad_()  # most codes have probability 0
    codebook_entropy(group_marginals(4 * certain, 1, None, False)).backward()
    assert certain.grad.isfinite().all()


def test_groups_bound_the_entropy_from_above():
    torch.manual_seed(0)
    z = torch.randn(1, 50, 12) @ torch.randn(12, 12)  # dependent bits
    bounds = [codebook_entropy(group_marginals(z, g, None, False)) for g in (1, 2, 4, 12)]
    exact = entropy(table(z[0] / 4).mean(0))
    torch.testing.assert_close(bounds[0].double(), exact, atol=1e-5, rtol=1e-5)
    assert all(a < b - 0.01 for a, b in zip(bounds, bounds[1:])), "larger groups are closer"


def test_choice_of_groups():
    assert [default_groups(d) for d in (1, 9, 10, 18, 19, 64, 128)] == [1, 1, 2, 2, 3, 8, 15]
    assert check_groups(64, None) == 8 and check_groups(18, 1) == 1
    for bits, groups in ((18, 0), (18, 19), (21, 1), (128, 6)):
        with pytest.raises(ModelError, match="entropy_groups"):
            check_groups(bits, groups)


def test_bit_entropy():
    bits = torch.tensor([[[0, 0, 0], [1, 0, 1], [0, 0, 0], [1, 0, 0]]]).bool()
    quarter = -(0.25 * torch.tensor(0.25).log2() + 0.75 * torch.tensor(0.75).log2())
    torch.testing.assert_close(bit_entropy(bits, None, False), (1 + quarter) / 3)
    torch.testing.assert_close(bit_entropy(bits, torch.tensor([[True, True, False, False]]), False), torch.tensor(2 / 3))
    assert bit_entropy(bits, torch.zeros(1, 4, dtype=torch.bool), False) == 0


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.untyped_storage().nbytes() // one.element_size())
        return out


@pytest.mark.parametrize(
    "quantizer", [LFQ(64), BSQ(64, entropy_groups=8), GroupedLFQ(8, 8), LFQ(18, entropy_groups=1)]
)
def test_memory_is_tokens_times_a_group(quantizer):
    tokens = 16384 if quantizer.bits == 64 else 1024
    z = torch.randn(4, tokens // 4, quantizer.bits, requires_grad=True)
    mask, saved = torch.rand(4, tokens // 4) < 0.9, {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        sum(quantizer.train()(z, mask).losses.values()).backward()
    group = 2 ** -(-quantizer.bits // quantizer.groups)
    assert largest.elements <= tokens * min(group, 512), "no tokens x codes table, not even of the largest group"
    assert sum(saved.values()) < 80e6
    assert z.grad.isfinite().all() and (z.grad[mask] != 0).any()


# several ranks ------------------------------------------------------------------------------------------------------


def _quantizers() -> dict[str, Quantizer]:
    torch.manual_seed(0)
    return {
        "lfq": LFQ(10, entropy_groups=2, temperature=2.0),
        "lfq64": LFQ(64, temperature=2.0),
        "bsq": BSQ(10, inv_temperature=2.0),
        "grouped": GroupedLFQ(2, 5, temperature=2.0),
        "bernoulli": BernoulliBits(10, 10, temperature=1e-9),
    }


def _batch(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.randn(4, 10, width, generator=torch.Generator().manual_seed(width))
    return z, torch.arange(10) < torch.tensor([10, 1, 7, 2])[:, None]


def _train(ranks: slice, masks: bool = True) -> dict[str, torch.Tensor]:
    """Losses, stats and gradients of every quantizer on the images of these ranks."""
    results = {}
    for name, quantizer in _quantizers().items():
        z, mask = _batch(quantizer.dim)
        z = z[ranks].requires_grad_()
        out = quantizer.train()(z, mask[ranks] if masks else None)
        loss = sum(out.losses.values())
        loss.backward()
        results[f"{name}.loss"], results[f"{name}.grad"] = loss.detach(), z.grad
        results.update({f"{name}.parameter.{k}": p.grad for k, p in quantizer.named_parameters() if p.grad is not None})
        shared = ("codebook_entropy", "bit_entropy", "usage", "perplexity")
        results.update({f"{name}.stat.{k}": out.stats[k] for k in shared if k in out.stats})
    return results


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for masks in (True, False):
        save_file(_train(slice(rank, None, 2), masks), f"{folder}/{masks}-{rank}.safetensors")
    dist.destroy_process_group()


def test_two_ranks_are_one_batch(tmp_path):
    """Losses and gradients averaged over ranks, as data parallelism does, are those of the concatenated batch."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    for masks in (True, False):
        ranks = [load_file(tmp_path / f"{masks}-{rank}.safetensors") for rank in (0, 1)]
        whole = _train(slice(None), masks)
        assert whole.keys() == ranks[0].keys() and len(whole) == 29
        for key, value in whole.items():
            if key.endswith(".grad"):
                for rank in (0, 1):
                    torch.testing.assert_close(ranks[rank][key] / 2, value[rank::2], atol=1e-7, rtol=1e-4, msg=key)
            elif ".stat." in key:
                assert all(torch.allclose(r[key], value) for r in ranks), key
            else:
                torch.testing.assert_close((ranks[0][key] + ranks[1][key]) / 2, value, atol=1e-7, rtol=1e-5, msg=key)


def test_two_ranks_differ_from_two_batches():
    """What the test above compares is not the same for halves of the batch on their own."""
    whole, half = _train(slice(None)), _train(slice(0, None, 2))
    assert all(not torch.allclose(whole[k], half[k], rtol=1e-3) for k in whole if k.endswith((".loss", "codebook_entropy")))
    assert not torch.allclose(F.normalize(whole["lfq.grad"][::2]), F.normalize(half["lfq.grad"]), rtol=1e-2)
