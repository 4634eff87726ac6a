"""Photos: what is indexed, what is refused, what a sample looks like."""

import gzip
import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.files import encoded, folder, shard
from tok1d.data.photos import Photos, centre_crop, decode_rgb, index_images, random_resized_crop, read_sample
from tok1d.errors import ImageError
from tok1d.image_io import read_uint8


def picture(mode: str, size: tuple[int, int], color, suffix: str = "PNG", **save) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, color).save(out, suffix, **save)
    return out.getvalue()


# the index -------------------------------------------------------------------------------------------------------


def test_folder_and_shard_hold_the_same(tmp_path):
    files = encoded(5)
    loose = index_images([folder(tmp_path / "loose", files)])
    packed = index_images([shard(tmp_path / "s.tar", dict(reversed(files.items())))])
    assert [read_sample(s) for s in loose] == [read_sample(s) for s in packed] == list(files.values())
    assert [s[0] for s in packed] == ["000", "001", "002", "003", "004"]


def test_paths_are_mixed_in_order(tmp_path):
    files = encoded(4)
    one = folder(tmp_path / "one", {"deep/er/b.PNG": files["000.png"], "a.jpeg": files["001.png"], "notes.txt": b"x"})
    shard(one / "z.tar", {"c.png": files["002.png"]})
    single = folder(tmp_path, {"single.png": files["003.png"]}) / "single.png"
    keys = [s[0] for s in index_images([single, one])]
    assert keys == ["single.png", "c", "a.jpeg", "deep/er/b.PNG"]


def test_hidden_files_are_left_out(tmp_path):
    files = encoded(1)
    data = files["000.png"]
    path = folder(tmp_path / "f", {"a.png": data, "._a.png": b"resource fork", ".cache/b.png": data})
    assert [s[0] for s in index_images([path])] == ["a.png"]
    assert [s[0] for s in index_images([shard(tmp_path / "s.tar", {"a.png": data, "._a.png": b"x"})])] == ["a"]


@pytest.mark.parametrize("name", ["nowhere", "nowhere.tar", "nowhere.png"])
def test_missing_path(tmp_path, name):
    with pytest.raises(ImageError, match="no such file or folder.*--data.train"):
        index_images([tmp_path / name])


def test_nothing_found_or_wrong_kind(tmp_path):
    with pytest.raises(ImageError, match=r"no images found under .*\.webp"):
        index_images([folder(tmp_path / "f", {"notes.txt": b"x"})])
    with pytest.raises(ImageError, match="neither a folder, a .tar shard, a manifest .* nor an image"):
        index_images([folder(tmp_path, {"a.zip": b"x"}) / "a.zip"])


def test_damaged_shards(tmp_path):
    whole = shard(tmp_path / "s.tar", encoded(4)).read_bytes()
    second = index_images([tmp_path / "s.tar"])[1][2]  # where its data start; the header is the block before
    wrong_header = bytearray(whole)
    wrong_header[second - 512 : second - 412] = b"\xff" * 100
    cases = {
        "truncated.tar": whole[: second + 5],
        "header.tar": bytes(wrong_header),
        "noise.tar": np.random.default_rng(0).bytes(4096),
        "empty.tar": b"",
        "zipped.tar": gzip.compress(whole),
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=rf"{name}.*(damaged|not a readable uncompressed tar shard)"):
            index_images([tmp_path / name])


def test_shard_without_end_mark_is_read(tmp_path):
    path = shard(tmp_path / "s.tar", encoded(3))
    samples = index_images([path])
    path.write_bytes(path.read_bytes().rstrip(b"\0") + b"\0" * 1024)
    assert index_images([path]) == samples


# samples ---------------------------------------------------------------------------------------------------------


def test_decoding_is_that_of_the_package():
    """Orientation, alpha, palettes, grey and 16 bit as everywhere else; animations give their first frame."""
    tags = Image.Exif()
    tags[0x0112] = 6  # turn by 90 degrees
    turned = picture("RGB", (6, 4), (255, 0, 0), "JPEG", exif=tags)
    assert decode_rgb(turned).shape == (6, 4, 3)
    assert (decode_rgb(picture("RGBA", (3, 2), (255, 0, 0, 0))) == 255).all()
    assert (decode_rgb(picture("RGBA", (3, 2), (255, 0, 0, 255))) == [255, 0, 0]).all()
    for data in (picture("L", (3, 2), 7), picture("I;16", (3, 2), 7 * 257), picture("P", (3, 2), 0), picture("1", (3, 2), 1)):
        image = decode_rgb(data)
        assert image.shape == (2, 3, 3) and image.dtype == np.uint8
        assert np.array_equal(image, read_uint8(data)[0].permute(1, 2, 0).numpy())
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert (decode_rgb(out.getvalue()) == [255, 0, 0]).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 5)])
def test_tiny_images_fill_the_view(tmp_path, size):
    path = folder(tmp_path, {"a.png": picture("RGB", size, (10, 200, 30))})
    for area in (None, (0.2, 1.0)):
        view = Photos(index_images([path]), 16, area)[0, 3]["image"]
        assert view.shape == (3, 16, 16) and view.dtype == torch.uint8
        assert (view.flatten(1).float().mean(1) - torch.tensor([10.0, 200.0, 30.0])).abs().max() < 1


def test_centre_crop_takes_the_middle():
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 30:70] = 255
    assert (centre_crop(image, 16) == 255).all()
    assert (centre_crop(image.transpose(1, 0, 2), 16) == 255).all()


def test_random_crops():
    y, x = np.mgrid[0:64, 0:96]
    image = np.stack([x * 2, y * 3, np.zeros_like(x)], -1).astype(np.uint8)
    crops = [random_resized_crop(image, 16, (0.25, 0.25), np.random.default_rng(i)) for i in range(64)]
    widths = [float(c[0].float().max() - c[0].float().min()) / 2 for c in crops]
    assert all(25 < w < 33 for w in widths)  # half of the largest square's 64
    mirrored = sum(bool(c[0, 0, 0] > c[0, 0, -1]) for c in crops)
    assert 16 < mirrored < 48 and len({tuple(c.flatten().tolist()) for c in crops}) > 60
    whole = random_resized_crop(image, 64, (1.0, 1.0), np.random.default_rng(0))
    assert whole[1].float().std() > 50  # the full height is seen


def test_views_follow_from_seed_and_draw(tmp_path):
    samples = index_images([folder(tmp_path, encoded(3))])
    one, two = Photos(samples, 16, (0.3, 1.0), seed=1), Photos(samples, 16, (0.3, 1.0), seed=1, cache=True)
    for pair in ((0, 5), (2, 5), (0, 6), (0, 5)):
        assert torch.equal(one[pair]["image"], two[pair]["image"])
    assert not torch.equal(one[0, 5]["image"], one[0, 6]["image"])
    assert not torch.equal(one[0, 5]["image"], Photos(samples, 16, (0.3, 1.0), seed=2)[0, 5]["image"])
    for file in tmp_path.iterdir():
        file.unlink()
    assert torch.equal(two[0, 5]["image"], two[0, 5]["image"]), "cached images need no file"


def test_broken_samples_are_counted_named_and_skipped(tmp_path, caplog):
    files = encoded(6)
    files |= {"001.png": b"not a png", "003.png": b"", "004.png": files["004.png"][:60]}
    photos = Photos(index_images([shard(tmp_path / "s.tar", files)]), 16)
    with caplog.at_level(logging.WARNING):
        batches = [photos.__getitems__([0, 1, 2]), photos.__getitems__([3, 4, 5]), photos.__getitems__([2, 1, 0])]
    assert photos.broken.tolist() == [False, True, False, True, True, False]
    assert len(caplog.records) == 3 and "skipping 004" in caplog.text and "3 broken so far" in caplog.text
    assert [b["key"] for b in batches] == [["000", "002"], ["005"], ["002", "000"]] and len(batches[0]["image"]) == 2
    with pytest.raises(ImageError, match="001 of .*broken"):
        photos[1]
    with caplog.at_level(logging.WARNING):
        assert photos.__getitems__([(3, 8), (4, 9)])["key"] == ["005"]
    assert "held broken images only: 005 stands in" in caplog.text


def test_a_set_of_broken_images_is_an_error(tmp_path):
    photos = Photos(index_images([folder(tmp_path, {"a.png": b"x", "b.png": b"y"})]), 16)
    for _ in range(2):
        with pytest.raises(ImageError, match="none of the 2 images can be read"):
            photos.__getitems__([0])


def test_iteration_ends(tmp_path):
    photos = Photos(index_images([folder(tmp_path, encoded(3))]), 16)
    assert len(list(photos)) == 3
