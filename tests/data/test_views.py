"""Windows, named views, and boxes that go with them: drawn rectangles are found where the boxes say."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from tok1d.data.batches import collate, make_sample
from tok1d.data.facts import Facts
from tok1d.data.photos import Photos, Views
from tok1d.data.views import Window, carry, centre, cut, named_view, random_crop, random_window, view_names
from tok1d.errors import UsageError


def scene(height: int, width: int, boxes: list[tuple[int, int, int, int]]) -> np.ndarray:
    """Black, with white rectangles (x0, y0, x1, y1)."""
    image = np.zeros((height, width, 3), np.uint8)
    for x0, y0, x1, y1 in boxes:
        image[y0:y1, x0:x1] = 255
    return image


def quad(x0, y0, x1, y1) -> tuple[float, ...]:
    return tuple(map(float, (x0, y0, x1, y0, x1, y1, x0, y1)))


def found_box(view: torch.Tensor) -> list[int]:
    """Bounds of what is white."""
    ys, xs = (view[0] > 127).nonzero(as_tuple=True)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (40, 96)])
def test_rectangles_lie_where_their_boxes_say(mirror, size):
    rng = np.random.default_rng(0)
    tried = 0
    for _ in range(60):
        x0, y0 = (int(v) for v in rng.integers(0, 70, 2))
        w, h = (int(v) for v in rng.integers(8, 40, 2))
        image = scene(120, 150, [(x0, y0, x0 + w, y0 + h)])
        window = random_crop((120, 150), size, (0.3, 1.0), rng, False)._replace(mirror=mirror)
        points, inside = carry(torch.tensor(quad(x0, y0, x0 + w, y0 + h)).reshape(1, 4, 2), window, size)
        whole = x0 >= window.left and y0 >= window.top and x0 + w <= window.left + window.width and y0 + h <= window.top + window.height
        assert bool(inside[0]) == whole
        if whole:
            tried += 1
            box = [float(v) for v in (*points[0].amin(0), *points[0].amax(0))]
            assert np.allclose(found_box(cut(image, window, size)), box, atol=1.01)
    assert tried > 5


def test_words_are_never_mirrored_and_faces_change_sides(tmp_path):
    image = scene(64, 64, [])
    words = Facts(words=((quad(10, 10, 30, 20), "Hi"),))
    views = Views(32, (0.5, 1.0), fields=("words",))
    assert not any(views.window(image, words, draw).mirror for draw in range(40))
    assert sum(views.window(image, Facts(), draw).mirror for draw in range(40)) > 10
    for draw in range(40):  # the same window but for the mirror
        assert views.window(image, words, draw)[:4] == views.window(image, Facts(), draw)[:4]
    face = Facts(faces=((10, 20, 30, 20, 22, 30, 14, 40, 27, 40),), words=words.words)
    mirrored = make_sample("k", image, face, Window(0, 0, 64, 64, True), (64, 64), ("faces", "words"))
    assert mirrored["words"][1] == [] and len(mirrored["words"][0]) == 0, "mirrored words would be no words"
    eyes_nose_mouth = mirrored["faces"][0]
    assert eyes_nose_mouth.tolist() == [[34, 20], [54, 20], [42, 30], [37, 40], [50, 40]], "left ones stay first"


def test_boxes_of_a_batch_know_their_image():
    image = scene(40, 40, [])
    facts = [Facts(words=((quad(2, 2, 9, 9), "a"), (quad(30, 30, 50, 39), "out"))), Facts(), Facts(words=((quad(1, 1, 4, 4), "b"), (quad(5, 5, 8, 8), "c")))]
    batch = collate([make_sample(str(i), image, f, Window(0, 0, 40, 40), (20, 20), ("words",)) for i, f in enumerate(facts)])
    assert batch["word_text"] == ["a", "b", "c"] and batch["word_image"].tolist() == [0, 2, 2]
    assert batch["word_quads"][1].tolist() == [[0.5, 0.5], [2, 0.5], [2, 2], [0.5, 2]]


def test_native_windows_are_not_resized():
    image = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    spots = set()
    for seed in range(30):
        window = random_window((50, 70), (16, 16), np.random.default_rng(seed))
        view = cut(image, window, (16, 16))
        part = image[window.top : window.top + 16, window.left : window.left + 16].transpose(2, 0, 1)
        assert np.array_equal(view.numpy(), part[:, :, ::-1] if window.mirror else part)
        spots.add(window[:2])
    assert len(spots) > 25
    assert random_window((10, 70), (16, 16), np.random.default_rng(0))[2:4] == (10, 10), "small images give what they have"
    samples = Views(16, (0.3, 1.0), kind="window")
    assert samples.window(image, Facts(), 3)[2:4] == (16, 16)


def test_centre_of_any_shape():
    assert centre((100, 50), (16, 16)) == Window(25, 0, 50, 50) and centre((60, 90), (20, 40)) == Window(7, 0, 45, 90)
    assert centre((1, 9), (16, 16)) == Window(0, 4, 1, 1)


def test_ten_crops_are_those_of_a_resized_square():
    """The published order of operations: a square of 1.1 times the size, then five windows and their mirror images."""
    y, x = np.mgrid[0:220, 0:300] / 220
    image = (127 + 60 * np.stack([np.sin(5 * x + 3 * y), np.cos(4 * y), np.sin(6 * x)], -1)).astype(np.uint8)
    square = torch.from_numpy(image[:, 40:260]).permute(2, 0, 1)[None].float()
    large = interpolate(square, (110, 110), mode="bicubic", antialias=True)[0]
    corners = {"middle": (5, 5), "top-left": (0, 0), "top-right": (0, 10), "bottom-left": (10, 0), "bottom-right": (10, 10)}
    names = view_names("ten-crop")
    assert len(names) == 10
    for name in names:
        view = cut(image, named_view(name, (220, 300), (100, 100)), (100, 100)).float()
        top, left = corners[name.removesuffix("-flip")]
        wanted = large[:, top : top + 100, left : left + 100]
        wanted = wanted.flip(2) if name.endswith("-flip") else wanted
        assert (view - wanted).abs().max() < 2


def test_named_views():
    assert view_names("centre") == ["centre"] and view_names("flip") == ["centre", "centre-flip"]
    assert named_view("centre", (40, 60), (8, 8)) == centre((40, 60), (8, 8))
    first = named_view("random-0", (40, 60), (8, 8), key="a", seed=1)
    assert first == named_view("random-0", (40, 60), (8, 8), key="a", seed=1)
    others = [named_view("random-1", (40, 60), (8, 8), key="a", seed=1), named_view("random-0", (40, 60), (8, 8), key="b", seed=1)]
    assert first not in others and first != named_view("random-0", (40, 60), (8, 8), key="a", seed=2)
    for wrong in ("0", "-3", "five", "1001"):
        with pytest.raises(UsageError, match="ten-crop"):
            view_names(wrong)
    with pytest.raises(UsageError, match="data.view"):
        Views(8, (0.5, 1.0), kind="zoom")


def test_photos_serve_boxes_of_their_views(tmp_path):
    from tests.data.files import shard
    from tok1d.data.index import index_images
    from tok1d.image_io import to_bytes

    box = (50, 20, 80, 45)
    image = torch.from_numpy(scene(90, 130, [box])).permute(2, 0, 1)
    path = shard(tmp_path / "s.tar", {"a.png": to_bytes(image, ".png")}, {"a": {"words": [{"text": "W", "quad": list(quad(*box))}]}})
    photos = Photos(index_images([path]), 64, (0.4, 1.0))
    seen = 0
    for draw in range(30):
        batch = photos.__getitems__([(0, draw)])
        if batch["word_text"]:
            seen += 1
            quads = batch["word_quads"][0]
            assert np.allclose(found_box(batch["image"][0]), [*quads.amin(0), *quads.amax(0)], atol=1.01)
    assert 5 < seen < 30
