"""Token shards: made once, resumed to the same bytes, shared by ranks; broken images, full disks, damaged files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.files import encoded, folder, shard
from tests.dct_model import make_model
from tests.training import tiny
from tok1d import disk
from tok1d.data.index import index_images
from tok1d.data.photos import decode_rgb
from tok1d.data.shards import read_head, read_notes
from tok1d.data.tokenise import plan, tokenise
from tok1d.data.tokens import TokenShards
from tok1d.data.views import cut
from tok1d.errors import TokError, UsageError
from tok1d.image_io import read_uint8
from tok1d.tokenizers.encoders.flextok import FlexTokEncoder
from tok1d.tokenizers.tokenizer import Tokenizer1D

CONTINUOUS = tiny.kl


@pytest.fixture(scope="module")
def model() -> Tokenizer1D:
    return make_model()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    rows = {f"{i:03d}": {"label": i % 3, "captions": [f"first {i}", f"second {i}"]} for i in range(10)}
    return shard(tmp_path_factory.mktemp("photos") / "s.tar", encoded(11) | {"004.png": b"broken"}, rows)


def make(model, path, out, *, ranks=(0, 1), **options):
    samples = index_images([path])
    head = plan(model, samples, **{"per_shard": 4, **options})
    return tokenise(model, samples, out, head, batch_size=3, rank=ranks[0], ranks=ranks[1])


def files_of(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


@pytest.mark.parametrize("views", ["centre", "flip", "ten-crop", "2"])
def test_stored_ids_are_those_of_the_views(tmp_path, model, photos, views):
    made = make(model, photos, tmp_path, views=views)
    assert (made.shards, made.images, made.kept, made.unfinished) == (3, 10, 0, 0) and [key for key, _ in made.broken] == ["004"]
    stored = TokenShards(tmp_path, f"{model.model_id:016x}")
    assert stored.keys == [f"{i:03d}" for i in range(11) if i != 4] and stored.broken[0][0] == "004" and stored.head.space["nested"]
    files, many = encoded(11), len(stored.head.views)
    for index, key in enumerate(stored.keys):
        image = decode_rgb(files[f"{key}.png"])
        for view in range(many):
            again = cut(image, stored.window(index, view), (16, 16))[None]
            assert torch.equal(stored.values(index, view), model.encode(again).ids[0])
    assert len({stored.window(0, view) for view in range(many)}) == many
    if views == "centre":
        pixels = read_uint8(files["000.png"])
        assert torch.equal(stored.values(0, 0), model.encode(pixels, policy="crop").ids[0]), "the view of tok encode --crop"


def test_labels_and_captions_are_kept(tmp_path, model, photos):
    make(model, photos, tmp_path)
    batch = TokenShards(tmp_path).__getitems__([0, 9, (2, 5)])
    assert batch["label"].tolist() == [0, -1, 2] and batch["text"][:2] == ["first 0", ""] and batch["text"][2] in ("first 2", "second 2")
    assert batch["ids"].dtype == torch.int64 and batch["ids"].shape == (3, 32) and batch["key"] == ["000", "010", "002"]


# interruptions ---------------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    pass


@pytest.mark.parametrize("at", range(1, 8))
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, model, photos, at, monkeypatch):
    """Cut at the n-th rename: before the head, between arrays and notes, after a shard …"""
    make(model, photos, tmp_path / "whole", views="2")
    replace, calls = os.replace, []

    def cut_off(*paths):
        calls.append(paths)
        if len(calls) == at:
            raise PowerCut
        replace(*paths)

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(disk.os, "replace", cut_off)
        make(model, photos, tmp_path / "cut", views="2")
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "cut").glob("0*.json")} if (tmp_path / "cut").exists() else {}
    made = make(model, photos, tmp_path / "cut", views="2")
    assert made.kept == len(finished) == max(0, (at - 2) // 2) and made.shards == 3 - made.kept
    assert all(p.stat().st_mtime_ns == then for p, then in finished.items()), "a finished shard is never made again"
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_ranks_make_the_same_set(tmp_path, model, photos):
    make(model, photos, tmp_path / "one")
    first = make(model, photos, tmp_path / "three", ranks=(1, 2))
    assert first.shards == 1 and first.unfinished == 2
    with pytest.raises(TokError, match="2 of 3 shards are not finished"):
        TokenShards(tmp_path / "three")
    assert make(model, photos, tmp_path / "three", ranks=(0, 2)).unfinished == 0
    assert files_of(tmp_path / "three") == files_of(tmp_path / "one")


def test_a_full_disk_leaves_finished_shards(tmp_path, model, photos, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(TokError, match=r"00001.json cannot be written: No space left"):
        patch.setattr(disk.os, "fsync", full)
        make(model, photos, tmp_path / "a")
    assert sorted(files_of(tmp_path / "a")) == ["00000.json", "00000.safetensors", "00001.safetensors", "tokens.json"]
    assert make(model, photos, tmp_path / "a").kept == 1
    make(model, photos, tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_another_set_is_not_continued(tmp_path, model, photos):
    make(model, photos, tmp_path / "s")
    for other in ({"views": "flip"}, {"per_shard": 5}, {"seed": 3}, {"what": "latents"}):
        with pytest.raises(UsageError, match=r"another set of token shards \((views|per_shard|seed|kind)"):
            make(model, photos, tmp_path / "s", **other)
    with pytest.raises(UsageError, match="data .* ≠ "):
        make(model, folder(tmp_path / "f", encoded(11)), tmp_path / "s")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="no token shards"):
        make(model, photos, tmp_path / "x")


def test_all_images_broken(tmp_path, model):
    made = make(model, folder(tmp_path / "f", {f"{i}.png": b"x" for i in range(5)}), tmp_path / "s")
    assert made.images == 0 and len(made.broken) == 5 and read_notes(tmp_path / "s", 1).keys == []
    with pytest.raises(TokError, match="none of 5 could be read"):
        TokenShards(tmp_path / "s")


def test_a_shard_of_broken_images_among_others(tmp_path, model):
    files = encoded(10) | {f"{i:03d}.png": b"x" for i in range(4, 8)}
    make(model, folder(tmp_path / "f", files), tmp_path / "s")
    stored = TokenShards(tmp_path / "s")
    assert len(stored) == 6 and stored.__getitems__([4, 5])["key"] == ["008.png", "009.png"]


# kinds -----------------------------------------------------------------------------------------------------------


def test_latents_are_what_the_decoder_takes(tmp_path, photos):
    model = CONTINUOUS().eval()
    make(model, photos, tmp_path, what="latents", views="flip")
    stored = TokenShards(tmp_path)
    assert stored.head.kind == "latents" and stored.head.shape == [4, 4]
    image = cut(decode_rgb(encoded(1)["000.png"]), stored.window(0, 1), (16, 16))[None]
    wanted = model.quantizer(model.encode_latents(image.float() / 255)).q[0]
    assert stored.values(0, 1).dtype == torch.float16 and torch.allclose(stored.values(0, 1).float(), wanted, atol=2e-3)
    with pytest.raises(UsageError, match="continuous and has no ids"):
        plan(model, index_images([photos]))


def test_bits_of_long_codes(tmp_path, photos):
    from tok1d.tokenizers.quantizers.bsq import BSQ

    model = tiny.titok(BSQ(70)).eval()
    assert model.vocab_size == 2**70
    make(model, photos, tmp_path, views="2")
    stored = TokenShards(tmp_path)
    assert stored.head.kind == "bits" and stored.head.shape == [4, 70] and stored.head.space["bits"] == 70
    image = cut(decode_rgb(encoded(2)["001.png"]), stored.window(1, 1), (16, 16))[None]
    assert torch.equal(stored.values(1, 1), model.encode(image).bits[0]) and stored.__getitems__([0, 1])["bits"].dtype == torch.uint8
    assert (tmp_path / "00000.safetensors").stat().st_size < 4 * 2 * (4 * 9 + 20) + 400, "9 bytes for 70 bits"


def test_latents_of_the_encoder_before_its_registers(tmp_path, photos):
    """Where a FlexTok has no VAE, its latents are the pixels."""
    torch.manual_seed(0)
    encoder = FlexTokEncoder(4, 3, width=64, depth=1, patch_size=8, image_size=16, scaling_factor=1.5)
    from tok1d.tokenizers.decoders.grid import GridDecoder
    from tok1d.tokenizers.quantizers.fsq import FSQ

    model = Tokenizer1D(encoder, FSQ([4, 4, 4]), GridDecoder(4, 3, width=32, depth=1, heads=2, patch_size=8, image_size=16), None, (16, 16)).eval()
    make(model, photos, tmp_path, what="vae")
    stored = TokenShards(tmp_path)
    image = cut(decode_rgb(encoded(1)["000.png"]), stored.window(0, 0), (16, 16))[None].float() / 255
    with torch.no_grad():
        wanted = encoder.latents(image)[0]
    assert stored.head.shape == list(wanted.shape) == [3, 16, 16]
    assert torch.allclose(stored.values(0, 0).float(), wanted, atol=2e-3) and stored.__getitems__([0])["latents"].shape == (1, 3, 16, 16)
    with pytest.raises(UsageError, match="has no VAE"):
        plan(make_model(), index_images([photos]), what="vae")


def test_ids_take_the_smallest_integers(tmp_path, photos):
    sizes = {}
    for levels in ([8, 8], [8] * 3, [8] * 6):
        out = tmp_path / str(len(levels))
        make(tiny.titok(tiny.FSQ(levels)).eval(), photos, out)
        sizes[len(levels)] = TokenShards(out)._arrays(0)["ids"].dtype
    assert sizes == {2: np.uint8, 3: np.uint16, 6: np.uint32}


def test_impossible_plans(model, photos):
    for wrong in ({"what": "pixels"}, {"per_shard": 0}, {"area": (0.5, 0.2)}):
        with pytest.raises(UsageError, match="what is one of"):
            plan(model, index_images([photos]), **wrong)


# files -----------------------------------------------------------------------------------------------------------


def test_damaged_files_are_refused(tmp_path, model, photos):
    def fresh(name: str) -> Path:
        make(model, photos, tmp_path / name)
        return tmp_path / name

    with pytest.raises(TokError, match="not a folder of token shards"):
        TokenShards(tmp_path / "none")
    out = fresh("a")
    (out / "tokens.json").write_text("{}")
    with pytest.raises(TokError, match="not a folder of token shards"):
        TokenShards(out)
    for damage in (b"", b"\xff" * 40, None):
        out = fresh(f"b{damage!r:.5}".replace("\\", ""))
        path = out / "00001.safetensors"
        path.write_bytes(path.read_bytes()[:-3] if damage is None else damage)
        with pytest.raises(TokError, match="00001.safetensors is missing or damaged"):
            TokenShards(out)[4]
    out = fresh("c")
    (out / "00001.safetensors").write_bytes((out / "00000.safetensors").read_bytes())
    with pytest.raises(TokError, match="shard 1 does not fit its notes"):
        TokenShards(out)[4]
    out = fresh("d")
    (out / "00000.json").write_text('{"keys": ["a"]}')
    with pytest.raises(TokError, match="00000.json is damaged"):
        TokenShards(out)
    head = json.loads((fresh("e") / "tokens.json").read_text())
    (tmp_path / "e" / "tokens.json").write_text(json.dumps(head | {"format": "tok1d.shards/9"}))
    with pytest.raises(TokError, match=r"not of tok1d.shards/1"):
        read_head(tmp_path / "e")


def test_tokens_of_another_model_are_refused(tmp_path, model, photos):
    make(model, photos, tmp_path)
    with pytest.raises(TokError, match=rf"made by dct {model.model_id:016x}, wanted are tokens of model 0000000000000001"):
        TokenShards(tmp_path, "0000000000000001")
