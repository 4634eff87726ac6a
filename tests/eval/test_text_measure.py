"""The text measure in whole runs, on pages of plain rectangles that a recogniser for tests reads by their colour."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tok1d.eval import run as running
from tok1d.eval.binned import Bins
from tok1d.eval.manifest import Manifest, Sample, Word
from tok1d.eval.ocr import DummyRecogniser, FunctionRecogniser
from tok1d.eval.protocol import Protocol
from tok1d.eval.run import Rank, evaluate, read_rows
from tok1d.eval.systems import Pictures, Rate, ResizeSystem, System
from tok1d.eval.text_measure import Text
from tok1d.eval.words import crop_word

BINS = Bins("test", (0.02, 0.05, 0.1, 1.0))
PAD = Protocol("pad-test", 64, "pad", "bicubic", "model", "text-v1-256", "face-v2-256", "tests")
CROP = replace(PAD, id="crop-test", fit="crop")
ORIGINAL = replace(PAD, id="original-test", space="original", resample="lanczos")
COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}


def by_colour(crop: np.ndarray) -> str:
    """The name of the brightest channel of the middle pixel; nothing for greys."""
    middle = crop[crop.shape[0] // 2, crop.shape[1] // 2].astype(int)
    return list(COLOURS)[int(middle.argmax())] if middle.max() - middle.min() > 60 else ""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(running, "CHUNK", 3)


def page(folder, name: str, words: list[Word], width: int = 128, height: int = 96, colours: dict | None = None) -> Sample:
    """Words as filled boxes of the colour they name, on grey."""
    folder.mkdir(exist_ok=True)
    pixels = np.full((height, width, 3), 128, np.uint8)
    for word in words:
        x0, y0, x1, y1 = (round(v) for v in word.box)
        pixels[max(0, y0) : y1, max(0, x0) : x1] = (colours or COLOURS).get(word.value, (128, 128, 128))
    Image.fromarray(pixels).save(folder / f"{name}.png")
    return Sample(name, f"{name}.png", width, height, words=tuple(words))


@pytest.fixture
def pages(tmp_path) -> Manifest:
    samples = []
    for i in range(8):
        a, b, c = ("red", "green", "blue")[i % 3 :] + ("red", "green", "blue")[: i % 3]
        words = [Word((10, 10, 42, 26), a, 0.2), Word((60, 40, 92, 56), b, 0.06), Word((10, 60, 42, 76), c, 0.03), Word((90, 80, 100, 90), "red", 0.01)]
        samples.append(page(tmp_path / "pages", f"p{i}", words))
    return Manifest("pages", tmp_path / "pages", tuple(samples))


def recogniser(charset: str | None = None) -> FunctionRecogniser:
    return FunctionRecogniser(by_colour, "by-colour", charset)


def run(pages, out, protocol=PAD, reads=None, system=None, **options):
    return evaluate(system or ResizeSystem([2, 64]), pages, protocol, [Text(reads or recogniser(), BINS, pool=options.pop("pool", 512))], out, **options)


def numbers(summary):
    return {k: v for k, v in summary.items() if k != "provenance"}


def test_words_are_read_and_scored(pages, tmp_path):
    summary = run(pages, tmp_path / "out")
    worst, best = (r["measures"]["text"] for r in summary["rates"])
    assert best["words"] == 24 == best["all"]["n"] and best["all"]["images"] == 8 and best["statuses"] == {"ok": 24}
    assert best["all"]["t_acc_raw"]["micro"]["mean"] == 1 == best["all"]["t_ned_raw"]["macro"]["mean"]
    assert [best["all"]["t_acc_raw"][k]["n"] for k in BINS.labels] == [8, 8, 8]
    assert worst["all"]["t_acc_raw"]["micro"]["mean"] < 0.5 and worst["ceiling"] == best["ceiling"]
    assert worst["ceiling"]["t_acc_raw"]["micro"]["mean"] == 1 and "chance_acc" not in worst["ceiling"]
    # Chance: each word against another one's reading, so about a third.
    assert 0 < best["all"]["chance_acc"]["micro"] < 1 and best["all"]["chance_ned"]["micro"] > best["all"]["chance_acc"]["micro"]
    rows = read_rows(tmp_path / "out", "words")
    assert len(rows) == 3 * 24 and {r["rate"] for r in rows} == {"original", "s2", "s64"}
    assert rows[0] == {"id": "p0", "rate": "original", "word": 0, "truth": "red", "scale": 0.2, "group": "", "status": "ok", "read": "red", "confidence": 1.0}


def test_words_below_the_bins_are_never_cropped(pages, tmp_path):
    seen = []
    run(pages, tmp_path / "out", reads=FunctionRecogniser(lambda crop: seen.append(crop.shape) or "x", "counting"))
    assert len(seen) == 24 * 3 and {r["word"] for r in read_rows(tmp_path / "out", "words")} == {0, 1, 2}


class AnyWord(DummyRecogniser):
    charset = None


@pytest.mark.parametrize("protocol", [PAD, ORIGINAL, CROP])
def test_ranks_batches_and_pools_do_not_matter(pages, tmp_path, protocol):
    alone = run(pages, tmp_path / "1", protocol, AnyWord(), batch_size=3)
    for count, pool in ((2, 1), (3, 5)):
        found = [run(pages, tmp_path / str(count), protocol, AnyWord(), rank=Rank(i, count), batch_size=count, pool=pool) for i in range(count)]
        assert numbers(found[-1]) == numbers(alone)
        assert read_rows(tmp_path / str(count), "words") == read_rows(tmp_path / "1", "words")
    texts = {r["read"] for r in read_rows(tmp_path / "1", "words") if r["rate"] == "s2"}
    assert len(texts) > 3  # the recogniser saw different pixels


def test_statuses(tmp_path):
    words = [
        Word((2, 10, 30, 30), "red", 0.2),  # cut off by the centre crop
        Word((60, 40, 92, 56), "green", 0.2),
        Word((60, 60, 92, 76), "grün", 0.2),
        Word((200, 10, 230, 30), "blue", 0.2),
        Word((50, 130, 80, 150), "blue", 0.2),
        Word((60, 80, 60, 90), "red", 0.2),
        Word((70, 80, 90, 90), "", 0.2),
    ]
    pages = Manifest("odd", tmp_path / "odd", (page(tmp_path / "odd", "a", words, width=160), page(tmp_path / "odd", "b", words[:2])))
    (tmp_path / "odd" / "b.png").write_bytes(b"not an image")
    reads = recogniser("abcdefghijklmnopqrstuvwxyz")
    wanted = ["ok", "outside_alphabet", "outside_image", "outside_image", "bad_box", "no_text"]
    for protocol, first in ((CROP, "outside_view"), (PAD, "ok"), (ORIGINAL, "ok")):
        out = tmp_path / protocol.id
        summary = run(pages, out, protocol, reads)
        rows = [r for r in read_rows(out, "words") if r["rate"] == "s64"]
        assert [r["status"] for r in rows if r["id"] == "a"] == [first, *wanted], protocol.id
        assert [r["status"] for r in rows if r["id"] == "b"] == ["unreadable_image"] * 2
        assert all((r["read"] is None) == (r["status"] != "ok") for r in rows)
        text = summary["rates"][-1]["measures"]["text"]
        assert text["words"] == 9 == sum(text["statuses"].values()) and text["all"]["n"] == text["statuses"]["ok"] == (1 if first != "ok" else 2)
        assert text["statuses"]["unreadable_image"] == 2 and text["statuses"]["outside_image"] == 2


class Budget(System):
    """Pictures of half of the images at the first rate, of all at the second."""

    name, rates = "budget", [Rate("b1"), Rate("b2")]

    def describe(self):
        return {"kind": "test"}

    def reconstruct(self, views, names):
        for rate in self.rates:
            status = ["does not fit" if rate.name == "b1" and int(n[1:]) % 2 else "ok" for n in names]
            yield Pictures(rate, views, [1.0] * len(views), [1.0] * len(views), status)


def test_a_rate_without_a_picture_is_a_status(pages, tmp_path):
    summary = run(pages, tmp_path / "out", system=Budget())
    half, whole = (r["measures"]["text"] for r in summary["rates"])
    assert half["statuses"] == {"does not fit": 12, "ok": 12} and half["all"]["n"] == 12 == half["recognisable"]["n"] and half["ceiling"]["n"] == 24
    assert half["all"]["t_acc_raw"]["micro"] == {"mean": 1, "low": 1, "high": 1, "n": 12, "clusters": 4}
    assert whole["statuses"] == {"ok": 24} and whole["all"]["n"] == 24


def test_nothing_read_at_all_has_no_mean(pages, tmp_path):
    text = run(pages, tmp_path / "out", reads=recogniser("xyz"))["rates"][0]["measures"]["text"]
    assert text["statuses"] == {"outside_alphabet": 24} and text["all"]["n"] == 0 == text["ceiling"]["n"]
    assert text["all"]["t_acc_raw"]["micro"]["mean"] is None


def test_what_the_recogniser_cannot_read_is_apart(tmp_path):
    """Green words are painted blue, so the recogniser misreads the originals, too."""
    words = [Word((10, 10, 42, 26), "red", 0.2), Word((60, 40, 92, 56), "green", 0.2)]
    sample = page(tmp_path / "p", "a", words, colours={**COLOURS, "green": (20, 20, 220)})
    text = run(Manifest("p", tmp_path / "p", (sample,)), tmp_path / "out")["rates"][-1]["measures"]["text"]
    assert text["all"]["t_acc_raw"]["micro"]["mean"] == 0.5 == text["ceiling"]["t_acc_raw"]["micro"]["mean"]
    assert text["recognisable"]["n"] == 1 and text["recognisable"]["t_acc_raw"]["micro"]["mean"] == 1


class Whole(System):
    """Pictures of one colour: what lies in the picture alone decides what is read."""

    name, rates = "whole", [Rate("green")]

    def describe(self):
        return {"kind": "test"}

    def reconstruct(self, views, names):
        green = torch.tensor(COLOURS["green"], dtype=torch.uint8).view(3, 1, 1).expand_as(views[0])
        yield Pictures(self.rates[0], green.expand_as(views).clone(), [1.0] * len(views), [1.0] * len(views), ["ok"] * len(views))


@pytest.mark.parametrize("protocol", [PAD, CROP, ORIGINAL])
def test_words_of_pictures_are_read_in_pictures(tmp_path, protocol):
    pages = Manifest("p", tmp_path / "p", (page(tmp_path / "p", "a", [Word((50, 40, 80, 56), "red", 0.2)]),))
    run(pages, tmp_path / "out", protocol, system=Whole())
    assert {r["rate"]: r["read"] for r in read_rows(tmp_path / "out", "words")} == {"original": "red", "green": "green"}


def test_the_space_decides_the_size_of_crops(tmp_path):
    """In the view a word is as large as the system saw it; in the original as large as it was."""
    words = [Word((32, 32, 96, 64), "red", 0.2), Word((96, 80, 140, 99), "blue", 0.2)]  # the second one leaves the image
    pages = Manifest("p", tmp_path / "p", (page(tmp_path / "p", "a", words),))
    shapes: dict[str, list] = {}
    for protocol in (PAD, ORIGINAL):
        seen = shapes.setdefault(protocol.space, [])
        run(pages, tmp_path / protocol.id, protocol, FunctionRecogniser(lambda crop, seen=seen: seen.append(crop.shape[:2]) or "", "shapes"), ResizeSystem([64]))
    assert shapes == {"model": [(16, 32), (8, 16)] * 2, "original": [(32, 64), (16, 32)] * 2}
    image = pages.read(pages.samples[0])
    assert np.array_equal(crop_word(image, words[1].box)[0], np.broadcast_to(COLOURS["blue"], (16, 32, 3)))


def test_slanted_words_are_turned_upright_in_the_view(tmp_path):
    poly = ((40.0, 20.0), (80.0, 60.0), (60.0, 80.0), (20.0, 40.0))
    sample = page(tmp_path / "p", "a", [Word((20, 20, 80, 80), "green", 0.2, poly)])
    seen = []
    run(Manifest("p", tmp_path / "p", (sample,)), tmp_path / "out", PAD, FunctionRecogniser(lambda crop: seen.append(crop) or "", "s"), ResizeSystem([64]))
    assert [c.shape for c in seen] == [(14, 28, 3)] * 2  # half of 40√2 × 20√2
    assert np.abs(seen[0].reshape(-1, 3).astype(int) - COLOURS["green"]).max() < 40
