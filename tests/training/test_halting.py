"""HaltingTask: the head learns what decoding measures, and nothing else of the tokenizer moves."""

from pathlib import Path

import pytest
import torch

from tests.dct_model import TOKENS, make_model, picture
from tests.training import tiny
from tok1d.cli.main import main
from tok1d.data.module import DrawnData
from tok1d.errors import ModelError, UsageError
from tok1d.tokenizers.budget import Auto, Budget
from tok1d.tokenizers.halting import CurveHead
from tok1d.training.export import export, load_run
from tok1d.training.tasks.halting import HaltingTask


def drawn(size: int = 16, **options) -> DrawnData:
    return DrawnData(**{"images": 24, "val_images": 8, "size": size, "batch_size": 8, **options})


def pictures(count: int, seed: int = 5, size: int = 16) -> torch.Tensor:
    from tok1d.data.drawn import DrawnImages

    found = DrawnImages(count, size, seed)
    return torch.stack([torch.as_tensor(found[i]["image"]) for i in range(count)]).float() / 255


def test_it_learns_what_decoding_measures():
    """On pictures that the codes tell all about but a little noise: well below what one curve for every picture could do."""
    torch.manual_seed(0)
    detail = torch.linspace(0, 2, 512)[torch.randperm(512)]
    images = torch.cat([picture(i, detail=float(d)) for i, d in enumerate(detail)])
    plain = make_model()
    images = plain.decode(plain.encode(images)) + 0.04 * torch.randn_like(images)
    train, images = images[:480], images[480:]
    task = HaltingTask(make_model(), width=32, quality=22.0, prefixes=4, fitted=32)
    optimizer = torch.optim.AdamW(task.head.parameters(), 5e-3)
    draw = torch.Generator().manual_seed(0)
    for step in range(120):
        batch = {"image": train[step % 60 * 8 :][:8]}
        losses, stats = task.losses_of(batch, task.draw_lengths(8, draw), draw)
        optimizer.zero_grad()
        losses["curve"].backward()
        optimizer.step()
    model = task.tokenizer
    seq = model.encode(images)
    predicted = model.halting.quality_of(model.halting(model.codes_of(seq.ids, seq.lengths))).detach()
    errors = torch.stack([(model.decode(seq[:, :k]) - images).square().mean((1, 2, 3)) for k in range(1, TOKENS + 1)], 1)
    measured = -10 * errors.log10()
    off, one_curve = (predicted - measured).abs().mean().item(), (measured - measured.mean(0)).abs().mean().item()
    assert off < 0.4 * one_curve and stats["psnr_off"] < 0.4 * one_curve, (off, stats, one_curve)
    auto, search = Auto().search(model, None, seq), Budget(psnr=22.0).search(model, images, seq)
    pairs = torch.tensor([auto.tokens, search.tokens]).double()
    assert torch.corrcoef(pairs)[0, 1] > 0.8 and len(set(search.tokens)) > 4, pairs


def test_measurements_are_those_of_decode():
    task = HaltingTask(tiny.spectral())
    images = pictures(3, size=32)
    data, codes = task.encode(images)
    lengths = torch.tensor([1, 8, 3])
    found = task.measure({"image": images}, codes, lengths)
    for i, k in enumerate(lengths.tolist()):
        out = task.tokenizer.decode(task.tokenizer.encode(images[i : i + 1], k))
        assert found[i].item() == pytest.approx((out - images[i]).square().mean().log().item(), abs=1e-4)
    assert torch.equal(data, task.tokenizer.encode(images).ids)


def test_codebooks_that_follow_their_data_stay(tmp_path):
    task = HaltingTask(tiny.vq_ema(), fitted=4)
    before = {k: v.clone() for k, v in task.tokenizer.state_dict().items()}
    done = tiny.Setup(tmp_path, task, steps=3).run()
    after = task.tokenizer.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all(k.startswith("halting.") for k in moved)
    assert not task.tokenizer.training and task.head.training
    groups = {id(p) for g in done.trainer.optimizers[0].param_groups for p in g["params"] if p.requires_grad}
    assert groups == {id(p) for p in task.head.parameters()}


def test_the_last_images_are_remembered(tmp_path):
    task = HaltingTask(tiny.fsq(), prefixes=3, memory=10)
    tiny.Setup(tmp_path, task, steps=4).run()  # 16 images
    kept = task._kept
    assert kept["data"].shape == (10, 4) and kept["lengths"].shape == kept["errors"].shape == (10, 3)
    codes = task.tokenizer.codes_of(kept["data"], torch.full((10,), 4))
    assert kept["errors"][-1].unique().numel() == kept["lengths"][-1].unique().numel() and codes.shape == (10, 4, 3)
    assert int(task.head.seen) == 16


def test_interrupted_equals_uninterrupted(tmp_path):
    whole = tiny.Setup(tmp_path / "whole", HaltingTask(tiny.fsq(), memory=12, fitted=5), steps=6).run()
    cut = tiny.Setup(tmp_path / "cut", HaltingTask(tiny.fsq(), memory=12, fitted=5), steps=6, crash_at=4)
    with pytest.raises(RuntimeError, match="power cut"):
        cut.run()
    again = tiny.Setup(tmp_path / "cut", HaltingTask(tiny.fsq(), memory=12, fitted=5), steps=6).run(tmp_path / "cut" / "last.ckpt")
    assert again.record.losses == whole.record.losses[4:]
    assert tiny.differences(again.checkpoint()["state_dict"], whole.checkpoint()["state_dict"]) == []
    assert tiny.differences(again.checkpoint()["halting_memory"], whole.checkpoint()["halting_memory"]) == []


def test_export_keeps_head_and_id(tmp_path):
    plain = tiny.fsq()
    plain.eval().save_pretrained(tmp_path / "plain")
    done = tiny.Setup(tmp_path / "run", HaltingTask(str(tmp_path / "plain"), width=8, quality=17.0), steps=3).run()
    export(tmp_path / "run", tmp_path / "out")
    model = load_run(tmp_path / "out").tokenizer
    assert model.model_id == plain.model_id and model.halting.quality == 17.0
    average = done.checkpoint()["state_dict"]
    for key, value in model.halting.state_dict().items():
        assert torch.equal(value, average[f"tokenizer.halting.{key}"]), key
    with pytest.warns(UserWarning, match="miss") if model.encode(pictures(1)).shape[1] else None:
        assert model.encode(pictures(2), tokens=Auto(200.0)).lengths.tolist() == [4, 4]


def test_a_head_that_is_there_is_kept_on_request():
    model = tiny.fsq()
    model.halting = CurveHead(4, 3, 8, quality=30.0)
    given = model.halting
    task = HaltingTask(model, keep=True, width=48, quality=20.0)
    assert task.head is given is model.halting and task.head.quality == 30.0 and all(p.requires_grad for p in task.head.parameters())
    assert not any(p.requires_grad for name, p in model.named_parameters() if not name.startswith("halting."))
    assert HaltingTask(model, quality=20.0).head.quality == 20.0 and model.halting is not given


def test_lpips_is_measured_where_it_is_predicted(tmp_path):
    task = HaltingTask(tiny.fsq(), metric="lpips", quality=0.4)
    task.perceptual["lpips"] = lambda a, b: (a - b).abs().mean((1, 2, 3))
    images = pictures(4)
    _, codes = task.encode(images)
    out = task.tokenizer.decode(task.tokenizer.encode(images, 2))
    torch.testing.assert_close(task.measure({"image": images}, codes, torch.full((4,), 2)).exp(), (out - images).abs().mean((1, 2, 3)))
    done = tiny.Setup(tmp_path, task, steps=2, options={"limit_val_batches": 1, "val_check_interval": 1}).run()
    assert 0 < done.trainer.callback_metrics["val/lpips_4"] < 1 and "val/lpips_off" in done.trainer.callback_metrics


def test_validation_says_how_far_it_is_off(tmp_path):
    task = HaltingTask(tiny.fsq(), val_tokens=[1, 4])
    options = {"limit_val_batches": 1, "val_check_interval": 1}
    found = tiny.Setup(tmp_path, task, drawn(val_images=3), steps=1, options=options).run().trainer.callback_metrics
    assert found["val/psnr_off"].item() == pytest.approx((found["val/psnr_off_1"].item() + found["val/psnr_off_4"].item()) / 2)
    assert 5 < found["val/psnr_4"] < 30


def test_lengths_are_drawn_for_all_ranks_together(monkeypatch):
    task = HaltingTask(tiny.fsq(), prefixes=3)
    whole = task.draw_lengths(8, torch.Generator().manual_seed(3))
    rows = []
    for rank in range(2):
        monkeypatch.setattr("tok1d.tokenizers.quantizers.common.world", lambda rank=rank: (rank, 2))
        rows.append(task.draw_lengths(4, torch.Generator().manual_seed(3)))
    assert torch.equal(torch.cat(rows), whole) and whole.shape == (8, 3) and whole.min() >= 1 and whole.max() <= 4


def test_refusals():
    with pytest.raises(UsageError, match="keep"):
        HaltingTask(tiny.fsq(), keep=True)
    with pytest.raises(UsageError, match="prefixes, memory and fitted"):
        HaltingTask(tiny.fsq(), memory=0)
    with pytest.raises(ModelError, match="nested"):
        HaltingTask(make_model(nested=False))


def test_the_debug_recipe(tmp_path, monkeypatch):
    recipe = Path(__file__).parents[2] / "configs/debug/halting.yaml"
    monkeypatch.chdir(tmp_path)
    small = ["--model.init_args.val_tokens", "[8]", "--data.init_args.val_images", "1", "--data.init_args.batch_size", "1"]
    assert main(["fit", "--config", str(recipe), "--trainer.fast_dev_run", "true", *small]) == 0
