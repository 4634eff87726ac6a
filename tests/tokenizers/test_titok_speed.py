"""The speed benchmark runs: its plain reference finds the ids and pictures of tok1d on the same weights."""

import importlib.util
import json
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "titok_speed.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("titok_speed", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WIDTHS", {"S": (64, 1), "L": (128, 1)})
    monkeypatch.setattr(module, "MODELS", {"tiny": ("S", "L", 6)})
    monkeypatch.setattr(module, "CODES", 64)
    return module


def test_it_writes_ratios(benchmark, tmp_path, capsys):
    benchmark.main(["--quick", "--sizes", "tiny", "--batches", "1,2", "--out", str(tmp_path / "r" / "speed.json")])
    report = json.loads((tmp_path / "r" / "speed.json").read_text())
    assert report["quick"] and {"machine", "date", "torch", "threads"} <= report.keys()
    rows = [(row["model"], row["batch"], row["verb"]) for row in report["rows"]]
    assert rows == [("tiny", b, v) for b in (1, 2) for v in ("encode", "decode")]
    assert all(row["ratio"] > 0 and row["tok1d_images_per_s"] > 0 and row["distinct_ids"] > 2 for row in report["rows"])
    assert capsys.readouterr().out.count("img/s") == 8


def test_unknown_size(benchmark):
    with pytest.raises(SystemExit):
        benchmark.main(["--sizes", "XXL"])
