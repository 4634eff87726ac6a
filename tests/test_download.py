"""Downloads by the real client of huggingface_hub from a hub on this machine: what is fetched, checked, resumed, refused; licences."""

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

import tok1d
from tests.dct_model import save_model
from tests.fake_hub import Hub, serve
from tests.golden.read import read
from tests.published import publish
from tok1d import hub, licences
from tok1d.errors import ModelError, UsageError
from tok1d.licences import LicenceNotice
from tok1d.presets import PRESETS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def online(monkeypatch, tmp_path):
    """The real client of huggingface_hub against a hub on this machine, with an empty cache and small chunks."""
    from huggingface_hub import constants

    with serve(Hub()) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_our_own_models_on_the_hub(folder, online):
    online.files["owner/some-model"] = {**contents(folder), "README.md": b"# card", "pytorch_model.bin": b"?", "x.png": b"?"}
    model = tok1d.load("owner/some-model", revision="v1")
    assert model.name == "dct" and model.model_id == tok1d.load(folder).model_id
    assert sorted(online.fetched()) == ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]


def test_published_models_on_the_hub(online, tmp_path):
    publish("titok_vq", tmp_path / "p", config={})
    publish("titok_vq", tmp_path / "q", "pytorch_model.bin")
    online.files["a/safetensors"] = {**contents(tmp_path / "p"), "pytorch_model.bin": b"?", "training.log": b"?"}
    online.files["b/pickle"] = contents(tmp_path / "q")
    online.files["c/loose"] = {"some.bin": contents(tmp_path / "q")["pytorch_model.bin"], "x.txt": b"?"}
    wanted = tok1d.load(tmp_path / "p").model_id
    for source, name, files in (
        ("a/safetensors", "safetensors", ["config.json", "model.safetensors"]),
        ("b/pickle", "pickle", ["pytorch_model.bin"]),
        ("c/loose", "loose", ["some.bin"]),
        ("c/loose:some.bin", "some", []),  # it is in the cache already
    ):
        online.log.clear()
        model = tok1d.load(source)
        assert (model.model_id, model.name) == (wanted, name) and sorted(online.fetched()) == files


def test_files_of_a_repository_with_several_models(online, tmp_path):
    publish("titok_vq", tmp_path, "x.bin")
    blob = contents(tmp_path)["x.bin"]
    online.files["a/many"] = {"one.bin": blob, "two.bin": blob}
    with pytest.raises(ModelError, match=r"a/many on the hub holds several models: give one file, of a/many:one\.bin, a/many:two\.bin"):
        tok1d.load("a/many")
    assert tok1d.load("a/many:two.bin").name == "two" and online.fetched() == ["two.bin"]
    with pytest.raises(ModelError, match=r"fun-research/TiTok holds several models: give one, of .*maskgit-vqgan.*tokenizer_titok_l32\.bin"):
        tok1d.load("fun-research/TiTok")
    online.files["a/none"] = {"README.md": b"x"}
    with pytest.raises(ModelError, match="a/none: it holds no weights"):
        tok1d.load("a/none")
    with pytest.raises(ModelError, match=r"a/many:three\.bin: there is no file three\.bin on the hub"):
        tok1d.load("a/many:three.bin")


def test_sharded_models_on_the_hub(online):
    from safetensors.torch import save

    state = read("titok_vq").state
    keys = sorted(state)
    index = {"weight_map": {k: f"model-{i % 2}.safetensors" for i, k in enumerate(keys)}}
    shards = {f"model-{i}.safetensors": save({k: state[k] for k in keys[i::2]}) for i in range(2)}
    online.files["a/shards"] = {"model.safetensors.index.json": json.dumps(index).encode(), **shards}
    assert tok1d.load("a/shards").max_tokens == 8
    del online.files["a/shards"]["model-1.safetensors"]
    online.files["a/less"] = online.files["a/shards"]
    with pytest.raises(ModelError, match=r"there is no file model-1\.safetensors, which model\.safetensors\.index\.json names"):
        tok1d.load("a/less")


def test_a_broken_download_goes_on_where_it_stopped(online, tmp_path):
    publish("titok_vq", tmp_path)
    online.files["a/b"] = contents(tmp_path)
    online.cut["model.safetensors"] = 700_000
    assert tok1d.load("a/b").max_tokens == 8
    asked = [entry[3] for entry in online.log if entry[0] == "GET" and entry[2] == "model.safetensors"]
    assert len(asked) == 2 and asked[0] is None and int(asked[1].removeprefix("bytes=").partition("-")[0]) > 600_000


def test_contents_are_compared_with_what_the_hub_announced(online, tmp_path):
    publish("titok_vq", tmp_path)
    online.files["a/b"] = contents(tmp_path)
    online.spoil.add("model.safetensors")
    with pytest.raises(ModelError, match=r"a/b: model\.safetensors came with SHA-256 .*, expected .*it was removed"):
        tok1d.load("a/b")
    online.spoil.clear()
    assert tok1d.load("a/b").max_tokens == 8  # nothing of the spoilt file is left


def test_rows_of_the_table_pin_revision_and_contents(online, tmp_path, monkeypatch):
    publish("titok_vq", tmp_path)
    blob = contents(tmp_path)["model.safetensors"]
    online.files["a/b"] = {"model.safetensors": blob}
    row = replace(next(p for p in PRESETS if p.name == "titok-bl-64-vq8k"), where="hub:a/b", revision="v1")
    monkeypatch.setattr(hub, "PRESETS", (replace(row, sha256=hashlib.sha256(blob).hexdigest()),))
    assert tok1d.load("titok-bl-64-vq8k").name == tok1d.load("a/b").name == "titok-bl-64-vq8k"
    asked = {revision for _, repo, _, _, revision in online.log if repo == "a/b"}
    assert asked == {"v1"}
    monkeypatch.setattr(hub, "PRESETS", (replace(row, sha256="0" * 64),))
    assert tok1d.load("a/b", revision="main").max_tokens == 8  # the pin says nothing about other revisions
    with pytest.raises(ModelError, match="expected 0000000000000000…"):
        tok1d.load("titok-bl-64-vq8k")  # although it is in the cache


def test_what_was_fetched_works_offline(online, tmp_path, monkeypatch):
    from huggingface_hub import constants

    publish("titok_vq", tmp_path)
    online.files["a/b"] = contents(tmp_path)
    with pytest.raises(ModelError, match="hub cannot be reached"):
        hub.find("a/b", cached=True)
    assert not online.log
    model = tok1d.load("a/b")
    online.log.clear()
    assert hub.find("a/b", cached=True).path.is_dir() and not online.log
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert tok1d.load("a/b").model_id == model.model_id
    with pytest.raises(ModelError, match=r"a/c: not a local folder and the hub cannot be reached.*Offline, only models fetched before"):
        tok1d.load("a/c")
    assert not online.log


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("owner/none", "the hub has no such repository, or it is private"),
        ("owner/name@v9", "the hub has no revision 'v9' of it"),
        ("owner/gated", r"gated\. Accept its conditions at https://huggingface\.co/owner/gated, then: hf auth login"),
    ],
)
def test_hub_trouble_is_one_line(online, source, message):
    online.files |= {"owner/name": {}, "owner/gated": {"model.safetensors": b"?"}}
    online.gated.add("owner/gated")
    with pytest.raises(ModelError, match=message) as caught:
        tok1d.load(source)
    assert "\n" not in str(caught.value)


def test_two_revisions_are_refused():
    with pytest.raises(UsageError, match=r"names revision v1, and revision=v2 was given"):
        tok1d.load("a/b@v1", revision="v2")


# licences --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    """Nothing was accepted or announced yet."""
    monkeypatch.setattr(licences, "_announced", set())
    monkeypatch.delenv(licences.VARIABLE, raising=False)


@pytest.mark.parametrize("source", ["flextok-d12-d12", "EPFL-VILAB/flextok_d18_d28_dfn", "amd/Instella-T2I", "amd/Instella-T2I:diffusion.pt"])
def test_research_weights_need_a_yes_before_anything_is_asked(online, fresh, source):
    with pytest.raises(ModelError, match=r"licensed for research only \((apple-amlr|RAIL-MS), https://huggingface\.co/.*accept_license=True"):
        tok1d.load(source)
    assert not online.log


@pytest.mark.parametrize("listed", ["", "flextok-d12-d12", "x, EPFL-VILAB/flextok_d12_d12_in1k", "apple-amlr"])
def test_a_yes_and_the_notice_once(online, fresh, listed, monkeypatch):
    online.files["EPFL-VILAB/flextok_d12_d12_in1k"] = {"model.safetensors": b"?", "config.json": b"{}"}
    monkeypatch.setenv(licences.VARIABLE, listed)
    with pytest.warns(LicenceNotice, match=r"^flextok-d12-d12: .* research only \(apple-amlr") as said:
        for _ in range(2):
            found = hub.find("flextok-d12-d12", accept_license=not listed)
    assert [w.category for w in said].count(LicenceNotice) == 1
    assert found.name == "flextok-d12-d12" and found.preset.research_only and not found.ours


def test_a_training_starts_from_research_weights_after_a_yes_in_the_environment(online, fresh, tmp_path, monkeypatch):
    """There is no argument for it, and the message names none."""
    pytest.importorskip("lightning", reason="training needs lightning (tok1d[train])")
    from tok1d.training.tasks import FlowTask, HaltingTask

    publish("flextok", tmp_path / "p", config={"scaling_factor": 0.6, "max_timestep": 1.0})
    online.files["EPFL-VILAB/flextok_d12_d12_in1k"] = contents(tmp_path / "p")
    with pytest.warns(LicenceNotice, match="if these weights come from the published ones"):
        there = tok1d.load(tmp_path / "p")
    here = type(there).from_config(there.to_config())
    said = r"cannot be loaded: flextok-d12-d12: .*research only \(apple-amlr.*accept its terms: the environment variable TOK1D_ACCEPT_LICENSE=flextok-d12-d12$"
    with pytest.raises(ModelError, match=f"^init_from flextok-d12-d12: {said}"):
        FlowTask(here, init_from="flextok-d12-d12")
    with pytest.raises(ModelError, match=f"^tokenizer flextok-d12-d12: {said}"):
        HaltingTask("flextok-d12-d12")
    assert not online.log
    monkeypatch.setenv(licences.VARIABLE, "flextok-d12-d12")
    licences._announced.clear()
    with pytest.warns(LicenceNotice, match="^flextok-d12-d12: "):
        task = FlowTask(here, init_from="flextok-d12-d12")
    assert all(v.equal(there.state_dict()[k]) for k, v in task.tokenizer.state_dict().items())


def test_only_the_tokenizer_of_instella_is_fetched(online, fresh):
    files = {"config.json": b"{}", "diffusion.pt": b"?", "ar.pt": b"?", "bae/model.safetensors": b"?" * 50}
    online.files["amd/Instella-T2I"] = files
    with pytest.warns(LicenceNotice):
        found = hub.find("amd/Instella-T2I", accept_license=True)
    assert found.name == "instella-bae" and found.path.read_bytes() == files["bae/model.safetensors"]
    assert online.fetched() == ["bae/model.safetensors"]
