"""The speed benchmark of binary latents runs: its plain reference finds the bits and pictures of tok1d on the same weights."""

import json

from benchmarks import binary_speed


def test_it_writes_ratios(tmp_path, capsys):
    binary_speed.main(["--quick", "--model", "small", "--sides", "64,96", "--batch", "2", "--out", str(tmp_path / "r")])
    report = json.loads((tmp_path / "r/binary_speed.json").read_text())
    assert report["quick"] and {"machine", "date"} <= report.keys()
    assert [(row["side"], row["verb"]) for row in report["rows"]] == [(s, v) for s in (64, 96) for v in ("encode", "decode")]
    assert all(row["ratio"] > 0 and row["tok1d_images_per_s"] > 0 and row["max_error"] < 1e-3 for row in report["rows"])
    assert capsys.readouterr().out.count("img/s") == 8
