"""The speed benchmark runs: the plain sampler makes the tokens of the batched one."""

import json

import pytest

from benchmarks import masked_speed


@pytest.mark.parametrize("body", masked_speed.BODIES)
def test_it_writes_ratios(body, tmp_path, capsys):
    sizes = ["--width", "32", "--depth", "2", "--tokens", "8", "--vocab", "32", "--repeats", "1", "--steps", "4", "--body", body]
    masked_speed.main([*sizes, "--batches", "1,2", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "masked_speed.json").read_text())
    assert {"machine", "date", "commit", "parameters"} <= report.keys() and report["body"] == body
    assert [(row["batch"], row["schedule"]) for row in report["rows"]] == [(b, s) for b in (1, 2) for s in ("constant", "linear")]
    assert all(row["ratio"] > 0 and row["same_tokens"] == 1.0 for row in report["rows"])
    assert capsys.readouterr().err.count("of tokens equal") == 4
