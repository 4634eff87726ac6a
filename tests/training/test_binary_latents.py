"""`tok fit` of the debug configuration of binary latents: it learns through bits, and what it exports takes other sizes."""

import pytest
import torch

import tok1d
from tok1d.cli.main import main

pytest.importorskip("lightning")


def test_debug_configuration_learns_and_exports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    more = ["--trainer.max_steps", "60", "--trainer.val_check_interval", "60", "--data.images", "128"]
    assert main(["fit", "--config", "debug/binary_latents", *more]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("step 60: val/"))
    values = {name: float(value) for name, value in (pair.split() for pair in line.partition(": ")[2].split(", "))}
    assert values["val/psnr_16"] > 12.8, "12.5 dB is what the best single colour for all images reaches"
    assert values["val/position_entropy"] > 1.5, "of the 4 bits that 16 images allow"
    assert main(["export", "runs/debug/binary_latents", "model"]) == 0
    model = tok1d.load("model")
    assert model.any_size and model.encode(torch.rand(1, 3, 32, 32), tokens=3).ids.shape == (1, 3)
    assert model.decode(model.encode(torch.rand(1, 3, 48, 64))).shape == (1, 3, 48, 64)
