"""``tok generate``: files that agree with the library, resumption, growth, refusals."""

import json
from pathlib import Path

import pytest
import torch

import tok1d
from tests.cli.conftest import Result
from tests.dct_model import make_model, save_model
from tests.generators.tiny import awake
from tok1d.generators.ar import AutoregressiveGenerator
from tok1d.generators.condition import ClassCondition, Unconditional
from tok1d.generators.space import TokenSpace
from tok1d.image_io import read_uint8

CLASSES = ["cat", "dog", "7"]


def generator(folder: Path, tokenizer, condition=None, **options) -> Path:
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 1, "heads": 2, **options}
    awake(AutoregressiveGenerator(TokenSpace.of(tokenizer), condition or ClassCondition(3, CLASSES), **sizes)).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return generator(tmp_path_factory.mktemp("generators") / "g", make_model())


@pytest.fixture
def make(tok, folder, model, tmp_path):
    """``make("--class", 1, …)`` into tmp_path/out."""

    def run(*args, to="out", which=folder, tokenizer=model) -> Result:
        return tok("generate", which, *(("--tokenizer", tokenizer) if tokenizer else ()), "-o", tmp_path / to, *args)

    return run


def record(tmp_path, to="out") -> dict:
    return json.loads((tmp_path / to / "samples.json").read_text())


def test_files_are_what_the_library_makes(make, folder, tmp_path):
    done = make("--class", "dog", "--class", 0, "-n", 3, "--seed", 5, "--tokens", 20, "--guidance", 3, "--schedule", "linear", "--temperature", 0.9, "--top-k", 100)
    assert done.code == 0 and "6 images of 20 tokens made" in done.out, done.err
    model, tokenizer = AutoregressiveGenerator.from_pretrained(folder), make_model()
    options = {"guidance": 3.0, "schedule": "linear", "temperature": 0.9, "top_k": 100}
    seq = model.generate(3, label="dog", tokens=20, seeds=5, **options)
    for i, picture in enumerate(tokenizer.decode(seq)):
        name = tmp_path / f"out/0001-{5 + i:05d}"
        assert torch.equal(read_uint8(name.with_suffix(".png"))[0], picture.mul(255).round().to(torch.uint8))
        stored = tok1d.TokenSequence.load(name.with_suffix(".tok"))
        assert torch.equal(stored.ids[0], seq.ids[i]) and stored.model_id == tokenizer.model_id and stored.nested
    held = record(tmp_path)
    assert held["settings"] == {
        "generator": {"class": "AutoregressiveGenerator", "model_id": f"{model.model_id:016x}"}, "kind": "ids", "tokens": 20,
        "tokenizer": {"name": "dct", "model_id": f"{tokenizer.model_id:016x}"}, "options": options, "decoder": {},
    }  # fmt: skip
    assert [row["file"] for row in held["images"]] == [f"000{c}-0000{s}.png" for c in (0, 1) for s in (5, 6, 7)]
    size = (tmp_path / "out/0001-00006.tok").stat().st_size
    assert held["images"][4] == {"file": "0001-00006.png", "seed": 6, "label": 1, "class": "dog", "tokens": 20, "bytes": size}
    assert held["runs"][0]["images"] == 6 and held["runs"][0]["images_per_second"] > 0 and held["runs"][0]["torch"] == torch.__version__
    sheet = read_uint8(tmp_path / "out/sheet.png")
    assert 128 < sheet.shape[2] < 2 * 128 and 6 * 128 < sheet.shape[3] < 8 * 128, "two classes of three in one row"


def test_a_folder_grows_and_keeps_what_it_has(make, tmp_path):
    assert make("--class", "all", "-n", 2, "--tokens", 8).code == 0
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "out").glob("0*")}
    assert len(before) == 12
    (tmp_path / "out/0001-00001.png").unlink()
    (tmp_path / "out/0002-00001.tok").unlink()
    grown = make("--class", "all", "-n", 3, "--tokens", 8, "--batch-size", 2, "--json")
    assert grown.code == 0 and "4 samples of 9 are there already" in grown.err and {r["file"] for r in grown.rows} == {
        "0001-00001.png", "0002-00001.png", "0000-00002.png", "0001-00002.png", "0002-00002.png"
    }  # fmt: skip
    for name, (at, data) in before.items():
        path = tmp_path / "out" / name
        assert path.read_bytes() == data, "the same in any batch"
        assert (path.stat().st_mtime_ns == at) == (name[:10] not in ("0001-00001", "0002-00001"))
    assert len(record(tmp_path)["images"]) == 9 and [run["images"] for run in record(tmp_path)["runs"]] == [6, 5]
    again = make("--class", 1, "-n", 3, "--tokens", 8)
    assert again.code == 0 and "0 images" in again.out and len(record(tmp_path)["runs"]) == 2


def test_other_settings_need_force(make, tmp_path):
    assert make("--class", 1, "-n", 1, "--tokens", 4).code == 0
    other = make("--class", 1, "-n", 1, "--tokens", 4, "--temperature", 0.5)
    assert other.code == 2 and "options {} ≠ {'temperature': 0.5}" in other.err and record(tmp_path)["settings"]["options"] == {}
    assert make("--class", 1, "-n", 1, "--tokens", 4, "--temperature", 0.5, "-f").code == 0 and record(tmp_path)["settings"]["options"] == {"temperature": 0.5}
    (tmp_path / "out/samples.json").unlink()
    foreign = make("--class", 1, "-n", 1)
    assert foreign.code == 2 and "holds 0001-00000.png, and no samples.json" in foreign.err
    (tmp_path / "out/samples.json").write_text('{"format": "tok1d.samples/1", "settings": {}, "runs": [], "images": [{}]}')
    assert "cannot be read as the record of tok generate" in make("--class", 1, "-n", 1).err


def test_an_interrupted_run_goes_on(make, tmp_path, monkeypatch):
    """It ends between the two files of a sample; what it leaves becomes what an undisturbed run makes."""
    from tok1d.generators import samples

    to_bytes, calls = samples.to_bytes, []

    def interrupted(picture, suffix):
        calls.append(suffix)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return to_bytes(picture, suffix)

    with monkeypatch.context() as patch:
        patch.setattr(samples, "to_bytes", interrupted)
        assert make("--class", "all", "-n", 2, "--tokens", 4).code == 130
    there = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("0*")}
    assert len(there) == 7 and not (tmp_path / "out/sheet.png").exists() and record(tmp_path)["images"] == []
    for to in ("out", "whole"):
        assert make("--class", "all", "-n", 2, "--tokens", 4, to=to).code == 0
    files = [{p.name: p.read_bytes() for p in (tmp_path / to).iterdir() if p.suffix in (".png", ".tok")} for to in ("out", "whole")]
    assert files[0] == files[1] and len(files[0]) == 13
    assert record(tmp_path)["images"] == record(tmp_path, "whole")["images"]
    kept = [name for name, at in there.items() if (tmp_path / "out" / name).stat().st_mtime_ns == at]
    assert len(kept) == 6


def test_unconditional_and_announced(make, tmp_path):
    plain = generator(tmp_path / "u", make_model(), Unconditional(), variable="announced")
    done = make("-n", 2, "--tokens", 3, "--option", "announce=8", which=plain)
    assert done.code == 0 and sorted(p.name for p in (tmp_path / "out").glob("*.tok")) == ["00000.tok", "00001.tok"], done.err
    assert record(tmp_path)["settings"]["options"] == {"announce": 8} and record(tmp_path)["images"][1]["tokens"] == 3
    assert make("--class", 0, which=plain, to="no").code == 1


def test_prompts(make, tmp_path, monkeypatch):
    from tok1d.generators.text import TextCondition

    class Letters(TextCondition):
        """Reads letters; no encoder needed."""

        __module__, __qualname__ = "tok1d.generators.text", "Letters"

        def _pieces(self, texts, cut):
            return [[ord(c) for c in text][: self.length if cut else None] for text in texts]

        def encode(self, texts):
            mask = torch.tensor([[i < len(t) for i in range(self.length)] for t in texts])
            codes = torch.tensor([[float(ord(c)) for c in t.ljust(self.length)] for t in texts])
            return (codes[..., None] * torch.arange(1, self.dim + 1)).sin() * 5, mask

    monkeypatch.setattr("tok1d.generators.text.Letters", Letters, raising=False)
    folder = generator(tmp_path / "t", make_model(), Letters("letters", dim=4, length=6))
    done = make("--prompt", "a cat", "--prompt", "a dog", "-n", 2, "--tokens", 16, which=folder)
    assert done.code == 0, done.err
    rows = record(tmp_path)["images"]
    assert sorted({row["text"] for row in rows}) == ["a cat", "a dog"] and len({row["file"] for row in rows}) == 4
    assert (tmp_path / "out" / rows[0]["file"]).read_bytes() != (tmp_path / "out" / rows[2]["file"]).read_bytes()
    long = make("--prompt", "much too long", which=folder, to="no")
    assert long.code == 1 and "has 13 pieces, this generator reads 6 at most" in long.err


def test_latents_of_a_flow_become_tokens_and_pictures(make, tmp_path):
    from tok1d.generators.flow import FlowGenerator

    torch.manual_seed(0)
    flow = awake(FlowGenerator(TokenSpace.of(make_model(), "latents"), ClassCondition(3, CLASSES), width=16, depth=1, heads=2)).eval()
    flow.save_pretrained(tmp_path / "flow")
    done = make("--class", "dog", "-n", 2, "--tokens", 8, "--steps", 3, "--seed", 4, which=tmp_path / "flow")
    assert done.code == 0, done.err
    made = flow.generate(2, label="dog", tokens=8, steps=3, seeds=4)
    assert torch.equal(tok1d.TokenSequence.load(tmp_path / "out/0001-00005.tok").ids, made.tokens(make_model()).ids[1:])
    picture = made.images(make_model())[1].mul(255).round().to(torch.uint8)
    assert torch.equal(read_uint8(tmp_path / "out/0001-00005.png")[0], picture) and record(tmp_path)["settings"]["kind"] == "latents"


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--class", 3), 1, "classes are 0 to 2 .-1: none in particular., got 3"),
        (("--class", "cow"), 1, "no class is called 'cow'; the classes are cat, dog, 7"),
        ((), 1, "needs a class: label=0..2"),
        (("--prompt", "a cat"), 1, "takes one of 3 classes, not a text"),
        (("--class", 0, "--tokens", 33), 1, "rows of 1 to 32 tokens, got tokens=33"),
        (("--class", 0, "--steps", 4), 2, "AutoregressiveGenerator has no option steps; its options: guidance"),
        (("--class", 0, "--option", "guidance=4"), 2, "--option guidance: it has a flag of its own"),
        (("--class", 0, "--option", "x"), 2, "NAME=VALUE is needed, got 'x'"),
        (("--class", 0, "--decoder", "steps=4"), 1, "steps"),
        (("--class", 0, "--temperature", -1), 1, "temperature"),
        (("--class", 0, "--schedule", "cubic", "--guidance", 2), 1, "cubic"),
        (("--class", 0, "-n", 0), 2, "at least 1"),
    ],
)  # fmt: skip
def test_wrong_requests_are_one_line(make, tmp_path, args, code, said):
    import re

    done = make(*args)
    assert done.code == code and re.search(said, done.err) and len(done.err.splitlines()) <= 2, done.err
    assert not list((tmp_path / "out").glob("*.png"))


def test_the_tokenizer_must_be_the_one_it_was_trained_for(make, folder, fixed_model, tmp_path, tok):
    unknown = make("--class", 0, tokenizer=None)
    assert unknown.code == 1 and "trained for the tokenizer 'dct', which is not found by its name" in unknown.err and "give --tokenizer" in unknown.err
    other = make_model()
    with torch.no_grad():
        next(other.decoder.parameters()).mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    hashes = make("--class", 0, tokenizer=tmp_path / "other")
    assert hashes.code == 1 and "same form, other weights" in hashes.err and not (tmp_path / "out").exists()
    assert make("--class", 0, tokenizer="nowhere").code == 1
    turned = make("--class", 0, which=fixed_model, tokenizer=None)
    assert turned.code == 1 and "is a tokenizer, which encodes and decodes" in turned.err
    assert "no generator, folder or file 'nowhere'" in make("--class", 0, which="nowhere").err
    (tmp_path / "file").write_text("")
    assert tok("generate", folder, "-o", tmp_path / "file").code == 2


def test_the_stored_name_finds_the_shipped_tokenizer(make, tmp_path):
    """The tiny model stands for the shipped one here."""
    shipped = make_model()
    shipped.name = "default"
    done = make("--class", 1, "-n", 1, "--tokens", 2, which=generator(tmp_path / "g", shipped), tokenizer=None)
    assert done.code == 0 and record(tmp_path)["settings"]["tokenizer"]["name"] == "dct", done.err


def test_models_are_saved_as_the_tests_think(tmp_path):
    assert save_model(tmp_path / "m").is_dir() and make_model().model_id == tok1d.load(tmp_path / "m").model_id
