"""KL: contract, sampling, divergence against torch.distributions."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tests.contract.parts import QuantizerContract
from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.quantizers.kl import KL


class TestKL(QuantizerContract):
    config = {"class": "tok1d.tokenizers.quantizers.kl.KL", "dim": 6}


def test_divergence_equals_torch_distributions():
    torch.manual_seed(0)
    kl, z = KL(8), torch.randn(3, 5, 8)
    posterior = kl.posterior(z)
    expected = kl_divergence(Normal(posterior.mean, (0.5 * posterior.logvar).exp()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(posterior.kl(), expected)
    torch.testing.assert_close(kl.eval()(z).losses["kl"], expected.sum(1).mean())


def test_mean_in_evaluation_samples_in_training():
    torch.manual_seed(0)
    kl, z = KL(4), torch.cat([torch.full((1, 4000, 2), 3.0), torch.full((1, 4000, 2), 2 * 0.5).log()], -1)
    assert torch.equal(kl.eval()(z).q, z[..., :2])
    q = kl.train()(z).q
    assert q.mean().item() == pytest.approx(3, abs=0.05) and q.std().item() == pytest.approx(1, abs=0.05)
    generator = torch.Generator().manual_seed(1)
    first = kl.posterior(z).sample(generator)
    assert torch.equal(first, kl.posterior(z).sample(generator.manual_seed(1)))


def test_log_variance_is_clamped():
    posterior = KL(2).posterior(torch.tensor([[[0.0, 100.0], [0.0, -100.0]]]))
    assert posterior.logvar.flatten().tolist() == [20, -30]


def test_there_are_no_ids():
    kl = KL(4)
    assert kl.vocab_size == 0 and kl.bits_per_token == 0 and kl.code_dim == 2
    with pytest.raises(TokenError, match="continuous"):
        kl.ids_to_codes(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(TokenError, match="continuous"):
        kl.codes_to_ids(torch.zeros(1, 2, 2))
    with pytest.raises(ModelError, match="even"):
        KL(5)
