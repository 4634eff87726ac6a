"""Labels, captions and boxes of every layout, and what is wrong with them."""

import json

import pytest
import torch

from tests.data.files import encoded, folder, shard
from tok1d.data.facts import Facts, class_names, of_row, read_classes, read_facts
from tok1d.data.index import index_images
from tok1d.data.module import PhotoData
from tok1d.data.photos import Photos
from tok1d.errors import ImageError, TokError, UsageError

QUAD = [1, 2, 9, 2, 9, 6, 1, 6]


def batch_of(paths, **options):
    photos = Photos(index_images(paths), 16, **options)
    return photos.__getitems__(list(range(len(photos))))


def test_class_folders(tmp_path):
    files = list(encoded(4).values())
    path = folder(tmp_path, {"dog/a.png": files[0], "cat/b.png": files[1], "cat/a.png": files[2], "emu/a.png": files[3]})
    samples = index_images([path])
    assert class_names(samples) == ["cat", "dog", "emu"]
    batch = batch_of([path])
    assert batch["key"] == ["cat/a.png", "cat/b.png", "dog/a.png", "emu/a.png"] and batch["label"].tolist() == [0, 0, 1, 2]
    assert batch["label"].dtype == torch.int64 and "text" not in batch and "word_quads" not in batch
    assert batch_of([path], classes=["emu", "dog", "cat"])["label"].tolist() == [2, 2, 1, 0]
    with pytest.raises(UsageError, match="does not hold 'emu'"):
        Photos(samples, 16, classes=["cat", "dog"])


@pytest.mark.parametrize("names", [["a.png", "x/b.png"], ["x/a.png", "x/b.png"], ["x/a.png", "y/z/b.png"]])
def test_folders_that_are_no_classes(tmp_path, names):
    path = folder(tmp_path, dict(zip(names, encoded(2).values())))
    assert "label" not in batch_of([path]) and class_names(index_images([path])) == []


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_imagefolder(tmp_path, suffix):
    path = folder(tmp_path, {f"train/{name}": data for name, data in encoded(3).items()})
    rows = [{"file_name": "001.png", "text": "ein Hügel, grün", "label": 4}, {"file_name": "000.png", "text": "a, b", "label": 0}]
    if suffix == "csv":
        text = 'file_name,text,label\n001.png,"ein Hügel, grün",4\n000.png,"a, b",0\n'
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "train" / f"metadata.{suffix}").write_text(text, "utf-8")
    batch = batch_of([path])
    assert batch["label"].tolist() == [0, 4, -1] and batch["text"] == ["a, b", "ein Hügel, grün", ""]


def test_labels_by_name_in_metadata(tmp_path):
    path = folder(tmp_path, encoded(3))
    (path / "metadata.csv").write_text("file_name,label\n000.png,zebra\n001.png,ant\n002.png,ant\n")
    assert batch_of([path])["label"].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("{}", "row 1 should name an image"),
        ('{"file_name": "gone.png"}', "row 1 .* got gone.png"),
        ("[1]", "row 1"),
        ("{", "row 1 cannot be read"),
        ('{"file_name": "000.png", "words": [{"quad": [1], "text": "a"}]}', "4 corners"),
        ('{"file_name": "000.png", "captions": [1]}', "texts"),
    ],
)
def test_wrong_metadata(tmp_path, text, wrong):
    path = folder(tmp_path, encoded(1))
    (path / "metadata.jsonl").write_text(text)
    with pytest.raises(TokError, match=rf"metadata.jsonl.*{wrong}"):
        index_images([path])


def test_shards_with_json(tmp_path):
    words = [{"text": "Hi", "quad": QUAD, "legible": True}, {"text": "###", "quad": QUAD, "legible": False}]
    face = [[3, 4], [8, 4], [6, 6], [4, 9], [7, 9]]
    rows = {"000": {"label": 3, "captions": ["one", "two"], "words": words}, "002": {"label": -1, "class_name": None, "face_points": [face, face]}}
    path = shard(tmp_path / "s.tar", encoded(3), rows)
    batch = batch_of([path])
    assert batch["label"].tolist() == [3, -1, -1] and batch["text"] == ["one", "", ""]
    assert batch["word_text"] == ["Hi"] and batch["word_image"].tolist() == [0] and batch["word_quads"].shape == (1, 4, 2)
    assert batch["face_image"].tolist() == [2, 2] and batch["face_points"].shape == (2, 5, 2)
    random = Photos(index_images([path]), 16, (0.9, 1.0))
    assert {random[0, draw]["text"] for draw in range(20)} == {"one", "two"} and random[0, 3]["text"] == random[0, 3]["text"]


def test_shards_with_numbers_and_captions(tmp_path):
    path = shard(tmp_path / "s.tar", encoded(2) | {"000.cls": b"17\n", "001.cls": b"0"})
    samples = index_images([path])
    assert [read_facts(s) for s in samples] == [Facts(17, texts=("a picture",)), Facts(0, texts=("a picture",))]


def test_damaged_notes_make_a_broken_sample(tmp_path):
    path = shard(tmp_path / "s.tar", encoded(4) | {"001.json": b"{", "002.cls": b"cat", "003.json": b'{"words": 3}'}, rows={"000": {"label": 1}})
    photos = Photos(index_images([path]), 16)
    assert photos.__getitems__([0, 1, 2, 3])["key"] == ["000"] and photos.broken.tolist() == [False, True, True, True]


def test_names_inside_shards_need_numbers(tmp_path):
    path = shard(tmp_path / "s.tar", encoded(2), {"000": {"label": "cat"}, "001": {"class_name": "dog"}})
    with pytest.raises(UsageError, match="data.classes .*'cat'.* without numbers"):
        Photos(index_images([path]), 16)
    assert batch_of([path], classes=["dog", "cat"])["label"].tolist() == [1, 0]


def test_manifest_with_words_and_faces(tmp_path):
    folder(tmp_path, encoded(2))
    face = {"kps": [[3, 4], [8, 4], [6, 6], [4, 9], [7, 9]], "scale": 0.5}
    word = {"box": [1, 2, 9, 6], "value": "Hi"}
    rows = [{"manifest": 1, "name": "m"}, {"id": "x", "path": "000.png", "width": 24, "height": 24, "words": [word], "faces": [face]}, {"id": "y", "path": "001.png"}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    x, y = index_images([tmp_path / "m.jsonl"])
    assert read_facts(x).words == ((tuple(map(float, QUAD)), "Hi"),) and len(read_facts(x).faces) == 1 and y.facts == Facts()
    batch = batch_of([tmp_path / "m.jsonl"])
    assert batch["key"] == ["x", "y"] and batch["word_text"] == ["Hi"] and batch["face_image"].tolist() == [0]
    (tmp_path / "001.png").unlink()
    with pytest.raises(ImageError, match="y should be at"):
        index_images([tmp_path / "m.jsonl"])


def test_keys_are_unique(tmp_path):
    files = encoded(2)
    a, b = folder(tmp_path / "a", files), shard(tmp_path / "b.tar", files)
    c = folder(tmp_path / "c", files)
    keys = [s.key for s in index_images([a, b, c, c])]
    assert len(set(keys)) == 8 and keys[:6] == ["000.png", "001.png", "000", "001", "000.png/000.png", "001.png/001.png"]


def test_rows():
    assert of_row({"label": "7"}) == Facts(7) and of_row({"label": "", "caption": "c"}) == Facts(texts=("c",))
    assert of_row({"label": 2, "class_name": "x"}) == Facts(2) and of_row({"class_name": "x"}) == Facts(name="x")
    for wrong in ([], {"label": [1]}, {"class_name": 3}, {"words": [{}]}, {"words": ["a"]}, {"face_points": [[1, 2]]}):
        with pytest.raises((ValueError, TypeError)):
            of_row(wrong)


def test_class_lists(tmp_path):
    (tmp_path / "c.json").write_text('["b", "a"]')
    assert read_classes(str(tmp_path / "c.json")) == ["b", "a"] and read_classes(["x"]) == ["x"] and read_classes(None) is None
    for wrong in (str(tmp_path / "none.json"), ["a", "a"], [1]):
        with pytest.raises(UsageError, match="classes"):
            read_classes(wrong)
    with pytest.raises(UsageError, match="data.view is one of crop"):
        PhotoData(["x"], view="zoom")
