import math

import numpy as np
import pytest
import scipy.linalg
import torch

from tests.golden.read import read
from tok1d.errors import TokError
from tok1d.eval.distribution import FeatureSample, FrechetDistance, InceptionScore, KernelDistance
from tok1d.eval.frechet import (
    Moments,
    Sums,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distance_of_subsets,
    precision_recall,
)

GOLDEN = read("metrics")
REAL, FAKE, LOGITS = (GOLDEN.inputs[n] for n in ("real", "fake", "logits"))
VALUES = GOLDEN.meta["values"]


def close(ours: float, wanted: float) -> bool:
    return ours == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_recorded_frechet():
    real, fake = Moments.of(REAL), Moments.of(FAKE)
    torch.testing.assert_close(real.mean, GOLDEN.outputs["mean_real"].double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(real.covariance, GOLDEN.outputs["cov_real"].double(), rtol=1e-5, atol=1e-6)
    assert close((real.mean - fake.mean).square().sum().item(), VALUES["fid_mean_term"])
    assert close(frechet_distance(real, fake), VALUES["fid"]) and close(frechet_distance(fake, real), VALUES["fid"])
    assert close(frechet_distance(Moments.of(REAL[: REAL.shape[1] // 2]), fake), VALUES["fid_few_real"])
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6)


def test_frechet_of_gaussians_known_in_closed_form():
    def gaussian(mean, deviations):
        scatter = torch.diag(torch.tensor(deviations, dtype=torch.float64) ** 2) * 9
        return Moments(10, torch.tensor(mean, dtype=torch.float64), scatter)

    a, b = gaussian([0.0, 0.0], [1.0, 2.0]), gaussian([3.0, 4.0], [2.0, 5.0])
    assert frechet_distance(a, b) == pytest.approx(25 + 1 + 9)
    # rotating one side of anisotropic covariances leaves no closed form by axes: compare with scipy's matrix root
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    c = Moments(10, b.mean, turn @ b.scatter @ turn.T)
    root = scipy.linalg.sqrtm((a.covariance @ c.covariance).numpy()).real
    wanted = 25 + np.trace(a.covariance.numpy() + c.covariance.numpy() - 2 * root)
    assert frechet_distance(a, c) == pytest.approx(wanted, rel=1e-9)


def test_scipy_agrees_at_256_features():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(600, 256, generator=rng, dtype=torch.float64)
    y = torch.randn(500, 256, generator=rng, dtype=torch.float64) @ (torch.eye(256) + 0.02 * torch.randn(256, 256, generator=rng)).double() + 0.1
    a, b = Moments.of(x), Moments.of(y)
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    wanted = (a.mean - b.mean).square().sum().item() + np.trace(a.covariance.numpy() + b.covariance.numpy() - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-8)


def test_parts_add_up_to_the_whole():
    whole = Moments.of(REAL)
    parts = [Moments.of(part) for part in REAL.split([1, 50, 0, 149, 100])]
    for order in (parts, parts[::-1]):
        total = order[0]
        for part in order[1:]:
            total = total + part
        assert total.n == whole.n
        torch.testing.assert_close(total.mean, whole.mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(total.scatter, whole.scatter, rtol=1e-9, atol=1e-9)


def test_sums_of_parts_are_those_of_the_whole_to_the_last_bit_on_a_grid():
    x = (REAL.double() * 2**12).round() / 2**12
    whole = Sums.of(x)
    parts = Sums.of(x[:7])
    for part in x[7:].split([1, 0, 150, 142]):
        parts.update(part)
    assert int(parts.n) == len(x) and torch.equal(parts.outer, whole.outer) and torch.equal(parts.total, whole.total)
    moments, wanted = parts.moments(), Moments.of(x)
    torch.testing.assert_close(moments.mean, wanted.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.covariance, wanted.covariance, rtol=1e-9, atol=1e-12)


def test_a_call_of_the_metric_gives_the_distance_of_its_batch_and_keeps_the_sums():
    metric = FrechetDistance(64, Moments.of(REAL))
    first = metric(FAKE[:100], real=False)
    assert close(first.item(), frechet_distance(Moments.of(REAL), Moments.of(FAKE[:100])))
    metric(FAKE[100:], real=False)
    assert close(metric.compute().item(), VALUES["fid"])


def test_moments_on_disk(tmp_path):
    path = tmp_path / "real.safetensors"
    Moments.of(REAL).save(path, network="test")
    again = Moments.load(path)
    assert again.n == len(REAL) and torch.equal(again.scatter, Moments.of(REAL).scatter)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TokError, match="tok eval stats"):
        Moments.load(path)


def test_recorded_kernel_distances():
    assert close(kernel_distance(REAL, FAKE), VALUES["kid_unbiased"])
    assert close(kernel_distance(REAL, FAKE, unbiased=False), VALUES["kid_biased"])
    rows = (GOLDEN.inputs["kid_real_subsets"], GOLDEN.inputs["kid_fake_subsets"])
    values = torch.tensor([kernel_distance(REAL[a], FAKE[b]) for a, b in zip(*rows)], dtype=torch.float64)
    torch.testing.assert_close(values, GOLDEN.outputs["kid_subset_values"].double(), rtol=1e-5, atol=1e-6)
    assert close(values.mean().item(), VALUES["kid_subsets_mean"])
    assert close(values.std(correction=0).item(), VALUES["kid_subsets_std_pop"])
    mean, deviation = kernel_distance_of_subsets(REAL, FAKE, subsets=20, size=40)
    assert abs(mean - VALUES["kid_unbiased"]) < 3 * deviation


def test_recorded_inception_score_and_neighbourhoods():
    assert close(inception_score(LOGITS)[0], VALUES["inception_score_1split"])
    for ours, wanted in zip(inception_score(LOGITS, 5), VALUES["inception_score_5splits"], strict=True):
        assert close(ours, wanted)
    for k in (3, 5):
        for block in (1024, 7):
            found = precision_recall(REAL, FAKE, k, block)
            assert all(close(getattr(found, name), value) for name, value in VALUES[f"prdc_k{k}"].items())


def test_bad_input_is_said():
    one = Moments.of(REAL[:1])
    with pytest.raises(TokError, match="at least 2"):
        frechet_distance(one, Moments.of(FAKE))
    with pytest.raises(TokError, match="features"):
        frechet_distance(Moments.of(REAL[:, :3]), Moments.of(FAKE))
    with pytest.raises(TokError, match="NaN"):
        frechet_distance(Moments.of(REAL * math.nan), Moments.of(FAKE))
    with pytest.raises(TokError):
        kernel_distance(REAL[:1], FAKE)
    with pytest.raises(TokError):
        inception_score(LOGITS[:3], 5)
    with pytest.raises(TokError):
        precision_recall(REAL[:5], FAKE, 5)


NAMES = [f"image {i}" for i in range(300)]


def test_metrics_do_not_depend_on_batches():
    results = []
    for sizes in ([300], [1, 99, 200]):
        frechet, kernel, score = FrechetDistance(64), KernelDistance(5, 50), InceptionScore()
        for rows in torch.arange(300).split(sizes):
            names = [NAMES[i] for i in rows]
            frechet.update(REAL[rows], real=True)
            kernel.update(REAL[rows], names, real=True)
            score.update(LOGITS[rows], names, real=False)
            inside = rows[rows < len(FAKE)]
            if len(inside):
                frechet.update(FAKE[inside], real=False)
                kernel.update(FAKE[inside], [NAMES[i] for i in inside], real=False)
        results.append((frechet.compute().item(), kernel.compute()["mean"].item(), score.compute()["mean"].item()))
    assert results[0] == pytest.approx(results[1], rel=1e-9)
    assert results[0][0] == pytest.approx(VALUES["fid"], rel=1e-6)
    assert results[0][2] == pytest.approx(VALUES["inception_score_1split"], rel=1e-6)


def test_a_cached_reference_is_the_real_side():
    metric = FrechetDistance(64, Moments.of(REAL))
    metric.update(FAKE, real=False)
    assert close(metric.compute().item(), VALUES["fid"])
    with pytest.raises(TokError, match="32"):
        FrechetDistance(32, Moments.of(REAL))


def test_samples_are_chosen_by_name():
    forwards, backwards = FeatureSample(40), FeatureSample(40)
    for i in range(0, 300, 30):
        forwards.update(REAL[i : i + 30], NAMES[i : i + 30], real=True)
    back = list(range(299, -1, -1))
    backwards.update(REAL[back], [NAMES[i] for i in back], real=True)
    kept = forwards.compute()["real"]
    assert kept.shape == (40, 64) and torch.equal(kept, backwards.compute()["real"])
    other = FeatureSample(40, seed=1)
    other.update(REAL, NAMES, real=True)
    assert not torch.equal(kept, other.compute()["real"])
    with pytest.raises(TokError, match="real and of fake"):
        KernelDistance().compute()
