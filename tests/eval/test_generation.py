"""Measuring samples: the probe against least squares, distances against direct computation, caches, labels, faults, the command."""

import json
from pathlib import Path

import pytest
import torch

from tok1d.cli.main import main
from tok1d.errors import TokError, UsageError
from tok1d.eval.features import FeatureNet
from tok1d.eval.frechet import Moments, frechet_distance, precision_recall
from tok1d.eval.generation import Probe, evaluate_samples
from tok1d.eval.measures import GRID
from tok1d.image_io import read_uint8, write


class Quadrants(FeatureNet):
    """Mean colours of the four quarters: 12 features that are easy to compute by hand."""

    name, distance_name, id, dim, device = "quadrants", "fd_quadrants", "quadrants-1", 12, torch.device("cpu")

    def __init__(self) -> None:
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return {"pooled": torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)}


def picture(kind: int, seed: int) -> torch.Tensor:
    """Reddish or bluish noise, uint8 (3, 16, 16)."""
    draw = torch.Generator().manual_seed(100 * kind + seed)
    image = torch.rand(3, 16, 16, generator=draw) * 0.6
    image[2 * kind] += 0.25 + 0.1 * torch.rand((), generator=draw)
    return image.clamp(0, 1).mul(255).round().to(torch.uint8)


def photos(folder: Path, count: int, first: int = 0) -> Path:
    for kind, name in enumerate(("red", "blue")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            write(folder / name / f"{first + i:03d}.png", picture(kind, first + i))
    return folder


def sampled(folder: Path, rows: list[tuple[int, str, int]], seconds: float = 2.0) -> Path:
    """A folder of ``tok generate``: (label, class, kind of picture)."""
    folder.mkdir()
    images = []
    for i, (label, name, kind) in enumerate(rows):
        write(folder / f"{i:03d}.png", picture(kind, 500 + i))
        images.append({"file": f"{i:03d}.png", "seed": i, "label": label, "class": name})
    settings = {"generator": {"class": "G", "model_id": "a"}, "tokens": 8, "options": {"guidance": 2.0}}
    runs = [{"images": len(rows), "seconds": seconds, "machine": "m", "device": "cpu", "threads": 1}]
    (folder / "samples.json").write_text(json.dumps({"format": "tok1d.samples/1", "settings": settings, "runs": runs, "images": images}))
    write(folder / "sheet.png", picture(0, 0))
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("sets")
    photos(home / "train", 12)
    photos(home / "val", 10, 50)
    # The generator's classes are numbered the other way round than class folders, and one sample in four shows the wrong one
    sampled(home / "samples", [(0, "blue", i % 4 > 0) for i in range(8)] + [(1, "red", i % 4 == 0) for i in range(8)])
    return home


@pytest.mark.parametrize("n", [6, 40])
def test_the_probe_is_ridge_regression(n):
    x = torch.randn(n, 9, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 10) + 3
    labels = torch.arange(n) % 3
    probe = Probe.fit(x, labels, 3, ridge=0.2)
    z = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    target = torch.nn.functional.one_hot(labels, 3).double()
    rows = torch.cat([z, (0.2 * n) ** 0.5 * torch.eye(9, dtype=torch.float64)])
    solved = torch.linalg.lstsq(rows, torch.cat([target - target.mean(0), torch.zeros(9, 3, dtype=torch.float64)])).solution
    torch.testing.assert_close(probe.weight, solved)
    assert torch.equal(probe(x), (z @ solved + target.mean(0)).argmax(1))


def test_results_are_those_of_the_features(sets, tmp_path):
    net = Quadrants()
    found = evaluate_samples(sets / "samples", [sets / "val"], net, train=[sets / "train"], cache=tmp_path)
    real = net.forward(torch.cat([read_uint8(p) for p in sorted((sets / "val").rglob("*.png"))]))["pooled"]
    fake = net.forward(torch.cat([read_uint8(sets / f"samples/{i:03d}.png") for i in range(16)]))["pooled"]
    results = found["results"]
    assert results["fd_quadrants"] == pytest.approx(frechet_distance(Moments.of(real), Moments.of(fake)), rel=1e-3)
    near = precision_recall(*((x.double() / GRID).round() * GRID for x in (real, fake)), k=3)
    assert (results["precision"], results["recall"]) == pytest.approx((near.precision, near.recall)) and 0 < near.recall < 1
    assert results["class_accuracy"] == 0.75 and results["class_accuracy_real"] == 1.0 and results["images_per_second"] == 8.0
    assert found["asked"]["samples"] == 16 and found["asked"]["options"] == {"tokens": 8, "guidance": 2.0} and found["asked"]["size"] == 16
    assert found["reference"]["images"] == 20 and found["classifier"]["images"] == 24 and found["features"] == {"name": "quadrants", "id": "quadrants-1"}
    json.dumps(found)


def test_real_features_are_kept_and_some_may_be_left_out(sets, tmp_path):
    first, again = Quadrants(), Quadrants()
    a, b = (evaluate_samples(sets / "samples", [sets / "val"], net, train=[sets / "train"], cache=tmp_path) for net in (first, again))
    assert first.seen == 16 + 20 + 24 and again.seen == 16 and a["results"] == b["results"] and len(list(tmp_path.iterdir())) == 2
    fewer = evaluate_samples(sets / "samples", [sets / "val"], Quadrants(), images=6)
    assert fewer["reference"]["images"] == 6 and fewer["classifier"] is None and "class_accuracy" not in fewer["results"]
    next(tmp_path.iterdir()).write_bytes(b"cut short")
    with pytest.raises(TokError, match="damaged cache of features"):
        evaluate_samples(sets / "samples", [sets / "val"], Quadrants(), train=[sets / "train"], cache=tmp_path)


def test_folders_of_others_and_equal_sets(sets):
    """Any class folders may be the samples; a set has no distance to itself."""
    found = evaluate_samples(sets / "val", [sets / "val"], Quadrants(), train=[sets / "train"])
    assert found["results"]["fd_quadrants"] == pytest.approx(0, abs=1e-6) and found["results"]["precision"] == 1.0
    assert found["results"]["class_accuracy"] == 1.0 and "images_per_second" not in found["results"] and found["asked"]["options"] == {"tokens": None}


def test_what_cannot_be_measured(sets, tmp_path):
    broken = photos(tmp_path / "broken", 3)
    (broken / "red/000.png").write_bytes(b"no picture")
    found = evaluate_samples(sets / "samples", [broken], Quadrants())
    assert found["reference"]["images"] == 5 and found["reference"]["broken"][0][0] == "red/000.png"
    with pytest.raises(TokError, match="000.png"):
        evaluate_samples(broken, [sets / "val"], Quadrants())
    with pytest.raises(UsageError, match="at least two classes"):
        evaluate_samples(sets / "samples", [sets / "val"], Quadrants(), train=[sets / "train/red"])
    other = sampled(tmp_path / "other", [(0, "green", 0), (1, "red", 0)])
    with pytest.raises(TokError, match="of class 'green', the training images have blue, red"):
        evaluate_samples(other, [sets / "val"], Quadrants(), train=[sets / "train"])
    numbered = sampled(tmp_path / "numbered", [(7, "", 0), (1, "", 0)])
    with pytest.raises(TokError, match="of class 7, the training images have 0 to 1"):
        evaluate_samples(numbered, [sets / "val"], Quadrants(), train=[sets / "train"])
    with pytest.raises(TokError, match="at least 2 images on each side, got 1 samples"):
        evaluate_samples(sampled(tmp_path / "one", [(0, "red", 0)]), [sets / "val"], Quadrants())
    with pytest.raises(TokError, match="holds no samples yet"):
        evaluate_samples(sampled(tmp_path / "none", []), [sets / "val"], Quadrants())
    wide = tmp_path / "wide"
    wide.mkdir()
    write(wide / "a.png", torch.zeros(3, 8, 16))
    with pytest.raises(TokError, match="must be square, got 8 × 16"):
        evaluate_samples(wide, [sets / "val"], Quadrants())


def test_the_command_and_the_card(sets, tmp_path, monkeypatch, capfd):
    import tok1d.eval.choose
    from tok1d.generators.ar import AutoregressiveGenerator
    from tok1d.generators.condition import ClassCondition
    from tok1d.generators.space import TokenSpace

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tok1d.eval.choose, "feature_net", lambda name, nets: Quadrants())
    arguments = ["eval", "generate", str(sets / "samples"), str(sets / "val"), "--train", str(sets / "train"), "-o", "scores.json"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told.pop("output") == "scores.json" and told == json.loads(Path("scores.json").read_text()) and told["provenance"]["versions"]
    assert len(list(Path("eval/features").iterdir())) == 2
    assert main(arguments) == 0 and "class_accuracy 0.75" in capfd.readouterr().out
    AutoregressiveGenerator(TokenSpace(tokens=4, vocab_size=8), ClassCondition(2), width=16, depth=1, heads=2).eval().save_pretrained("g")
    assert main(["export", "g", "out", "--scores", "scores.json"]) == 0
    card = Path("out/README.md").read_text()
    assert "16 samples, quadrants-1, 20 images to compare with; tokens 8, guidance 2.0" in card and "| class_accuracy | 0.75 |" in card
    Path("wrong.json").write_text('{"results": {}}')
    assert main(["export", "g", "more", "--scores", "wrong.json"]) == 2 and "not the result of tok eval generate" in capfd.readouterr().err
    assert main(["eval", "generate", "nowhere", str(sets / "val")]) == 1 and "nowhere: no such file or folder" in capfd.readouterr().err
