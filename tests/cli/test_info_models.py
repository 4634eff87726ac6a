"""``tok info``, ``tok truncate``, ``tok models``, ``tok show`` and ``tok reconstruct``."""

import json

import pytest
import torch
from PIL import Image

from tests.dct_model import picture
from tok1d import tokfile
from tok1d.errors import MissingExtraError
from tok1d.image_io import read, write
from tok1d.presets import PRESETS
from tok1d.tokens import Geometry, TokenSequence

# info ------------------------------------------------------------------------------------------------------------------


def test_info_of_a_32_token_file_of_12_bits(tok, tmp_path):
    seq = TokenSequence(torch.zeros(1, 32, dtype=torch.int64), vocab_size=4096, model_id=0xAB, geometry=(Geometry(480, 640, "resize"),))
    seq.save(tmp_path / "x.tok")
    done = tok("info", tmp_path / "x.tok")
    assert done.code == 0 and not done.err
    for text in ("images        1\n", "00000000000000ab, nested", "4,096, 12 bits a token", "tokens        32\n", "384 bits (48 bytes)",
                 "file          84 bytes", "0.001250 by payload, 0.002188 by file", "480×640, resize"):  # fmt: skip
        assert text in done.out
    row = tok("info", tmp_path / "x.tok", "--json").rows[0]
    assert row["payload_bits"] == 384 and row["file_bytes"] == 84 and row["vocab_size"] == 4096
    assert row["bpp_payload"] == 384 / (480 * 640) and row["bpp_file"] == 8 * 84 / (480 * 640)
    assert (row["height"], row["width"], row["policy"], row["model_id"], row["meta"]) == (480, 640, "resize", "00000000000000ab", {})


def test_info_of_a_stream_of_many(tok, photos):
    data = tok("encode", photos, "-o", "-", "--target-psnr", 20).data
    done = tok("info", "-", stdin=data)
    assert done.code == 0 and "standard input\n  images        4\n" in done.out
    assert f"file          {len(data)} bytes" in done.out and ".." in done.out and "1 more sizes" in done.out
    rows = tok("info", "-", "--json", stdin=data).rows
    assert [r["index"] for r in rows] == [0, 1, 2, 3] and rows[3]["meta"] == {"name": "sub/deep/d.webp"}
    assert sum(r["file_bytes"] for r in rows) == len(data)


def test_info_without_sizes_and_of_bit_codes(tok, tmp_path):
    TokenSequence(None, bits=torch.ones(2, 5, 80, dtype=torch.uint8), vocab_size=1 << 80).save(tmp_path / "b.tok")
    done = tok("info", tmp_path / "b.tok")
    assert "2**80, 80 bits a token" in done.out and "not recorded (2)" in done.out and "bits/pixel" not in done.out
    assert "unknown" in done.out
    row = tok("info", tmp_path / "b.tok", "--json").rows[1]
    assert row["bpp_file"] is None and row["height"] is None


# truncate --------------------------------------------------------------------------------------------------------------


def test_truncate_files_folders_and_streams(tok, photos, tmp_path):
    tok("encode", photos, "-o", tmp_path / "t")
    assert tok("truncate", tmp_path / "t", "--tokens", 5, "-o", tmp_path / "u").code == 0
    tok("encode", photos, "-o", tmp_path / "v", "--tokens", 5)
    for name in ("a.tok", "sub/deep/d.tok"):
        assert (tmp_path / "u" / name).read_bytes() == (tmp_path / "v" / name).read_bytes()
    stream = tok("encode", photos, "-o", "-").data
    cut = tok("truncate", "-", "--tokens", 5, stdin=stream)
    assert cut.code == 0 and [r.tokens for r in tokfile.unpack(cut.data)] == [5] * 4
    row = tok("truncate", tmp_path / "t/a.tok", "--tokens", 1, "-o", tmp_path / "one.tok", "--json").rows[0]
    assert row["bytes"] == 37 and row["bytes_before"] == 68


def test_truncate_refuses(tok, photo, tmp_path, fixed_model):
    tok("encode", photo, "-o", tmp_path / "f.tok", "--model", fixed_model)
    done = tok("truncate", tmp_path / "f.tok", "--tokens", 5, "-o", tmp_path / "g.tok")
    assert done.code == 1 and "fixed length" in done.err and not (tmp_path / "g.tok").exists()
    tok("encode", photo, "-o", tmp_path / "n.tok")
    done = tok("truncate", tmp_path / "n.tok", "--tokens", 33, "-o", tmp_path / "g.tok")
    assert done.code == 1 and "1 to 32" in done.err


# models and show -------------------------------------------------------------------------------------------------------


def test_models_table(tok):
    done = tok("models")
    lines = done.out.splitlines()
    assert done.code == 0 and lines[0].startswith("NAME") and len(lines) == 1 + len(PRESETS)
    assert any(line.startswith("default") and "1..256" in line for line in lines)
    rows = tok("models", "--json", "--filter", "nested").rows
    assert {"name", "where", "tokens", "bits_per_token", "nested", "image_size", "licence", "parameters", "description"} < set(rows[0])
    assert all(r["nested"] and r["bits_per_image"] == r["tokens"] * r["bits_per_token"] for r in rows)
    assert [line.split()[0] for line in tok("models", "--filter", "research").out.splitlines()[1:]] == [p.name for p in PRESETS if p.research_only]
    assert "apple-amlr (research only)" in tok("models", "--filter", "flextok").out
    assert "latents" in tok("models", "--filter", "continuous").out.splitlines()[1]
    done = tok("models", "--filter", "zzz")
    assert done.code == 1 and "no model matches" in done.err


def test_show(tok, model, fixed_model, tmp_path):
    done = tok("show", fixed_model)
    assert done.code == 0 and "FixedLength" in done.out and "parameters  49,152 (49.2 k)" in done.out
    (fixed_model / "README.md").write_text("# A card\n")
    done = tok("show", fixed_model)
    assert done.out.startswith("# A card\n")
    found = tok("show", "default", "--json").rows[0]
    assert found["name"] == "default" and found["config"]["name"] == "dct" and found["parts"] == {"encoder": 24576, "decoder": 24576}
    done = tok("show", "defualt")
    assert done.code == 1 and "did you mean 'default'" in done.err
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).write_bytes(b"\xff" * 20)
    done = tok("show", tmp_path)
    assert done.code == 1 and "cannot be read" in done.err


# reconstruct -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def lpips(monkeypatch):
    from tok1d.tokenizers import budget

    monkeypatch.setattr(budget, "lpips_on", lambda device: lambda a, b: (a - b).abs().mean((1, 2, 3)))


def test_reconstruct_draws_a_grid(tok, photos, tmp_path, lpips):
    done = tok("reconstruct", photos / "a.png", photos / "sub", "--tokens", "1,8,32", "-o", tmp_path / "grid.png", "--height", 120)
    assert done.code == 0 and "grid.png drawn" in done.err
    lines = done.out.splitlines()
    assert len(lines) == 9 and "8 tokens, 64 bits, PSNR" in lines[1] and "LPIPS 0." in lines[1]
    grid = read(tmp_path / "grid.png")
    assert grid.shape[2] > 3 * 120 and grid.shape[3] > 4 * 170
    assert (grid[0, :, :10] == 1).all() and grid.std() > 0.1


def test_reconstruct_as_json_says_what_the_model_does(tok, photo, tmp_path, lpips, model):
    done = tok("reconstruct", photo, "--tokens", "1,4,16,32", "-o", tmp_path / "g.png", "--json")
    assert [r["tokens"] for r in done.rows] == [1, 4, 16, 32] and [r["bits"] for r in done.rows] == [8, 32, 128, 256]
    quality = [r["psnr"] for r in done.rows]
    assert quality == sorted(quality) and all(r["output"] == str(tmp_path / "g.png") for r in done.rows)
    distances = [r["lpips"] for r in done.rows]
    assert distances == sorted(distances, reverse=True)


def test_reconstruct_without_the_eval_extra_says_so_once(tok, photos, tmp_path, monkeypatch):
    from tok1d.tokenizers import budget

    def missing(device):
        raise MissingExtraError("lpips could not be imported. pip install 'tok1d[eval]'")

    monkeypatch.setattr(budget, "lpips_on", missing)
    done = tok("reconstruct", photos, "-o", tmp_path / "g.png")
    assert done.code == 0 and done.err.count("LPIPS is n/a: lpips could not be imported") == 1
    assert "LPIPS n/a" in done.out and [line.split(": ")[1].split()[0] for line in done.out.splitlines()[:3]] == ["1", "8", "32"]


@pytest.mark.parametrize("policy", ["--resize", "--crop", "--pad", "--tile"])
def test_reconstruct_with_every_policy_and_odd_shapes(tok, tmp_path, lpips, policy):
    write(tmp_path / "wide.png", picture(1, 10, 400))
    write(tmp_path / "tall.png", picture(2, 100, 3))
    write(tmp_path / "one.png", picture(3, 1, 1))
    done = tok("reconstruct", tmp_path / "*.png", "-o", tmp_path / "g.jpg", policy, "--height", 64)
    assert done.code == 0 and Image.open(tmp_path / "g.jpg").format == "JPEG"


def test_reconstruct_faults(tok, photos, tmp_path, lpips, fixed_model):
    (photos / "bad.png").write_bytes(b"no")
    done = tok("reconstruct", photos, "-o", tmp_path / "g.png", "--json")
    assert done.code == 1 and "bad.png: not an image" in done.err and (tmp_path / "g.png").is_file()
    assert tok("reconstruct", photos / "a.png", "-o", tmp_path / "g.png").code == 1
    assert tok("reconstruct", photos / "a.png", "-o", tmp_path / "g.png", "-f").code == 0
    done = tok("reconstruct", photos / "bad.png", "-o", tmp_path / "none.png")
    assert done.code == 1 and not (tmp_path / "none.png").exists()
    done = tok("reconstruct", photos / "a.png", "--tokens", "8,99", "-o", tmp_path / "h.png")
    assert done.code == 1 and "keeps 1 to 32 tokens" in done.err
    done = tok("reconstruct", photos / "a.png", "-o", tmp_path / "h.png", "--model", fixed_model, "--json")
    assert done.code == 0 and [json.loads(line)["tokens"] for line in done.out.splitlines()] == [32]
