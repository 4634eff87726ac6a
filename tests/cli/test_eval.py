"""tok eval: what it prints, how it exits, which files it leaves."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.dct_model import picture
from tests.eval.drawn import annotated, jsonl, png, tar
from tests.eval.test_run import Colours
from tok1d.eval import protocol
from tok1d.eval.manifest import Manifest
from tok1d.eval.ocr import FunctionRecogniser

TINY = protocol.Protocol("tiny-v1", 16, "crop", "bicubic", "model", "text-v1-256", "face-v2-256", "tests")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    from tok1d.eval import choose

    monkeypatch.setitem(protocol.PROTOCOLS, "tiny-v1", TINY)
    monkeypatch.setattr(choose, "feature_net", lambda name, nets: Colours())


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        pixels = (picture(i, 20, 26)[0].permute(1, 2, 0) * 255).round().to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def measured(tok, model, photos, tmp_path):
    """``measured("run", …)``: on the photos with pixels and codes, into tmp/out."""

    def run(*args, out="out", measures="pixels,codes"):
        flags = next((i for i, a in enumerate(args) if str(a).startswith("-")), len(args))
        return tok("eval", *args[:flags], photos, *args[flags:], "--protocol", "tiny-v1", "--measures", measures, "-o", tmp_path / out)

    return run


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_a_model_is_measured(measured, model, tmp_path):
    done = measured("run", model, "--tokens", "1,8,32")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "dct on photos (5 images), tiny-v1" and lines[-1] == str(tmp_path / "out" / "summary.json")
    assert lines[1].split() == ["rate", "ok", "file_bytes", "bytes", "psnr", "ssim"]
    assert [line.split()[:2] for line in lines[2:5]] == [["k1", "5/5"], ["k8", "5/5"], ["k32", "5/5"]]
    held = summary_of(tmp_path / "out")
    assert held["conditions"]["protocol"]["id"] == "tiny-v1" and [r["metrics"]["bytes"]["mean"] for r in held["rates"]] == [1, 8, 32]
    assert held["rates"][2]["measures"]["codes"]["tokens"] == 160
    psnr = [float(line.split()[4]) for line in lines[2:5]]
    assert psnr == sorted(psnr) and psnr[2] == pytest.approx(held["rates"][2]["metrics"]["psnr"]["mean"], rel=1e-3)


def test_without_a_verb_it_is_run(measured, model, tmp_path):
    assert measured(model, "--tokens", "2").code == 0
    assert [r["rate"] for r in summary_of(tmp_path / "out")["rates"]] == ["k2"]


def test_json_and_quiet(measured, model, tmp_path):
    done = measured("run", model, "--tokens", "4", "--json")
    (row,) = done.rows
    assert done.code == 0 and row["output"] == str(tmp_path / "out") and row["rates"] == summary_of(tmp_path / "out")["rates"] and row["skipped"] == {}
    quiet = measured("run", model, "--tokens", "4", "-q", out="quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_another_run_in_the_folder(measured, model, tmp_path):
    assert measured("run", model, "--tokens", "4").code == 0
    assert measured("run", model, "--tokens", "4").code == 0  # the same again
    other = measured("run", model, "--tokens", "5")
    assert other.code == 2 and "holds another run" in other.err and "--restart" in other.err and "Traceback" not in other.err
    assert measured("run", model, "--tokens", "5", "--restart").code == 0
    assert [r["rate"] for r in summary_of(tmp_path / "out")["rates"]] == ["k5"]


def test_an_image_that_cannot_be_read_is_counted(measured, model, photos, tmp_path):
    (photos / "3.png").write_bytes(b"damaged")
    done = measured("run", model, "--tokens", "4")
    assert done.code == 0 and "4/5" in done.out and summary_of(tmp_path / "out")["rates"][0]["metrics"]["psnr"]["n"] == 4
    for path in photos.iterdir():
        path.write_bytes(b"damaged")
    none = measured("run", model, "--tokens", "4", out="none")
    assert none.code == 1 and "0/5" in none.out


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["MODEL", "--tokens", "99"], 2, "--tokens 99: dct makes 1 to 32 tokens"),
        (["MODEL", "--tokens", "0"], 2, "at least 1"),
        (["MODEL", "--protocol", "recon256"], 2, "unknown protocol 'recon256'; there are recon256-v1"),
        (["MODEL", "--protocol", "recon256-v1", "--measures", "pixels"], 2, "works at 16×16 pixels, this protocol's views are 256×256"),
        (["MODEL", "--measures", "pixels,psnr"], 2, "unknown measures psnr; there are pixels"),
        (["MODEL", "--measures", "text"], 2, "has no words annotated"),
        (["MODEL", "--measures", "faces"], 2, "has no faces annotated"),
        (["nowhere"], 1, "nowhere"),
        (["MODEL", "--tokns", "4"], 2, "did you mean --tokens"),
    ],
)
def test_wrong_asks_are_one_line(tok, model, photos, tmp_path, args, code, message):
    given = [model if a == "MODEL" else a for a in args]
    more = [] if "--protocol" in args else ["--protocol", "tiny-v1"]
    done = tok("eval", "run", given[0], photos, *given[1:], *more, "-o", tmp_path / "out")
    assert done.code == code and message in done.err and len(done.err.strip().splitlines()) <= 2 and "internal" not in done.err and not done.out


def test_wrong_data(tok, model, photos, tmp_path):
    for data, message in (([tmp_path / "none"], "no such file or folder"), ([jsonl(tmp_path / "m.jsonl", {"id": 3})], "m.jsonl: line 2 is not a sample")):
        done = tok("eval", "run", model, *data, "--protocol", "tiny-v1", "-o", tmp_path / "out")
        assert done.code == 1 and message in done.err
    both = tok("eval", "run", model, tmp_path / "m.jsonl", photos, "--protocol", "tiny-v1", "-o", tmp_path / "out")
    assert both.code == 2 and "give one manifest, or images only" in both.err


def test_codecs_and_resizes(measured, tmp_path):
    done = measured("codec", "jpeg", "resize", "--qualities", "10,90", "--sides", "4,16")
    assert done.code == 0, done.err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"jpeg-4", "jpeg", "resize"}  # 16 is the whole view
    assert [r["rate"] for r in summary_of(tmp_path / "out" / "jpeg")["rates"]] == ["q10", "q90"]
    resize = summary_of(tmp_path / "out" / "resize")["rates"]
    assert resize[1]["metrics"]["psnr"]["mean"] == 100 and resize[0]["metrics"]["psnr"]["mean"] < 40
    assert measured("codec", "webp", "--qualities", "50", out="webp").code == 0
    assert summary_of(tmp_path / "webp")["rates"][0]["metrics"]["file_bytes"]["mean"] > 20


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["jpeg"], "give codecs"),
        (["bpg", "x"], "give codecs"),
        (["x", "--codecs", "bpg,jpeg"], "unknown codecs bpg; there are jpeg, webp, avif, jxl, jpg, jpegxl, resize"),
        (["--codecs", "jpeg"], "required"),
        (["jpeg", "x", "--qualities", "5", "--budgets", "9"], "exclude each other"),
        (["jpeg", "x", "--qualities", "abc"], "integer"),
        (["jpeg", "x", "--sides", "8", "--downscale", "2"], "exclude each other"),
        (["jpeg", "x", "--budgets", "99", "--downscale", "2"], "a budget searches the size"),
        (["jpeg", "x", "--qualties", "5"], "did you mean --qualities"),
    ],
)
def test_wrong_codecs(tok, args, message):
    done = tok("eval", "codec", *args)
    assert done.code == 2 and message in done.err


@pytest.mark.parametrize(
    "args",
    [["DATA", "--codecs", "jpeg,resize"], ["--codecs", "jpeg,resize", "DATA"], ["jpeg", "resize", "DATA"], ["jpg", "resize", "DATA", "jpeg"], ["jpeg", "--quiet", "resize", "DATA"]],
)
def test_codecs_and_data_in_any_order(tok, photos, tmp_path, args):
    given = [photos if a == "DATA" else a for a in args]
    done = tok("eval", "codec", "--qualities", "20", *given, "--protocol", "tiny-v1", "--measures", "pixels", "-o", tmp_path / "out", "--downscale", "2")
    assert done.code == 0, done.err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"jpeg-8", "resize"}
    assert summary_of(tmp_path / "out" / "resize")["rates"][0]["rate"] == "s8"


def test_data_that_is_named_as_a_codec(tok, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos.rename(tmp_path / "webp")
    rest = ["--protocol", "tiny-v1", "--measures", "pixels", "--qualities", "20", "-q", "-o", tmp_path / "out"]
    done = tok("eval", "codec", "jpeg", "webp", *rest)
    assert done.code == 2 and "webp is a codec and lies here as data; write ./webp" in done.err
    assert tok("eval", "codec", "jpeg", "./webp", *rest).code == 0
    assert tok("eval", "codec", "webp", "--codecs", "jpeg", *rest).code == 0  # the same run again
    assert summary_of(tmp_path / "out")["conditions"]["data"]["images"] == 5


def test_the_jpeg_xl_of_the_plugin(measured, tmp_path):
    pytest.importorskip("pillow_jxl")
    assert measured("codec", "jpegxl", "--qualities", "10,90", measures="pixels").code == 0
    held = summary_of(tmp_path / "out")
    low, high = (r["metrics"] for r in held["rates"])
    assert held["conditions"]["system"]["name"] == "jxl" and 0 < low["file_bytes"]["mean"] < high["file_bytes"]["mean"] and low["psnr"]["mean"] < high["psnr"]["mean"]


def test_without_the_plugin_it_says_so(tok, photos, monkeypatch):
    from tok1d.eval import codecs

    monkeypatch.setattr(codecs.importlib.util, "find_spec", lambda name: None)
    done = tok("eval", "codec", "jpegxl", photos)
    assert done.code == 2 and "codec jxl: no JPEG XL plugin" in done.err and "pillow-jxl-plugin" in done.err


def test_pictures_made_elsewhere_are_scored(measured, photos, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    for path in photos.iterdir():
        image = Image.open(path).crop((3, 0, 23, 20)).resize((16, 16), Image.Resampling.BICUBIC)
        image.save(made / (path.stem + (".jpg" if path.stem == "2" else ".png")))
    (made / "4.png").unlink()
    (tmp_path / "bytes.json").write_text(json.dumps({f"{i}.png": 10 + i for i in range(5)}))
    done = measured("score", made, "--bytes", tmp_path / "bytes.json", measures="pixels")
    assert "1 file in" in done.err and "are lossy" in done.err and "4/5" in done.out and done.code == 0
    row = summary_of(tmp_path / "out")["rates"][0]
    assert row["failed"] == {"missing reconstruction": 1} and row["metrics"]["bytes"]["mean"] == 11.5 and row["metrics"]["psnr"]["mean"] > 20
    assert measured("score", tmp_path / "none").code == 2


def test_two_runs_are_compared(measured, tok, model, tmp_path):
    measured("run", model, "--tokens", "2,4,8,16", out="a")
    measured("codec", "resize", "--sides", "2,4,8,12", out="b", measures="pixels,codes")
    measured("run", model, "--tokens", "2,4,8,16", out="c")
    same = tok("eval", "compare", tmp_path / "a", tmp_path / "c")
    assert same.code == 0 and "k16 and k16" in same.out and "+0 (+0 to +0), larger on 0% of 5" in same.out and "+0.0 %" in same.out
    (found,) = tok("eval", "compare", tmp_path / "a", tmp_path / "c", "--json").rows
    assert [p["a"] for p in found["pairs"]] == ["k2", "k4", "k8", "k16"] and found["pairs"][0]["differences"]["psnr"]["mean"] == 0
    apart = tok("eval", "compare", tmp_path / "a", tmp_path / "b")
    assert apart.code == 2 and "no rates in common (k2, k4, k8, k16; s2, s4, s8, s12); try --match bytes" in apart.err
    by_bytes = tok("eval", "compare", tmp_path / "a", tmp_path / "b", "--match", "bytes")
    assert by_bytes.code == 0 and "k16 and s4" in by_bytes.out and "not comparable" in by_bytes.out
    measured("run", model, "--tokens", "2,4", out="d", measures="pixels")
    part = tok("eval", "compare", tmp_path / "a", tmp_path / "d")
    assert part.code == 0 and f"only {tmp_path / 'a'} measured codes" in part.err and "k4 and k4" in part.out
    alone = tok("eval", "compare", tmp_path / "a", (tmp_path / "c" / "summary.json").rename(tmp_path / "c.json"))
    assert alone.code == 0 and "no rows beside it" in alone.err and alone.out.startswith("\nBD-rate") and "+0.0 %" in alone.out
    measured("run", model, "--tokens", "2,4", "--images", "3", out="e")
    refused = tok("eval", "compare", tmp_path / "a", tmp_path / "e")
    assert refused.code == 2 and "measured differently" in refused.err and "data.images: 5 ≠ 3" in refused.err
    none = tok("eval", "compare", tmp_path / "a", tmp_path)
    assert none.code == 1 and "no summary there" in none.err


def test_reference_statistics(tok, measured, model, photos, tmp_path):
    made = tok("eval", "stats", photos, "--protocol", "tiny-v1", "-o", tmp_path / "reference")
    assert made.code == 0 and Path(made.out.strip()).is_file()
    again = tok("eval", "stats", photos, "--protocol", "tiny-v1", "-o", tmp_path / "reference")
    assert again.out == made.out and len(list((tmp_path / "reference").iterdir())) == 1
    plain = measured("run", model, "--tokens", "4", measures="features", out="plain")
    cached = measured("run", model, "--tokens", "4", "--reference", made.out.strip(), measures="features", out="cached")
    assert plain.code == cached.code == 0 and "fd_colours" in plain.out
    rows = [summary_of(tmp_path / name)["rates"][0]["measures"]["features/colours"] for name in ("plain", "cached")]
    assert rows[0]["fd_colours"] == pytest.approx(rows[1]["fd_colours"], rel=1e-6) and rows[1]["real_images"] == 5
    other = tok("eval", "run", model, photos, "--protocol", "fit256-v1", "--reference", made.out.strip(), "--measures", "features", "-o", tmp_path / "other")
    assert other.code == 2 and "view.size: 16 ≠ 256" in other.err
    (photos / "1.png").write_bytes(b"damaged")
    broken = tok("eval", "stats", photos, "--protocol", "tiny-v1", "-o", tmp_path / "new")
    # The name of the cache is that of the data, which a damaged file does not change; a new folder needs every image.
    assert broken.code == 1 and "reference statistics need every image" in broken.err


def test_words_in_a_run(tok, model, tmp_path, monkeypatch):
    from tok1d.eval import ocr

    monkeypatch.setattr(ocr, "EasyOCR", lambda weights, device: FunctionRecogniser(lambda crop: "wörd0", "always", None))
    annotated(tmp_path / "data").write(tmp_path / "m.jsonl")
    done = tok("eval", "run", model, tmp_path / "m.jsonl", "--protocol", "tiny-v1", "--measures", "text,pixels", "--tokens", "4", "-o", tmp_path / "out")
    # Three words of "wörd0", "wörd1", "wörd2", and two slanted ones that the crop cuts off or that are misread.
    assert done.code == 0 and "T-ACC" in done.out
    text = summary_of(tmp_path / "out")["rates"][0]["measures"]["text"]
    assert text["words"] == 5 and sum(text["statuses"].values()) == 5


def test_import(tok, tmp_path):
    said = {"width": 24, "height": 16, "words": [{"text": "ab", "quad": [1, 2, 13, 2, 13, 8, 1, 8]}, {"text": "###", "quad": [0] * 8, "legible": False}]}
    tar(tmp_path / "s.tar", {"a.png": png(), "a.json": json.dumps(said).encode()})
    done = tok("eval", "import", "shards", tmp_path / "s.tar", "-o", tmp_path / "m.jsonl")
    manifest = Manifest.load(tmp_path / "m.jsonl")
    assert done.code == 0 and done.out == f"{tmp_path / 'm.jsonl'}: 1 image, 1 word, 0 faces, hash {manifest.hash}\n"
    assert done.err == "tok: illegible words, left out: 1\n" and manifest.notes == ("illegible words, left out: 1",)
    quiet = tok("eval", "import", "shards", tmp_path / "s.tar", "-o", tmp_path / "m.jsonl", "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    for args, code, message in (
        (("wflw", tmp_path, "-o", tmp_path / "x.jsonl"), 2, "give one list of faces"),
        (("icdar", tmp_path / "none", "-o", tmp_path / "x.jsonl"), 1, "no such file or folder of annotations"),
        (("coco", tmp_path, "-o", tmp_path / "x.jsonl"), 2, "'coco' is not one of tokbench"),
        (("shards", tmp_path / "s.tar", "-o", tmp_path / "x.csv"), 2, "written as .jsonl or .parquet"),
        (("shards", tmp_path / "s.tar", "-o", tmp_path / "none" / "x.jsonl"), 1, "cannot be written"),
    ):
        wrong = tok("eval", "import", *args)
        assert wrong.code == code and message in wrong.err and not wrong.out, args
    assert not (tmp_path / "x.jsonl").exists() and not (tmp_path / "x.csv").exists()


def test_kinds_of_annotations_are_those_of_the_importers():
    from tok1d.cli.evaluate import SETS
    from tok1d.eval.importers import KINDS

    assert tuple(KINDS) == SETS


def test_export(tok, tmp_path):
    annotated(tmp_path / "data").write(tmp_path / "m.jsonl")
    done = tok("eval", "export", tmp_path / "m.jsonl", "-o", tmp_path / "out", "--copy")
    assert done.code == 0 and done.out.splitlines() == [str(tmp_path / "out" / "annotations" / f"{n}.json") for n in ("face_meta", "text_drawn")]
    again = tok("eval", "import", "tokbench", tmp_path / "out", "-o", tmp_path / "again.jsonl")
    made = Manifest.load(tmp_path / "again.jsonl")
    assert again.code == 0 and [len(s.words) for s in made.samples] == [1, 2, 2, 0, 0] and [len(s.faces) for s in made.samples] == [0, 0, 0, 1, 1]
    assert tok("eval", "export", tmp_path / "data" / "images", "-o", tmp_path / "x").code == 1


def test_synthetic_sets(tok, model, tmp_path):
    done = tok("eval", "synthetic", "faces", tmp_path / "set", "--count", "2", "--size", "64", "--seed", "3")
    assert done.code == 0 and done.out == f"{tmp_path / 'set' / 'manifest.jsonl'}: 2 images\n"
    assert len(Manifest.load(tmp_path / "set" / "manifest.jsonl")) == 2
    other = tok("eval", "synthetic", "text", tmp_path / "set", "--count", "2", "--size", "64")
    assert other.code == 2 and "holds another set" in other.err
    assert tok("eval", "synthetic", "text", tmp_path / "small", "--size", "8").code == 2
    run = tok("eval", "run", model, tmp_path / "set" / "manifest.jsonl", "--protocol", "tiny-v1", "--measures", "pixels", "--tokens", "4", "-o", tmp_path / "out")
    assert run.code == 0 and "dct on drawn-faces-64 (2 images), tiny-v1" in run.out


def test_words_that_are_read_right_are_kept(tok, tmp_path, monkeypatch):
    from tok1d.eval import ocr

    monkeypatch.setattr(ocr, "EasyOCR", lambda weights, device: FunctionRecogniser(lambda crop: "wörd1", "always"))
    annotated(tmp_path / "data").write(tmp_path / "m.jsonl")
    done = tok("eval", "annotate", "refine", tmp_path / "m.jsonl", "-o", tmp_path / "refined.jsonl")
    kept = Manifest.load(tmp_path / "refined.jsonl")
    assert done.code == 0 and "misread" in done.err and [w.value for s in kept.samples for w in s.words] == ["wörd1"]
    assert "always" in kept.version
    wrong = tok("eval", "annotate", "words", tmp_path / "m.jsonl", "-o", tmp_path / "x.jsonl")
    assert wrong.code == 2 and not wrong.out
