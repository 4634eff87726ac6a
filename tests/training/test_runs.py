"""`tok fit` and `tok export` end to end at tiny size: learning, exact resume, averaging, faults."""

import csv
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tok1d
from tok1d.cli.main import main
from tok1d.errors import ImageError

pytest.importorskip("lightning")
CONFIG = str(Path(__file__).parents[2] / "configs/debug/titok_fsq.yaml")


def fit(folder: Path, *more: str) -> int:
    """Run the debug configuration with every output under ``folder``."""
    text = Path(CONFIG).read_text().replace("runs/debug/titok_fsq", str(folder))
    config = folder / "run.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text(text)
    return main(["fit", "--config", str(config), *more])


def rows(folder: Path) -> list[dict[str, str]]:
    return [r for f in sorted(folder.rglob("metrics.csv")) for r in csv.DictReader(f.open())]


def losses(folder: Path) -> dict[int, float]:
    return {int(r["step"]): float(r["train/loss"]) for r in rows(folder) if r.get("train/loss")}


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert fit(folder, "--trainer.max_steps", "150", "--trainer.val_check_interval", "30") == 0
    return folder


def test_a_run_leaves_metrics_pictures_and_throughput(run):
    found = rows(run)
    assert any(r.get("images_per_second") for r in found)
    assert any(r.get("val/usage") for r in found) and any(r.get("val/perplexity") for r in found)
    assert list(run.rglob("grids/*.png")) and list(run.rglob("events.out.tfevents*"))


def test_it_learns_through_the_bottleneck(run):
    found = [r for r in rows(run) if r.get("val/psnr_16")]
    first, last = float(found[0]["val/psnr_16"]), float(found[-1]["val/psnr_16"])
    by_length = [float(found[-1][f"val/psnr_{k}"]) for k in (1, 2, 4, 8, 16)]
    assert last > first + 0.5
    assert last > 13.0, "12.5 dB is what the best single colour for all images reaches"
    assert all(b > a - 0.1 for a, b in zip(by_length, by_length[1:])), by_length  # hundreds of steps more spread them
    assert float(found[-1]["val/position_entropy"]) > 2, "of the 4 bits that 16 images allow"


def test_interrupted_equals_uninterrupted(run, tmp_path):
    (saved,) = (run / "checkpoints").glob("*step=100*.ckpt")  # all that a process killed after it would have left
    assert fit(tmp_path, "--trainer.max_steps", "150", "--trainer.val_check_interval", "30", "--ckpt_path", str(saved)) == 0
    one, two = checkpoint(run), checkpoint(tmp_path)
    assert one["global_step"] == two["global_step"] == 150
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key
    for a, b in zip(one["optimizer_states"][0]["state"].values(), two["optimizer_states"][0]["state"].values()):
        assert all(torch.equal(a[k], b[k]) for k in ("exp_avg", "exp_avg_sq", "step"))
    late = {s: v for s, v in losses(run).items() if s >= 100}
    assert late and late == losses(tmp_path)


def test_export_is_the_average(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "model"), "--name", "tiny"]) == 0
    model = tok1d.load(tmp_path / "model")
    average = {k.removeprefix("tokenizer."): v for k, v in checkpoint(run)["state_dict"].items()}
    for key, value in model.state_dict().items():
        assert torch.equal(value, average[key]), key
    live = checkpoint(run)["current_model_state"]
    assert any(not torch.equal(live[k], v) for k, v in checkpoint(run)["state_dict"].items())
    assert "tiny" in (tmp_path / "model/README.md").read_text()
    assert main(["export", str(run), str(tmp_path / "model")]) == 2  # never overwritten unasked
    assert "-f" in capsys.readouterr().err
    seq = model.encode(torch.rand(2, 3, 32, 32), tokens=4)
    assert model.decode(seq).shape == (2, 3, 32, 32)


def test_half_precision_export_loads(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "half"), "--dtype", "float16"]) == 0
    assert tok1d.load(tmp_path / "half").dtype == torch.float32


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("bomb-went-off"),)


def test_a_hostile_checkpoint_is_refused_and_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("evil.ckpt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"state_dict": {}, "tokenizer_config": Bomb()}, "evil2.ckpt")
    for name in ("evil.ckpt", "evil2.ckpt"):
        assert main(["export", name, "out"]) == 1
        assert not Path("bomb-went-off").exists() and not Path("out").exists()
    assert "safely" in capsys.readouterr().err


def test_photos_from_a_shard_and_a_folder_with_one_broken(tmp_path, caplog):
    from tok1d.data.photos import Photos, index_images

    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"not an image")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for i in range(5):
            tar.add(folder / f"{i}.png", f"{i}.png")
    plain = Photos(index_images([folder]), 32, (0.5, 1.0), seed=1)
    shard = Photos(index_images([tmp_path / "shard.tar"]), 32, (0.5, 1.0), seed=1)
    assert len(plain) == len(shard) == 5
    for i in (0, 1, 2, 4):
        assert torch.equal(plain[i, 7]["image"], shard[i, 7]["image"])
    for photos in (plain, shard):
        with pytest.raises(ImageError, match="not an image"):
            photos[3, 7]
    assert not torch.equal(plain[0, 7]["image"], plain[0, 8]["image"])  # the draw number decides the crop
    assert int(sum(plain.broken)) == 1 and "3" in caplog.text


def test_loss_weights_with_a_wrong_name(tmp_path, capsys):
    assert fit(tmp_path / "run", "--model.init_args.weights.nonsense", "1.0", "--trainer.max_steps", "2") != 0
    assert "nonsense" in capsys.readouterr().err


def test_the_default_configuration_is_the_shipped_architecture():
    import yaml

    path = Path(__file__).parents[2] / "configs/tokenizer/default.yaml"
    parts = yaml.safe_load(path.read_text())["model"]["init_args"]["tokenizer"]["init_args"]
    shipped = json.loads((Path(tok1d.__file__).parent / "weights/default/config.json").read_text())
    for part in ("encoder", "quantizer", "decoder"):
        assert parts[part]["class_path"] == shipped[part]["class"]
        assert {k: shipped[part][k] for k in parts[part]["init_args"]} == parts[part]["init_args"]
