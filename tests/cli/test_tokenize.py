"""``tok tokenize``: what it writes and says, resumption, ranks, wrong requests."""

import multiprocessing
import os
import signal
import time

import torch

from tests.data.files import encoded, folder
from tests.dct_model import make_model
from tok1d.cli.main import main
from tok1d.data.tokens import TokenShards


def test_a_folder_with_classes(tok, tmp_path):
    files = list(encoded(5).values())
    data = folder(tmp_path / "d", {"cat/a.png": files[0], "dog/a.png": files[1], "cat/b.png": files[2], "dog/b.png": b"broken"})
    done = tok("tokenize", data, "-o", tmp_path / "s", "--views", "flip", "--per-shard", 3)
    assert done.code == 0 and "3 images × 2 views of dct, ids (32,), 2 shards" in done.out
    assert "1 images could not be read and have no tokens: dog/b.png" in done.err
    stored = TokenShards(tmp_path / "s")
    assert stored.head.classes == ["cat", "dog"] and stored.__getitems__([0, 1, 2])["label"].tolist() == [0, 0, 1]
    ids = stored.__getitems__([0])["ids"]
    assert torch.equal(ids, make_model().encode(torch.stack([_centre(files[0])])).ids)


def _centre(data: bytes) -> torch.Tensor:
    from tok1d.data.photos import centre_crop, decode_rgb

    return centre_crop(decode_rgb(data), 16)


def test_again_does_nothing_and_says_so(tok, tmp_path):
    data = folder(tmp_path / "d", encoded(3))
    assert tok("tokenize", data, "-o", tmp_path / "s", "--json").rows[0]["shards"] == 1
    again = tok("tokenize", data, "-o", tmp_path / "s", "--json")
    assert again.code == 0 and {k: again.rows[0][k] for k in ("shards", "kept_shards", "images", "kind", "shape")} == {
        "shards": 0, "kept_shards": 1, "images": 0, "kind": "ids", "shape": [32]
    }  # fmt: skip
    other = tok("tokenize", data, "-o", tmp_path / "s", "--views", "ten-crop")
    assert other.code == 2 and "another set of token shards (views" in other.err


def test_ranks_of_the_environment(tok, tmp_path, monkeypatch):
    data = folder(tmp_path / "d", encoded(4))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, left in (("1", True), ("0", False)):
        monkeypatch.setenv("RANK", rank)
        done = tok("tokenize", data, "-o", tmp_path / "s", "--per-shard", 2)
        assert done.code == 0 and ("1 of 2 shards are left to other processes" in done.err) == left
    assert len(TokenShards(tmp_path / "s")) == 4


def test_a_killed_process_can_be_continued(tok, model, tmp_path):
    """SIGKILL in the middle of many shards; the second call ends with the bytes of an undisturbed run."""
    data = folder(tmp_path / "d", encoded(40))
    command = ["tokenize", data, "-m", model, "--per-shard", 2, "--views", 20, "-o"]
    process = multiprocessing.get_context("fork").Process(target=main, args=([str(a) for a in (*command, tmp_path / "s", "-q")],))
    process.start()
    deadline = time.monotonic() + 120
    while not list((tmp_path / "s").glob("0*.json")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    done = len(list((tmp_path / "s").glob("0*.json")))
    assert 0 < done < 20 and process.exitcode == -signal.SIGKILL
    assert tok(*command, tmp_path / "s", "--json").rows[0]["kept_shards"] == done
    assert tok(*command, tmp_path / "whole", "--json").rows[0]["kept_shards"] == 0
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert [p for p in sorted(os.listdir(tmp_path / "s")) if not p.startswith(".")] == names and len(names) == 41
    assert all((tmp_path / "s" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)


def test_wrong_requests(tok, tmp_path):
    data = folder(tmp_path / "d", encoded(1))
    (tmp_path / "file").write_bytes(b"")
    for arguments, code, message in (
        ([data], 2, "-o"),
        ([tmp_path / "none", "-o", tmp_path / "s"], 1, "no such file or folder"),
        ([data, "-o", tmp_path / "file"], 2, "a folder is needed"),
        ([data, "-o", tmp_path / "s", "--views", "six"], 2, "ten-crop"),
        ([data, "-o", tmp_path / "s", "--what", "vae"], 2, "has no VAE"),
        ([data, "-o", tmp_path / "s", "--classes", tmp_path / "none.json"], 2, "not a JSON file"),
        ([data, "-o", tmp_path / "s", "--area", "0.9", "0.1"], 2, "rising shares"),
    ):
        done = tok("tokenize", *arguments)
        assert done.code == code and message in done.err, done.err
    assert not (tmp_path / "s").exists()


def test_rows_of_several_lengths(tok, tmp_path):
    data = folder(tmp_path / "d", encoded(6))
    done = tok("tokenize", data, "-o", tmp_path / "s", "--target-psnr", 16)
    assert done.code == 0 and "ids (32,), " in done.out and " on average, 1 shards" in done.out, done.err
    lengths = TokenShards(tmp_path / "s").__getitems__(range(6))["lengths"].tolist()
    assert f"{min(lengths)} to {max(lengths)} tokens, {sum(lengths) / 6:.1f} on average" in done.out
    missed = tok("tokenize", data, "-o", tmp_path / "t", "--target-psnr", 90)
    assert "6 of 6 views miss the target and keep all tokens they may" in missed.err
    assert tok("tokenize", data, "-o", tmp_path / "u", "--tokens", 5, "--json").rows[0]["shape"] == [5]
    for arguments, code, message in (
        (["--tokens", "auto"], 1, "has no halting head"),
        (["--tokens", 3, "--max-bytes", 90], 2, "--tokens fixes the number"),
        (["--quality", 3], 2, "--quality is what --tokens auto aims at"),
        (["--tokens", 33], 1, "33"),
        (["--what", "latents", "--tokens", 3], 2, "kept whole"),
    ):
        done = tok("tokenize", data, "-o", tmp_path / "v", *arguments)
        assert done.code == code and message in done.err, done.err
    assert not (tmp_path / "v").exists()
