"""Token shards of several lengths: those of tok encode, zero beyond, resumed to the same bytes, learned from with a stop."""

import json
from functools import partial
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.data.files import encoded, folder
from tests.data.test_tokenise import PowerCut, files_of, make
from tests.dct_model import make_model
from tests.tokenizers.test_halting import trained_like
from tests.training import tiny
from tok1d import disk
from tok1d.cli.main import main
from tok1d.data.index import index_images, read_sample
from tok1d.data.module import PhotoData
from tok1d.data.photos import decode_rgb
from tok1d.data.tokenise import plan
from tok1d.data.tokens import TokenData, TokenShards
from tok1d.data.views import cut
from tok1d.errors import TokenError, TokError, UsageError
from tok1d.generators.ar import AutoregressiveGenerator
from tok1d.tokenizers.budget import Auto, Budget
from tok1d.tokenizers.quantizers.bsq import BSQ
from tok1d.training.tasks import GeneratorTask

BUDGETS = {"psnr": Budget(psnr=16.0), "bytes": Budget(psnr=16.0, max_bytes=52), "auto": Auto(18.0), "auto, bytes": Auto(18.0, 60)}


@pytest.fixture(scope="module")
def model():
    """One whose halting head says something."""
    made = make_model()
    made.halting = trained_like()
    return made.eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    files = encoded(10)
    return folder(tmp_path_factory.mktemp("photos"), {f"{'cat' if i % 3 else 'dog'}/{name}": data for i, (name, data) in enumerate(files.items())} | {"cat/x.png": b"broken"})


@pytest.mark.parametrize("name", BUDGETS)
def test_rows_are_those_of_encode_and_zero_beyond(tmp_path, model, photos, name):
    budget = BUDGETS[name]
    made = make(model, photos, tmp_path, views="flip", tokens=budget)
    stored = TokenShards(tmp_path)
    assert stored.head.shape == [32] and stored.head.space["tokens"] == 32 and len(made.lengths) == 20
    batch = stored.__getitems__([(i, i) for i in range(10)])
    assert batch["ids"].shape == (10, 32) and batch["lengths"].dtype == torch.int64 and batch["lengths"].shape == (10,)
    seen, files = set(), {sample.key: read_sample(sample) for sample in index_images([photos])}
    for i, key in enumerate(stored.keys):
        for view in (0, 1):
            image = cut(decode_rgb(files[key]), stored.window(i, view), (16, 16))[None]
            wanted = model.encode(image.float() / 255 if image.dtype == torch.uint8 else image)
            found = budget.search(model, image, wanted)
            n = stored.length(i, view)
            assert n == found.tokens[0] and torch.equal(stored.values(i, view)[:n], wanted.ids[0, :n])
            assert not stored.values(i, view)[n:].any()
            seen.add(n)
        view = stored.view_of(i, i)
        assert batch["lengths"][i] == stored.length(i, view) and torch.equal(batch["ids"][i], stored.values(i, view))
    assert len(seen) > 2 and sorted(made.lengths) == sorted(stored.length(i, v) for i in range(10) for v in (0, 1))
    assert max(seen) <= (52 - 36 if name == "bytes" else 60 - 36 if name == "auto, bytes" else 32)
    assert json.loads((tmp_path / "tokens.json").read_text())["budget"]["rule"] == ("auto" if "auto" in name else "search")


def test_views_that_miss_are_counted_and_whole(tmp_path, model, photos):
    made = make(model, photos, tmp_path, tokens=Budget(psnr=90.0))
    assert made.missed == 10 and made.lengths == [32] * 10 and TokenShards(tmp_path).__getitems__([0, 5])["lengths"].tolist() == [32, 32]


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, model, photos, at, monkeypatch):
    make(model, photos, tmp_path / "whole", tokens=Auto(18.0))
    replace, calls = disk.os.replace, []

    def cut_off(*paths):
        calls.append(paths)
        if len(calls) == at:
            raise PowerCut
        replace(*paths)

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(disk.os, "replace", cut_off)
        make(model, photos, tmp_path / "cut", tokens=Auto(18.0))
    assert make(model, photos, tmp_path / "cut", tokens=Auto(18.0)).kept == (at > 3)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_other_budgets_and_other_heads_are_another_set(tmp_path, model, photos):
    make(model, photos, tmp_path, tokens=Auto())
    make(model, photos, tmp_path, tokens=Auto(model.halting.quality))  # what is stored with the head is what it takes
    for other in (None, Auto(21.0), Auto(max_bytes=50), Budget(psnr=24.0)):
        with pytest.raises(UsageError, match=r"another set of token shards \(budget"):
            make(model, photos, tmp_path, tokens=other)
    again = make_model()
    again.halting = trained_like()
    again.halting.position.data += 0.1
    assert again.model_id == model.model_id
    with pytest.raises(UsageError, match=r"another set of token shards \(budget"):
        make(again.eval(), photos, tmp_path, tokens=Auto())


def test_a_number_of_tokens(tmp_path, model, photos):
    make(model, photos, tmp_path / "all")
    made = make(model, photos, tmp_path / "eight", tokens=8)
    stored = TokenShards(tmp_path / "eight")
    assert stored.head.shape == [8] and stored.head.space["tokens"] == 8 and made.lengths == [] and stored.length(3, 0) == 8
    batch = stored.__getitems__([3, 4])
    assert "lengths" not in batch and torch.equal(batch["ids"], TokenShards(tmp_path / "all").__getitems__([3, 4])["ids"][:, :8])
    for data in ("eight", "all"):
        GeneratorTask(partial(AutoregressiveGenerator, width=16, depth=1, heads=2), tokens=8)._build(TokenData(str(tmp_path / data)))


def test_bits_of_long_codes(tmp_path, photos):
    made = tiny.titok(BSQ(70)).eval()
    make(made, photos, tmp_path, tokens=Budget(max_bytes=70))
    batch = TokenShards(tmp_path).__getitems__([0, 1])
    assert batch["lengths"].tolist() == [3, 3] and batch["bits"][:, :3].any() and not batch["bits"][:, 3:].any()


def test_impossible_requests(model, photos):
    samples = index_images([photos])
    with pytest.raises(UsageError, match="what latents is kept whole"):
        plan(model, samples, what="latents", tokens=Auto())
    with pytest.raises(TokenError, match="no halting head"):
        plan(make_model(), samples, tokens=Auto())
    for tokens in (Budget(psnr=20.0), 7):
        with pytest.raises(TokenError, match="exactly 32 tokens|rows of 32 tokens"):
            plan(make_model(nested=False), samples, tokens=tokens)


def test_damaged_lengths_are_refused(tmp_path, model, photos):
    make(model, photos, tmp_path, tokens=Auto(18.0))
    path = tmp_path / "00000.safetensors"
    whole = load_file(path)
    for damaged in (None, whole["lengths"] + 32, whole["lengths"] * 0, whole["lengths"][:1]):
        arrays = {k: v for k, v in whole.items() if k != "lengths"} | ({} if damaged is None else {"lengths": np.ascontiguousarray(damaged)})
        save_file(arrays, path)
        with pytest.raises(TokError, match=r"shard 0 has no lengths in 1\.\.32"):
            TokenShards(tmp_path)[0]


def test_they_are_no_targets(tmp_path, model, photos):
    make(model, photos, tmp_path, tokens=Auto(18.0))
    with pytest.raises(UsageError, match="rows of several lengths, which are no targets"):
        data = PhotoData([str(photos)], size=16, targets=str(tmp_path))
        data.setup("fit")


def test_a_set_without_a_budget_written_before_there_were_any(tmp_path, model, photos):
    make(model, photos, tmp_path)
    head = json.loads((tmp_path / "tokens.json").read_text())
    del head["budget"]
    (tmp_path / "tokens.json").write_text(json.dumps(head))
    assert "lengths" not in TokenShards(tmp_path).__getitems__([0]) and make(model, photos, tmp_path).kept == 3


def test_a_model_that_may_end_learns_from_them(tmp_path, capsys):
    """From pictures to a step and to samples of several lengths, with the shipped tokenizer."""
    pictures = folder(tmp_path / "photos", {f"{'plain' if i % 2 else 'rich'}/{name}": data for i, (name, data) in enumerate(encoded(4, 280).items())})
    assert main(["tokenize", str(pictures), "-o", str(tmp_path / "s"), "--tokens", "auto", "--quality", "17", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert 1 <= row["least_tokens"] < row["mean_tokens"] < row["most_tokens"] <= 256
    data = TokenData(str(tmp_path / "s"), batch_size=4)
    task = GeneratorTask(partial(AutoregressiveGenerator, width=16, depth=1, heads=2, variable="stop"), warmup_steps=0)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=2, **options)
    trainer.fit(task, data)
    assert trainer.global_step == 2 and 0 < trainer.callback_metrics["train/stop"] < 10 and torch.isfinite(trainer.callback_metrics["train/token"])
    batch = TokenShards(tmp_path / "s").__getitems__(range(4))
    found, _ = task.generator.eval().losses(batch)
    assert torch.isfinite(found["stop"]) and found["stop"] > 0 and torch.isfinite(found["token"])
    garbled = {**batch, "ids": torch.where(torch.arange(256) < batch["lengths"][:, None], batch["ids"], 7)}
    assert all(torch.equal(value, found[name]) for name, value in task.generator.losses(garbled)[0].items()), "what is beyond counts for nothing"
    assert task.generator.generate(2, label=0).lengths.min() >= 1
