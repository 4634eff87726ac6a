import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch

from tests.eval.drawn import KPS, annotated, jsonl, png, tar
from tok1d.errors import ImageError, TokError, UsageError
from tok1d.eval.manifest import Manifest, Sample, landmarks, of_images, word

ROW = {"id": "a", "path": "a.png", "width": 24, "height": 16}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_files_hold_what_was_written(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    manifest = annotated(tmp_path / "data")
    manifest.write(tmp_path / f"list{suffix}")
    again = Manifest.load(tmp_path / f"list{suffix}")
    assert (again.name, again.version, again.licence, again.notes) == ("drawn", "2", "CC0", ("1 word is left out",))
    assert [replace(s, path="") for s in again.samples] == [replace(s, path="") for s in manifest.samples]
    assert [s.path for s in again.samples] == [f"data/images/{i}.png" for i in range(3)]
    assert again.hash == manifest.hash
    assert all(torch.equal(again.read(a), manifest.read(b)) for a, b in zip(again.samples, manifest.samples))


def test_characters_of_all_kinds_survive(tmp_path):
    odd = "\u2028 \x85 \" \\ £ 語 \x1c"
    sample = Sample("bad\udcff name", "a.png", 24, 16, words=(word((0, 0, 5, 5), odd, 24, 16),))
    manifest = Manifest("x", tmp_path, (sample,))
    for name in ("a.jsonl", "a.parquet") if _has_pyarrow() else ("a.jsonl",):
        manifest.write(tmp_path / name)
        assert Manifest.load(tmp_path / name).samples == (sample,) and Manifest.load(tmp_path / name).hash == manifest.hash


def _has_pyarrow() -> bool:
    import importlib.util

    return importlib.util.find_spec("pyarrow") is not None


def test_the_hash_names_the_data_and_not_their_place(tmp_path):
    manifest = annotated(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    moved = replace(manifest, base=tmp_path / "there", name="other", notes=())
    assert moved.hash == manifest.hash
    first = manifest.samples[0]
    for other in (replace(first, width=25), replace(first, id="z"), replace(first, words=()), replace(first, sha256="00")):
        assert Manifest("x", tmp_path, (other, *manifest.samples[1:])).hash != manifest.hash
    assert replace(manifest, samples=manifest.samples[::-1]).hash == manifest.hash
    loose, packed = tmp_path / "loose", tmp_path / "packed.tar"
    loose.mkdir()
    (loose / "a.png").write_bytes(png())
    found = of_images([tar(packed, {"a.png": png()})], "x").samples[0]
    alone = of_images([loose], "x").samples[0]
    assert Manifest("x", tmp_path, (replace(found, id="a.png"),)).hash == Manifest("x", tmp_path, (alone,)).hash


def test_images_of_folders_and_tars(tmp_path):
    (tmp_path / "set" / "deep").mkdir(parents=True)
    (tmp_path / "set" / "deep" / "a.png").write_bytes(png(1))
    (tmp_path / "set" / "b.png").write_bytes(png(2))
    tar(tmp_path / "set" / "s0.tar", {"a.png": png(3), "a.json": b"{}", "b.png": png(4)})
    tar(tmp_path / "s1.tar", {"a.png": png(5)})
    manifest = of_images([tmp_path / "set", tmp_path / "s1.tar"], "mixed")
    assert {s.id: s.group for s in manifest.samples} == {"a": "s0", "b": "s0", "b.png": "", "deep/a.png": "deep", "s1.tar/a": "s1"}
    wanted = {"a": 3, "b": 4, "b.png": 2, "deep/a.png": 1, "s1.tar/a": 5}
    assert {s.id: manifest.encoded(s) for s in manifest.samples} == {k: png(v) for k, v in wanted.items()}
    manifest.write(tmp_path / "m.jsonl")
    again = Manifest.load(tmp_path / "m.jsonl")
    assert all(again.encoded(s) == png(wanted[s.id]) for s in again.samples) and again.samples[0].path == "set/s0.tar"
    assert Manifest.load(tmp_path / "s1.tar").read(Sample("x", str(tmp_path / "s1.tar"), offset=512, size=len(png(5)))).shape == (3, 16, 24)


def test_twice_the_same_id(tmp_path):
    samples = annotated(tmp_path).samples
    with pytest.raises(TokError, match="'s1' appears twice"):
        Manifest("x", tmp_path, (*samples, samples[1]))
    with pytest.raises(TokError, match=r"m\.jsonl: line 4: the id 'a' appears in 2 already"):
        Manifest.load(jsonl(tmp_path / "m.jsonl", ROW, "", ROW))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 3 is not JSON"),
        ("[1]", "line 3 is not a JSON object"),
        ({"id": "b"}, "line 3 is not a sample: path is missing"),
        ({"id": 5, "path": "b"}, "id should be text, got 5"),
        ({**ROW, "id": "b", "wdth": 3}, "unknown fields wdth; there are id, path"),
        ({**ROW, "id": "b", "width": -1}, "width should be a whole number"),
        ({**ROW, "id": "b", "height": 0}, "both width and height or neither"),
        ({**ROW, "id": "b", "words": {}}, "words should be a list"),
        ({**ROW, "id": "b", "words": [3]}, r"words\[0\] should be a JSON object"),
        ({**ROW, "id": "b", "words": [{"value": "x"}]}, r"words\[0\]\.box should be \[x0, y0, x1, y1\], got None"),
        ({**ROW, "id": "b", "words": [{"box": [1, 2, 3, 4]}]}, r"words\[0\] has no value"),
        ({**ROW, "id": "b", "words": [{"box": [1, 2, 3, 4], "text": "x"}]}, r"words\[0\] has unknown fields text"),
        ({**ROW, "id": "b", "words": [{"box": [1, 2, "3", 4], "value": "x"}]}, "finite number, got 3"),
        ({**ROW, "id": "b", "words": [{"box": [1, 2, float("nan"), 4], "value": "x"}]}, "finite number, got nan"),
        ({**ROW, "id": "b", "words": [{"box": [1, 2, 10**400, 4], "value": "x"}]}, "finite number"),
        ({"id": "b", "path": "b", "words": [{"box": [1, 2, 3, 4], "value": "x"}]}, "has no scale"),
        ({**ROW, "id": "b", "faces": [{"kps": KPS[:4], "scale": 0.1}]}, "needs 5 landmarks .* got 4"),
        ({**ROW, "id": "b", "faces": [{"kps": KPS}]}, r"faces\[0\] has no scale"),
        ({**ROW, "id": "b", "faces": [{"kps": KPS, "scale": -0.1}]}, "at least 0"),
        ({**ROW, "id": "b", "faces": [{"box": [0, 0, 5, 5]}]}, "tok eval annotate"),
        ({**ROW, "id": "b", "tags": "x"}, "tags should be a list"),
    ],
)
def test_bad_rows_are_named_by_their_line(tmp_path, row, message):
    with pytest.raises(TokError, match=message) as caught:
        Manifest.load(jsonl(tmp_path / "m.jsonl", ROW, row))
    assert "line 3" in str(caught.value)


def test_bad_files(tmp_path):
    for content, message in ((b"", "empty"), (b"\xff\xfe", "cannot be read"), (b'{"id": "a"}\n', "not a manifest of version 1"), (b'{"manifest": 2}\n', "version 1")):
        (tmp_path / "m.jsonl").write_bytes(content)
        with pytest.raises(TokError, match=message):
            Manifest.load(tmp_path / "m.jsonl")
    with pytest.raises(TokError, match="cannot be read"):
        Manifest.load(tmp_path / "nowhere.jsonl")
    with pytest.raises(UsageError, match=r"\.jsonl or \.parquet"):
        annotated(tmp_path).write(tmp_path / "m.csv")


def test_bad_parquet(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "m.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(TokError, match="not a manifest in Parquet"):
        Manifest.load(tmp_path / "m.parquet")
    parquet.write_table(pa.table({"row": ["{}"]}), tmp_path / "m.parquet")
    with pytest.raises(TokError, match="not a manifest in Parquet"):
        Manifest.load(tmp_path / "m.parquet")
    head = {"tok1d": json.dumps({"manifest": 1})}
    parquet.write_table(pa.table({"row": [json.dumps(ROW), '{"id": "b"}']}).replace_schema_metadata(head), tmp_path / "m.parquet")
    with pytest.raises(TokError, match="row 2 is not a sample: path is missing"):
        Manifest.load(tmp_path / "m.parquet")


def test_scales_follow_from_boxes(tmp_path):
    row = {**ROW, "words": [{"box": [1, 2, 13, 8], "value": "four"}], "faces": [{"kps": KPS, "box": [2, 2, 8, 11]}]}
    sample = Manifest.load(jsonl(tmp_path / "m.jsonl", row)).samples[0]
    assert sample.words[0].scale == 12 / 4 / 24 == word((1, 2, 13, 8), "four", 24, 16).scale
    assert sample.faces[0].scale == 9 / 24
    assert torch.equal(landmarks(sample.faces), torch.tensor([KPS])) and landmarks(()).shape == (0, 5, 2)


def test_an_image_must_be_the_one_that_was_annotated(tmp_path):
    manifest = annotated(tmp_path)
    sample = manifest.samples[0]
    right = hashlib.sha256(manifest.encoded(sample)).hexdigest()
    assert manifest.read(replace(sample, sha256=right)).shape == (3, 16, 24)
    with pytest.raises(ImageError, match="s0 is another file"):
        manifest.read(replace(sample, sha256=right[::-1]))
    with pytest.raises(ImageError, match=r"s0 is 24×16 .* says 24×17"):
        manifest.read(replace(sample, height=17))
    with pytest.raises(ImageError, match="width and height are swapped"):
        manifest.read(replace(sample, width=16, height=24))
    with pytest.raises(ImageError, match="No such file"):
        manifest.read(replace(sample, path="images/none.png"))
    (tmp_path / "images" / "0.png").write_bytes(png()[:50])
    with pytest.raises(ImageError, match="s0: .*damaged"):
        manifest.read(sample)


def test_a_choice_is_spread_evenly(tmp_path):
    manifest = Manifest("x", tmp_path, tuple(Sample(f"{i:02d}", "p") for i in range(10)))
    assert [s.id for s in manifest.choose(4).samples] == ["00", "02", "05", "07"]
    assert manifest.choose(None) is manifest and manifest.choose(10) is manifest and len(manifest.choose(1)) == 1
    assert manifest.choose(4).hash != manifest.hash
