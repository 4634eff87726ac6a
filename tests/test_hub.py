"""Loading by name, folder and hub id; everything that can be wrong with it in one helpful line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tok1d
from tests.dct_model import picture, save_model
from tok1d import hub
from tok1d.errors import ModelError
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


def test_a_loaded_model_is_saved_as_it_was_stored_and_keeps_its_id(tmp_path):
    """The shipped weights are float16; written as float32 they would be another model, and its generators would refuse it."""
    model = tok1d.load("default")
    model.save_pretrained(tmp_path / "same")
    names = ("diffusion_pytorch_model.safetensors", "halting.safetensors")
    assert all((tmp_path / "same" / n).stat().st_size <= 1.01 * (hub.resolve("default") / n).stat().st_size for n in names)
    assert tok1d.load(tmp_path / "same").model_id == model.model_id
    with torch.no_grad():
        next(model.decoder.parameters()).mul_(1.0001)
    model.save_pretrained(tmp_path / "other")
    again = tok1d.load(tmp_path / "other")
    assert again.model_id != model.model_id and torch.equal(next(again.decoder.parameters()), next(model.decoder.parameters()))
