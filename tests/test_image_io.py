"""Reading every odd kind of image, refusing the rest in one line, and the size policies there and back."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tok1d.errors import ImageError
from tok1d.image_io import fit, read, read_uint8, to_bytes, unfit, write
from tok1d.sizes import MAX_PIXELS
from tok1d.tokens import Geometry

SIZES = st.integers(1, 70)


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def ramp(height: int = 20, width: int = 30) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // max(height - 1, 1), x * 255 // max(width - 1, 1), (x + y) % 256], -1).astype(np.uint8)


def smooth(height: int, width: int) -> torch.Tensor:
    y, x = torch.linspace(0, 3, height)[:, None], torch.linspace(0, 4, width)[None]
    return torch.stack([(y + x).sin(), (y - x).cos(), (y * x).sin()])[None] * 0.4 + 0.5


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * (a - b).square().mean().log10().item()


# reading ---------------------------------------------------------------------------------------------------------------


def test_read_gives_the_pixels_as_float_and_as_bytes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(file_of(Image.fromarray(ramp())))
    wanted = torch.from_numpy(ramp()).permute(2, 0, 1)[None]
    assert torch.equal(read_uint8(path), wanted)
    got = read(path)
    assert got.dtype == torch.float32 and got.is_contiguous() and torch.equal(got, wanted.float() / 255)
    with open(path, "rb") as stream:
        assert torch.equal(read(stream), got)
    assert torch.equal(read(path.read_bytes()), got)
    assert read_uint8(path).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.new("RGB", (40, 24), "black")
    upright.paste("red", (0, 0, 20, 12))  # red corner at the top left when seen upright
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }.get(orientation)  # fmt: skip
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = read(file_of(stored, "JPEG", exif=exif, quality=95, subsampling=0))
    assert got.shape == (1, 3, 24, 40)
    assert got[0, 0, 5, 8] > 0.9 and got[0, 0, 18, 30] < 0.1 and got[0, 0, 5, 30] < 0.1


def test_alpha_is_composited_on_white():
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert read(file_of(rgba)).eq(1).all()
    half = read(file_of(Image.new("RGBA", (4, 4), (0, 0, 0, 128))))
    assert torch.allclose(half, torch.full_like(half, 127 / 255))
    assert read(file_of(Image.new("LA", (4, 4), (0, 0)))).eq(1).all()
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([0, 0, 0] * 256)
    assert read(file_of(palette, transparency=3)).eq(1).all()
    assert read(file_of(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))).eq(1).all()
    assert read(file_of(Image.new("L", (4, 4), 9), transparency=9)).eq(1).all()


def test_premultiplied_grey_and_rgb_modes_are_brought_to_rgb():
    from tok1d.image_io import _pixels

    for mode in ("La", "RGBa"):
        image = Image.new("LA" if mode == "La" else "RGBA", (3, 2), (80, 255) if mode == "La" else (80, 80, 80, 255)).convert(mode)
        assert (_pixels(image, "x", None) == 80).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_colour_modes_are_close_to_rgb(mode):
    source = Image.fromarray(ramp()).convert("L").convert("RGB") if mode in ("1", "L") else Image.fromarray(ramp())
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    got = read(file_of(source.convert(mode), kind))
    wanted = torch.from_numpy(np.array(source)).permute(2, 0, 1)[None] / 255
    assert got.shape == wanted.shape
    assert (got - wanted).abs().mean() < {"1": 0.5, "P": 0.1}.get(mode, 0.03)


def test_sixteen_bits_keep_their_precision():
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    values[0, 1] += 100  # between two 8-bit levels
    for kind in ("PNG", "TIFF"):
        got = read(file_of(Image.fromarray(values), kind))
        assert torch.allclose(got[0, 0], torch.from_numpy(values.astype(np.float32) / 65535), atol=1e-7)
        assert got.shape == (1, 3, 16, 16) and torch.equal(got[0, 0], got[0, 2])
        assert torch.equal(read_uint8(file_of(Image.fromarray(values), kind))[0, 0], (got[0, 0] * 255).round().byte())


def test_sixteen_bit_colour_png_is_read():
    rows = b"".join(b"\0" + struct.pack(">6H", 65535, 0, 32896, 0, 65535, 257) for _ in range(2))
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert read_uint8(png)[0, :, 0].T.tolist() == [[255, 0, 128], [0, 255, 1]]


def test_float_images_need_a_known_scale():
    assert read(file_of(Image.fromarray(np.full((2, 2), 0.25, np.float32)), "TIFF")).eq(0.25).all()
    with pytest.raises(ImageError, match="no known scale"):
        read(file_of(Image.fromarray(np.full((2, 2), 7.0, np.float32)), "TIFF"))
    with pytest.raises(ImageError, match="no known scale"):
        read(file_of(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"))


def test_animations_are_refused_unless_a_frame_is_chosen():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        with pytest.raises(ImageError, match="--frame 0"):
            read(data)
        assert read_uint8(data, frame=0)[0, :, 0, 0].tolist() == [255, 0, 0]
        assert read_uint8(data, frame=2)[0, :, 0, 0].tolist() == [0, 0, 255]
        for missing in (3, -1):
            with pytest.raises(ImageError, match="no frame"):
                read(data, frame=missing)
    assert read(file_of(frames[0]), frame=0).shape == (1, 3, 4, 4)
    with pytest.raises(ImageError, match="no frame 1"):
        read(file_of(frames[0]), frame=1)


def test_phone_photos_with_attached_previews_are_one_image():
    data = file_of(Image.new("RGB", (8, 8), "red"), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
    assert read_uint8(data)[0, 0, 4, 4] > 240


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_and_damaged_files_are_refused_in_one_line(kind, tmp_path):
    data = file_of(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), kind)
    path = tmp_path / f"broken.{kind.lower()}"
    for cut in (4, 30, len(data) // 2):
        path.write_bytes(data[:cut])
        with pytest.raises(ImageError) as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF"]), seed=st.integers(0, 10_000))
def test_random_damage_reads_or_raises_image_error(kind, seed):
    rng = np.random.default_rng(seed)
    data = bytearray(file_of(Image.fromarray(ramp()), kind))
    for at in rng.integers(0, len(data), 8):
        data[at] = rng.integers(0, 256)
    try:
        assert read_uint8(bytes(data)).shape[1] == 3
    except ImageError as error:
        assert "\n" not in str(error)


def test_what_is_not_an_image_is_said_plainly(tmp_path):
    empty, text, tokens = tmp_path / "empty.png", tmp_path / "text.png", tmp_path / "a.tok"
    empty.write_bytes(b"")
    text.write_text("hello, I am not an image")
    tokens.write_bytes(b"TOK1" + bytes(60))
    for path, message in (
        (empty, r"empty\.png: empty \(0 bytes\)"),
        (text, "not an image"),
        (tokens, "It holds tokens: tok decode"),
        (tmp_path / "none.png", "no such file"),
        (tmp_path, "[Dd]irectory"),
    ):
        with pytest.raises(ImageError, match=message):
            read(path)


def test_bombs_and_empty_sizes_are_refused_before_decoding():
    def png(width, height):
        chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

    with pytest.raises(ImageError, match="bomb"):
        read(png(60_000, 60_000))
    for size in ((0, 5), (5, 0)):
        with pytest.raises(ImageError):
            read(png(*size))


def test_one_pixel_images_work():
    one = read(file_of(Image.new("RGB", (1, 1), (10, 20, 30))))
    for policy in ("resize", "crop", "pad", "tile"):
        fitted, geometry = fit(one, (16, 16), policy)
        assert fitted.shape == (1, 3, 16, 16) and torch.allclose(fitted, one.expand_as(fitted), atol=1e-6)
        assert torch.allclose(unfit(fitted, geometry), one, atol=1e-6)


# writing ---------------------------------------------------------------------------------------------------------------


def test_write_rounds_to_nearest_and_is_exact_for_png(tmp_path):
    levels = torch.arange(256).float().repeat(3, 1)[:, :, None] / 255
    size = write(tmp_path / "a.png", levels + 0.49 / 255)
    assert size == (tmp_path / "a.png").stat().st_size
    assert torch.equal(read_uint8(tmp_path / "a.png")[0, 0, :, 0], torch.arange(256).byte())
    write(tmp_path / "b.png", (levels - 0.49 / 255)[None])
    assert torch.equal(read_uint8(tmp_path / "b.png")[0, 1, :, 0], torch.arange(256).byte())
    write(tmp_path / "c.png", torch.full((3, 2, 2), 1.7))
    assert read(tmp_path / "c.png").eq(1).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp", ".avif", ".bmp", ".tiff", ".ppm"])
def test_every_format_comes_back_close(suffix):
    image = smooth(32, 48)
    assert psnr(read(to_bytes(image, suffix)), image) > 35


def test_write_refuses_what_it_cannot_write(tmp_path):
    image = torch.rand(3, 4, 4)
    for bad, name, message in (
        (image, "a.xyz", "suffix"),
        (image, "a", "suffix"),
        (torch.rand(2, 3, 4, 4), "a.png", "one image"),
        (torch.rand(1, 4, 4), "a.png", "one image"),
        (torch.full((3, 4, 4), torch.nan), "a.png", "NaN"),
        (torch.ones(3, 4, 4, dtype=torch.int64), "a.png", "uint8"),
        (torch.zeros(3, 1, 70_000), "a.webp", "WEBP"),
    ):
        with pytest.raises(ImageError, match=message):
            write(tmp_path / name, bad)
    assert not list(tmp_path.iterdir())


# sizes -----------------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(height=SIZES, width=SIZES, h=SIZES, w=SIZES, batch=st.integers(1, 2), policy=st.sampled_from(["resize", "crop", "pad", "tile"]))
def test_policies_reach_the_size_and_come_back(height, width, h, w, batch, policy):
    images = torch.rand(batch, 3, height, width)
    fitted, geometry = fit(images, (h, w), policy)
    assert fitted.shape[1:] == (3, h, w) and len(geometry) == batch
    assert len(fitted) == sum(g.tiles for g in geometry) and geometry[0].policy == policy
    assert fitted.min() >= 0 and fitted.max() <= 1
    back = unfit(fitted, geometry)
    assert back.min() >= 0 and back.max() <= 1
    if policy == "crop":
        assert back.shape[2] <= height and back.shape[3] <= width and (back.shape[2] == height or back.shape[3] == width)
    else:
        assert back.shape == images.shape
    if policy == "tile":
        assert torch.equal(back, images)
    small = (images * 128 + 64).round().byte()  # away from 0 and 255, where bytes clip the overshoot between the two passes
    bytes_fitted, bytes_geometry = fit(small.contiguous(memory_format=torch.channels_last), (h, w), policy)
    assert bytes_fitted.dtype == torch.uint8 and bytes_geometry == geometry
    assert (bytes_fitted.float() / 255 - fit(small.float() / 255, (h, w), policy)[0]).abs().max() < 4 / 255


def test_resize_there_and_back_keeps_a_smooth_image():
    for height, width in ((300, 400), (512, 128), (100, 90)):
        image = smooth(height, width)
        for policy in ("resize", "pad"):
            assert psnr(unfit(*fit(image, (256, 256), policy)), image) > 45


def test_resize_of_bytes_is_pillows_bicubic():
    image = Image.fromarray(ramp(100, 140))
    ours = fit(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], (64, 48), "resize")[0]
    theirs = torch.from_numpy(np.array(image.resize((48, 64), Image.Resampling.BICUBIC))).permute(2, 0, 1)[None]
    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_tiles_are_consecutive_rows_in_raster_order():
    image = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float() / 200
    tiles, geometry = fit(image, (2, 4), "tile")
    assert tiles.shape == (8, 3, 2, 4) and geometry[0] == Geometry(4, 6, "tile", 2, 2)
    assert torch.equal(tiles[0], image[0, :, :2, :4]) and torch.equal(tiles[6], image[1, :, 2:, :4])
    assert torch.equal(tiles[5][..., :2], image[1, :, :2, 4:]) and torch.equal(tiles[5][..., 3], image[1, :, :2, 5])


def test_unfit_gives_a_list_when_sizes_differ():
    parts = [fit(torch.rand(1, 3, *size), (8, 8), policy) for size, policy in (((5, 9), "resize"), ((9, 20), "tile"), ((8, 8), "none"))]
    images = torch.cat([p[0] for p in parts])
    geometry = tuple(g for p in parts for g in p[1])
    back = unfit(images, geometry)
    assert isinstance(back, list) and [tuple(b.shape) for b in back] == [(3, 5, 9), (3, 9, 20), (3, 8, 8)]
    assert isinstance(unfit(images[:1], geometry[:1]), torch.Tensor)


def test_fit_refuses_with_the_remedy():
    with pytest.raises(ImageError, match=r"256×256 .*got 100×200.*--resize, --crop, --pad or --tile"):
        fit(torch.rand(1, 3, 100, 200), (256, 256))
    with pytest.raises(ImageError, match="must be one of none, resize"):
        fit(torch.rand(1, 3, 4, 4), (4, 4), "stretch")
    with pytest.raises(ImageError, match="no pixels"):
        fit(torch.rand(1, 3, 0, 4), (4, 4), "resize")


@pytest.mark.parametrize(
    "geometry",
    [Geometry(65535, 65535, "resize"), Geometry(MAX_PIXELS + 1, 1, "pad"), Geometry(0, 5, "resize"), Geometry(9, 9, "tile", 1, 1), Geometry(4, 4, "x")],
)
def test_forged_geometry_is_refused_before_it_costs_memory(geometry):
    with pytest.raises(ImageError):
        unfit(torch.rand(1, 3, 8, 8), (geometry,))


def test_rows_must_be_covered():
    with pytest.raises(ImageError, match="3 rows"):
        unfit(torch.rand(3, 3, 8, 8), (Geometry(4, 4, "resize"),))
