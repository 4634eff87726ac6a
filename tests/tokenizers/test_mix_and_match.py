"""Any encoder × quantizer × decoder × length rule builds, trains, encodes, decodes, saves and loads.

By default every two parts meet at least once (a covering design); the whole product is under the ``slow`` mark.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from tests.tokenizers import mix
from tests.tokenizers.mix import DECODERS, IMAGE, QUANTIZERS, TABLES, Mix
from tok1d.errors import ModelError, TokenError
from tok1d.tokenizers.part import Part
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.tokens import TokenSequence

COVERING = mix.covering()


def images(batch: int = 3) -> Tensor:
    return torch.rand(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1))


def make(combination: Mix) -> Tokenizer1D:
    """Built from configuration data, with no weight at zero (where some paths start and pass no gradient yet)."""
    torch.manual_seed(0)
    tokenizer = Tokenizer1D.from_config(json.loads(json.dumps(mix.config(combination))))
    with torch.no_grad():
        for p in tokenizer.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return tokenizer


def context(tokenizer: Tokenizer1D, batch: int) -> dict[str, Tensor]:
    """What a decoder must be told beside the codes."""
    if "text" not in tokenizer.decoder.options:
        return {}
    row = DECODERS[type(tokenizer.decoder).__name__]
    return {"text": torch.randn(batch, row["text_tokens"], row["text_dim"], generator=torch.Generator().manual_seed(2))}


def check_training(tokenizer: Tokenizer1D) -> None:
    """A training step gives finite losses, and gradients that reach image, encoder and decoder."""
    pictures = images().requires_grad_()
    torch.manual_seed(3)
    out = tokenizer.train()(pictures, **context(tokenizer, 3))
    assert set(out.lengths.tolist()) <= set(tokenizer.token_lengths) and set(tokenizer.quantizer.loss_weights) <= set(out.losses)
    own = {name: loss for name, loss in out.losses.items() if name not in tokenizer.quantizer.loss_weights}
    if tokenizer.decoder.objective == "own":
        assert out.reconstruction is None and own and set(own) == set(tokenizer.decoder.loss_weights)
        loss = sum(own.values())
    else:
        assert out.reconstruction.shape == pictures.shape and not own
        loss = (out.reconstruction - pictures.detach()).square().mean()
    assert all(value.ndim == 0 and value.isfinite() for value in (loss, *out.losses.values()))
    loss.backward()  # of the picture alone: gradients of the encoder have come through the codes
    for part in (tokenizer.encoder, tokenizer.decoder):
        parameters = list(part.parameters())
        assert not parameters or any(p.grad is not None and (p.grad != 0).any() for p in parameters), type(part).__name__
    assert pictures.grad is not None and (pictures.grad != 0).any() and pictures.grad.isfinite().all()


def check_use(tokenizer: Tokenizer1D, folder: Path) -> None:
    """Loaded from its folder it makes the same tokens and, from a .tok file, the same pictures."""
    tokenizer.eval().requires_grad_(False).save_pretrained(folder)
    again = Tokenizer1D.from_pretrained(folder)
    assert again.to_config() == json.loads((folder / "config.json").read_text()) == tokenizer.to_config()
    if not tokenizer.is_discrete:
        check_continuous(tokenizer, again)
        return
    seq, more = tokenizer.encode(images()), context(tokenizer, 3)
    assert seq.shape == (3, tokenizer.max_tokens) and torch.equal(again.encode(images()).data, seq.data)
    assert (seq.bits is not None) == (tokenizer.bits_per_token > 62)
    wanted = tokenizer.decode(seq, **more)
    assert wanted.shape == (3, 3, IMAGE, IMAGE) and wanted.isfinite().all()
    for n in {1, 3, tokenizer.max_tokens} & set(tokenizer.token_lengths):
        short = tokenizer.encode(images(), tokens=n)
        assert torch.equal(short.data, seq.data[:, :n])
        short.save(folder / "images.tok")
        loaded = TokenSequence.load(folder / "images.tok")
        assert torch.equal(loaded.data, short.data) and loaded.bits_per_image == [n * tokenizer.bits_per_token] * 3
        pictures = again.decode(loaded, **more)
        assert torch.equal(pictures, tokenizer.decode(short, **more))
        assert torch.equal(pictures, wanted) or n < tokenizer.max_tokens
    if not tokenizer.is_nested:
        with pytest.raises(TokenError, match=f"exactly {tokenizer.max_tokens} tokens"):
            tokenizer.encode(images(), tokens=1)


def check_continuous(tokenizer: Tokenizer1D, again: Tokenizer1D) -> None:
    with pytest.raises(TokenError, match="continuous bottleneck"):
        tokenizer.encode(images())
    with torch.inference_mode():
        codes = [t.quantizer(t.encode_latents(images())).q for t in (tokenizer, again)]
        pictures = [t.decode_latents(q, **context(t, 3)) for t, q in zip((tokenizer, again), codes)]
    assert torch.equal(*codes) and torch.equal(*pictures) and pictures[0].shape == (3, 3, IMAGE, IMAGE)


def check(combination: Mix, folder: Path) -> None:
    try:
        tokenizer = make(combination)
        check_training(tokenizer)
        check_use(tokenizer, folder)
    except Exception as error:
        error.add_note(f"with {combination}")
        raise


# every part has a row --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TABLES, ids=lambda kind: kind.__name__)
def test_every_part_has_a_row(kind: type[Part]):
    rows = {name.split()[0] for name in TABLES[kind]}
    missing = set(mix.discover(kind)) - rows
    assert not missing, f"give {sorted(missing)} a row with tiny arguments in tests/tokenizers/mix.py, so that they are mixed with all other parts"
    assert rows <= set(mix.discover(kind)), "rows of parts that do not exist"


def test_the_design_covers_every_pair():
    allowed = {pair for m in mix.product() if not mix.refused(m) for pair in mix.pairs(m)}
    assert {pair for m in COVERING for pair in mix.pairs(m)} == allowed and len(COVERING) < 0.2 * len(mix.product())


# the product -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_two_parts_work_together(quantizer, tmp_path):
    for combination in (m for m in COVERING if m.quantizer == quantizer):
        check(combination, tmp_path)


@pytest.mark.parametrize("combination", COVERING[:: len(COVERING) // 6], ids=lambda m: "-".join(m[:3]))
def test_yaml_of_a_training_run_builds_the_same(combination, tmp_path):
    """As ``tok fit`` reads it: class_path and init_args, values named once and repeated (anchors)."""
    jsonargparse = pytest.importorskip("jsonargparse", reason="needs tok1d[train]")
    config = mix.config(combination)
    slots = {slot: dict(config[slot]) for slot in Mix._fields}
    slots = {slot: {"class_path": values.pop("class"), "init_args": values} for slot, values in slots.items()}
    shared = [IMAGE, IMAGE]  # one list in several places: written as an anchor and its repetitions
    for values in slots.values():
        if "image_size" in values["init_args"]:
            values["init_args"]["image_size"] = shared
    arguments = {"name": "mix", "image_size": shared, **slots}
    path = f"{Tokenizer1D.__module__}.{Tokenizer1D.__qualname__}"
    text = yaml.safe_dump({"tokenizer": {"class_path": path, "init_args": arguments}})
    assert "&id001" in text and "*id001" in text
    (tmp_path / "run.yaml").write_text(text)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--tokenizer", type=Tokenizer1D)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the older name
    built = instantiate(parser.parse_path(tmp_path / "run.yaml")).tokenizer
    wanted = Tokenizer1D.from_config(config)
    for slot in Mix._fields:
        got = built.to_config()[slot]
        assert {**got, "image_size": None} == {**wanted.to_config()[slot], "image_size": None}
    shapes = [{k: v.shape for k, v in t.state_dict().items()} for t in (built, wanted)]
    assert shapes[0] == shapes[1] and built.image_size == wanted.image_size


@pytest.mark.slow
@pytest.mark.parametrize(("quantizer", "decoder"), itertools.product(QUANTIZERS, DECODERS))
def test_whole_product(quantizer, decoder, tmp_path):
    for combination in mix.product():
        if (combination.quantizer, combination.decoder) == (quantizer, decoder) and not mix.refused(combination):
            check(combination, tmp_path)


# what does not go together ---------------------------------------------------------------------------------------


def test_what_does_not_go_together_says_why():
    wrong = {m[:3]: m for m in mix.product() if mix.refused(m)}.values()
    assert wrong
    for m in wrong:
        with pytest.raises(ModelError, match=mix.refused(m)):
            Tokenizer1D.from_config(mix.config(m))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": {"dim": 5}}, "latents of width 5, the quantizer takes 6. Set dim of TiTokEncoder to 6"),
        ({"decoder": {"dim": 5}}, "codes of width 6, the decoder takes 5. Set dim of GridDecoder to 6"),
        ({"encoder": {"tokens": 9}}, "TiTokEncoder makes 9 latents, which become 9 tokens, but NestedVQ takes at most 4"),
        ({"decoder": {"tokens": 3}}, "TiTokEncoder makes 4 latents, which become 4 codes, but GridDecoder takes at most 3"),
        ({"encoder": {"image_size": 64}}, r"TiTokEncoder was made for images of 64×64 .*, the tokenizer for 32×32"),
        ({"decoder": {"image_size": [32, 48]}}, r"GridDecoder was made for images of 32×48 .*, the tokenizer for 32×32"),
        ({"image_size": [32, 48]}, "TiTokEncoder was made for images of 32×32 .*, the tokenizer for 32×48"),
    ],
)
def test_parts_that_do_not_agree(changes, message):
    config = mix.config(Mix("TiTokEncoder", "NestedVQ", "GridDecoder", "FixedLength"))
    for slot, values in changes.items():
        config[slot] = {**config[slot], **values} if isinstance(values, dict) else values
    with pytest.raises(ModelError, match=message):
        Tokenizer1D.from_config(config)


def test_sizes_an_encoder_of_any_size_does_not_take():
    config = mix.config(Mix("BinaryEncoder", "VQ", "GridDecoder", "FixedLength"))
    config["image_size"] = config["decoder"]["image_size"] = [32, 40]
    config["decoder"]["patch_size"] = 8
    with pytest.raises(ModelError, match=r"BinaryEncoder takes sides that are multiples of 16 up to 64 pixels.*\[32, 40\]"):
        Tokenizer1D.from_config(config)


def test_scales_must_end_with_the_number_of_latents():
    config = mix.config(Mix("TiTokEncoder", "GrowingScaleVQ", "GridDecoder", "FixedLength"))
    with pytest.raises(ModelError, match="must be the number of latents, which is 6"):
        Tokenizer1D.from_config({**config, "encoder": {**config["encoder"], "tokens": 6}})
