import math
from itertools import islice

import numpy as np
import pytest
import torch

from tok1d.errors import UsageError
from tok1d.eval import synthetic
from tok1d.eval.binned import Bins
from tok1d.eval.drawn_faces import Person, landmarks, outline
from tok1d.eval.ladder import ladder_table
from tok1d.eval.manifest import Manifest
from tok1d.eval.synthetic import MARGIN, STEPS, face_image, face_set, text_image, text_ladder, write_set


def test_words_are_as_large_as_their_step_says():
    for (image, sample), step in zip(text_ladder(len(STEPS), 128, seed=3), STEPS):
        assert image.shape == (3, 128, 128) and image.dtype == torch.uint8
        assert sample.tags == (f"step={step:g}",) and 1 <= len(sample.words) <= 15
        for word in sample.words:
            assert word.scale * 256 == pytest.approx(step, rel=0.1) and len(word.value) >= 3 and word.value.isascii() and word.value.isalnum()


def test_boxes_are_those_of_the_ink(monkeypatch):
    """On even paper, the pixels that differ from it lie in the boxes, and reach to their margin and no further."""
    monkeypatch.setattr(synthetic, "_background", lambda rng, colour, size, depth: np.ones((size, size, 1)) * colour.round())
    for index in (0, 3, 6, 8):
        image, sample = text_image(index, 160, seed=1)
        painted = (image != image[:, -1:, -1:]).any(0)
        for word in sample.words:
            x0, y0, x1, y1 = word.box
            assert 0 <= x0 < x1 <= 160 and 0 <= y0 < y1 <= 160
            rows, columns = (painted[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)].any(d).nonzero()[:, 0] for d in (1, 0))
            room = (y1 - y0) * MARGIN / (1 + 2 * MARGIN)
            if min(x0, y0) > 0 and max(x1, y1) < 160:
                assert float(rows[0]) + math.floor(y0) == pytest.approx(y0 + room, abs=1.01)
                assert float(rows[-1]) + 1 + math.floor(y0) == pytest.approx(y1 - room, abs=1.01)
                assert float(columns[0]) + math.floor(x0) == pytest.approx(x0 + room, abs=1.01)
                assert float(columns[-1]) + 1 + math.floor(x0) == pytest.approx(x1 - room, abs=1.01)
                assert max(x1 - x0, y1 - y0) - 2 * room == pytest.approx(word.scale * 160 * len(word.value))
            painted[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)] = False
        assert not painted.any()


def test_an_image_does_not_depend_on_how_many_are_drawn():
    for make in (text_ladder, face_set):
        few, many = list(make(2, 64, 5)), list(islice(make(900, 64, 5), 2))
        assert all(torch.equal(a, b) and s == t for (a, s), (b, t) in zip(few, many))
        other = next(iter(make(1, 64, 6)))
        assert not torch.equal(other[0], few[0][0]) and (other[1].words, other[1].faces) != (few[0][1].words, few[0][1].faces)


def test_faces_fill_all_bins_and_their_landmarks_are_in_their_boxes():
    bins, seen = Bins.named("face-v2-256"), set()
    for image, sample in face_set(6, 96, seed=2):
        assert image.shape == (3, 96, 96) and image.dtype == torch.uint8 and len(sample.faces) in (1, 2, 4)
        for face in sample.faces:
            seen.add(bins.index(face.scale))
            x0, y0, x1, y1 = face.box
            assert 0 <= x0 < x1 <= 96 and 0 <= y0 < y1 <= 96 and face.scale == pytest.approx(max(x1 - x0, y1 - y0) / 96)
            xs, ys = zip(*face.kps)
            assert x0 < min(xs) and max(xs) < x1 and y0 < min(ys) and max(ys) < y1
            assert face.kps[0][0] < face.kps[1][0] and face.kps[3][0] < face.kps[4][0]
            assert max(ys[:2]) < ys[2] + 3 < max(ys[3:]) + 6
    assert seen == {0, 1, 2}


def patch(grey: torch.Tensor, point) -> float:
    """Mean of the four pixels around a point."""
    x, y = (round(v) for v in point)
    return float(grey[y - 1 : y + 1, x - 1 : x + 1].mean())


def test_landmarks_lie_on_what_they_name():
    """Pupils are dark, the white of the eye beside them is light; lips differ from the skin of the chin."""
    for index in (5, 11):
        image, sample = face_image(index, 256, 0)
        (face,) = sample.faces
        grey = image.float().mean(0)
        apart = np.subtract(face.kps[1], face.kps[0])
        for eye, side in ((face.kps[0], -1), (face.kps[1], 1)):
            assert patch(grey, eye) < patch(grey, np.array(eye) + side * 0.14 * apart) - 60
        mouth = (np.array(face.kps[3]) + face.kps[4]) / 2
        below = mouth + np.array([0, 0.25 * apart[0]])
        assert max(abs(patch(c, mouth) - patch(c, below)) for c in image.float()) > 8


def test_people_differ():
    people = [Person.draw_lots(np.random.default_rng(i)) for i in range(20)]
    assert len(set(people)) == 20 and len({p.skin for p in people}) > 15
    shapes = np.stack([landmarks(p) for p in people])
    assert (shapes.std(0).max(0) > 0.02).all()
    for p in people:
        shape, points = outline(p), landmarks(p)
        assert shape[:, 1].min() == pytest.approx(-1) and shape[:, 1].max() == pytest.approx(1)
        assert (np.abs(points[:, 0]) < p.width).all()


@pytest.mark.parametrize("kind", ["text", "faces"])
def test_sets_on_disk(tmp_path, kind):
    whole = write_set(kind, tmp_path / "a", 4, 64, 1)
    files = {p.name: p.read_bytes() for p in (tmp_path / "a" / "images").iterdir()}
    assert len(files) == 4 and len(whole) == 4
    loaded = Manifest.load(tmp_path / "a" / "manifest.jsonl")
    assert loaded.hash == whole.hash and loaded.read(loaded.samples[2]).shape == (3, 64, 64)
    drawn = {s.id: image for image, s in (text_ladder if kind == "text" else face_set)(4, 64, 1)}
    assert all(torch.equal(loaded.read(s), drawn[s.id]) for s in loaded.samples)
    # Begun elsewhere, cut off, finished: the same bytes, and what is whole is not written again.
    write_set(kind, tmp_path / "b", 2, 64, 1)
    one, two = sorted((tmp_path / "b" / "images").iterdir())
    two.write_bytes(two.read_bytes()[:50])
    before = one.stat().st_mtime_ns
    assert write_set(kind, tmp_path / "b", 4, 64, 1).hash == whole.hash and one.stat().st_mtime_ns == before
    assert {p.name: p.read_bytes() for p in (tmp_path / "b" / "images").iterdir()} == files
    assert (tmp_path / "b" / "manifest.jsonl").read_bytes() == (tmp_path / "a" / "manifest.jsonl").read_bytes()
    with pytest.raises(UsageError, match="holds another set .*'seed': 1.*'seed': 2"):
        write_set(kind, tmp_path / "a", 4, 64, 2)


def test_wrong_asks(tmp_path):
    for kind, count, size, message in (("noise", 1, 64, "not drawn; there are text, faces"), ("text", 1, 63, "64 to 4096"), ("faces", 1, 5000, "size=5000"), ("text", 0, 64, "count=0")):
        with pytest.raises(UsageError, match=message):
            write_set(kind, tmp_path / "x", count, size)
        assert not (tmp_path / "x").exists()


def test_the_ladder_by_hand():
    def row(pixels, read, rate="k1", status="ok"):
        return {"rate": rate, "scale": pixels / 256, "truth": "abcd", "read": read, "status": status}

    rows = [row(4.1, "abcd"), row(3.9, "abxx"), row(4.0, None, status="outside_view"), row(40.5, "abcd"), row(5.4, "", "k2")]
    first, second, third = ladder_table(rows)
    assert (first.rate, first.pixels, first.n, first.accuracy, first.ned) == ("k1", 4.0, 2, 0.5, 0.75)
    assert (second.pixels, second.n, second.accuracy, second.high) == (40.0, 1, 1.0, 1.0)
    assert (third.rate, third.pixels, third.accuracy, third.ned, third.low) == ("k2", 5.5, 0.0, 0.0, 0.0)
    assert first.low == pytest.approx(0.0945, abs=1e-3) and first.high == pytest.approx(0.9055, abs=1e-3)  # Wilson, 1 of 2
    assert [p.pixels for p in ladder_table(rows[:1], 512)] == [8.0]
    assert ladder_table([]) == []


def test_a_recogniser_reads_what_is_large():
    pytest.importorskip("easyocr")
    from tok1d.errors import TokError
    from tok1d.eval.ocr import EasyOCR, crop_word

    try:
        recogniser = EasyOCR()
    except TokError as error:
        pytest.skip(str(error))
    rows, crops = [], []
    for index in (0, 7, 8):
        image, sample = text_image(index)
        for word in sample.words[:3]:
            crops.append(crop_word(image, word.box)[0])
            rows.append({"rate": "original", "truth": word.value, "scale": word.scale, "status": "ok"})
    for row, (text, _) in zip(rows, recogniser.recognise(crops)):
        row["read"] = text
    found = {p.pixels: p.accuracy for p in ladder_table(rows)}
    assert found[18.0] == found[24.0] == 1.0 and found[4.0] < 1.0
