"""The speed benchmark runs: its plain reference makes the pictures of tok1d on the same weights."""

import json

import pytest

pytest.importorskip("diffusers", reason="the published tokenizer has a VAE of diffusers")

from benchmarks import flextok_speed


@pytest.fixture
def tiny(monkeypatch):
    sizes = {"decoder_depth": 3, "decoder_width": 64, "latent_channels": 4, "vae_channels": (32, 32), "vae_layers": 1}
    monkeypatch.setattr(flextok_speed, "MODELS", {"tiny": {**sizes, "tokens": 8, "image_size": 32, "patch_size": 8}})


@pytest.mark.usefixtures("tiny")
def test_it_writes_ratios(tmp_path, capsys):
    flextok_speed.main(["--quick", "--models", "tiny", "--tokens", "1,3,8", "--batches", "1,2", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "flextok_speed.json").read_text())
    assert report["quick"] and {"machine", "date", "commit"} <= report.keys()
    assert [(row["batch"], row["tokens"]) for row in report["rows"]] == [(b, k) for b in (1, 2) for k in (1, 3, 8)]
    for row in report["rows"]:
        assert row["flow_ratio"] > 0 and row["decode_ratio"] > 0 and 0 < row["max_error"] <= 1e-4
    assert capsys.readouterr().err.count("error") == 6


def test_unknown_model():
    with pytest.raises(SystemExit):
        flextok_speed.main(["--models", "huge"])
