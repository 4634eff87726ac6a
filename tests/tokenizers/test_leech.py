"""LeechShell: the code and the lattice behind it, exact search, contract."""

import pytest
import torch
import torch.nn.functional as F

from tests.contract.parts import QuantizerContract
from tok1d.tokenizers.quantizers import leech
from tok1d.tokenizers.quantizers.leech import COUNT, SECOND, THIRD, LeechShell, golay_words

ONE_OF_EACH_SHAPE = [5, SECOND - 1, SECOND + 7777, THIRD - 1, THIRD + 1, COUNT - 1]


class TestLeechShell(QuantizerContract):
    config = {"class": "tok1d.tokenizers.quantizers.leech.LeechShell"}


@pytest.fixture(scope="module")
def quantizer() -> LeechShell:
    return LeechShell()


@pytest.fixture(scope="module")
def shell(quantizer) -> torch.Tensor:
    return quantizer._shell.float()


def test_golay_code():
    words = golay_words()
    assert torch.bincount(words.sum(-1)).tolist() == [1, *[0] * 7, 759, *[0] * 3, 2576, *[0] * 3, 759, *[0] * 7, 1]
    both = words[[1, 77, 4000]][:, None] ^ words  # linear: the sum of two words is a word
    assert torch.isin(both.flatten(0, 1).long() @ 2 ** torch.arange(24), words.long() @ 2 ** torch.arange(24)).all()


def test_shell_is_that_of_the_leech_lattice(shell):
    assert shell.shape == (196_560, 24) and (shell.square().sum(-1) == 32).all()
    keys = ((shell.long() + 4) * 9 ** torch.arange(24)).sum(-1)  # wraps around, but differs where the vectors do
    assert len(keys.unique()) == COUNT
    for i in ONE_OF_EACH_SHAPE:  # angles that every vector of the shell meets equally often
        values, counts = (shell @ shell[i]).unique(return_counts=True)
        assert values.tolist() == [-32, -16, -8, 0, 8, 16, 32]
        assert counts.tolist() == [1, 4600, 47104, 93150, 47104, 4600, 1]


def test_nearest_neighbours_of_codes_are_60_degrees_away(quantizer, shell):
    some = torch.randint(COUNT, (60,), generator=torch.Generator().manual_seed(0))
    codes = quantizer.ids_to_codes(some[None])[0]
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(60))
    cosine = codes @ shell.T / 32**0.5
    cosine[torch.arange(60), some] = -1
    torch.testing.assert_close(cosine.amax(-1), torch.full((60,), 0.5))


@pytest.mark.parametrize("power", [0.3, 1.0, 3.0])
def test_search_is_exact(quantizer, shell, power):
    """Latents with flat to peaked entries, so that every shape wins somewhere."""
    torch.manual_seed(int(10 * power))
    x = torch.randn(96, 24)
    x = x.sign() * x.abs() ** power
    x[:8] = shell[torch.randint(COUNT, (8,))] + shell[torch.randint(COUNT, (8,))] + 1e-3 * x[:8]
    cosine = F.normalize(x, dim=-1) @ shell.T
    best, ids = cosine.max(-1)
    ours = quantizer.codes_to_ids(x[None])[0]
    chosen = cosine.gather(1, ours[:, None])[:, 0]
    torch.testing.assert_close(chosen, best, atol=2e-6, rtol=0)
    assert (ours == ids).float().mean() > 0.98, "others are ties to the last bit"
    out = quantizer(x[None])
    torch.testing.assert_close(out.stats["cosine"], best.mean() / 32**0.5)


def test_every_shape_wins_somewhere(quantizer):
    torch.manual_seed(0)
    x = torch.randn(1, 2000, 24)
    ids = quantizer.codes_to_ids(x)
    shapes = torch.bucketize(ids, torch.tensor([SECOND, THIRD]), right=True).flatten().bincount(minlength=3)
    assert (shapes > 1).all() and shapes.sum() == 2000


def test_every_code_is_its_own_nearest(quantizer):
    ids = torch.cat([torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))[:800], torch.tensor(ONE_OF_EACH_SHAPE)])
    codes = quantizer.ids_to_codes(ids[None])
    assert torch.equal(quantizer.codes_to_ids(codes)[0], ids)
    assert torch.equal(quantizer.codes_to_ids(7 * codes.bfloat16())[0], ids), "bf16 loses no code"


def test_chunks_make_no_difference(quantizer, monkeypatch):
    x = torch.randn(1, 50, 24, generator=torch.Generator().manual_seed(0))
    ids = quantizer.codes_to_ids(x)
    monkeypatch.setattr(leech, "PAIRS_CPU", 7 * 4096)
    assert torch.equal(quantizer.codes_to_ids(x), ids)
    assert quantizer.codes_to_ids(x[:, :0]).shape == (1, 0)


def test_gradient_passes_the_sphere(quantizer):
    z, weight = torch.randn(2, 3, 24, requires_grad=True), torch.randn(2, 3, 24)
    (quantizer(z).q * weight).sum().backward()
    (wanted,) = torch.autograd.grad((F.normalize(z, dim=-1) * weight).sum(), z)
    assert torch.equal(z.grad, wanted)


def test_tables_are_not_weights_and_need_no_file(quantizer):
    assert not quantizer.state_dict() and quantizer.bits_per_token == 18
    with torch.device("meta"):
        again = LeechShell()
    assert torch.equal(again._shell, quantizer._shell)
