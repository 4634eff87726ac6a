import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.dct_model import make_model
from tok1d.errors import TokError, UsageError
from tok1d.eval import run as running
from tok1d.eval.codebook import Codes
from tok1d.eval.frechet import Moments, frechet_distance
from tok1d.eval.manifest import Manifest
from tok1d.eval.measures import GRID, Features, Pixels
from tok1d.eval.protocol import Protocol
from tok1d.eval.run import Rank, evaluate, read_rows
from tok1d.eval.systems import CodecSystem, FolderSystem, ResizeSystem, TokenizerSystem

SMALL = Protocol("small-v1", 16, "crop", "bicubic", "model", "text-v1-256", "face-v2-256", "tests")


class Colours:
    """A feature network for tests: colour means of quarters, and their first four as logits."""

    name, id, distance_name = "colours", "colours/1", "fd_colours"

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = torch.nn.functional.avg_pool2d(images.float() / 255, images.shape[-1] // 2).flatten(1)
        return {"pooled": pooled, "logits": pooled[:, :4] * 9}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(running, "CHUNK", 4)


@pytest.fixture
def photos(tmp_path) -> Manifest:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = torch.Generator().manual_seed(0)
    for i in range(14):
        coarse = torch.rand(1, 3, 5, 6, generator=rng)
        image = torch.nn.functional.interpolate(coarse, (40 + i, 50), mode="bicubic").clamp(0, 1)
        Image.fromarray((image[0].permute(1, 2, 0) * 255).byte().numpy()).save(folder / f"photo{i:02d}.png")
    return Manifest.load(folder)


def measures():
    return [Pixels(), Codes(), Features(Colours(), sample=8)]


def run(photos, out, system=None, **options):
    system = system or TokenizerSystem(make_model(), [1, 4])
    return evaluate(system, photos, SMALL, measures(), out, **options)


def numbers(summary):
    return {k: v for k, v in summary.items() if k != "provenance"}


def test_one_two_and_three_ranks_give_the_same_numbers(photos, tmp_path):
    alone = run(photos, tmp_path / "1", batch_size=3)
    for count in (2, 3):
        out = tmp_path / str(count)
        found = [run(photos, out, rank=Rank(i, count), batch_size=count) for i in range(count)]
        assert found[:-1] == [None] * (count - 1)
        assert numbers(found[-1]) == numbers(alone)
    assert alone["rates"][0]["ok"] == 14 and alone["rates"][1]["metrics"]["psnr"]["n"] == 14
    assert alone["rates"][0]["metrics"]["psnr"]["mean"] < alone["rates"][1]["metrics"]["psnr"]["mean"]


def test_numbers_are_those_of_a_plain_loop(photos, tmp_path):
    from tok1d.eval.pixel import psnr, to_uint8
    from tok1d.eval.view import make_view

    summary = run(photos, tmp_path / "out")
    model, net = make_model(), Colours()
    views = torch.stack([make_view(photos.read(s), SMALL)[0] for s in photos.samples])
    pictures = to_uint8(model.decode(model.encode(views, 4)))
    row = summary["rates"][1]
    assert row["metrics"]["psnr"]["mean"] == pytest.approx(psnr(views, pictures).mean().item(), rel=1e-6)
    real, fake = ((net.features(x)["pooled"].double() / GRID).round() * GRID for x in (views, pictures))
    wanted = frechet_distance(Moments.of(real), Moments.of(fake))
    assert row["measures"]["features/colours"]["fd_colours"] == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    ids = model.encode(views, 4).ids
    codes = row["measures"]["codes"]
    assert codes["tokens"] == ids.numel() and codes["distinct"] == len(ids.unique())
    share = ids.flatten().bincount().double() / ids.numel()
    assert codes["entropy_bits"] == pytest.approx(-(torch.special.xlogy(share, share).sum() / torch.log(torch.tensor(2.0))).item(), rel=1e-6)
    assert row["metrics"]["bytes"]["mean"] == -(-4 * model.bits_per_token // 8)


def test_a_run_that_was_stopped_goes_on(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "SAVE_EVERY", 0.0)
    whole, out = run(photos, tmp_path / "whole"), tmp_path / "out"

    class Stop(Exception):
        pass

    def stop(done, chunks):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        run(photos, out, progress=stop)
    assert not (out / "summary.json").exists()
    seen = []
    system = TokenizerSystem(make_model(), [1, 4])
    reconstruct = system.reconstruct
    system.reconstruct = lambda views, names: (seen.extend(names), reconstruct(views, names))[1]
    again = run(photos, out, system)
    assert len(seen) == 14 - 8 and numbers(again) == numbers(whole)
    assert numbers(run(photos, out)) == numbers(whole)  # a third time there is nothing to do


def _killed(photos, out):
    class Slow(TokenizerSystem):
        def reconstruct(self, views, names):
            time.sleep(0.3)
            return super().reconstruct(views, names)

    running.CHUNK, running.SAVE_EVERY = 4, 0.0
    run(photos, Path(out), Slow(make_model(), [1, 4]))


def test_a_killed_process_leaves_a_run_that_goes_on(photos, tmp_path):
    out = tmp_path / "out"
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(photos, str(out)))
    process.start()
    deadline = time.monotonic() + 300  # importing torch alone takes a minute on a busy machine
    while not list(out.glob("states/*.safetensors")) and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(out.glob("states/*.safetensors")) and not (out / "summary.json").exists()
    assert numbers(run(photos, out)) == numbers(run(photos, tmp_path / "whole"))


def test_another_run_is_not_mixed_in(photos, tmp_path):
    run(photos, tmp_path / "out")
    with pytest.raises(UsageError, match="another run.*rates"):
        run(photos, tmp_path / "out", TokenizerSystem(make_model(), [2]))
    summary = run(photos, tmp_path / "out", TokenizerSystem(make_model(), [2]), restart=True)
    assert [r["rate"] for r in summary["rates"]] == ["k2"]


def test_what_cannot_be_read_is_a_row(photos, tmp_path):
    folder = photos.base / photos.samples[3].path
    Path(folder).write_bytes(Path(folder).read_bytes()[:60])
    os.remove(photos.base / photos.samples[9].path)
    summary = run(photos, tmp_path / "out")
    row = summary["rates"][0]
    assert (row["images"], row["ok"], sum(row["failed"].values())) == (14, 12, 2)
    assert row["metrics"]["psnr"]["n"] == 12
    table = {r["id"]: r["status"] for r in read_rows(tmp_path / "out", "images") if r["rate"] == "k1"}
    assert len(table) == 14 and sum(s == "ok" for s in table.values()) == 12
    assert "No such file" in table[photos.samples[9].id]


def test_codecs_and_resizes_go_through_the_same_door(photos, tmp_path):
    jpeg = run(photos, tmp_path / "jpeg", CodecSystem("jpeg", [10, 90]))
    sizes = [r["metrics"]["file_bytes"]["mean"] for r in jpeg["rates"]]
    assert sizes[0] < sizes[1] and all(r["metrics"]["bytes"]["mean"] < s for r, s in zip(jpeg["rates"], sizes))
    bound = run(photos, tmp_path / "resize", ResizeSystem([8, 16]))
    assert bound["rates"][1]["metrics"]["mae"]["mean"] == 0 and bound["rates"][1]["metrics"]["psnr"]["mean"] == 100
    assert bound["rates"][1]["measures"]["features/colours"]["fd_colours"] == pytest.approx(0, abs=1e-9)
    budget = run(photos, tmp_path / "budget", CodecSystem("webp", budgets=[20, 400]))
    low, high = budget["rates"]
    assert low["failed"] == {"does not fit": 14 - low["ok"]} and high["ok"] == 14
    assert high["metrics"]["file_bytes"]["mean"] <= 400


def test_pictures_made_elsewhere(photos, tmp_path):
    from tok1d.eval.view import make_view

    folder = tmp_path / "made"
    folder.mkdir()
    for i, sample in enumerate(photos.samples):
        view = make_view(photos.read(sample), SMALL)[0]
        if i == 2:
            view = view[:, :-1]
        if i != 5:
            Image.fromarray(view.permute(1, 2, 0).numpy()).save(folder / f"{Path(sample.id).stem}.png")
    (tmp_path / "bytes.json").write_text(json.dumps({s.id: 100 for s in photos.samples}))
    summary = run(photos, tmp_path / "out", FolderSystem(folder, tmp_path / "bytes.json"))
    row = summary["rates"][0]
    assert row["ok"] == 12 and row["metrics"]["mae"]["mean"] == 0 and row["metrics"]["bytes"]["mean"] == 100
    assert any("missing" in status for status in row["failed"]) and any("15×16" in status for status in row["failed"])
    with pytest.raises(UsageError, match="no such folder"):
        FolderSystem(tmp_path / "nowhere")


def test_wrong_asks_are_said(photos, tmp_path):
    with pytest.raises(UsageError, match="tokens 99"):
        TokenizerSystem(make_model(), [99])
    with pytest.raises(UsageError, match="jpeg2000"):
        CodecSystem("jpeg2000", [10])
    other = Protocol("other-v1", 24, "crop", "bicubic", "model", "text-v1-256", "face-v2-256", "tests")
    with pytest.raises(UsageError, match="24×24"):
        evaluate(TokenizerSystem(make_model(), [1]), photos, other, measures(), tmp_path / "a")
    with pytest.raises(TokError, match="no images"):
        run(Manifest("empty", tmp_path, ()), tmp_path / "b")
    run(photos, tmp_path / "c")
    (tmp_path / "c" / "states" / "rank0.safetensors").write_bytes(b"damaged")
    with pytest.raises(TokError, match="--restart"):
        run(photos, tmp_path / "c")
