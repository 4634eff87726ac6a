"""GeneratorTask: one batch is one step of a plain loop, exact continuation, the shards say what is built, learning, export."""

import json
import os
import socket
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.generators.tiny import IDS
from tests.training.shards import CLASSES, SPACE, drawn, rows
from tok1d.cli.main import main
from tok1d.data.module import DrawnData
from tok1d.data.tokens import TokenData
from tok1d.errors import ModelError, TokenError, UsageError
from tok1d.generators.ar import AutoregressiveGenerator
from tok1d.generators.condition import ClassCondition, Unconditional
from tok1d.generators.generator import Generator
from tok1d.generators.space import TokenSpace
from tok1d.training.averaging import EMA
from tok1d.training.checkpoints import SafeCheckpointIO
from tok1d.training.export import load_run
from tok1d.training.export_generator import holds_generator, load_generator_run
from tok1d.training.tasks import GeneratorTask

SMALL = partial(AutoregressiveGenerator, width=32, depth=1, heads=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("shards")
    drawn(home / "train", 48)
    drawn(home / "val", 12, seed=1)
    drawn(home / "plain", 12, classes=[])
    return home


def data(shards: Path, **options) -> TokenData:
    return TokenData(str(shards / "train"), **{"val": str(shards / "val"), "batch_size": 4, "val_batch_size": 5, **options})


class Record(lightning.Callback):
    def __init__(self) -> None:
        self.losses, self.scores, self.keys = [], [], []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())
        self.keys.append(batch["key"])

    def on_validation_end(self, trainer, task) -> None:
        self.scores.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")})


def fit(task: GeneratorTask, feed, folder: Path, steps: int = 4, resume: Path | None = None, **options) -> Record:
    record, ema = Record(), EMA(0.9, module="generator")
    keep = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True, monitor=None)
    trainer = lightning.Trainer(
        default_root_dir=folder, accelerator="cpu", use_distributed_sampler=False, max_steps=steps, callbacks=[record, ema, keep],
        logger=False, plugins=[SafeCheckpointIO()], check_val_every_n_epoch=None, val_check_interval=2, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, **{"gradient_clip_val": 1.0, "devices": 1, **options},
    )  # fmt: skip
    trainer.fit(task, datamodule=feed, ckpt_path=resume, weights_only=True)
    record.ema, record.trainer = ema, trainer
    return record


def task(make=SMALL, **settings) -> GeneratorTask:
    torch.manual_seed(0)
    return GeneratorTask(make, **{"warmup_steps": 2, "lr": 1e-2, **settings})


# the step --------------------------------------------------------------------------------------------------------


def test_a_run_is_a_plain_loop(shards, tmp_path):
    run = task(weight_decay=0.3)
    record = fit(run, data(shards), tmp_path, steps=4)
    torch.manual_seed(0)
    model, feed = SMALL(SPACE, ClassCondition(3, CLASSES)), data(shards)
    feed.trainer = record.trainer
    whole = {key: i for i, key in enumerate(feed.train_set.keys)}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    kept = [n for n, p in model.named_parameters() if p.ndim < 2 or id(p) in tables or any(w in n for w in ("norm", "embed", "position", "token"))]
    groups = [[p for n, p in model.named_parameters() if n not in kept], [p for n, p in model.named_parameters() if n in kept]]
    optimizer = torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], betas=(0.9, 0.95), weight_decay=0.3)
    for step, keys in enumerate(record.keys):
        seeds = np.random.SeedSequence((0, 0, step)).generate_state(2, np.uint64)
        batch = feed.train_set.__getitems__([whole[key] for key in keys])
        torch.manual_seed(int(seeds[0]))
        losses, _ = model.losses(batch, torch.Generator().manual_seed(int(seeds[1])))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (0.5, 1.0, 1.0, 0.55)[step]
        optimizer.zero_grad()
        losses["token"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert losses["token"].item() == pytest.approx(record.losses[step], rel=1e-5)
    assert {"condition.table.weight", "start"} <= set(kept) and len(groups[0]) == 5
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    trained = last.get("current_model_state", last["state_dict"])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[f"generator.{name}"], value, rtol=1e-4, atol=1e-6)


def test_resumed_is_uninterrupted_and_validations_repeat(shards, tmp_path):
    whole = fit(task(lr=1e-3), data(shards), tmp_path / "whole", steps=6)
    fit(task(lr=1e-3), data(shards), tmp_path / "part", steps=6, limit_train_batches=4, max_epochs=1)
    saved = torch.load(tmp_path / "part/last.ckpt", weights_only=True)
    assert saved["global_step"] == 4 and saved["generator_config"]["space"]["vocab_size"] == 64
    rest = fit(task(lr=1e-3), data(shards), tmp_path / "part", steps=6, resume=tmp_path / "part/last.ckpt")
    assert rest.losses == whole.losses[4:] and rest.scores == whole.scores[2:]
    names = {"val/token", "val/bits_per_token"}
    assert whole.scores[0].keys() == names and whole.scores[0] != whole.scores[2]
    still = fit(task(lr=0.0), data(shards), tmp_path / "still")
    assert still.scores[0] == still.scores[1], "the same draws at every validation"


def test_the_number_of_the_step_is_told(shards, tmp_path):
    seen = []

    class Watching(AutoregressiveGenerator):
        def losses(self, batch, generator=None):
            seen.append(batch.get("step"))
            return super().losses(batch, generator)

    fit(task(partial(Watching, width=32, depth=1, heads=2)), data(shards, val=""), tmp_path, accumulate_grad_batches=2, limit_val_batches=0)
    assert seen == [0, 0, 1, 1, 2, 2, 3, 3]


def test_weights_of_losses(shards, tmp_path):
    with pytest.raises(ModelError, match="weights name losses that do not exist here: .'nothing'.; there are .'token'."):
        fit(task(weights={"nothing": 1.0}), data(shards), tmp_path)
    one, two = (fit(task(weights={"token": w}), data(shards), tmp_path / str(w), steps=1).losses[0] for w in (1.0, 0.5))
    assert two == pytest.approx(one / 2)


def part(rank: int, port: int, shards: Path, folder: Path) -> None:
    """A process of two, as a launcher starts it."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    made = task(partial(SMALL, variable="announced"))
    record = fit(made, data(shards, batch_size=2, val_batch_size=3), folder, devices=2, strategy="ddp")
    torch.save({"losses": record.losses, "scores": record.scores, "state": made.generator.state_dict()}, folder / f"{rank}.pt")


def test_two_processes_are_one_with_the_whole_batch(shards, tmp_path):
    """Hidden tokens, dropped classes and announced lengths are drawn for both; validation counts what each has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(part, (port, shards, tmp_path), nprocs=2, start_method="fork")
    whole = task(partial(SMALL, variable="announced"))
    alone = fit(whole, data(shards, batch_size=4, val_batch_size=6), tmp_path / "alone")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [sum(pair) / 2 for pair in zip(*(r["losses"] for r in ranks))] == pytest.approx(alone.losses, rel=1e-5)
    for found in ranks:
        assert [s["val/token"] for s in found["scores"]] == pytest.approx([s["val/token"] for s in alone.scores], rel=1e-5)
        for name, value in whole.generator.state_dict().items():
            torch.testing.assert_close(found["state"][name], value, atol=1e-4, rtol=1e-4)


def test_the_initial_weights_follow_from_the_seed_alone(shards):
    """Whatever drew numbers before; else processes with other histories would start from other weights."""
    states = []
    for history, seed in ((1, 0), (2, 0), (1, 5)):
        made = task(seed=seed)
        torch.manual_seed(history)
        before = torch.get_rng_state()
        states.append(made._build(data(shards)).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


# what is built ---------------------------------------------------------------------------------------------------


def built(feed, **settings) -> Generator:
    made = task(**settings)
    made._trainer = SimpleNamespace(datamodule=feed, max_steps=1)
    made.setup("fit")
    return made.generator


def test_the_shards_say_what_is_built(shards):
    model = built(data(shards))
    assert model.space == SPACE and model.condition.names == CLASSES and model.condition.drop == 0.1
    assert isinstance(built(TokenData(str(shards / "plain"))).condition, Unconditional)
    short = built(data(shards), tokens=4, drop=0.3)
    assert short.space == TokenSpace(tokens=4, vocab_size=64, nested=True, tokenizer="drawn", model_id=SPACE.model_id) and short.condition.drop == 0.3
    made = task(tokens=4)
    made.generator = short
    batch = made.shortened({"ids": torch.arange(32).view(2, 16), "key": ["a", "b"], "lengths": torch.tensor([2, 9])})
    assert batch["ids"].tolist() == [[0, 1, 2, 3], [16, 17, 18, 19]] and batch["lengths"].tolist() == [2, 4]
    with pytest.raises(ModelError, match="needs 'ids', got only key"):
        made.shortened({"key": []})


@pytest.mark.parametrize(
    ("settings", "feed", "error", "said"),
    [
        ({}, DrawnData(), UsageError, "learns from token shards .*TokenData.* got DrawnData"),
        ({"tokens": 17}, None, TokenError, "rows of 1 to 16 tokens, got tokens=17"),
        ({"make": SMALL(IDS, Unconditional())}, None, UsageError, "made for .*'vocab_size': 16.*shards hold .*'vocab_size': 64"),
        ({"make": SMALL(SPACE, Unconditional()), "tokens": 4}, None, UsageError, "leave condition and tokens out"),
        ({"condition": ClassCondition(5)}, None, UsageError, "knows 5 classes, the shards have 3"),
        ({"compile": ["generator.nothing"]}, None, UsageError, "no module 'generator.nothing'; give names such as generator.condition"),
        ({"init_from": "nowhere"}, None, ModelError, "nowhere: cannot be loaded"),
    ],
)  # fmt: skip
def test_what_does_not_fit(shards, settings, feed, error, said):
    with pytest.raises(error, match=said):
        built(feed or data(shards), **settings)


def test_a_checkpoint_of_another_generator(shards, tmp_path):
    fit(task(), data(shards), tmp_path, steps=2)
    with pytest.raises(ModelError, match="it has depth: 1, the configuration and its shards say 2"):
        fit(task(partial(SMALL, depth=2)), data(shards), tmp_path / "b", resume=tmp_path / "last.ckpt")
    with pytest.raises(ModelError, match="not one of a generator"):
        task(SMALL(SPACE, Unconditional())).on_load_checkpoint({"tokenizer_config": {}})


# from shards to a folder -----------------------------------------------------------------------------------------


def test_trained_by_command_exported_and_right(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    space = TokenSpace(tokens=5, vocab_size=8, nested=True, tokenizer="drawn", model_id=SPACE.model_id)
    drawn(Path("tokens"), 96, space)
    drawn(Path("val"), 24, space, seed=1)
    short = ["--trainer.max_steps", "60", "--trainer.val_check_interval", "30", "--data.val", "val", "--data.batch_size", "16", "--model.lr", "0.01", "--model.generator.init_args.width", "32"]
    assert main(["fit", "--config", "debug/generator_ar", *short, "--model.generator.init_args.depth", "1"]) == 0
    assert main(["export", "runs/debug/generator_ar", "model"]) == 0
    assert main(["export", "runs/debug/generator_ar", "model"]) == 2 and "holds config.json already" in capfd.readouterr().err
    config = json.loads(Path("model/config.json").read_text())
    assert config["space"]["tokenizer"] == "drawn" and config["space"]["model_id"] == SPACE.model_id and config["condition"]["names"] == CLASSES
    model = Generator.from_pretrained("model")
    label = torch.arange(24) % 3
    made = model.generate(24, label=label, seeds=5, temperature=0.5).ids
    steps = (made[:, 1:] - made[:, :-1]) % 8
    assert (steps == 1 + 2 * label[:, None]).float().mean() > 0.9, "every class counts in its own steps"
    card = Path("model/README.md").read_text()
    for said in ("# model", "drawn 0123456789abcdef", "one of 3 classes", "0 ones, 1 threes, 2 fives", "60 of 16 images", "1 token"):
        assert said in card, card
    last = next(Path("runs").rglob("last.ckpt"))
    assert main(["export", str(last), "half", "--dtype", "float16", "--name", "Half"]) == 0 and "# Half" in Path("half/README.md").read_text()
    averaged = torch.load(last, weights_only=True)["state_dict"]
    assert all(torch.equal(value, averaged[f"generator.{name}"]) for name, value in model.state_dict().items())
    assert main(["export", str(last), "no", "--layout", "titok-legacy"]) == 2 and "is a generator" in capfd.readouterr().err
    assert holds_generator(Path("half")) and load_generator_run(Path("half")).step is None
    assert built(TokenData("tokens"), make=partial(SMALL, depth=1), init_from="model").state_dict()["start"].equal(model.start)
    with pytest.raises(ModelError, match="init_from model: a generator of other parts"):
        built(TokenData("tokens"), make=partial(SMALL, depth=2), init_from="model")
    with pytest.raises(ModelError, match="no tokenizer_config"):
        load_run(last)


def test_rows_are_progressions():
    ids, labels = rows(6)
    assert np.diff(ids[1]).tolist().count(3) >= 12 and labels == [0, 1, 2, 0, 1, 2] and ids.max() < 64
