"""PrincipalFlow: components against numpy, rows that come back, tokens of latents from before quantization, a run from photos to samples."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from lightning import Trainer

from tests.data.files import encoded, shard
from tests.data.test_module import attach
from tests.data.test_tokenise import make
from tests.generators import tiny
from tests.training import tiny as tokenizers
from tok1d.data.module import PhotoData
from tok1d.data.tokens import TokenData
from tok1d.errors import ModelError, TokenError, UsageError
from tok1d.generators.condition import ClassCondition, Unconditional
from tok1d.generators.generator import Generator
from tok1d.generators.latents import Latents
from tok1d.generators.principal import Principal, PrincipalFlow
from tok1d.generators.row_noise import RowNoise
from tok1d.generators.space import TokenSpace
from tok1d.training.tasks import GeneratorTask

SPACE = TokenSpace(tokens=4, kind="latents", channels=3, nested=True)
SMALL = {"width": 32, "depth": 1, "heads": 2, "hidden": 64}


def rows(count: int = 200, tokens: int = 4, seed: int = 0) -> torch.Tensor:
    """Latents (count, tokens, 3) of few directions: token 1 repeats token 0."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, tokens, 3, generator=draw) * torch.tensor([5.0, 1.0, 0.2])
    x[:, 1] = x[:, 0]
    return x + torch.arange(3) * 10


# components ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_components_are_those_of_numpy(whitening):
    x, plan = rows(), Principal(4, 3, places=3, components=9, whitening=whitening)
    plan.measure(x.split(64))
    y = plan(x)
    flat = x.flatten(1).double().numpy()
    values, directions = np.linalg.eigh(np.cov(flat.T, bias=True))
    values, directions = values[::-1][:9], directions[:, ::-1][:, :9]
    expected = np.abs((flat - flat.mean(0)) @ directions)
    np.testing.assert_allclose((y.flatten(1) * plan.unit).abs().numpy(), expected, atol=2e-4)
    spread = y.flatten(1).var(0, correction=0)
    assert y.shape == (200, 3, 3) and spread.mean().item() == pytest.approx(1, abs=1e-3)
    ratio = (spread / spread[0]).numpy()
    np.testing.assert_allclose(ratio, (values / values[0]) ** (1 - whitening), rtol=2e-3)
    torch.testing.assert_close(plan.inverse(y), x, atol=1e-4, rtol=0)  # nine hold all there is: three repeat others


def test_few_components_are_the_best_of_their_number():
    x, plan = rows(), Principal(4, 3, places=1, components=2)
    plan.measure([x])
    left = (plan.inverse(plan(x)) - x).flatten(1).var(0, correction=0).sum().item()
    values = np.linalg.eigvalsh(np.cov(x.flatten(1).double().numpy().T, bias=True))
    assert left == pytest.approx(values[:-2].sum(), rel=1e-4)


def test_batches_and_offsets_change_nothing():
    x = rows() + 1000
    whole, parts = Principal(4, 3, 2, 8), Principal(4, 3, 2, 8)
    whole.measure([x]), parts.measure(x.split(7))
    torch.testing.assert_close(parts(x), whole(x), atol=2e-3, rtol=0)
    constant = Principal(4, 3, 2, 8)
    constant.measure([torch.full((5, 4, 3), 2.5)])
    torch.testing.assert_close(constant.inverse(constant(x[:2] * 0 + 2.5)), torch.full((2, 4, 3), 2.5))
    with pytest.raises(TokenError, match="no latents"):
        whole.measure([])
    with pytest.raises(TokenError, match="not finite"):
        whole.measure([torch.full((5, 4, 3), float("nan"))])


@pytest.mark.parametrize(("change", "message"), [({"components": 10}, "no multiple"), ({"components": 13}, "components"), ({"whitening": 2}, "whitening")])
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(ModelError, match=message):
        PrincipalFlow(SPACE, Unconditional(), **{"components": 9, "places": 3, **SMALL, **change})


# samples -------------------------------------------------------------------------------------------------------------


def made() -> PrincipalFlow:
    torch.manual_seed(0)
    model = PrincipalFlow(SPACE, ClassCondition(3), components=8, places=4, **SMALL)
    model.prepare(lambda: [{"latents": rows()}])
    tiny.awake(model.net), tiny.awake(model.condition)
    return model.eval()


@pytest.mark.parametrize("solver", ["euler", "heun", "maruyama"])
def test_a_row_is_the_same_alone_in_a_batch_and_shorter(solver):
    model, options = made(), {"steps": 3, "guidance": 2.0, "solver": solver}
    whole = model.generate(3, label=[0, 1, 2], seeds=[5, 6, 9], **options)
    assert whole.shape == (3, 4)
    torch.testing.assert_close(model.generate(1, label=2, seeds=[9], **options).data, whole.data[2:], atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(3, label=[0, 1, 2], seeds=[5, 6, 9], tokens=2, **options).data, whole.data[:, :2])
    assert not torch.allclose(model.generate(1, label=1, seeds=[9], **options).data, whole.data[2:], atol=1e-3)


def test_one_step_is_one_velocity():
    model = made()
    x = RowNoise([3]).normal(4, 2)
    v = model.net(x, torch.ones(1), model.condition({"label": torch.tensor([1])}, 1))
    torch.testing.assert_close(model.generate(1, label=1, seeds=3, steps=1).data, model.scale.inverse(x - v))


def test_what_is_saved_comes_back_and_what_is_refused(tmp_path):
    model = made()
    model.save_pretrained(tmp_path)
    back = Generator.from_pretrained(tmp_path)
    assert isinstance(back, PrincipalFlow) and torch.equal(back.scale.basis, model.scale.basis)
    assert torch.equal(back.generate(1, label=1, steps=2).data, model.generate(1, label=1, steps=2).data)
    with pytest.raises(TokenError, match="no option 'prefix'"):
        model.generate(1, label=0, prefix=torch.zeros(1, 2, 3))
    batch = {"latents": rows(2), "label": torch.zeros(2).long()}
    with pytest.raises(TokenError, match="whole rows of 4"):
        model.losses({**batch, "lengths": torch.tensor([2, 4])})
    with pytest.raises(TokenError, match="not known yet"):
        PrincipalFlow(SPACE, Unconditional(), components=8, places=4, **SMALL).losses(batch)


def test_a_distribution_is_learned():
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    centre = torch.randn(2, 4, 3, generator=draw) * 4
    label = torch.randint(2, (512,), generator=draw)
    x = centre[label] + 0.5 * torch.randn(512, 4, 3, generator=draw)
    model = PrincipalFlow(SPACE, ClassCondition(2), components=12, places=4, **SMALL)
    model.prepare(lambda: [{"latents": part} for part in x.split(100)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        i = torch.randint(512, (64,), generator=draw)
        loss = model.losses({"latents": x[i], "label": label[i]}, draw)[0]["flow"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    label = torch.arange(40) % 2
    out = model.eval().generate(40, label=label, steps=10).data
    assert (out - centre[label]).square().mean() < 0.1 * (out - centre[1 - label]).square().mean()


# before quantization ---------------------------------------------------------------------------------------------------


def test_latents_from_before_quantization_become_the_tokens_of_the_picture():
    tokenizer = tokenizers.fsq().eval()
    space = TokenSpace.of(tokenizer, "encoder")
    assert space.before and space.kind == "latents" and TokenSpace.from_config(space.to_config()) == space
    images = torch.rand(2, 3, *tokenizer.image_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = Latents(tokenizer.encode_latents(images), space)
    seq = tokenizer.encode(images)
    assert torch.equal(found.tokens(tokenizer).ids, seq.ids)
    torch.testing.assert_close(found.images(tokenizer), tokenizer.decode(seq), atol=1e-5, rtol=0)
    with pytest.raises(ModelError, match="before"):
        TokenSpace(tokens=4, vocab_size=8, before=True)
    continuous = tokenizers.kl().eval()
    with pytest.raises(TokenError, match="has before False"):
        replace(TokenSpace.of(continuous), before=True).matches(continuous)
    with pytest.raises(TokenError, match="makes latents, not encoder"):
        TokenSpace.of(continuous, "encoder")


def test_from_photos_to_samples(tmp_path):
    """Shards of what the encoder makes, a run that measures its components first, and pictures through the quantizer."""
    tokenizer = tokenizers.spectral().eval()
    photos = shard(tmp_path / "photos.tar", encoded(12), {f"{i:03d}": {"label": i % 3} for i in range(12)})
    make(tokenizer, photos, tmp_path / "shards", what="encoder", tokens=4, views="flip")
    data = TokenData(str(tmp_path / "shards"), batch_size=4)
    assert data.space == TokenSpace.of(tokenizer, "encoder").first(4)
    seen = list(data.every_image())
    assert [key for batch in seen for key in batch["key"]] == data.train_set.keys
    task = GeneratorTask(partial(PrincipalFlow, components=8, places=2, **SMALL), condition=Unconditional(), warmup_steps=1)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    Trainer(accelerator="cpu", devices=1, max_steps=2, use_distributed_sampler=False, default_root_dir=tmp_path, **options).fit(task, data)
    again = Principal(4, 4, 2, 8)
    again.measure(batch["latents"].float() for batch in seen)
    torch.testing.assert_close(task.generator.scale.basis, again.basis)
    made = task.generator.eval().generate(2, steps=2)
    assert made.tokens(tokenizer).shape == (2, 4)
    torch.testing.assert_close(made.images(tokenizer), tokenizer.decode(made.tokens(tokenizer)), atol=1e-5, rtol=0)


def test_latents_from_before_are_no_targets(tmp_path):
    tokenizer = tokenizers.spectral().eval()
    photos = shard(tmp_path / "photos.tar", encoded(4), {})
    make(tokenizer, photos, tmp_path / "shards", what="encoder")
    with pytest.raises(UsageError, match="before quantization"):
        attach(PhotoData([str(photos)], size=32, targets=str(tmp_path / "shards")))
    with pytest.raises(UsageError, match="kept whole"):
        make(tokenizer, photos, tmp_path / "other", what="latents", tokens=4)
