import io

import numpy as np
import pytest
from PIL import Image

from tok1d.eval import codecs

VIEW = np.asarray(Image.fromarray((np.random.default_rng(0).random((6, 8, 3)) * 255).astype(np.uint8)).resize((96, 64)))
CODECS = [name for name, why in codecs.available().items() if not why]


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_rise_with_quality_and_fall_with_size(codec):
    sizes = [len(codecs.at_quality(VIEW, codec, quality)[0]) for quality in (5, 50, 95, 100)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4
    data, picture = codecs.at_quality(VIEW, codec, 50, side=48)
    assert len(data) < sizes[1] and picture.shape == VIEW.shape
    assert codecs.decode(data).shape == (32, 48, 3)


@pytest.mark.parametrize("codec", CODECS)
def test_files_are_real(codec):
    data, picture = codecs.at_quality(VIEW, codec, 90)
    again = codecs.decode(data)
    assert np.array_equal(again, picture)
    assert np.abs(again.astype(int) - VIEW).mean() < 6
    assert 0 < codecs.payload_bytes(data) < len(data) or codec == "jxl"


@pytest.mark.parametrize("codec", sorted({"jpeg", "webp", "jxl"} & set(CODECS)))
def test_the_search_is_that_of_brute_force(codec, monkeypatch):
    monkeypatch.setattr(codecs, "SIZES", (8, 16, 32))
    monkeypatch.setattr(codecs, "QUALITIES", (0, 40, 100))
    view = np.asarray(Image.fromarray(VIEW).resize((32, 32)))
    every = []
    for side in codecs.SIZES:
        for quality in codecs.QUALITIES:
            data, picture = codecs.at_quality(view, codec, quality, side)
            every.append((len(data), codecs._psnr(view, picture)))
    budgets = (3, 120, 400, 4000)
    found = codecs.search(view, codec, budgets)
    assert found[3] is None and found[4000] is not None
    for budget in budgets[1:]:
        best = max((psnr for size, psnr in every if size <= budget), default=None)
        assert (None if found[budget] is None else found[budget].psnr) == best


def test_container_bytes_by_hand():
    out = io.BytesIO()
    Image.fromarray(VIEW).save(out, "JPEG", comment=b"hello")
    data = out.getvalue()
    jfif, comment = 18, 2 + 2 + 5  # APP0 of JFIF with marker; COM with marker and length
    assert codecs.payload_bytes(data) == len(data) - 2 - 2 - jfif - comment
    out = io.BytesIO()
    Image.fromarray(VIEW).save(out, "WEBP", quality=50)
    assert codecs.payload_bytes(out.getvalue()) in (len(out.getvalue()) - 20, len(out.getvalue()) - 21)  # RIFF + chunk, padding
    out = io.BytesIO()
    Image.fromarray(VIEW).save(out, "PNG")
    assert codecs.payload_bytes(out.getvalue()) == len(out.getvalue())


def test_png_round_trip_is_exact():
    out = io.BytesIO()
    Image.fromarray(VIEW).save(out, "PNG")
    assert np.array_equal(codecs.decode(out.getvalue()), VIEW)
