"""Total-Text, TextOCR, CORD, SROIE, DocVQA, InfographicVQA: small files as their authors write them."""

import json

import pytest

from tests.eval.drawn import png
from tests.eval.test_importers import write
from tok1d.errors import TokError
from tok1d.eval.importers import KINDS, import_manifest
from tok1d.eval.manifest import Manifest, word

QUAD = [4.0, 10.0, 19.0, 9.0, 20.0, 14.0, 5.0, 15.0]
SLANT = word((4, 9, 20, 15), "slant", 24, 16, [(4, 10), (19, 9), (20, 14), (5, 15)])
BOX = [1.0, 2.0, 13.0, 2.0, 13.0, 8.0, 1.0, 8.0]
UPRIGHT = word((1, 2, 13, 8), "Hello", 24, 16)


def totaltext_line(points=BOX, value="u'Hello'", orientation="u'h'"):
    x, y = (" ".join(f"{v:g}" for v in part) for part in (points[::2], points[1::2]))
    return f"x: [[{x}]], y: [[{y}]], ornt: [{orientation}], transcriptions: [{value}]\n"


def test_totaltext(tmp_path):
    curved = "x: [[ 1 6 12\n 12 6 1]], y: [[2 1 2 8\n 7 8]], ornt: [u'c'], transcriptions: [u\"BOB'S caf\\xe9\"]\n"
    lines = totaltext_line() + totaltext_line(QUAD, "u'slant'", "u'm'") + curved + totaltext_line(value="u'#'", orientation="u'#'") + totaltext_line(value="", orientation="")
    write(tmp_path / "txt_format" / "Test" / "poly_gt_img11.txt", lines)
    write(tmp_path / "Images" / "Test" / "img11.jpg", png())
    manifest = import_manifest("totaltext", tmp_path / "txt_format")
    (sample,) = manifest.samples
    assert (sample.id, sample.group) == ("Test/img11.jpg", "totaltext") and sample.words[:2] == (UPRIGHT, SLANT)
    third = sample.words[2]
    assert third.value == "BOB'S café" and third.box == (1, 1, 12, 8) and len(third.poly) == 6 and len(sample.words) == 3
    assert manifest.notes == ("illegible words, left out: 2",)
    alone = import_manifest("totaltext", tmp_path / "txt_format" / "Test" / "poly_gt_img11.txt", tmp_path / "Images" / "Test")
    assert alone.samples[0].words == sample.words


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (totaltext_line() + "1,2,3,4,word\n", r"poly_gt_a\.txt: line 2: should be x: \[\["),
        (totaltext_line() + totaltext_line([*BOX[:-1], 3, 4]), "line 2: 5 x and 4 y"),
        (totaltext_line([1, 2, 3, 4]), "line 1: word 0, 'Hello': corners should be .* three points, got 4 numbers"),
        (totaltext_line().replace("13", "1e3x", 1), "line 1: '1e3x' is not a number"),
        (totaltext_line(value="u'\\x'"), "line 1: .*truncated"),
        (totaltext_line().replace(", ornt", " ornt"), "line 1: should be"),
    ],
)
def test_wrong_totaltext(tmp_path, content, message):
    write(tmp_path / "poly_gt_a.txt", content)
    write(tmp_path / "a.png", png())
    with pytest.raises(TokError, match=message):
        import_manifest("totaltext", tmp_path)


def test_only_matlab_files(tmp_path):
    write(tmp_path / "poly_gt_img1.mat", b"MATLAB")
    with pytest.raises(TokError, match=r"no poly_gt_<image>\.txt there; its MATLAB files are not read.*txt_format"):
        import_manifest("totaltext", tmp_path)


def test_sroie(tmp_path):
    write(tmp_path / "box" / "X1.txt", "1,2,13,2,13,8,1,8,TAN WOON, YANN\r\n4,10,19,9,20,14,5,15,slant\r\n")
    write(tmp_path / "img" / "X1.jpg", png())
    write(tmp_path / "entities" / "X1.txt", '{"company": "not words"}')
    manifest = import_manifest("sroie", tmp_path)
    (sample,) = manifest.samples
    assert sample.words == (word((1, 2, 13, 8), "TAN WOON, YANN", 24, 16), SLANT) and sample.group == "sroie"
    assert manifest.notes == ("lines of several words, kept as one: 1",)
    write(tmp_path / "box" / "X1.txt", "1,2,13,2,13,8,1,8,ok\n1,2,13,total\n")
    with pytest.raises(TokError, match=r"X1\.txt: line 2: should be x1,y1"):
        import_manifest("sroie", tmp_path)
    write(tmp_path / "box" / "X2.txt", "1,2,13,2,13,8,1,8,ok\n")
    write(tmp_path / "box" / "X1.txt", "")
    with pytest.raises(TokError, match=r"no image X2\.jpg"):
        import_manifest("sroie", tmp_path)


def textocr_file(**changes):
    image = {"id": "i1", "width": 24, "height": 16, "set": "val", "file_name": "train/a.jpg"}
    gone = {**image, "id": "i2", "file_name": "train/gone.jpg"}
    anns = {
        "i1_1": {"id": "i1_1", "image_id": "i1", "bbox": [1, 2, 12, 6], "utf8_string": "Hello", "points": BOX, "area": 72.0},
        "i1_2": {"id": "i1_2", "image_id": "i1", "bbox": [4, 9, 16, 6], "utf8_string": "slant", "points": QUAD, "area": 96.0},
        "i1_3": {"id": "i1_3", "image_id": "i1", "bbox": [0, 0, 2, 2], "utf8_string": ".", "points": BOX, "area": 4.0},
    }
    held = {"info": {}, "imgs": {"i1": image, "i2": gone}, "anns": anns, "imgToAnns": {"i1": list(anns), "i2": []}}
    for path, value in changes.items():
        place = held
        *way, last = path.split("__")
        for key in way:
            place = place[key]
        place[last] = value
    return held


def test_textocr(tmp_path):
    write(tmp_path / "TextOCR_0.1_val.json", textocr_file())
    write(tmp_path / "train" / "a.jpg", png())
    manifest = import_manifest("textocr", tmp_path)
    first, gone = manifest.samples
    assert first.id == "train/a.jpg" and first.words == (UPRIGHT, SLANT) and first.group == "textocr"
    assert gone.words == () and any("images missing or damaged, rows with a status later: 1" in n for n in manifest.notes)
    assert "illegible words, left out: 1" in manifest.notes
    manifest.write(tmp_path / "m.jsonl")
    assert Manifest.load(tmp_path / "m.jsonl").hash == manifest.hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anns__i1_1__image_id": "i9"}, "annotation i1_1: no image 'i9' in imgs"),
        ({"anns__i1_1__points": [1, 2, 3, 4, 5]}, r"image i1: word 0, 'Hello': corners should be"),
        ({"anns__i1_1__points": [1, "2"]}, "annotation i1_1: points should be a finite number, got 2"),
        ({"anns__i1_2": {"image_id": "i1"}}, "annotation i1_2: 'points' is missing"),
        ({"anns__i1_1__utf8_string": 5}, "word 0: its text should be text, got 5"),
        ({"imgs__i1": {"file_name": "a.jpg"}}, "image i1: 'width' is missing"),
        ({"imgs__i1__width": 16, "imgs__i1__height": 24}, "width and height are swapped"),
        ({"anns": []}, "should be a JSON object with imgs and anns"),
    ],
)
def test_wrong_textocr(tmp_path, changes, message):
    write(tmp_path / "val.json", textocr_file(**changes))
    write(tmp_path / "train" / "a.jpg", png())
    with pytest.raises(TokError, match=message):
        import_manifest("textocr", tmp_path / "val.json", tmp_path)


def quad(corners):
    return dict(zip(("x1", "y1", "x2", "y2", "x3", "y3", "x4", "y4"), corners))


def cord_file(**meta):
    lines = [{"words": [{"quad": quad(BOX), "is_key": 0, "row_id": 1, "text": "Hello"}, {"quad": quad(QUAD), "text": "slant"}], "category": "menu.nm"}]
    return {"valid_line": lines, "meta": {"image_size": {"width": 24, "height": 16, **meta}}}


def docvqa_file(**page):
    words = [{"boundingBox": BOX, "text": "Hello"}, {"boundingBox": QUAD, "text": "slant", "confidence": "Low"}]
    held = {"page": 1, "clockwiseOrientation": 0.3, "width": 24, "height": 16, "unit": "pixel", "lines": [{"boundingBox": BOX, "text": "Hello slant", "words": words}]}
    return {"status": "Succeeded", "recognitionResults": [{**held, **page}]}


def textract(corners, text):
    polygon = [{"X": x / 24, "Y": y / 16} for x, y in zip(corners[::2], corners[1::2])]
    return {"BlockType": "WORD", "Confidence": 99.0, "Text": text, "Geometry": {"Polygon": polygon}}


DOCUMENTS = {
    "cord": ("json", "image", cord_file(), "cord"),
    "docvqa": ("ocr_results", "documents", docvqa_file(), "docvqa"),
    "infographicvqa": ("infographicsvqa_ocr", "infographicsvqa_images", {"PAGE": [], "LINE": [], "WORD": [textract(BOX, "Hello"), textract(QUAD, "slant")]}, "infograph"),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_documents(tmp_path, kind):
    place, images, said, group = DOCUMENTS[kind]
    write(tmp_path / place / "p_1.json", said)
    write(tmp_path / images / "p_1.png", png())
    manifest = import_manifest(kind, tmp_path)
    (sample,) = manifest.samples
    assert (sample.id, sample.group, sample.width, sample.height) == ("p_1.png", group, 24, 16)
    for found, wanted in zip(sample.words, (UPRIGHT, SLANT), strict=True):
        assert found.value == wanted.value and found.box == pytest.approx(wanted.box) and found.scale == pytest.approx(wanted.scale)
    assert sample.words[0].poly is None or kind == "infographicvqa"  # parts of 24 and 16 pixels are not exact
    assert [v for xy in sample.words[1].poly for v in xy] == pytest.approx(QUAD)
    assert any("read by an OCR engine" in n for n in manifest.notes) == (kind != "cord")
    assert import_manifest(kind, tmp_path / place / "p_1.json").samples == manifest.samples


def test_blocks_of_textract(tmp_path):
    write(tmp_path / "a.json", {"Blocks": [{"BlockType": "PAGE"}, textract(BOX, "Hello")]})
    write(tmp_path / "a.png", png())
    assert [w.value for w in import_manifest("infographicvqa", tmp_path).samples[0].words] == ["Hello"]
    write(tmp_path / "a.png", png()[:30])
    with pytest.raises(TokError, match=r"a\.png: not a readable image.*without its size its words cannot be placed"):
        import_manifest("infographicvqa", tmp_path)


@pytest.mark.parametrize(
    ("kind", "said", "message"),
    [
        ("cord", "{", r"a\.json: not JSON"),
        ("cord", cord_file(width=16, height=24), "a.json: a.png: the annotation says 16×24 .* swapped"),
        ("cord", {"meta": {"image_size": {"width": 24, "height": 16}}}, "a.json: 'valid_line' is missing"),
        ("cord", json.loads(json.dumps(cord_file()).replace('"y4": 8.0', '"y5": 8.0')), "a.json: 'y4' is missing"),
        ("cord", json.loads(json.dumps(cord_file()).replace('"y4": 8.0', '"y4": "eight"')), "quad.y4 should be a finite number, got eight"),
        ("docvqa", docvqa_file(unit="inch"), "boxes are in units of 'inch'"),
        ("docvqa", docvqa_file(lines=[{"words": [{"boundingBox": [1, 2], "text": "x"}]}]), "word 0, 'x': corners should be"),
        ("docvqa", {"recognitionResults": []}, "a.json: not enough values"),
        ("docvqa", [], "a.json"),
        ("infographicvqa", {"WORD": [{"Text": "x"}]}, "'Geometry' is missing"),
        ("infographicvqa", {"LINE": []}, "'Blocks' is missing"),
    ],
)
def test_wrong_documents(tmp_path, kind, said, message):
    write(tmp_path / "a.json", said)
    with pytest.raises(TokError, match=r"no image a\.jpg"):
        import_manifest(kind, tmp_path)
    write(tmp_path / "a.png", png())
    with pytest.raises(TokError, match=message):
        import_manifest(kind, tmp_path)


def test_damaged_documents_stay_as_rows(tmp_path):
    write(tmp_path / "json" / "a.json", cord_file())
    write(tmp_path / "image" / "a.png", png()[:30])
    manifest = import_manifest("cord", tmp_path)
    assert len(manifest.samples[0].words) == 2 and any("images damaged, rows with a status later: 1" in n for n in manifest.notes)


def test_empty_places(tmp_path):
    for kind in sorted(set(KINDS) - {"folder"}):
        with pytest.raises(TokError, match=r"there|give one (list|file)|there are: none"):
            import_manifest(kind, tmp_path)
