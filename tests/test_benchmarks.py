"""The measuring programs: their arithmetic, their caches, and small runs of each; the committed document is up to date."""

import io
import json
import math
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import codebook_usage, folder_throughput, linear_line, measure, plots, record, tables
from tok1d.eval import codecs as codec_search


class Squared:
    """Stands in for LPIPS: same interface, no weights; counts how often the original is looked at."""

    def __init__(self) -> None:
        self.calls = 0

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        self.calls += 1
        return [images]

    def compare(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
        return (a[0] - b[0]).square().mean((1, 2, 3))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Five drawn photos in a tar."""
    path = tmp_path / "drawn-val-00000.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(5):
            data = folder_throughput.draw(i)
            member = tarfile.TarInfo(f"photo_{i}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_views_are_evenly_spaced_and_described(shard: Path) -> None:
    views = measure.ViewSet(shard, 2)
    assert views.name == "drawn-val"
    assert [v.key for v in views] == ["photo_0", "photo_2"]
    assert views[0].pixels.shape == (3, 256, 256) and views[0].pixels.dtype == torch.uint8
    described = views.describe()
    assert (described["images"], described["of"]) == (2, 5)
    assert described["sha256"] != measure.ViewSet(shard, 3).describe()["sha256"]


def test_measure_resumes_from_its_cache(shard: Path, tmp_path: Path) -> None:
    views, lpips, rendered = measure.ViewSet(shard, 2), Squared(), []

    def render(index, view, missing):
        rendered.append((index, missing))
        return {c: None if c == "none" else measure.Rendered((view.pixels.float() * float(c)).byte(), {"bytes": 7}) for c in missing}

    path = tmp_path / "cache.jsonl"
    first = measure.measure(views, ["0.5", "none"], render, measure.Cache(path), lpips)
    assert rendered == [(0, ["0.5", "none"]), (1, ["0.5", "none"])] and lpips.calls == 4
    assert first[0]["0.5"]["bytes"] == 7 and first[0]["0.5"]["lpips"] > 0 and "psnr" not in first[0]["none"]

    with path.open("a") as file:
        file.write('{"image": "killed while wri')
    again = measure.measure(views, ["0.5", "none", "1"], render, measure.Cache(path), lpips)
    assert rendered[2:] == [(0, ["1"]), (1, ["1"])]
    assert again[1]["0.5"] == first[1]["0.5"]
    assert again[1]["1"]["psnr"] == 100.0 and again[1]["1"]["lpips"] == 0.0
    assert len(measure.Cache(path).rows) == 6
    assert measure.point([r["none"] for r in again]) == {"images": 0}


def test_interval_covers_the_mean() -> None:
    x = np.random.default_rng(0).normal(5, 1, 400)
    found = measure.interval(x.tolist())
    assert found["low"] < found["mean"] < found["high"]
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.15)


@pytest.mark.parametrize("bits", [1.0, 12.0, 300.0])
def test_water_filling_spends_the_bits_and_the_channel_keeps_its_promise(bits: float) -> None:
    variance = torch.logspace(1, -3, 60)
    level = linear_line.water_level(variance, bits)
    assert (variance / level).log2().clamp(min=0).sum().item() / 2 == pytest.approx(bits, rel=1e-4)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 60, generator=rng) * variance.sqrt()
    noise = torch.randn(20000, 60, generator=rng)
    error = (linear_line.channel(x, variance, level, noise) - x).square().mean(0)
    assert torch.allclose(error, variance.clamp(max=level), rtol=0.06)


def test_linear_statistics_rebuild_smooth_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_line, "SMALL", 12)
    rng = torch.Generator().manual_seed(0)
    small = torch.rand(24, 3, 4, 4, generator=rng)
    images = torch.nn.functional.interpolate(small, size=(256, 256), mode="bicubic").clamp(0, 1)
    stats = linear_line.fit(images.split(8))
    assert torch.allclose(stats["pca32_axes"] @ stats["pca32_axes"].T, torch.eye(3 * 12**2), atol=1e-3)
    view = measure.to_bytes(images[0])
    for line, least in (("pca32", 22), ("dct64", 40)):
        coefficients, back = linear_line.transform(stats, line, view)
        assert measure.psnr(measure.to_bytes(back(coefficients)), view) > least
        # the variances describe both the images and their mirror images
        mirrored, _ = linear_line.transform(stats, line, view.flip(2))
        assert mirrored.square().sum().item() == pytest.approx(coefficients.square().sum().item(), rel=0.2)


def test_codecs_stay_within_the_budget_and_gain_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_search, "SIZES", (8, 16, 32, 64))
    view = np.asarray(Image.open(io.BytesIO(folder_throughput.draw(3))).convert("RGB").resize((64, 64)))
    for codec in ("jpeg", "webp"):
        best = codec_search.search(view, codec, (8, 400, 900))
        assert best[8] is None
        assert best[400] is not None and best[400].bytes <= 400 and best[900].bytes <= 900
        assert best[900].psnr > best[400].psnr
        assert best[400].pixels.shape == view.shape
        small = Image.fromarray(view).resize((best[400].side,) * 2, Image.Resampling.BICUBIC)
        data = codec_search.encode(small, codec, best[400].quality)
        assert len(data) == best[400].bytes and b"Exif" not in data


def test_usage_of_even_and_of_dead_codes() -> None:
    even = torch.arange(64 * 50).view(-1, 1) % 64
    dead = torch.zeros_like(even)
    found = codebook_usage.usage(torch.cat([even, dead], 1), 64, torch.tensor([0, 1]))
    assert [b["used"] for b in found["books"]] == [1.0, round(1 / 64, 4)]
    assert found["entropy_bits"]["by_position"] == [6.0, 0.0]
    assert codebook_usage.usage(torch.cat([even, dead], 1), 64, torch.tensor([0, 0]))["codes_used"] == 1.0


def test_a_process_is_timed_and_weighed_and_its_failure_told() -> None:
    done = record.run([sys.executable, "-c", "x = bytearray(80 << 20); print(len(x))"])
    assert done.output.strip() == str(80 << 20) and done.seconds > 0 and 80 < done.peak_mib < 250
    with pytest.raises(SystemExit, match="no such luck"):
        record.run([sys.executable, "-c", "raise SystemExit('no such luck')"])


def fake_results(folder: Path, sha: str = "aa") -> None:
    """Results as the programs write them, with invented numbers."""
    sets = [{"set": "drawn-val", "images": 5, "of": 9, "sha256": sha}]

    def score(psnr: float, lpips: float, images: int = 5) -> dict:
        return {"images": images, "psnr": {"mean": psnr, "low": psnr - 1, "high": psnr + 1}, "lpips": {"mean": lpips, "low": lpips - 0.1, "high": lpips + 0.1}}

    curve = [{"tokens": k, "bits": 12 * k, "payload_bytes": 3 * k // 2, "file_bytes": 3 * k // 2 + 36, **score(10 + k / 10, 1 / k)} for k in (8, 64, 256)]
    record.save("default_scores", {"sets": [{**sets[0], "monotone": True, "curve": curve}]}, folder=folder)
    lines = [{"bits": 8 * b, "bytes": float(b), **score(11.5, 0.6)} for b in measure.BUDGETS]
    record.save("linear_line", {"sets": [{**sets[0], "sha256": "aa", "curves": {"pca32": lines, "dct64": lines}}]}, folder=folder)
    codec = [{"bytes": b, "images": 0} if b < 96 else {"bytes": b, "bytes_mean": b - 2.0, **score(20.25, 0.5, 4 if b == 96 else 5)} for b in measure.BUDGETS]
    record.save("image_codecs", {"sets": [{**sets[0], "sha256": "aa", "curves": {"webp": codec, "jpeg": codec}}]}, folder=folder)


def test_tables_say_what_the_results_say(tmp_path: Path) -> None:
    fake_results(tmp_path)
    results = {name: record.load(name, tmp_path) for name in tables.COMMANDS}
    assert "| 8 | 96 | 12 | 48 | 10.80 (9.80 to 11.80) | 0.125 (0.025 to 0.225) |" in tables.scores(results)
    payload, file = tables.by_payload(results).splitlines(), tables.by_file(results).splitlines()
    assert "| 12 | 10.8 / 0.125 (8 tokens) | 11.5 / 0.600 | 11.5 / 0.600 | does not fit | does not fit |" in payload
    assert "| 96 | 16.4 / 0.016 (64 tokens) | 11.5 / 0.600 | 11.5 / 0.600 | fits 4 of 5 | fits 4 of 5 |" in payload
    assert "| 384 | 35.6 / 0.004 (256 tokens) | 11.5 / 0.600 | 11.5 / 0.600 | 20.2 / 0.500 | 20.2 / 0.500 |" in payload
    assert "| 12 | does not fit | 11.5 / 0.600 | 11.5 / 0.600 | does not fit | does not fit |" in file
    assert any(line.startswith("| 384 | 16.4 / 0.016 (64 tokens)") for line in file)  # 256 tokens are a file of 420 bytes
    assert "Not measured yet" in tables.startup(results)
    fake_results(tmp_path, sha="bb")
    with pytest.raises(SystemExit, match="different images"):
        tables.by_payload({name: record.load(name, tmp_path) for name in tables.COMMANDS})


def test_plots_are_drawn_from_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib (tok1d[eval])")
    fake_results(tmp_path)
    plots.main(["--results", str(tmp_path), "--out", str(tmp_path / "figures")])
    for metric in plots.AXES:
        with Image.open(tmp_path / "figures" / f"{metric}_bytes.png") as picture:
            assert picture.size[0] > 600 and len(set(picture.convert("RGB").resize((64, 64)).getdata())) > 10


def test_results_carry_their_origin(tmp_path: Path) -> None:
    path = record.save("some", {"value": 1}, folder=tmp_path)
    found = json.loads(path.read_text())
    assert found["value"] == 1 and found["machine"]["cores"] >= 1 and found["machine"]["torch"] and found["date"].endswith("UTC")
    assert record.load("other", tmp_path) is None


def test_the_committed_document_is_what_the_results_make() -> None:
    assert tables.main(["--check"]) == 0
