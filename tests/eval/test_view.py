import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.dct_model import picture
from tok1d.eval.protocol import Protocol, protocol
from tok1d.eval.view import make_view, resize, restore

CROP = Protocol("crop", 32, "crop", "bicubic", "model", "text-v1-256", "face-v2-256", "tests")
PAD = Protocol("pad", 32, "pad", "bicubic", "model", "text-v1-256", "face-v2-256", "tests")


def image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return (picture(seed, height, width)[0] * 255).round().to(torch.uint8)


def dot(height: int, width: int, x: int, y: int) -> torch.Tensor:
    """White, 4 × 4 pixels around the corner (x, y), on black."""
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    pixels[:, y - 2 : y + 2, x - 2 : x + 2] = 255
    return pixels


def centre(pixels: torch.Tensor) -> torch.Tensor:
    """(x, y) of the mass, in coordinates where the first pixel covers 0 to 1."""
    weight = pixels[0].double()
    y, x = (torch.arange(n, dtype=torch.float64) + 0.5 for n in weight.shape)
    return torch.stack([(weight.sum(0) * x).sum(), (weight.sum(1) * y).sum()]) / weight.sum()


@pytest.mark.parametrize("rule", [CROP, PAD, Protocol("l", 32, "pad", "lanczos", "original", "text-v1-256", "face-v2-256", "")])
@pytest.mark.parametrize(("height", "width", "x", "y"), [(40, 100, 45, 12), (90, 51, 20, 40), (20, 24, 10, 8), (64, 64, 30, 30)])
def test_points_go_where_their_pixels_go(rule, height, width, x, y):
    view, geometry = make_view(dot(height, width, x, y), rule)
    assert view.shape == (3, 32, 32) and view.dtype == torch.uint8
    point = torch.tensor([float(x), float(y)], dtype=torch.float64)
    assert torch.allclose(geometry.to_view(point), centre(view), atol=0.15)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([CROP, PAD]))
def test_points_come_back(height, width, rule):
    geometry = make_view(torch.zeros(3, height, width, dtype=torch.uint8), rule)[1]
    points = torch.tensor([(0.0, 0.0), (width, height), (0.3 * width, 0.9 * height)], dtype=torch.float64)
    assert torch.allclose(geometry.to_original(geometry.to_view(points)), points, atol=1e-9)
    left, top, right, bottom = geometry.inner
    assert 0 <= left < right <= 32 and 0 <= top < bottom <= 32
    if rule is PAD:
        assert geometry.shows(points)
        assert torch.allclose(geometry.to_view(points[:2]), torch.tensor([(left, top), (right, bottom)], dtype=torch.float64))


def test_a_crop_is_the_middle_square():
    whole = image(32, 48)
    view, geometry = make_view(whole, CROP)
    assert torch.equal(view, whole[:, :, 8:40])
    assert torch.equal(restore(view, geometry, CROP), view)
    corners = torch.tensor([(8.0, 0.0), (40.0, 32.0)])
    assert geometry.shows(corners) and not geometry.shows(corners - 1.5) and not geometry.shows(corners + 1.5)
    larger = image(65, 99)
    view, geometry = make_view(larger, CROP)
    plain = F.interpolate(larger[None, :, :, 17:82].float(), (32, 32), mode="bicubic", antialias=True)[0].round().clamp(0, 255)
    assert (view.float() - plain).abs().max() <= 1
    assert restore(view, geometry, CROP).shape == (3, 65, 65)


def test_padding_is_black_and_is_cut_off_again():
    whole = image(16, 64)
    view, geometry = make_view(whole, PAD)
    assert geometry.inner == (0, 12, 32, 20)
    assert not view[:, :12].any() and not view[:, 20:].any() and view[:, 12:20].any()
    back = restore(view, geometry, PAD)
    assert back.shape == whole.shape and (back.float() - whole.float()).abs().mean() < 4
    view[:, :12], view[:, 20:] = 255, 255  # what a system paints into the padding does not matter
    assert torch.equal(restore(view, geometry, PAD), back)


@pytest.mark.parametrize(("width", "height"), [(300, 111), (77, 200), (600, 600), (256, 100)])
def test_tokbench_in_plain_pillow(width, height):
    """Longer side to the size, Lanczos; pasted in the middle of black; cut out and brought back, Lanczos."""
    rule, whole = protocol("tokbench256-v1"), image(height, width)
    original = Image.fromarray(whole.permute(1, 2, 0).numpy())
    scale = 256 / max(width, height)
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    place = ((256 - small[0]) // 2, (256 - small[1]) // 2)
    square = Image.new("RGB", (256, 256))
    square.paste(original.resize(small, Image.Resampling.LANCZOS), place)
    view, geometry = make_view(whole, rule)
    assert np.array_equal(view.permute(1, 2, 0).numpy(), np.asarray(square))
    cut = square.crop((*place, place[0] + small[0], place[1] + small[1]))
    assert np.array_equal(restore(view, geometry, rule).permute(1, 2, 0).numpy(), np.asarray(cut.resize((width, height), Image.Resampling.LANCZOS)))


def test_extreme_shapes_keep_a_pixel():
    view, geometry = make_view(torch.full((3, 1, 500), 200, dtype=torch.uint8), PAD)
    assert geometry.inner == (0, 15, 32, 16) and (view[:, 15] == 200).all()
    assert restore(view, geometry, PAD).shape == (3, 1, 500)
    same = image(8, 9)
    assert resize(same, (8, 9), "bicubic") is same
