"""IBQ: contract; values and gradients against the formula written out over the whole table of tokens and codes."""

import pytest
import torch
import torch.nn.functional as F

from tests.contract.parts import QuantizerContract
from tok1d.errors import ModelError
from tok1d.tokenizers.quantizers import ibq as ibq_module
from tok1d.tokenizers.quantizers.ibq import IBQ

CLASS = {"class": "tok1d.tokenizers.quantizers.ibq.IBQ", "vocab_size": 24, "dim": 5}


class TestIBQ(QuantizerContract):
    config = CLASS


class TestCosineIBQ(QuantizerContract):
    config = {**CLASS, "l2": True, "entropy": 0.0}


def written_out(ibq: IBQ, z: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """q and losses by the formulas of the paper, autograd doing the gradients."""
    book = F.normalize(ibq.codebook, dim=-1) if ibq.l2 else ibq.codebook
    z = F.normalize(z, dim=-1) if ibq.l2 else z
    rows = z[mask]
    scores = rows @ book.T
    p = (scores / ibq.temperature).softmax(-1)
    one_hot = F.one_hot(scores.argmax(-1), len(book)).float()
    q, hard = (one_hot + p - p.detach()) @ book, one_hot @ book
    spread = (scores / ibq.entropy_temperature).softmax(-1)
    mean = spread.mean(0)
    entropy = -torch.special.xlogy(spread, spread).sum(-1).mean() + torch.special.xlogy(mean, mean).sum()
    return torch.zeros_like(z).index_put((mask,), q), {
        "quantization": F.mse_loss(q, rows),
        "commitment": F.mse_loss(rows, hard.detach()),
        "codebook": F.mse_loss(hard, rows.detach()),
        "entropy": entropy,
    }


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("piece", [2**21, 24 * 5, 1])  # all rows at once, 5 at a time, one
def test_gradients_are_those_of_the_formula(l2, piece, monkeypatch):
    monkeypatch.setattr(ibq_module, "PIECE_CPU", piece)
    torch.manual_seed(0)
    ibq = IBQ(24, 5, l2=l2, temperature=0.7, entropy_temperature=0.3)
    with torch.no_grad():
        ibq.codebook.copy_(torch.randn(24, 5))
    z, weight = torch.randn(3, 7, 5, requires_grad=True), torch.randn(3, 7, 5)
    mask = torch.arange(7) < torch.tensor([7, 1, 4])[:, None]
    out, (q, losses) = ibq(z, mask), written_out(ibq, z, mask)
    assert len(out.ids.unique()) > 3
    torch.testing.assert_close(out.q, q, atol=1e-6, rtol=1e-5)
    assert out.losses.keys() == losses.keys() == ibq.loss_weights.keys()
    pairs = [(out.losses[name], losses[name]) for name in losses] + [((out.q * weight).sum(), (q * weight).sum())]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        for x in (z, ibq.codebook):
            expected = torch.autograd.grad(theirs, x, retain_graph=True, allow_unused=True)[0]
            got = torch.autograd.grad(ours, x, retain_graph=True, allow_unused=True)[0]
            if expected is None or got is None:
                assert expected is None and got is None
                continue
            torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-4)


def test_every_code_gets_a_gradient():
    """What index backpropagation is for; one token, 64 codes."""
    torch.manual_seed(0)
    ibq = IBQ(64, 4, entropy=0.0)
    ibq(torch.randn(1, 1, 4)).q.sum().backward()
    assert (ibq.codebook.grad.abs().sum(-1) > 0).all()


def test_backward_within_autocast_is_in_float32():
    torch.manual_seed(0)
    ibq, z = IBQ(16, 4), torch.randn(1, 6, 4)
    grads = []
    for autocast in (False, True):
        x = z.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = ibq(x)
            (out.q.sum() + out.losses["entropy"]).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_a_batch_of_nothing_costs_nothing():
    ibq = IBQ(16, 4)
    out = ibq(torch.full((1, 3, 4), torch.nan), torch.zeros(1, 3, dtype=torch.bool))
    sum(out.losses.values()).backward()
    assert all(value == 0 for value in out.losses.values()) and (ibq.codebook.grad == 0).all()


def test_arguments_are_checked():
    for arguments in ({"vocab_size": 1}, {"dim": 0}, {"temperature": 0.0}, {"entropy_temperature": -1}):
        with pytest.raises(ModelError):
            IBQ(**{"vocab_size": 8, "dim": 3, **arguments})
