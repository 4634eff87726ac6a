"""Loading by name, folder and hub id; everything that can be wrong with it in one helpful line."""

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tok1d
from tests.dct_model import picture, save_model
from tests.fake_hub import Hub, serve
from tests.golden.read import read
from tests.published import publish
from tok1d import hub, licences
from tok1d.errors import ModelError, UsageError
from tok1d.licences import LicenceNotice
from tok1d.presets import PRESETS, Preset
from tok1d.sources import HubName, hub_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("hub") / "model")


def test_load_from_a_folder(folder):
    for given in (folder, str(folder), str(folder) + os.sep):
        model = tok1d.load(given)
        assert not model.training and model.name == "dct" and model.device.type == "cpu"
    seq = model.encode(picture())
    assert torch.equal(model.encode(picture()).ids, tok1d.load(folder).encode(picture()).ids)
    assert model.decode(seq).shape == (1, 3, 16, 16)


def test_dtype_leaves_the_quantizer_alone(folder):
    model = tok1d.load(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.model_id == tok1d.load(folder).model_id
    assert all(p.dtype == torch.float32 for p in model.quantizer.parameters())
    assert model.decode(model.encode(picture())).dtype == torch.float32


def test_shipped_models_are_found_inside_the_package(folder, monkeypatch):
    monkeypatch.setattr(hub, "_shipped", lambda name: folder)
    assert tok1d.load("default").name == "dct"


def test_unknown_names_get_a_guess():
    with pytest.raises(ModelError, match=r"did you mean 'default'.*tok models"):
        tok1d.load("defualt")
    with pytest.raises(ModelError, match=r"no model, folder or file 'zzz'.*owner/name"):
        tok1d.load("zzz")
    with pytest.raises(ModelError, match="did you mean 'titok-l-32'"):
        tok1d.load("titok_l32")
    for missing in ("weights/model.safetensors", "x.bin"):
        with pytest.raises(ModelError, match="no such file"):
            tok1d.load(missing)
    with pytest.raises(ModelError, match="no model, folder or file 'owner/name'"):
        tok1d.load(Path("owner/name"))  # a path is never looked for on the hub


def test_hub_names():
    assert hub_name("a/b") == HubName("a/b") and str(HubName("a/b", "v1", "x/y.bin")) == "a/b:x/y.bin"
    assert hub_name("a/b@refs/pr/1:x/y.bin") == HubName("a/b", "refs/pr/1", "x/y.bin")
    for none in ("a", "a/b/c", "a/b.bin", "/a/b", "a/b:", "a/b:/etc/x", "a/b:../x.bin", "a b/c", "~/a/b"):
        assert hub_name(none) is None, none


def test_incomplete_folders_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json and .*safetensors missing"):
        tok1d.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is not a file of tensors that can be read safely"):
        tok1d.load(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ModelError, match=r"x\.txt is not a file of weights"):
        tok1d.load(tmp_path / "x.txt")


def test_damaged_folders_are_refused(folder, tmp_path):
    for name, content in (("config.json", b"{"), ("diffusion_pytorch_model.safetensors", b"\x08" + bytes(20))):
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match="cannot be loaded"):
            tok1d.load(tmp_path)


# the hub ---------------------------------------------------------------------------------------------------------


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


def test_files_at_hand_get_the_notice_only(fresh, tmp_path):
    publish("flextok", tmp_path, config={"scaling_factor": 0.6, "max_timestep": 1.0})
    with pytest.warns(LicenceNotice, match="if these weights come from the published ones: flextok-d12-d12") as said:
        assert tok1d.load(tmp_path).max_tokens == 16
    assert said[0].filename == __file__


def test_only_the_tokenizer_of_instella_is_fetched(online, fresh):
    files = {"config.json": b"{}", "diffusion.pt": b"?", "ar.pt": b"?", "bae/model.safetensors": b"?" * 50}
    online.files["amd/Instella-T2I"] = files
    with pytest.warns(LicenceNotice):
        found = hub.find("amd/Instella-T2I", accept_license=True)
    assert found.name == "instella-bae" and found.path.read_bytes() == files["bae/model.safetensors"]
    assert online.fetched() == ["bae/model.safetensors"]


def test_the_real_client_offline_fails_at_once_and_helps(tmp_path):
    code = "from tok1d import hub\ntry: hub.resolve('owner/name')\nexcept hub.ModelError as e: print(e)"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert "owner/name: not a local folder and the hub cannot be reached" in done.stdout, done.stderr
    assert "tok models" in done.stdout and done.stdout.count("\n") == 1


def test_resolving_names_imports_neither_torch_nor_the_hub_client(folder):
    code = (
        "import sys\nfrom tok1d import hub\n"
        f"hub.resolve({str(folder)!r}); hub.list_models()\n"
        "print(sorted(m for m in ('torch', 'huggingface_hub', 'PIL', 'numpy') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_list_models_filters():
    assert tok1d.list_models() == list(PRESETS)
    assert [p.name for p in tok1d.list_models("nested")] == [p.name for p in PRESETS if p.nested]
    assert [p.name for p in tok1d.list_models("fixed")] == [p.name for p in PRESETS if not p.nested]
    assert "default" in [p.name for p in tok1d.list_models("photo")]
    assert tok1d.list_models("no such word") == []
    for word, wanted in (("continuous", "continuous"), ("research", "research_only")):
        assert tok1d.list_models(word) == [p for p in PRESETS if getattr(p, wanted)] != []
    assert len(tok1d.list_models("free")) + len(tok1d.list_models("research")) == len(PRESETS)
    assert [p.name for p in tok1d.list_models("one-d-piece")] == ["one-d-piece-s-256", "one-d-piece-b-256", "one-d-piece-l-256"]


@pytest.mark.parametrize("preset", [p for p in PRESETS if p.where == "package"], ids=lambda p: p.name)
def test_the_table_agrees_with_the_shipped_files(preset: Preset):
    from tok1d.cli.models import describe

    found = describe(hub.resolve(preset.name))
    config = found["config"]
    assert config["_class_name"] == "Tokenizer1D" and tuple(config["image_size"]) == preset.image_size
    assert config["encoder"]["tokens"] == preset.tokens
    model = tok1d.load(preset.name)
    assert (model.max_tokens, model.bits_per_token, model.is_nested) == (preset.tokens, preset.bits_per_token, preset.nested)
    assert found["parameters"] == preset.parameters
    assert preset.bits_per_token <= 16 and found["weight_bytes"] <= 40_000_000
    json.dumps(config)
