"""TokPipeline: what the library makes, saved and loaded by diffusers' own code, seeds, callbacks, kinds of output, refusals."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tok1d
from tests.dct_model import make_model
from tests.generators.tiny import awake
from tok1d.errors import MissingExtraError, TokenError
from tok1d.generators.ar import AutoregressiveGenerator
from tok1d.generators.condition import ClassCondition, Unconditional
from tok1d.generators.generator import Generator
from tok1d.generators.space import TokenSpace

try:
    from tok1d.generators import pipeline
    from tok1d.generators.pipeline import GeneratorModel, TokenizerModel, TokPipeline, seeds_of
except MissingExtraError as error:
    pytest.skip(str(error), allow_module_level=True)


def model(condition=None) -> AutoregressiveGenerator:
    torch.manual_seed(0)
    space = TokenSpace.of(make_model())
    return awake(AutoregressiveGenerator(space, condition or ClassCondition(3, ["cat", "dog", "bird"]), width=16, depth=1, heads=2)).eval()


@pytest.fixture(scope="module")
def pipe() -> TokPipeline:
    made = TokPipeline(make_model(), model())
    made.set_progress_bar_config(disable=True)
    return made


def test_images_are_those_of_the_library(pipe):
    out = pipe(class_labels=["dog", 0], tokens=12, guidance_scale=2.0, generator=[9, 4], output_type="pt", options={"schedule": "linear", "temperature": 0.8})
    seq = model().generate(2, label=["dog", 0], tokens=12, seeds=[9, 4], guidance=2.0, schedule="linear", temperature=0.8)
    assert torch.equal(out.tokens.ids, seq.ids) and torch.equal(out.images, make_model().decode(seq))
    alone = pipe(class_labels=0, tokens=12, guidance_scale=2.0, generator=4, output_type="pt", options={"schedule": "linear", "temperature": 0.8})
    assert torch.equal(alone.tokens.ids[0], out.tokens.ids[1])
    torch.testing.assert_close(alone.images[0], out.images[1])


def test_kinds_of_output(pipe):
    asked = {"class_labels": 1, "num_images": 2, "generator": 3, "tokens": 6}
    pt, array, pil = (pipe(**asked, output_type=kind).images for kind in ("pt", "np", "pil"))
    assert array.shape == (2, 16, 16, 3) and np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert [p.size for p in pil] == [(16, 16)] * 2 and np.array_equal(np.asarray(pil[1]), (array[1] * 255).round().astype(np.uint8))
    images, made = pipe(**asked, output_type="tokens", return_dict=False)
    assert images is None and made.shape == (2, 6)
    assert torch.equal(pipe(**asked, prefix=made[:, :3], output_type="tokens").tokens.ids[:, :3], made.ids[:, :3])


def test_seeds():
    one, again = (torch.Generator().manual_seed(5) for _ in range(2))
    drawn = seeds_of(one, 2)
    assert drawn == [seeds_of(again, 1)[0], seeds_of(again, 1)[0]] and drawn[0] != drawn[1]
    each = [torch.Generator().manual_seed(i) for i in (5, 6)]
    assert seeds_of(each, 2)[0] == drawn[0]
    torch.manual_seed(1)
    first = seeds_of(None, 1)
    torch.manual_seed(1)
    assert seeds_of(None, 1) == first
    for wrong in (True, -1, [1]):
        with pytest.raises(TokenError, match="generator must be"):
            seeds_of(wrong, 2)


def test_a_saved_pipeline_samples_as_before(tmp_path):
    made = model()
    made.sampling = made.check_sampling({"guidance": 2.0, "schedule": "linear", "temperature": 0.7})
    TokPipeline(make_model(), made).save_pretrained(tmp_path)
    again = TokPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    seq = model().generate(1, label=2, tokens=8, seeds=3, guidance=2.0, schedule="linear", temperature=0.7)
    assert torch.equal(again(class_labels=2, tokens=8, generator=3, output_type="tokens").tokens.ids, seq.ids)
    plain = again(class_labels=2, tokens=8, generator=3, guidance_scale=1.0, output_type="tokens", options={"temperature": 1.0}).tokens
    assert torch.equal(plain.ids, model().generate(1, label=2, tokens=8, seeds=3).ids)


def test_callbacks_see_every_step(pipe):
    seen = []
    pipe(class_labels=0, num_images=2, tokens=4, generator=0, output_type="tokens", callback_on_step_end=lambda p, i, n, now: seen.append((p is pipe, i, n, now["tokens"].shape)))
    assert seen == [(True, i, 4, (2, i + 1)) for i in range(4)]

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(class_labels=0, callback_on_step_end=stop)


def test_saved_and_loaded_by_diffusers(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "p")
    index = json.loads((tmp_path / "p/model_index.json").read_text())
    assert index["tokenizer"] == ["tok1d.generators.pipeline", "TokenizerModel"] and index["generator"] == ["tok1d.generators.pipeline", "GeneratorModel"]
    assert {p.suffix for p in (tmp_path / "p").rglob("*") if p.is_file()} == {".json", ".safetensors"}
    assert tok1d.load(tmp_path / "p/tokenizer").model_id == make_model().model_id
    assert Generator.from_pretrained(tmp_path / "p/generator").model_id == model().model_id
    again = TokPipeline.from_pretrained(tmp_path / "p")
    again.set_progress_bar_config(disable=True)
    asked = {"class_labels": "bird", "tokens": 8, "generator": 1, "output_type": "pt"}
    assert torch.equal(again(**asked).images, pipe(**asked).images)
    assert again.components.keys() == {"tokenizer", "generator"} and again.generator.config.model_id == f"{model().model_id:016x}"


@pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")
def test_half_precision_keeps_the_quantizer_and_is_not_saved(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "p")
    half = TokPipeline.from_pretrained(tmp_path / "p", torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    quantizer = half.tokenizer.model.quantizer
    assert half.tokenizer.dtype == half.generator.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in quantizer.parameters())
    assert half(class_labels=1, tokens=4, generator=0, output_type="np").images.dtype == np.float32
    with pytest.raises(TokenError, match="cast to torch.bfloat16, and rounded weights are another model"):
        half.save_pretrained(tmp_path / "half")
    whole = half.to(torch.float32).to("cpu")
    assert whole.tokenizer.dtype == torch.float32 and whole.device.type == "cpu"


def test_push_is_what_save_writes(pipe, monkeypatch):
    """The hub's side is not there: what is handed to it is looked at."""
    from diffusers.utils import hub_utils

    sent = {}

    def uploaded(*, repo_id, folder_path, **_):
        sent[repo_id] = {str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()}

    monkeypatch.setattr(hub_utils, "create_repo", lambda repo, **_: SimpleNamespace(repo_id=repo))
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *_, **__: SimpleNamespace(save=lambda path: None))
    monkeypatch.setattr(hub_utils, "populate_model_card", lambda card, **_: card)
    monkeypatch.setattr(hub_utils, "upload_folder", uploaded)
    pipe.push_to_hub("me/pipe")
    wanted = {f"{part}/{name}" for part in ("tokenizer", "generator") for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    assert sent["me/pipe"] == wanted | {"model_index.json"}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"class_labels": 5}, "classes are 0 to 2"),
        ({"class_labels": 0, "prompt": "a cat"}, "not a text"),
        ({}, "needs a class"),
        ({"class_labels": 0, "output_type": "jpg"}, "output_type must be one of pil, pt, np, tokens, got 'jpg'"),
        ({"class_labels": 0, "num_inference_steps": 4}, "has no option 'steps'"),
        ({"class_labels": 0, "tokens": 40}, "rows of 1 to 32 tokens"),
        ({"class_labels": [0, 1], "generator": [1]}, "one for each of the 2 images, got 1"),
        ({"class_labels": [0, 1], "num_images": 3}, "one for each of the 3 rows, got 2"),
        ({"class_labels": 0, "decoder_options": {"steps": 3}}, "steps"),
    ],
)
def test_wrong_requests(pipe, asked, said):
    with pytest.raises(TokenError, match=said):
        pipe(**asked)


def test_parts_that_do_not_fit():
    with pytest.raises(TokenError, match="Use .*, or train a generator"):
        TokPipeline(make_model(), AutoregressiveGenerator(TokenSpace(tokens=4, vocab_size=8), Unconditional(), width=16, depth=1, heads=2))
    wrapped = TokPipeline(TokenizerModel(make_model()), GeneratorModel(model(Unconditional())))
    wrapped.set_progress_bar_config(disable=True)
    assert wrapped(num_images=2, tokens=2, generator=0, output_type="tokens").tokens.shape == (2, 2)
    assert pipeline.ModelMixin in type(wrapped.generator).__mro__
