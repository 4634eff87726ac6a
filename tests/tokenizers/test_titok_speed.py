"""The speed benchmark runs: its plain reference finds the ids and pictures of tok1d on the same weights."""

import importlib
import json

import pytest
import torch

from tok1d.tokenizers.official import titok


@pytest.fixture
def benchmark(monkeypatch):
    module = importlib.import_module("benchmarks.titok_speed")
    monkeypatch.setattr(module, "WIDTHS", {"S": (64, 1), "L": (128, 1)})
    monkeypatch.setattr(module, "MODELS", {"tiny": ("S", "L", 6, 1), "tiny2": ("L", "S", 6, 2)})
    monkeypatch.setattr(module, "CODES", {1: (64, 16), 2: (64, 12)})
    monkeypatch.setattr(module, "PIXEL", (32, (1, 1, 1, 1, 2)))
    monkeypatch.setattr(module, "SIDE", 64)
    monkeypatch.setattr(module, "titok_config", lambda name, **sizes: titok.titok_config(name, image_size=64, **sizes))
    monkeypatch.setattr(module, "legacy_config", lambda name, **sizes: titok.legacy_config(name, image_size=64, **sizes))
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_it_writes_ratios(benchmark, tmp_path, capsys):
    """It stops with an error where ids or pictures differ."""
    out = tmp_path / "r" / "speed.json"
    benchmark.main(["--quick", "--models", "tiny,tiny2", "--batches", "1,2", "--clock", "cpu", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["quick"] and report["clock"] == "cpu" and {"machine", "date", "torch", "threads"} <= report.keys()
    rows = [(row["model"], row["batch"], row["verb"]) for row in report["rows"]]
    assert rows == [(m, b, v) for m in ("tiny", "tiny2") for b in (1, 2) for v in ("encode", "decode", "both")]
    assert all(row["ratio"] > 0 and row["tok1d_images_per_s"] > 0 and row["distinct_ids"] > 2 for row in report["rows"])
    assert capsys.readouterr().out.count("img/s") == 24


def test_kinder_reference_gives_the_same_pictures(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark.titok_reference, "PAD_INSIDE", False)  # and put back afterwards
    out = tmp_path / "speed.json"
    benchmark.main(["--quick", "--models", "tiny2", "--batches", "1", "--pad-inside", "--out", str(out)])
    assert json.loads(out.read_text())["reference_pads_inside"] and benchmark.titok_reference.PAD_INSIDE


def test_other_ids_are_noticed(benchmark, monkeypatch, tmp_path):
    encode = benchmark.Reference.encode
    monkeypatch.setattr(benchmark.Reference, "encode", lambda model, images: (encode(model, images) + 1) % 64)
    with pytest.raises(SystemExit, match="tiny2: ids differ in 6 of 6 places"):
        benchmark.main(["--quick", "--models", "tiny2", "--batches", "1", "--out", str(tmp_path / "speed.json")])


def test_unknown_model(benchmark):
    with pytest.raises(SystemExit):
        benchmark.main(["--models", "XXL"])
