"""Published generators by name, hub id, folder and loose file, with their tokenizers and what their authors sample with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tok1d
from tests.cli.conftest import tok as tok
from tests.dct_model import save_model
from tests.generators.tiny import ar
from tests.published import publish
from tests.test_download import contents
from tests.test_download import online as online
from tok1d import presets as tokenizers
from tok1d.errors import ModelError, TokenError, UsageError
from tok1d.generators.generator import Generator
from tok1d.generators.masked import MaskedGenerator
from tok1d.generators.presets import GENERATORS, generator_named, sampling_line
from tok1d.generators.rar import RARGenerator

ROW = "one-d-piece-s-256-maskgit"  # golden files of both are of 16 tokens and 64 codes


@pytest.fixture
def model(tmp_path) -> Path:
    """What stands for the shipped tokenizer in the ``tok`` fixture."""
    return save_model(tmp_path / "shipped")


@pytest.fixture
def hub(online, tmp_path):
    """Tiny weights under the published names."""
    for case, name, repo in (
        ("maskgit_imagebert", "pytorch_model.bin", "turing-motors/MaskGIT_One-D-Piece-S-256"),
        ("one_d_piece", "pytorch_model.bin", "turing-motors/One-D-Piece-S-256"),
        ("rar", "rar_b.bin", "yucornetto/RAR"),
        ("maskgit_uvit", "generator_titok_s128.bin", "fun-research/TiTok"),
    ):
        publish(case, tmp_path / case, name)
        online.files[repo] = {**contents(tmp_path / case), "notes.txt": b"?"}
    online.files["yucornetto/RAR"]["maskgitvq.jsonl"] = b"?"
    return online


@pytest.mark.parametrize(
    ("source", "row", "kind", "file"),
    [
        (ROW, ROW, MaskedGenerator, "pytorch_model.bin"),
        ("turing-motors/MaskGIT_One-D-Piece-S-256", ROW, MaskedGenerator, "pytorch_model.bin"),
        ("rar-b", "rar-b", RARGenerator, "rar_b.bin"),
        ("yucornetto/RAR:rar_b.bin", "rar-b", RARGenerator, "rar_b.bin"),
        ("fun-research/TiTok:generator_titok_s128.bin", "titok-s-128-maskgit", MaskedGenerator, "generator_titok_s128.bin"),
    ],
)
def test_by_name_and_hub_id(hub, source, row, kind, file):
    made, row = tok1d.load_generator(source), generator_named(row)
    assert type(made) is kind and not made.training and not any(p.requires_grad for p in made.parameters())
    assert made.space.tokenizer == row.tokenizer and made.space.tokens == 16 and made.sampling == dict(row.sampling)
    assert hub.fetched() == [file]
    hub.log.clear()
    assert tok1d.load_generator(source, revision="c" * 40).model_id == made.model_id and hub.fetched() == []


def test_loose_files_and_folders_have_no_row(hub, tmp_path):
    loose = tok1d.load_generator(tmp_path / "rar" / "rar_b.bin", tokenizer="mine")
    assert loose.sampling == {} and loose.space.tokenizer == "mine" and tok1d.load_generator(tmp_path / "rar").space.tokenizer == "tokenizer"
    named = tok1d.load_generator("rar-b")
    assert all(torch.equal(a, b) for a, b in zip(loose.parameters(), named.parameters(), strict=True))
    with pytest.raises(ModelError, match="not those of a published generator"):
        tok1d.load_generator(tmp_path / "one_d_piece")


def test_what_authors_sample_with_is_what_is_used(hub):
    made = tok1d.load_generator(ROW)
    asked = {"label": [1, 2], "seeds": [4, 5]}
    default = made.generate(2, **asked)
    given = made.generate(2, **asked, steps=16, temperature=3.0, guidance=12.5, schedule="power_cosine(3)")
    assert torch.equal(default.ids, given.ids)
    seen = []
    other = made.generate(2, **asked, steps=3, guidance=1.0, on_step=lambda step, steps, ids: seen.append(steps))
    assert seen == [3] * 3 and not torch.equal(other.ids, default.ids)
    made.sampling = {}
    assert torch.equal(made.generate(2, **asked, steps=3, temperature=3.0).ids, other.ids)
    with pytest.raises(TokenError, match="classes are 0 to 9"):
        made.generate(1, label=10)


def test_the_command_loads_both_and_says_how(hub, tok, tmp_path):
    done = tok("generate", ROW, "--class", 7, "-n", 2, "--steps", 4, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert hub.fetched() == ["pytorch_model.bin", "pytorch_model.bin"]
    settings = json.loads((tmp_path / "out" / "samples.json").read_text())["settings"]
    assert settings["options"] == {"steps": 4, "temperature": 3.0, "guidance": 12.5, "schedule": "power_cosine(3)"}
    assert settings["tokenizer"]["name"] == "one-d-piece-s-256" and settings["tokens"] == 16
    seq = tok1d.load_generator(ROW).generate(2, label=7, steps=4)
    assert torch.equal(tok1d.TokenSequence.load(tmp_path / "out/0007-00001.tok").ids, seq.ids[1:])
    assert tok("generate", ROW, "--class", 10, "-o", tmp_path / "no").code == 1
    every = tok("generate", "--help").out
    assert all(f"{row.name} " in every and sampling_line(row) in every for row in GENERATORS)


def test_what_is_missing_is_one_line(hub, tok, tmp_path):
    def refused(*arguments: object) -> str:
        done = tok("generate", *arguments, "--class", 0, "-n", 1, "-o", tmp_path / "out")
        assert done.code == 1 and len([line for line in done.err.splitlines() if line.startswith("tok:") and "CPU" not in line]) == 1, done.err
        return done.err

    assert "did you mean 'rar-xl'" in refused("rar_xl")
    assert "titok-l-32 is a tokenizer" in refused("titok-l-32")
    assert "yucornetto/RAR holds several models: give one, of yucornetto/RAR:rar_b.bin" in refused("yucornetto/RAR")
    assert "yucornetto/RAR:rar_l.bin: there is no file rar_l.bin on the hub" in refused("rar-l")
    del hub.files["turing-motors/One-D-Piece-S-256"]
    message = refused(ROW)
    assert "trained for the tokenizer 'one-d-piece-s-256'" in message and "no such repository" in message and "give --tokenizer" in message
    with pytest.raises(ModelError, match="one-d-piece-s-256-maskgit is a generator, which makes tokens: tok generate one-d-piece-s-256-maskgit"):
        tok1d.load(ROW)


def test_offline_is_one_helpful_line(tok, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    done = tok("generate", "titok-l-32-maskgit", "--class", 207, "-o", tmp_path / "out")
    assert done.code == 1 and done.err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert "yucornetto/generator_titok_l32_imagenet: not a local folder and the hub cannot be reached" in done.err


def test_research_only_rows_ask_once(hub, monkeypatch):
    from tok1d.generators import presets

    rows = tuple(replace(row, research_only=row.name == "rar-b", licence="test-only") for row in GENERATORS)
    monkeypatch.setattr(presets, "GENERATORS", rows)
    with pytest.raises(ModelError, match="rar-b: these weights are licensed for research only"):
        tok1d.load_generator("rar-b")
    assert hub.fetched() == []
    with pytest.warns(UserWarning, match="research only"):
        assert tok1d.load_generator("rar-b", accept_license=True).sampling["guidance"] == 16.0
    with pytest.raises(UsageError, match="names revision v1"):
        tok1d.load_generator("yucornetto/RAR@v1:rar_b.bin", revision="main", accept_license=True)


def test_sampling_stays_with_a_folder_and_is_no_part_of_the_id(tmp_path):
    made = ar()
    plain = made.model_id
    made.sampling = made.check_sampling({"guidance": 2.0, "schedule": "linear", "top_k": 3})
    made.save_pretrained(tmp_path / "g")
    again = Generator.from_pretrained(tmp_path / "g")
    assert again.sampling == made.sampling and again.model_id == plain and again.to_config() == made.to_config()
    wanted = ar().generate(2, label=1, guidance=2.0, schedule="linear", top_k=3)
    assert torch.equal(again.generate(2, label=1).ids, wanted.ids)
    assert torch.equal(tok1d.load_generator(tmp_path / "g").generate(2, label=1).ids, wanted.ids)
    config = json.loads((tmp_path / "g" / "config.json").read_text())
    for wrong in ({"steps": 3}, {"prefix": 1}, {"guidance": [2]}, "x", {"on_step": "x"}):
        (tmp_path / "g" / "config.json").write_text(json.dumps({**config, "sampling": wrong}))
        with pytest.raises(ModelError, match="sampling must be options of AutoregressiveGenerator"):
            Generator.from_pretrained(tmp_path / "g")


def test_rows_say_what_the_hub_needs():
    assert len({row.name for row in GENERATORS} | {row.name for row in tokenizers.PRESETS}) == len(GENERATORS) + len(tokenizers.PRESETS)
    assert generator_named("rar-xl").hub_id == "yucornetto/RAR:rar_xl.bin" and generator_named("rar-xl").url == "https://huggingface.co/yucornetto/RAR"
