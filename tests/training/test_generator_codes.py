"""GeneratorTask where the generator learns from codes: they are those of the tokenizer that the shards name, or nothing is trained."""

import json
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
import yaml

from tests.training import tiny as tokenizers
from tests.training.shards import drawn
from tok1d import hub
from tok1d.cli.main import main
from tok1d.data.tokens import TokenData
from tok1d.errors import ModelError, TokenError
from tok1d.generators.ar import AutoregressiveGenerator
from tok1d.generators.codes import CodeTable, wants_codes
from tok1d.generators.condition import ClassCondition, Unconditional
from tok1d.generators.generator import Generator
from tok1d.generators.heads_codes import Codes
from tok1d.generators.space import TokenSpace
from tok1d.tokenizers.quantizers.code_books import CodeBooks
from tok1d.training.checkpoints import SafeCheckpointIO
from tok1d.training.tasks import GeneratorTask


def small(space, condition):
    return AutoregressiveGenerator(space, condition, width=32, depth=1, heads=2, head=Codes(8, 8))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """``model/`` of 8 nested tokens, two books, and shards of its tokens, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tokenizers.spectral().eval()
    tokenizer.save_pretrained("model")
    drawn(tmp_path / "tokens", 48, TokenSpace.of(tokenizer))
    return tokenizer


def built(make=small, **settings) -> Generator:
    task = GeneratorTask(make, **settings)
    task._trainer = SimpleNamespace(datamodule=TokenData("tokens"), max_steps=1)
    task.setup("fit")
    return task.generator


def test_the_codes_are_those_of_the_tokenizer_of_the_shards(place):
    with pytest.raises(ModelError, match="needs the tokenizer that made the shards, tiny-spectral [0-9a-f]{16}: .*Give its name or folder as model.tokenizer"):
        built()
    table = built(tokenizer="model", tokens=3).head.codes
    expected = CodeBooks.of(place.quantizer, 3)
    assert table.book.tolist() == expected.book.tolist() == [0, 0, 0] and table.books.shape == (1, 16, 4)
    torch.testing.assert_close(table.books, expected.books / expected.books.square().mean().sqrt())
    whole = built(tokenizer="model")
    assert whole.head.codes.book.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] and whole.to_config()["head"]["books"] == 2
    again = built(tokenizer="model")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    Path("model").rename("tiny-spectral")
    assert not wants_codes(built()), "a folder of the name in the shards"


def test_a_generator_that_is_built_already_gets_them_too(place):
    space = TokenSpace.of(place)
    made = built(small(space, Unconditional()), tokenizer="model")
    assert made.head.codes.filled
    kept = built(Generator.from_config(made.to_config()), tokenizer="model")
    assert torch.equal(kept.head.codes.books, made.head.codes.books)
    made.save_pretrained("generator")
    assert built(Generator.from_pretrained("generator").requires_grad_(True)).head.codes.filled, "one that has its codes needs no tokenizer"


def test_another_tokenizer_is_refused(place):
    with torch.no_grad():
        place.quantizer.codebooks.mul_(2)
    place._model_id = None
    place.save_pretrained("other")
    with pytest.raises(TokenError, match="same form, other weights"):
        built(tokenizer="other")
    tokenizers.fsq().eval().save_pretrained("fsq")
    with pytest.raises(TokenError, match="makes tokens of tiny-spectral with tokens 8, tiny has tokens 4"):
        built(tokenizer="fsq")
    with pytest.raises(ModelError, match="has 3 codebooks of width 4, these are 2 of width 4; leave books and dim out"):
        built(lambda space, condition: AutoregressiveGenerator(space, condition, 32, 1, 2, head=Codes(8, 8, books=3, dim=4)), tokenizer="model")


def test_weights_to_start_from_bring_no_codes(place):
    """Those of a generator of another tokenizer with as many books: ids then mean what they mean in the shards."""
    with torch.no_grad():
        other = CodeBooks(torch.randn(2, 16, 4), torch.tensor([1, 0] * 4), torch.ones(8, 4))
        made = small(TokenSpace.of(place), ClassCondition(3))
        made.head.take(other)
        made.config["head"] = made.head.to_config()
        made.start.fill_(7.0)
    made.save_pretrained("start")
    begun = built(tokenizer="model", init_from="start")
    assert begun.start.eq(7).all() and begun.head.codes.book.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    books = CodeBooks.of(place.quantizer, 8).books
    torch.testing.assert_close(begun.head.codes.books, books / books.square().mean((1, 2), keepdim=True).sqrt())


def test_trained_by_command_exported_and_generating(place, capfd):
    """As a user does it: a recipe that says sizes only, a run, its continuation, a folder that works alone."""
    config = {
        "trainer": {
            "max_steps": 6, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
            "default_root_dir": "run", "gradient_clip_val": 1.0, "check_val_every_n_epoch": None, "val_check_interval": 3,
            "callbacks": [
                {"class_path": "tok1d.training.averaging.EMA", "init_args": {"decay": 0.9, "module": "generator"}},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "run/checkpoints", "every_n_train_steps": 3, "save_last": True, "save_top_k": -1, "monitor": None}},
            ],
        },
        "model": {
            "class_path": "tok1d.training.tasks.GeneratorTask",
            "init_args": {
                "generator": {
                    "class_path": "tok1d.generators.ar.AutoregressiveGenerator",
                    "init_args": {"width": 32, "depth": 1, "heads": 2, "head": {"class_path": "tok1d.generators.heads_codes.Codes", "init_args": {"features": 8, "hidden": 8}}},
                },
                "tokenizer": "model", "tokens": 6, "warmup_steps": 2, "lr": 0.01,
            },
        },
        "data": {"class_path": "tok1d.data.tokens.TokenData", "init_args": {"train": "tokens", "val": "tokens", "batch_size": 16}},
    }  # fmt: skip
    Path("run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "run.yaml"]) == 0, capfd.readouterr().err
    last = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert last["generator_config"]["head"] == {"class": "tok1d.generators.heads_codes.Codes", "features": 8, "hidden": 8, "books": 2, "dim": 4}
    half = next(p for p in Path("run/checkpoints").iterdir() if "step=3" in p.name)
    assert main(["fit", "--config", "run.yaml", "--ckpt_path", str(half), "--trainer.default_root_dir", "again"]) == 0, capfd.readouterr().err
    assert main(["export", "run", "made"]) == 0, capfd.readouterr().err
    Path("model").rename("gone")
    generator = Generator.from_pretrained("made")
    assert generator.generate(3, label="ones", seeds=1).model_id == place.model_id
    assert json.loads(Path("made/config.json").read_text())["head"]["books"] == 2
    books = CodeBooks.of(place.quantizer, 6).books
    torch.testing.assert_close(generator.head.codes.books, books / books.square().mean((1, 2), keepdim=True).sqrt())


def test_a_step_of_the_recipe(tmp_path, monkeypatch, capfd):
    """configs/generator/ar_small on shards of the shipped tokenizer, which it finds by their name."""
    monkeypatch.chdir(tmp_path)
    space = TokenSpace.of(hub.load("default"))
    for name in ("train", "val"):
        drawn(tmp_path / "tokens" / name, 4, space)
    sizes = ["--model.generator.init_args.width", "32", "--model.generator.init_args.heads", "2", "--model.generator.init_args.depth", "1"]
    assert main(["fit", "--config", "generator/ar_small", "--trainer.fast_dev_run", "true", "--data.batch_size", "2", *sizes]) == 0
    assert "val/token 8." in capfd.readouterr().err


def test_codes_are_neither_counted_nor_trained_nor_averaged(place):
    task = GeneratorTask(small, tokenizer="model", lr=0.1, weight_decay=0.5, warmup_steps=1)
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False, plugins=[SafeCheckpointIO()],
    )  # fmt: skip
    trainer.fit(task, TokenData("tokens", batch_size=8))
    table, books = task.generator.head.codes, CodeBooks.of(place.quantizer, 8).books
    assert isinstance(table, CodeTable)
    torch.testing.assert_close(table.books, books / books.square().mean((1, 2), keepdim=True).sqrt())
    names = {name for name, _ in task.named_parameters()}
    assert not any("books" in name or name.endswith(".book") for name in names)
    assert table.bias.any() and table.offset.any()
