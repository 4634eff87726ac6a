import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.eval.drawn import KPS, annotated, png, tar
from tok1d.errors import TokError, UsageError
from tok1d.eval.import_lists import FIVE
from tok1d.eval.importers import export_tokbench, import_manifest
from tok1d.eval.manifest import Manifest, word


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode() if isinstance(content, str) else json.dumps(content).encode())
    return path


def turned(orientation: int) -> bytes:
    """24 × 16 pixels in the file, shown as 16 × 24 for orientations from 5 on."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.open(io.BytesIO(png())).save(out, "JPEG", exif=exif)
    return out.getvalue()


# TokBench --------------------------------------------------------------------------------------------------------


def text_entry(name="a.png", width=24, height=16, **other):
    words = [{"rec": "Hello", "bbox": [1, 2, 21, 8], "ratio": 0.123, "lang": "en"}, {"rec": "###", "bbox": [0, 0, 2, 2]}, {"rec": "no", "bbox": [1, 9, 9, 15]}]
    return {"file_name": name, "width": width, "height": height, "annotations": words, **other}


def face_entry(name="f.png", width=24, height=16):
    return {"image_name": name, "img_width": width, "img_height": height, "faces": [{"kps": KPS, "ratio": 0.4, "box": [2, 2, 10, 11], "gt": 1}]}


def test_tokbench(tmp_path):
    write(tmp_path / "annotations" / "text_ic15.json", [text_entry()])
    write(tmp_path / "annotations" / "face_meta.json", [face_entry()])
    write(tmp_path / "ic15" / "a.png", png(1))
    write(tmp_path / "wflw" / "f.png", png(2))
    manifest = import_manifest("tokbench", tmp_path)
    assert [(s.id, s.group, s.width, s.height) for s in manifest.samples] == [("ic15/a.png", "ic15", 24, 16), ("wflw/f.png", "wflw", 24, 16)]
    first, second = manifest.samples[0].words
    assert (first.value, first.scale, first.box) == ("Hello", 0.123, (1, 2, 21, 8))
    assert second == word((1, 9, 9, 15), "no", 24, 16)
    face = manifest.samples[1].faces[0]
    assert (face.kps, face.scale, face.box) == (KPS, 0.4, (2, 2, 10, 11))
    assert manifest.notes == ("illegible words, left out: 1",)
    assert manifest.read(manifest.samples[1]).shape == (3, 16, 24)
    assert import_manifest("tokbench", tmp_path / "annotations").samples == manifest.samples
    alone = import_manifest("tokbench", tmp_path / "annotations" / "text_ic15.json", tmp_path)
    assert alone.samples == manifest.samples[:1]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (text_entry(width=16, height=24), r"text_ic13\.json: ic13/a\.png: .*says 16×24 .*image is 24×16: width and height are swapped.*1 of 1"),
        (text_entry(width=30), "the annotation says 30×16 .*the image is 24×16. Give the images that were annotated"),
        ({"width": 24, "height": 16, "annotations": []}, "image 0: 'file_name' is missing"),
        (text_entry(annotations=[{"rec": "x", "bbox": [1, 2, 3]}]), r"image 0: words\[0\]\.box should be"),
        (text_entry(annotations=[{"rec": None, "bbox": [1, 2, 3, 4]}]), "rec should be text"),
        (text_entry(annotations=["word"]), "image 0"),
        (text_entry(name="other.png"), r"none of its 1 images is there .*first: other\.png.*--images"),
        ("entry", "image 0"),
    ],
)
def test_wrong_tokbench_files(tmp_path, entry, message):
    write(tmp_path / "annotations" / "text_ic13.json", [entry])
    write(tmp_path / "ic13" / "a.png", png())
    with pytest.raises(TokError, match=message):
        import_manifest("tokbench", tmp_path)


def test_more_wrong_tokbench_files(tmp_path):
    write(tmp_path / "ic13" / "a.png", png())
    for content, message in (("{", "not JSON"), ({}, "should be a list"), ([text_entry(), text_entry()], "image 1: 'a.png' appears twice")):
        write(tmp_path / "text_ic13.json", content)
        with pytest.raises(TokError, match=message):
            import_manifest("tokbench", tmp_path / "text_ic13.json", tmp_path)
    write(tmp_path / "text_ic13.json", [text_entry(), text_entry("gone.png")])
    manifest = import_manifest("tokbench", tmp_path / "text_ic13.json", tmp_path)
    assert len(manifest) == 2 and any("images missing or damaged, rows with a status later: 1 " in n and "gone.png" in n for n in manifest.notes)
    with pytest.raises(TokError, match=r"neither text_<set>\.json"):
        import_manifest("tokbench", tmp_path / "ic13")


def test_to_tokbench_and_back(tmp_path):
    drawn = annotated(tmp_path / "data")
    upright = [replace(s, words=tuple(replace(w, poly=None, tags=()) for w in s.words), faces=()) for s in drawn.samples]
    words = replace(drawn, samples=tuple(upright))
    files = export_tokbench(words, tmp_path / "out", images=True)
    assert [str(f.relative_to(tmp_path / "out")) for f in files] == ["annotations/text_drawn.json"]
    again = import_manifest("tokbench", tmp_path / "out")
    assert [s.words for s in again.samples] == [s.words for s in words.samples]
    assert [(s.id, s.width, s.height, s.group) for s in again.samples] == [(f"drawn/{s.id}.png", 24, 16, "drawn") for s in words.samples]
    assert [again.encoded(s) for s in again.samples] == [words.encoded(s) for s in words.samples]
    second = export_tokbench(again, tmp_path / "twice")
    assert second[0].read_bytes() == files[0].read_bytes()


def test_faces_and_tars_to_tokbench_and_back(tmp_path):
    drawn = annotated(tmp_path / "data")
    packed = tar(tmp_path / "p.tar", {f"s{i}.png": png(i) for i in range(3)})
    tarred = {s.id: s for s in Manifest.load(packed).samples}
    faces = [replace(tarred[s.id], width=24, height=16, faces=s.faces) for s in drawn.samples if s.faces]
    files = export_tokbench(Manifest("x", tmp_path, tuple(faces)), tmp_path / "out", images=True)
    assert [f.name for f in files] == ["face_meta.json"]
    again = import_manifest("tokbench", tmp_path / "out")
    assert [[replace(f, person=None) for f in s.faces] for s in faces] == [list(s.faces) for s in again.samples]
    assert [again.encoded(s) for s in again.samples] == [png(1), png(2)]


def test_what_cannot_be_tokbench_is_said(tmp_path):
    sample = annotated(tmp_path).samples[0]
    with pytest.raises(TokError, match="its size is not in the manifest"):
        export_tokbench(Manifest("x", tmp_path, (replace(sample, width=0, height=0),)), tmp_path / "out")
    with pytest.raises(TokError, match=r"another image is called a\.png"):
        export_tokbench(Manifest("x", tmp_path, (replace(sample, id="a"), replace(sample, id="a.png"))), tmp_path / "out")
    with pytest.raises(TokError, match="leads out of the folder"):
        export_tokbench(Manifest("x", tmp_path, (replace(sample, id="../../a"),)), tmp_path / "out")


# ICDAR -----------------------------------------------------------------------------------------------------------


def test_icdar_2015_and_2013(tmp_path):
    write(tmp_path / "gt_img_1.txt", "\ufeff1,2,13,2,13,8,1,8,Hello, world\r\n4,10,19,9,20,14,5,15,slant\r\n0,0,2,0,2,2,0,2,###\r\n\r\n3,3,9,3,9,6,3,6,\"q\"\n".encode())
    write(tmp_path / "gt_img_2.txt", '1, 2, 13, 8, "say \\"a, b\\" \\\\"\n5 9 15 15 "two"\n')
    write(tmp_path / "img_1.jpg", turned(1))
    write(tmp_path / "img_2.png", png())
    write(tmp_path / "img_3.png", png())
    manifest = import_manifest("icdar", tmp_path)
    one, two = manifest.samples
    assert (one.id, one.width, one.height) == ("img_1.jpg", 24, 16)
    assert one.words[0] == word((1, 2, 13, 8), "Hello, world", 24, 16)
    assert one.words[1] == word((4, 9, 20, 15), "slant", 24, 16, [(4, 10), (19, 9), (20, 14), (5, 15)])
    assert one.words[2].value == '"q"' and len(one.words) == 3
    assert [w.value for w in two.words] == ['say "a, b" \\', "two"] and two.words[1].box == (5, 9, 15, 15)
    assert set(manifest.notes) == {"illegible words, left out: 1", "images without a file of words, left out: 1 (first: img_3.png)"}
    manifest.write(tmp_path / "m.jsonl")
    assert Manifest.load(tmp_path / "m.jsonl").hash == manifest.hash


def test_orientation_is_that_of_the_image_as_shown(tmp_path):
    write(tmp_path / "gt_a.txt", "1,2,13,2,13,8,1,8,x")
    write(tmp_path / "a.jpg", turned(6))
    manifest = import_manifest("icdar", tmp_path)
    assert (manifest.samples[0].width, manifest.samples[0].height) == (16, 24) == manifest.read(manifest.samples[0]).shape[:0:-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1,2,13,2,13,8,1,8,ok\n1,2,13,2,13,8,1\n", r"gt_a\.txt: line 2: should be x1,y1"),
        (b"1,2,13,2,13,8,one,8,ok\n", "line 1: 'one' is not a number"),
        (b"1,2,13,2,13,8,nan,8,ok\n", "line 1: 'nan' is no coordinate"),
        (b"1,2,13,2,13,8,1,8,ok\n1,2,13,2,13,8,1,8,\xff\n", "line 2 is not UTF-8"),
    ],
)
def test_wrong_icdar_files(tmp_path, content, message):
    write(tmp_path / "gt_a.txt", content)
    with pytest.raises(TokError, match=r"no image a\.jpg .*--images"):
        import_manifest("icdar", tmp_path)
    write(tmp_path / "pictures" / "a.png", png())
    with pytest.raises(TokError, match=message):
        import_manifest("icdar", tmp_path, tmp_path / "pictures")


# WFLW ------------------------------------------------------------------------------------------------------------


def wflw_line(path="d/a b.png", box=(2, 2, 10, 11), shift=0.0, attributes="0 0 0 0 0 0"):
    points = [(0.1 * i + shift, 0.05 * i) for i in range(98)]
    for place, (x, y) in zip(FIVE, KPS):
        points[place] = (x + shift, y)
    numbers = [f"{v:.3f}" for xy in points for v in xy] + [str(v) for v in box]
    return " ".join([*numbers, *attributes.split(), path])


def test_wflw(tmp_path):
    write(tmp_path / "WFLW_images" / "d" / "a b.png", png())
    lines = [wflw_line(), wflw_line(shift=1.0), wflw_line("d/gone.png"), wflw_line(box=(), attributes="")]
    source = write(tmp_path / "lists" / "list_98pt_rect_attr_test.txt", "\n".join(lines) + "\n")
    manifest = import_manifest("wflw", source)
    (sample,) = manifest.samples
    assert (sample.id, sample.group, len(sample.faces)) == ("d/a b.png", "wflw", 3)
    assert sample.faces[0].kps == KPS and sample.faces[0].box == (2, 2, 10, 11) and sample.faces[0].scale == 9 / 24
    assert sample.faces[1].kps[0] == (KPS[0][0] + 1, KPS[0][1])
    assert sample.faces[2].box == pytest.approx((0, 0, 9.5, 8.0), abs=0.5)
    assert len(manifest.notes) == 1 and "d/gone.png" in manifest.notes[0]
    assert import_manifest("wflw", tmp_path).samples == manifest.samples  # the only list there


@pytest.mark.parametrize(
    ("line", "message"),
    [("1 2 3 a.png", "line 2: should be 196 coordinates.* got 4 fields"), (wflw_line().replace(" ", " x", 1), "line 2: 'x0.000' is not a number")],
)
def test_wrong_wflw_files(tmp_path, line, message):
    write(tmp_path / "d" / "a b.png", png())
    with pytest.raises(TokError, match=message):
        import_manifest("wflw", write(tmp_path / "list_98pt.txt", wflw_line() + "\n" + line))
    write(tmp_path / "list_98pt_b.txt", "")
    with pytest.raises(UsageError, match="give one list of faces by its file; there are: list_98pt.txt, list_98pt_b.txt"):
        import_manifest("wflw", tmp_path)
    with pytest.raises(TokError, match="no faces in it"):
        import_manifest("wflw", tmp_path / "list_98pt_b.txt")


# shards and folders ----------------------------------------------------------------------------------------------

SAID = {
    "width": 24, "height": 16, "source": "scenes",
    "words": [{"text": "ab", "quad": [1, 2, 13, 2, 13, 8, 1, 8], "legible": True}, {"text": "###", "quad": [0, 0, 2, 0, 2, 2, 0, 2], "legible": False}],
}  # fmt: skip


def test_shards(tmp_path):
    person = {"width": 24, "height": 16, "kps": KPS, "face_box": [2, 2, 8, 9]}
    files = {"a": SAID, "b": person, "c": {"width": 24, "height": 16, "face_box": [2, 2, 8, 9]}}
    packed = {f"{k}.{kind}": data for k, said in files.items() for kind, data in (("png", png()), ("json", json.dumps(said).encode()))}
    source = tar(tmp_path / "s-0.tar", {**packed, "d.png": png(4), "e.png": png()[:30], "e.json": json.dumps(SAID).encode()})
    manifest = import_manifest("shards", source)
    a, b, c, d, e = manifest.samples
    assert a.words == (word((1, 2, 13, 8), "ab", 24, 16),) and a.group == "scenes" and (a.width, a.height) == (24, 16)
    assert b.faces[0].kps == KPS and b.faces[0].box == (2, 2, 10, 11) and b.faces[0].scale == 9 / 24
    assert c.faces == () and d.words == () and len(e.words) == 1
    assert manifest.encoded(d) == png(4)
    assert any(n.startswith("faces with a box but without landmarks") and n.endswith(": 1") for n in manifest.notes) and any("without a JSON file, kept without annotations: 1 (first: d)" in n for n in manifest.notes)
    assert any("illegible words, left out: 2" in n for n in manifest.notes) and any("images damaged, rows with a status later: 1" in n for n in manifest.notes)
    assert import_manifest("shards", tmp_path).samples == manifest.samples


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"{", r"s\.tar: a\.json: "),
        (b"[]", "a.json: should be a JSON object"),
        ({**SAID, "width": 16, "height": 24}, "width and height are swapped"),
        ({**SAID, "words": [{"text": "x", "quad": [1, 2]}]}, "quad should be"),
        ({**SAID, "words": [{"quad": [1, 2]}]}, "'text' is missing"),
        ({**SAID, "words": ["x"]}, "a.json"),
        ({**SAID, "kps": KPS[:3], "face_box": [2, 2, 8, 9]}, "needs 5 landmarks"),
    ],
)
def test_wrong_shards(tmp_path, said, message):
    tar(tmp_path / "s.tar", {"a.png": png(), "a.json": said if isinstance(said, bytes) else json.dumps(said).encode()})
    with pytest.raises(TokError, match=message):
        import_manifest("shards", tmp_path / "s.tar")


def test_folders(tmp_path):
    write(tmp_path / "set" / "x" / "a.png", png())
    write(tmp_path / "set" / "b.png", png()[:20])
    manifest = import_manifest("folder", tmp_path / "set")
    assert [(s.id, s.width, s.height, s.group) for s in manifest.samples] == [("b.png", 0, 0, ""), ("x/a.png", 24, 16, "x")]
    assert len(manifest.notes) == 1 and manifest.notes[0].startswith("images damaged, rows with a status later: 1")


def test_wrong_asks(tmp_path):
    for kind, source, images, error, message in (
        ("coco", tmp_path, None, UsageError, "'coco' are not known; there are tokbench, icdar"),
        ("icdar", tmp_path / "none", None, TokError, "no such file or folder of annotations"),
        ("icdar", tmp_path, tmp_path / "none", TokError, "no such folder of images"),
        ("icdar", tmp_path, None, TokError, "no gt_<image>.txt there"),
        ("shards", tmp_path, None, TokError, "no .tar shards there"),
        ("shards", tmp_path, tmp_path, UsageError, "hold their images themselves"),
    ):
        with pytest.raises(error, match=message):
            import_manifest(kind, source, images)
