"""Every recipe of configs/: its header, its architecture beside the published one, its printed configuration and a step of it."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.data.files import encoded, folder, shard
from tests.training import recipes
from tok1d.cli.main import main
from tok1d.presets import PRESETS
from tok1d.tokenizers.official import config_of
from tok1d.tokenizers.tokenizer import Tokenizer1D

pytest.importorskip("lightning")
ROOT = Path(__file__).parents[2]
PUBLISHED = {p.name.replace("-", "_"): p for p in PRESETS if p.layout != "tok1d"}
TRAINING = {"clustering", "noise", "mode_scale", "stratified", "null_prob"}  # what inference does not read


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Stand-ins for teachers, and photos with captions in a folder and in a shard."""
    for extra in ("timm", "transformers", "diffusers"):
        pytest.importorskip(extra)
    base = tmp_path_factory.mktemp("recipes")
    for save in (recipes.save_teachers, recipes.save_vae, recipes.save_clip, recipes.save_network):
        save(base)
    files = encoded(4, 40)
    table = "file_name,text\n" + "".join(f"{name},a b\n" for name in files)
    folder(base / "photos", {**files, "metadata.csv": table.encode()})
    shard(base / "photos.tar", files)
    return base


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """``run(…)`` is ``tok fit …`` in an empty folder → (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: (main(["fit", *args]), *capsys.readouterr())


@pytest.mark.parametrize("name", recipes.names())
def test_a_step_of_every_recipe(run, place, name):
    Path("tiny.yaml").write_text(yaml.safe_dump(recipes.shrunk(name, place, place / "photos")))
    code, _, err = run("--config", f"tokenizer/{name}", "--config", "tiny.yaml", "--trainer.fast_dev_run", "true")
    assert code == 0, err
    assert re.search(r"step 1: val/psnr_\d+ \d", err), err
    assert not Path("runs").exists(), "a trial run leaves nothing behind"


def representatives() -> list:
    """Every recipe; those whose like was shown already take their turn with the slow tests."""
    kinds, rows = set(), []
    for name in recipes.names():
        recipe = recipes.read(f"tokenizer/{name}")
        kind = recipe["model"]["class_path"], recipe["data"]["class_path"]
        rows.append(pytest.param(name, marks=pytest.mark.slow) if kind in kinds else name)
        kinds.add(kind)
    return rows


@pytest.mark.parametrize("name", representatives())
def test_print_config_of_every_recipe(run, name):
    code, out, err = run("--config", f"tokenizer/{name}", "--trainer.fast_dev_run", "true", "--print_config")
    shown, recipe = yaml.safe_load(out), recipes.read(f"tokenizer/{name}")
    assert code == 0 and shown["trainer"]["fast_dev_run"] is True, err
    assert shown["model"]["class_path"].rpartition(".")[2] == recipe["model"]["class_path"].rpartition(".")[2]
    assert shown["model"]["init_args"]["tokenizer"] and shown["data"]["init_args"]["size"]


# architectures ---------------------------------------------------------------------------------------------------


def preset_of(name: str):
    return PUBLISHED.get(re.sub(r"_stage\d$", "", name))


@pytest.mark.parametrize("name", [name for name in recipes.names() if preset_of(name)])
def test_parts_are_those_of_the_published_model(name):
    wanted = config_of(preset_of(name))
    found = recipes.config(recipes.parts_of(recipes.read(f"tokenizer/{name}")))
    if name.endswith("stage1"):  # which predicts codes and has no pixels yet
        wanted["decoder"] = {k: v for k, v in wanted["decoder"].items() if not k.startswith("pixel_") and k != "proxy_dim"} | {"pixels": False}
    with torch.device("meta"):
        here, there = Tokenizer1D.from_config(found), Tokenizer1D.from_config(wanted)
    assert here.image_size == there.image_size and here.token_lengths == there.token_lengths
    for slot in ("encoder", "quantizer", "decoder", "lengths"):
        one, other = getattr(here, slot).to_config(), getattr(there, slot).to_config()
        assert {k: v for k, v in one.items() if k not in TRAINING} == {k: v for k, v in other.items() if k not in TRAINING}
    shapes = [{k: tuple(v.shape) for k, v in plain_meta(model).items()} for model in (here, there)]
    assert shapes[0] == shapes[1]
    counted = sum(v.numel() for v in plain_meta(here).values())
    if not name.endswith("stage1"):
        assert abs(counted - preset_of(name).parameters) < 1e-3 * counted, (counted, preset_of(name).parameters)


def plain_meta(model: Tokenizer1D) -> dict[str, torch.Tensor]:
    """Tensors of an exported model; those that training alone needs are left out."""
    skipped = {f"quantizer.{name}" for name in model.quantizer.training_only}
    return {k: v for k, v in model.state_dict().items() if k not in skipped}


def test_every_published_model_has_its_recipe():
    assert {preset_of(name).name for name in recipes.names() if preset_of(name)} == {preset.name for preset in PUBLISHED.values()}
    stages = [name for name in recipes.names() if re.search(r"_stage\d$", name)]
    assert len(stages) == 12 and {preset_of(name).layout for name in stages} == {"titok-legacy"}


# pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_headers_say_what_they_must(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(head)
    assert len(head) >= 4 and "ommand" in text and "ardware" in text and "Run by us:" in text
    assert f"--config configs/{path.relative_to(ROOT / 'configs')}" in text
    for used in re.findall(r"--config (?:configs/)?([\w/]+)(?:\.yaml)?", text):
        assert (ROOT / f"configs/{used}.yaml").is_file(), used


def test_pages_are_those_of_the_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["write_recipes.py", "--check"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts/write_recipes.py"), run_name="__main__")
    assert stop.value.code == 0, capsys.readouterr().out


# overlays --------------------------------------------------------------------------------------------------------


def overlay(name: str, place: Path) -> None:
    """Write tiny.yaml: the shrunk recipe without its data, which an overlay says."""
    tiny = recipes.shrunk(name, place, place / "photos")
    tiny["data"] = {"class_path": tiny["data"]["class_path"], "init_args": {"size": 32, "batch_size": 2, "workers": 0}}
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny))


def test_targets_that_were_cached_are_trained_on(run, place):
    """As the headers of data/cached_codes and data/cached_latents have it, at tiny size."""
    photos = str(place / "photos")
    for name, data, model, what in (("titok_s_128_stage1", "codes", "vqgan", "ids"), ("flextok_d12_d12", "latents", "start", "vae")):
        overlay(name, place)
        if what == "vae":
            recipes.build(recipes.shrunk_parts(recipes.parts_of(recipes.read(f"tokenizer/{name}")))).save_pretrained(place / "start")
        for part in ("train", "val"):
            assert main(["tokenize", photos, "-m", str(place / model), "-o", f"runs/{data}/{part}", "--what", what, "--views", "2"]) == 0
        arguments = ("--config", f"tokenizer/{name}", "--config", f"data/cached_{data}", "--config", "tiny.yaml", "--data.train", f"[{photos}]")
        code, _, err = run(*arguments, "--data.val", f"[{photos}]", "--trainer.fast_dev_run", "true")
        assert code == 0 and "val/psnr" in err, err


@pytest.mark.parametrize(("name", "where"), [("data/small", "photos"), ("data/shards", "photos.tar"), ("debug/overlay", None)])
def test_other_overlays_fit_on_recipes(run, place, name, where):
    overlay("titok_bl_64_vq8k", place)
    data = ("--data.train", f"[{place / where}]", "--data.val", f"[{place / 'photos'}]") if where else ()
    last = ("--config", name) if where else ("--config", name, "--data.init_args.size", "32")
    code, _, err = run("--config", "tokenizer/titok_bl_64_vq8k", "--config", "tiny.yaml", *last, *data, "--trainer.fast_dev_run", "true", "--trainer.devices", "1")
    assert code == 0 and "val/psnr" in err, err
