"""The command ``tok fit``: configurations by file and name, overlays, errors of one line, runs of debug size."""

import csv
import os
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml

import tok1d
from tests.data.files import folder
from tok1d.cli.main import main
from tok1d.errors import ModelError
from tok1d.training.export import load_run
from tok1d.training.fit import find_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tok(tmp_path, monkeypatch, capsys):
    """``tok("fit", …)`` in an empty folder → (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> tuple[int, str, str]:
        code = main([str(a) for a in args])
        return code, *capsys.readouterr()

    return run


def one_line(text: str) -> str:
    """The message of a failure, which is one line after what Lightning says of itself."""
    lines = [line for line in text.splitlines() if line.startswith("tok")]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


# configurations --------------------------------------------------------------------------------------------------


def test_configurations_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = ROOT / "configs/debug/titok_fsq.yaml"
    for name in ("debug/titok_fsq", "configs/debug/titok_fsq.yaml", str(wanted)):
        assert Path(find_config(name)).samefile(wanted)
    folder(tmp_path, {"configs/debug/titok_fsq.yaml": b"{}", "mine.yaml": b"{}"})
    assert find_config("debug/titok_fsq") == "configs/debug/titok_fsq.yaml", "the working folder comes first"
    assert find_config("mine.yaml") == "mine.yaml"


def test_print_config_and_help(tok):
    code, out, _ = tok("fit", "--config", "debug/titok_fsq", "--trainer.max_steps", "7", "--print_config")
    shown = yaml.safe_load(out)
    assert code == 0 and shown["trainer"]["max_steps"] == 7 and shown["model"]["init_args"]["lr"] == 0.001
    code, out, _ = tok("fit", "--help")
    assert code == 0 and "--ckpt_path" in out and not list(Path().iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--config", "debug/titok_fqs"], 2, "no configuration 'debug/titok_fqs'.*debug/titok_fsq"),
        (["--config=nothing.yaml"], 2, "no configuration"),
        (["--config", "debug/titok_fsq", "--ckpt_path", "no.ckpt"], 2, r"no\.ckpt: no such checkpoint.*'last'"),
        (["--config", "debug/titok_fsq", "--model.lr", "fast"], 2, "model.lr: Expected a <class 'float'>. Got value: fast"),
        (["--config", "debug/titok_fsq", "--data.nope", "1"], 2, "data: Option 'nope' is not accepted"),
        (["--config", "debug/titok_fsq", "--data.batch_size", "0"], 2, "batch sizes are at least 1"),
        (["--config", "debug/titok_fsq", "--model.tokenizer.init_args.encoder.init_args.dim", "5"], 1, "latents of width 5"),
        (["--config", "debug/spectral"], 1, "init_from runs/debug/spectral/linear: cannot be loaded"),
        (["--config", "tokenizer/titok_s_128_one_stage", "--trainer.devices", "1", "--trainer.precision", "32",
          "--model.weights", "{l2: 1}", "--data.train", "[no/photos]"], 1, "no/photos: no such file or folder"),
    ],
)  # fmt: skip
def test_errors_are_one_line(tok, arguments, code, said):
    import re

    got, _, err = tok("fit", *arguments)
    assert got == code and re.search(said, one_line(err)), err


def test_missing_lightning(tok, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    code, _, err = tok("fit", "--config", "debug/titok_fsq")
    assert code == 1 and "pip install 'tok1d[train]'" in one_line(err)


def test_debug_shows_the_traceback(tok):
    code, _, err = tok("fit", "--config", "nothing", "--debug")
    assert code == 2 and "Traceback" in err and "no configuration" in err


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("went-off",)


def test_hostile_checkpoint_is_not_continued(tok):
    torch.save({"state_dict": Bomb()}, "evil.ckpt")
    Path("worse.ckpt").write_bytes(pickle.dumps(Bomb()))
    Path("noise.ckpt").write_bytes(os.urandom(500))
    for name in ("evil.ckpt", "worse.ckpt", "noise.ckpt"):
        code, _, err = tok("fit", "--config", "debug/titok_fsq", "--trainer.logger", "false", "--ckpt_path", name)
        assert code == 1 and "cannot be read safely" not in err.replace("is not a checkpoint that can be read safely", "")
        assert "can be read safely" in err and not Path("went-off").exists()
        with pytest.raises(ModelError, match="read safely"):
            load_run(Path(name))


# runs ------------------------------------------------------------------------------------------------------------


def last_values(err: str) -> dict[str, float]:
    line = [line for line in err.splitlines() if line.startswith("step") and "val/psnr" in line][-1]
    return {k: float(v) for k, v in (pair.split() for pair in line.partition(": ")[2].split(", "))}


@pytest.mark.parametrize("name", ["titok_bits_flow", "binary_leech_generative", "registers_simvq_grid"])
def test_surprising_combinations_learn_and_export(tok, name):
    """Parts that no published family has together: a few steps lower the loss, and the exported model makes and reads tokens."""
    short = ("--trainer.max_steps", "30", "--trainer.val_check_interval", "30", "--trainer.log_every_n_steps", "1", "--data.val_images", "4",
             "--data.images", "16", "--data.batch_size", "8", "--model.warmup_steps", "1", "--model.lr", "0.003")  # fmt: skip
    code, _, err = tok("fit", "--config", f"debug/{name}", *short)
    assert code == 0 and last_values(err)["val/psnr_16"] > 3, err
    with next(Path("runs").rglob("metrics.csv")).open() as file:
        loss = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(loss) == 30 and sum(loss[-6:]) < 0.95 * sum(loss[:6]), (sum(loss[-6:]), sum(loss[:6]))
    assert tok("export", f"runs/debug/{name}", "model")[0] == 0
    model, image = tok1d.load("model"), torch.rand(1, 3, 32, 32)
    assert model.token_lengths == list(range(1, 17))
    model.encode(image, tokens=4).save("image.tok")
    pictures = [model.decode(tok1d.TokenSequence.load("image.tok")) for _ in range(2)]
    assert pictures[0].shape == (1, 3, 32, 32) and torch.equal(*pictures)


def test_moving_average_codebook_learns(tok):
    code, _, err = tok("fit", "--config", "debug/titok_vq_ema", "--trainer.max_steps", "240", "--trainer.val_check_interval", "120")
    values = last_values(err)
    assert code == 0 and values["val/psnr_16"] > 12.9 and values["val/usage"] > 0.2 and values["val/position_entropy"] > 2, err


def test_spectral_is_fitted_then_trained(tok, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fit_spectral.py", "--config", "debug/spectral", "--views", "1", "--own-books", "16", "--out", "runs/debug/spectral/linear"])
    runpy.run_path(str(ROOT / "scripts/fit_spectral.py"), run_name="__main__")
    more = ("--trainer.max_steps", "24", "--trainer.val_check_interval", "12", "--data.val_images", "8")
    code, _, err = tok("fit", "--config", "debug/spectral", *more)
    values = last_values(err)
    curve = [values[f"val/psnr_{k}"] for k in (1, 2, 4, 8, 16)]
    assert code == 0 and curve == sorted(curve) and curve[-1] > curve[0] + 3 and values["val/usage"] > 0.8, err
    code, _, err = tok("fit", "--config", "debug/spectral", "--trainer.max_steps", "30", "--ckpt_path", "last", *more[2:])
    assert code == 0 and "step 24: val/psnr" not in err
    assert load_run(Path("runs/debug/spectral")).step == 30
    left = {p.relative_to("runs/debug/spectral").parts[0] for p in Path("runs/debug/spectral").rglob("*") if p.is_file()}
    assert left == {"linear", "csv", "tb", "checkpoints"}
    assert tok("export", "runs/debug/spectral", "model")[0] == 0
    model = tok1d.load("model")
    assert model.decode(model.encode(torch.rand(1, 3, 32, 32), tokens=3)).shape == (1, 3, 32, 32)
