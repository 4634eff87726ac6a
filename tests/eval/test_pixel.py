import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tests.golden.read import read
from tok1d.errors import ImageError
from tok1d.eval.pixel import mae, ms_ssim, psnr, ssim, ssim_and_ms_ssim, to_uint8

GOLDEN = read("metrics")
BAD = ("noisy", "blurred", "shifted")


def batch(name: str) -> torch.Tensor:
    return GOLDEN.inputs[name].to(torch.uint8).permute(2, 0, 1)[None]


@pytest.mark.parametrize("name", BAD)
def test_recorded_values(name):
    wanted = GOLDEN.meta["values"]["images"][name]
    a, b = batch("image"), batch(f"image_{name}")
    assert psnr(a, b).item() == pytest.approx(wanted["psnr"], rel=1e-9)
    assert ssim(a, b).item() == pytest.approx(wanted["ssim_gaussian"], abs=2e-6)
    assert ms_ssim(a, b).item() == pytest.approx(wanted["ms_ssim"], abs=2e-6)


def test_skimage_agrees_and_batches_do_not_mix():
    a = torch.cat([batch("image")] * 3)
    b = torch.cat([batch(f"image_{name}") for name in BAD])
    for i in range(3):
        x, y = (t[i].permute(1, 2, 0).numpy() for t in (a, b))
        assert psnr(a, b)[i].item() == pytest.approx(peak_signal_noise_ratio(x, y, data_range=255))
        wanted = structural_similarity(
            x, y, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(a, b)[i].item() == pytest.approx(wanted, abs=2e-6)
        assert mae(a, b)[i].item() == pytest.approx(abs(x.astype(float) - y).mean())
        for metric in (psnr, ssim, ms_ssim, mae):
            torch.testing.assert_close(metric(a[i : i + 1], b[i : i + 1]), metric(a, b)[i : i + 1], rtol=1e-6, atol=1e-7)


def test_both_at_once_and_images_that_are_not_square():
    a, b = (torch.cat([batch(name)] * 2)[..., : 170 + 12, :] for name in ("image", "image_noisy"))
    together = ssim_and_ms_ssim(a, b)
    assert torch.equal(together[0], ssim(a, b)) and torch.equal(together[1], ms_ssim(a, b))
    x, y = (t[0].permute(1, 2, 0).numpy() for t in (a, b))
    wanted = structural_similarity(x, y, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert together[0][1].item() == pytest.approx(wanted, abs=2e-6)


def test_equal_images():
    a = batch("image")
    assert psnr(a, a).item() == float("inf") and mae(a, a).item() == 0
    assert ssim(a, a).item() == pytest.approx(1) and ms_ssim(a, a).item() == pytest.approx(1)


def test_rounding_loses_no_level_where_truncation_loses_63():
    levels = torch.arange(256, dtype=torch.uint8)
    normalised = levels.float() / 255 * 2 - 1  # to [-1, 1] and back, as models do
    back = (normalised + 1) / 2
    assert torch.equal(to_uint8(back), levels)
    assert ((back * 255).to(torch.uint8) != levels).sum() == 63


def test_what_cannot_be_compared():
    a = batch("image")
    for other in (a.float(), a[..., :-1], a[0]):
        with pytest.raises(ImageError):
            psnr(a, other)
    with pytest.raises(ImageError, match="161"):
        ms_ssim(a[..., :100, :], a[..., :100, :])
    with pytest.raises(ImageError, match="11×11"):
        ssim(a[..., :10, :], a[..., :10, :])
