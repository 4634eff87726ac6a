"""``tok export``: the folder, its card, scores, what is refused."""

import json

import pytest
import torch

import tok1d
from tests.training import tiny
from tok1d.errors import ModelError, UsageError
from tok1d.tokenizers.folder import WEIGHTS_NAME
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.export import export, load_run
from tok1d.training.tasks import ReconstructionTask

SCORES = {
    "protocol": {"id": "view32-v1", "view": "centre crop 32 x 32"},
    "sets": [
        {
            "set": "drawn", "images": 2, "of": 5,
            "curve": [{"tokens": 4, "bits": 36, "file_bytes": 41, "psnr": {"mean": 12.345}, "lpips": {"mean": 0.5}}],
        }
    ],
    "notes": ["Measured on drawings."],
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.Setup(tmp_path_factory.mktemp("run"), ReconstructionTask(tiny.fsq(), weights={"l2": 2.0}), steps=3).run().last


def test_folder_and_card(run, tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    export(run, tmp_path / "out", name="small", scores=tmp_path / "scores.json")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "config.json", WEIGHTS_NAME]
    card = (tmp_path / "out/README.md").read_text()
    model = tok1d.load(tmp_path / "out")
    assert model.name == "small" and card.startswith("# small\n")
    for words in (
        "any number of tokens from 1 to 4 of 9 bits (vocabulary 512); at most 36 bits, 5 bytes an image",
        "TiTokEncoder × FSQ × GridDecoder × TailDrop", "stored as float32", "| Steps | 3 of 4 images |", "| Images seen | 12 |",
        "10, crops of 16 × 16", "2 l2", "learning rate 0.0001", "CPU, ", "Protocol view32-v1: centre crop 32 x 32.",
        "### drawn (2 images of 5)", "| 4 | 36 | 41 | 12.35 | 0.500 |", "Measured on drawings.",
    ):  # fmt: skip
        assert words in card, words
    assert str(tmp_path) not in card and "None" not in card


def test_the_snippet_of_the_card_runs(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export(run, tmp_path / "out")
    tok1d.write("photo.jpg", torch.rand(3, 20, 30))
    snippet = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(snippet.replace("FOLDER", "out").replace("tokens=4", "tokens=2"), {})
    assert tok1d.read("again.png").shape == (1, 3, 20, 30)


def test_half_precision(run, tmp_path):
    export(run, tmp_path / "full")
    export(run, tmp_path / "half", dtype="float16")
    sizes = [(tmp_path / kind / WEIGHTS_NAME).stat().st_size for kind in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0] and "stored as float16" in (tmp_path / "half/README.md").read_text()
    a, b = (tok1d.load(tmp_path / kind) for kind in ("full", "half"))
    image = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(a.decode(a.encode(image)), b.decode(b.encode(image)), atol=0.02, rtol=0)
    export(tmp_path / "full", tmp_path / "again", dtype="float16")  # a model folder is a source too
    assert tok1d.load(tmp_path / "again").model_id == b.model_id
    assert "## Training" not in (tmp_path / "again/README.md").read_text()


def test_nothing_is_overwritten_unasked(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("mine")
    with pytest.raises(UsageError, match=r"holds README\.md already; use -f"):
        export(run, tmp_path / "out")
    assert (tmp_path / "out/README.md").read_text() == "mine"
    export(run, tmp_path / "out", overwrite=True)
    assert tok1d.load(tmp_path / "out").name == "tiny"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer_config": None}, "was not written by 'tok fit'"),
        ({"state_dict": [1]}, "was not written by 'tok fit'"),
        ({"global_step": "3"}, "was not written by 'tok fit'"),
        ({"tokenizer_config": {"_class_name": "os.system"}}, "does not describe a Tokenizer1D"),
        ({"state_dict": {"tokenizer.x": torch.zeros(1)}}, "weights do not fit"),
    ],
)
def test_foreign_checkpoints(run, tmp_path, change, said):
    checkpoint = torch.load(run, weights_only=True) | change
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(ModelError, match=said):
        load_run(tmp_path / "x.ckpt")


def test_weights_that_are_no_numbers_or_too_large(run, tmp_path):
    checkpoint = torch.load(run, weights_only=True)
    weight = checkpoint["state_dict"]["tokenizer.encoder.proj.weight"]
    weight[0, 0] = 1e6
    torch.save(checkpoint, tmp_path / "large.ckpt")
    with pytest.raises(ModelError, match=r"encoder\.proj\.weight does not fit into float16.*--dtype float32"):
        export(tmp_path / "large.ckpt", tmp_path / "out", dtype="float16")
    weight[0, 0] = torch.nan
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    with pytest.raises(ModelError, match=r"encoder\.proj\.weight and 0 more hold NaN"):
        export(tmp_path / "nan.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sources_that_are_none(tmp_path):
    for name, said in (("", "holds no checkpoint"), ("nowhere", "does not exist")):
        with pytest.raises(ModelError, match=said):
            load_run(tmp_path / name)


@pytest.mark.parametrize("text", ["{", "[]", '{"protocol": {}}', '{"protocol": {"id": 1}, "sets": [{"set": 1}]}'])
def test_scores_of_another_form(run, tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(UsageError, match="--scores"):
        export(run, tmp_path / "out", scores=tmp_path / "scores.json")
    assert not (tmp_path / "out").exists()


def test_cards_of_other_kinds():
    from tok1d.training.card import Run, model_card

    fixed = Tokenizer1D(tiny.fsq().encoder, tiny.fsq().quantizer, tiny.fsq().decoder, image_size=(16, 16), name="fixed")
    assert "4 tokens of 9 bits" in model_card(Run(fixed), "float32", {}) and "tokens=" not in model_card(Run(fixed), "float32", {})
    assert "4 latents of width 4" in model_card(Run(tiny.kl()), "float32", {})
