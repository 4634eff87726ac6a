"""The speed benchmark runs: the plain sampler makes the tokens of the cached one."""

import json

from benchmarks import generator_speed


def test_it_writes_ratios(tmp_path, capsys):
    sizes = ["--width", "32", "--depth", "1", "--tokens", "8", "--vocab", "32", "--repeats", "1"]
    generator_speed.main([*sizes, "--batches", "1,2", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "generator_speed.json").read_text())
    assert {"machine", "date", "commit", "parameters"} <= report.keys()
    assert [(row["batch"], row["plain_tokens_timed"]) for row in report["rows"]] == [(1, 8), (2, 2)]
    for row in report["rows"]:
        assert row["ratio"] > 0 and row["max_error"] < 1e-4 and row["same_tokens"] == 1.0
        assert row["cache_bytes"] == row["cache_bytes_predicted"] == 2 * 2 * row["batch"] * 9 * 32 * 4
    assert capsys.readouterr().err.count("as predicted") == 2
