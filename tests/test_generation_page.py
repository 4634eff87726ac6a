"""docs/generation.md: its tables are up to date, its commands parse, its Python runs on a tiny model, its classes exist."""

import importlib
import re
import shutil
from pathlib import Path

import pytest
import torch

import tok1d
from tests.generators.tiny import awake
from tok1d.cli.main import parse
from tok1d.generators.ar import AutoregressiveGenerator
from tok1d.generators.condition import ClassCondition
from tok1d.generators.guidance import SCHEDULES, parse_schedule
from tok1d.generators.space import TokenSpace

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "generation.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder as the page thinks of it: a generator of 64 tokens for 16 classes, and the photo of the package."""
    torch.manual_seed(0)
    space = TokenSpace.of(tok1d.load("default")).first(64)
    awake(AutoregressiveGenerator(space, ClassCondition(16), width=16, depth=1, heads=2)).eval().save_pretrained(tmp_path / "my-generator")
    (tmp_path / "tok1d" / "assets").mkdir(parents=True)
    shutil.copy(ROOT / "tok1d" / "assets" / "demo.jpg", tmp_path / "tok1d" / "assets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_tables_are_those_of_rows_and_results():
    from benchmarks import generation_tables

    assert generation_tables.main(check=True) == 0, "docs/generation.md is out of date: python -m benchmarks.generation_tables"


def test_its_python_runs(here):
    names: dict = {}
    plain = [block for block in blocks("python") if "diffusers" not in block and "TokPipeline" not in block]
    assert len(plain) == 4
    for block in plain:
        exec(compile(block, "docs/generation.md", "exec"), names)
    assert (here / "first.png").is_file() and names["images"].shape == (4, 3, 256, 256)
    assert torch.equal(names["again"].ids[:, :16], names["photo"].ids[:, :16]) and names["again"].shape == (1, 64)
    assert torch.equal(names["four"].ids[:, :32], names["photo"].ids[:, :32].expand(4, -1)) and names["way"].shape == (5, 3, 256, 256)
    for kind in names["kinds"]:
        awake(kind)
        short, long = (kind.generate(1, label=0, tokens=n, seeds=7) for n in (4, 16))
        same = torch.allclose(short.data[:, :4].float(), long.data[:, : short.data.shape[1]].float(), atol=1e-4)
        assert same == (not isinstance(kind, names["MaskedGenerator"]) and getattr(kind, "variable", "none") != "announced"), type(kind).__name__
    assert len(names["kinds"]) == 9 and names["made"].tokens(names["tok"]).shape == (1, 16)


def test_its_pipeline_runs(here):
    pytest.importorskip("diffusers", reason="TokPipeline needs diffusers")
    block = next(block for block in blocks("python") if "TokPipeline" in block)
    names = {"tok": tok1d.load("default"), "model": tok1d.load_generator("my-generator")}
    exec(compile(block, "docs/generation.md", "exec"), names)
    assert (here / "three.png").is_file() and tok1d.load_generator("my-pipeline/generator").model_id == names["model"].model_id


def test_its_commands_parse_and_its_configurations_exist():
    lines = [part.split("#")[0].split() for block in blocks("sh") for line in block.splitlines() for part in line.split("&&")]
    verbs = [words[1] for words in lines if words]
    assert {"tokenize", "fit", "export", "generate", "eval"} <= set(verbs) and len(verbs) >= 9
    for words in filter(None, lines):
        assert words[0] == "tok"
        args = parse(words[1:])
        if args.verb == "fit":
            assert args.arguments[0] == "--config" and (ROOT / args.arguments[1]).is_file()
    for path in re.findall(r"configs/[\w/]+\.yaml", PAGE):
        assert (ROOT / path).is_file(), path


def test_what_it_names_exists():
    classes = re.findall(r"^\| `((?:\w+\.)+[A-Z]\w+)`", PAGE, flags=re.MULTILINE)
    assert len(classes) == 14
    for name in classes:
        module, _, kind = name.rpartition(".")
        assert hasattr(importlib.import_module(f"tok1d.generators.{module}"), kind), name
    for path in re.findall(r"class_path: (tok1d\.[\w.]+)", PAGE):
        module, _, kind = path.rpartition(".")
        assert hasattr(importlib.import_module(module), kind), path
    shown = [name for name in re.findall(r"^\| `(\w+(?:\([\w, ]+\))?)` \|", PAGE, flags=re.MULTILINE)]
    named = {parse_schedule(name.replace("a, b", "0, 1").replace("(p)", "(3)"))[0] for name in shown if name != "schedule"}
    assert named == set(SCHEDULES)
