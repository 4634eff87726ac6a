"""SimVQ: contract, vector-quantize-pytorch, what learns, the kept table."""

import copy

import pytest
import torch

from tests.contract.parts import QuantizerContract
from tok1d.tokenizers.quantizers.simvq import SimVQ


class TestSimVQ(QuantizerContract):
    config = {"class": "tok1d.tokenizers.quantizers.simvq.SimVQ", "vocab_size": 24, "dim": 5}
    scale = 0.5


class TestRotatingSimVQ(TestSimVQ):
    config = {**TestSimVQ.config, "rotation": True}


@pytest.mark.parametrize("rotation", [False, True])
def test_vector_quantize_pytorch(rotation):
    """Same table and map: ids, codes, loss, and gradients of latents and map."""
    module = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is the oracle of this test")
    torch.manual_seed(0)
    theirs = module.SimVQ(dim=6, codebook_size=32, rotation_trick=rotation)
    ours = SimVQ(32, 6, rotation=rotation)
    ours.load_state_dict({"table": theirs.frozen_codebook, "map.weight": theirs.code_transform.weight})
    z, weight = torch.randn(3, 20, 6), torch.randn(3, 20, 6)
    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    q, ids, loss = theirs(x)
    out = ours(y)
    assert torch.equal(out.ids, ids)
    torch.testing.assert_close(out.q, q, atol=1e-5, rtol=1e-4)
    total = sum(ours.loss_weights[name] * value for name, value in out.losses.items())
    torch.testing.assert_close(total, loss, atol=1e-6, rtol=1e-5)
    for one, other in ((loss, total), ((q * weight).sum(), (out.q * weight).sum())):
        expected = torch.autograd.grad(one, x, retain_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(other, y, retain_graph=True)[0], expected, atol=1e-6, rtol=1e-4)
    expected = torch.autograd.grad(loss, theirs.code_transform.weight)[0]
    torch.testing.assert_close(torch.autograd.grad(total, ours.map.weight)[0], expected, atol=1e-6, rtol=1e-4)


def test_one_token_moves_every_code_and_the_table_stays():
    torch.manual_seed(0)
    vq = SimVQ(16, 4)
    table, before = vq.table.clone(), vq.book().clone()
    optimizer = torch.optim.SGD(vq.parameters(), lr=0.1)
    vq(torch.randn(1, 1, 4)).losses["codebook"].backward()
    optimizer.step()
    assert torch.equal(vq.table, table) and ((vq.book() - before).abs().sum(-1) > 0).all()


def test_kept_codes_follow_the_map():
    """The table of codes that eval mode keeps is never older than what it is made of."""
    torch.manual_seed(0)
    vq, ids = SimVQ(16, 4).eval(), torch.arange(16)[None]
    with torch.inference_mode():
        first = vq.ids_to_codes(ids).clone()
        assert vq.book() is vq.book()
    with torch.no_grad():
        vq.map.weight.mul_(2)
    torch.testing.assert_close(vq.ids_to_codes(ids), first * 2)
    vq.load_state_dict({k: v * 3 for k, v in vq.state_dict().items()})
    torch.testing.assert_close(vq.ids_to_codes(ids), first * 18)
    torch.testing.assert_close(vq.double().ids_to_codes(ids), first * 18)
    torch.testing.assert_close(copy.deepcopy(vq).ids_to_codes(ids), first * 18)
    z = torch.randn(1, 3, 4, requires_grad=True)
    vq(z).losses["commitment"].backward()  # a table made in inference mode would refuse
    assert z.grad.isfinite().all()
