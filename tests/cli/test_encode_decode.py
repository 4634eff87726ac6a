"""``tok encode`` and ``tok decode``: every way in and out, and that the images come back."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tok1d
from tests.dct_model import picture
from tok1d import tokfile
from tok1d.image_io import fit, read, read_uint8, unfit, write
from tok1d.tokens import Geometry


def psnr(a, b) -> float:
    return -10 * (a - b).square().mean().log10().item()


def names(folder) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# one image -------------------------------------------------------------------------------------------------------------


def test_a_photo_becomes_a_tok_file_beside_it_and_comes_back(tok, photo, tmp_path, model):
    done = tok("encode", photo, "--tokens", 12)
    assert done.code == 0 and "12 tokens, 96 bits, 48 bytes" in done.out
    assert done.err == "tok: no CUDA: running on CPU\n"
    file = photo.with_suffix(".tok")
    assert file.stat().st_size == 32 + 12 + 4
    record = tokfile.unpack(file.read_bytes())[0]
    assert record.geometry == Geometry(40, 56, "resize") and record.nested and record.tokens == 12
    api = tok1d.load(model).encode(read_uint8(photo), 12, policy="resize")
    assert record.ids.tolist() == api.ids.tolist() and record.model_id == api.model_id
    done = tok("decode", file, "-o", tmp_path / "again.png")
    assert done.code == 0 and "40×56 from 12 tokens" in done.out
    again = read(tmp_path / "again.png")
    assert again.shape == (1, 3, 40, 56)
    assert (again - tok1d.load(model).decode(api)).abs().max() <= 0.5 / 255 + 1e-6


def test_all_tokens_by_default(tok, photo):
    assert tok("encode", photo).code == 0
    assert tokfile.load(photo.with_suffix(".tok")).shape == (1, 32)


@pytest.mark.parametrize("policy", ["resize", "crop", "pad", "tile"])
def test_size_policies_are_recorded_and_undone(tok, photo, tmp_path, policy):
    assert tok("encode", photo, f"--{policy}").code == 0
    record = tokfile.unpack(photo.with_suffix(".tok").read_bytes())[0]
    assert record.geometry == Geometry(40, 56, policy, *((3, 4) if policy == "tile" else ()))
    assert tok("decode", photo.with_suffix(".tok"), "-o", tmp_path / "out.png").code == 0
    out, original = read(tmp_path / "out.png"), read(photo)
    if policy == "crop":
        assert out.shape == (1, 3, 40, 40)
        original = original[..., 8:48]
    assert psnr(out, original) > 15
    assert tok("decode", photo.with_suffix(".tok"), "-o", tmp_path / "raw.png", "--model-size").code == 0
    assert read(tmp_path / "raw.png").shape == ((1, 3, 48, 64) if policy == "tile" else (1, 3, 16, 16))


def test_policies_exclude_each_other(tok, photo):
    done = tok("encode", photo, "--crop", "--pad")
    assert done.code == 2 and "not allowed with" in done.err


def test_standard_input_to_standard_output(tok, photo):
    encoded = tok("encode", "-", "--tokens", 8, stdin=photo.read_bytes())
    assert encoded.code == 0 and len(encoded.data) == 44 and encoded.data[:4] == b"TOK1"
    decoded = tok("decode", "-", stdin=encoded.data)
    assert decoded.code == 0 and Image.open(io.BytesIO(decoded.data)).size == (56, 40)
    jpeg = tok("decode", "-", "--format", "jpg", stdin=encoded.data)
    assert Image.open(io.BytesIO(jpeg.data)).format == "JPEG"


def test_a_file_to_standard_output_and_stdin_to_a_file(tok, photo, tmp_path):
    encoded = tok("encode", photo, "-o", "-")
    assert encoded.code == 0 and tokfile.unpack(encoded.data)[0].meta == {}
    assert tok("encode", "-", "-o", tmp_path / "x.tok", stdin=photo.read_bytes()).code == 0
    assert (tmp_path / "x.tok").read_bytes() == encoded.data
    assert tok("decode", "-", "-o", tmp_path / "x.webp", stdin=encoded.data).code == 0
    assert Image.open(tmp_path / "x.webp").format == "WEBP"


def test_many_records_in_a_stream(tok, photos, tmp_path):
    encoded = tok("encode", photos, "-o", "-", "--tokens", 4)
    assert [r.meta["name"] for r in tokfile.unpack(encoded.data)] == ["a.png", "b.png", "sub/c.jpg", "sub/deep/d.webp"]
    done = tok("decode", "-", "-o", tmp_path / "out", stdin=encoded.data)
    assert done.code == 0
    assert names(tmp_path / "out") == ["stdin/a.png", "stdin/b.png", "stdin/sub/c.png", "stdin/sub/deep/d.png"]
    done = tok("decode", "-", stdin=encoded.data)
    assert done.code == 2 and "holds 4 images: give a folder" in done.err and not done.data


def test_json_rows_on_standard_output_and_all_else_on_standard_error(tok, photos, tmp_path):
    done = tok("encode", photos, "-o", tmp_path / "t", "--json", "--tokens", 8)
    assert done.code == 0 and len(done.rows) == 4
    row = done.rows[2]
    assert row["input"] == str(photos / "sub/c.jpg") and row["output"] == str(tmp_path / "t/sub/c.tok")
    assert (row["tokens"], row["bits"], row["bytes"], row["height"], row["width"], row["policy"]) == (8, 64, 44, 22, 30, "resize")
    assert row["bpp"] == 64 / (22 * 30) and row["model"] == "dct" and len(row["model_id"]) == 16
    assert "4 images, 176 bytes" in done.err
    back = tok("decode", tmp_path / "t", "-o", tmp_path / "p", "--json")
    assert [r["height"] for r in back.rows] == [20, 21, 22, 23] and all(r["tokens"] == 8 for r in back.rows)


def test_quiet_says_nothing(tok, photos, tmp_path):
    done = tok("encode", photos, "-o", tmp_path / "t", "-q")
    assert (done.code, done.out, done.err) == (0, "", "")
    done = tok("decode", tmp_path / "t", "-o", tmp_path / "p", "-q")
    assert (done.code, done.out, done.err) == (0, "", "")


# many images -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_recreated_and_decoded(tok, photos, tmp_path):
    assert tok("encode", photos, "-o", tmp_path / "tokens").code == 0
    assert names(tmp_path / "tokens") == ["a.tok", "b.tok", "sub/c.tok", "sub/deep/d.tok"]
    assert tok("decode", tmp_path / "tokens", "-o", tmp_path / "images", "--format", "jpg").code == 0
    assert names(tmp_path / "images") == ["a.jpg", "b.jpg", "sub/c.jpg", "sub/deep/d.jpg"]
    for name in ("a", "sub/c"):
        original = next((photos / name).parent.glob(f"{name[-1]}.*"))
        assert psnr(read(tmp_path / f"images/{name}.jpg"), read(original)) > 15


def test_outputs_inside_the_input_folder(tok, photos):
    assert tok("encode", photos).code == 0
    assert (photos / "sub/deep/d.tok").is_file()
    assert tok("encode", photos, "-o", photos / "tokens").code == 0
    assert tok("decode", photos / "tokens", "-o", photos / "tokens/again").code == 0
    assert (photos / "tokens/again/sub/c.png").is_file()


def test_globs_keep_the_tree_below_their_fixed_part(tok, photos, tmp_path):
    assert tok("encode", photos / "**/*.[pj]*g", "-o", tmp_path / "t").code == 0
    assert names(tmp_path / "t") == ["a.tok", "b.tok", "sub/c.tok"]
    done = tok("encode", photos / "*.bmp", "-o", tmp_path / "t")
    assert done.code == 1 and "nothing matches" in done.err


def test_files_named_twice_are_done_once(tok, photos, tmp_path):
    done = tok("encode", photos / "a.png", photos / "*.png", photos / "a.png", "-o", tmp_path / "t", "--json")
    assert done.code == 0 and len(done.rows) == 2


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_batches_give_the_same_files_in_order(tok, photos, tmp_path, batch):
    done = tok("encode", photos, "-o", tmp_path / "t", "--batch-size", batch, "--json", "--tile")
    assert [r["input"][-5:] for r in done.rows] == ["a.png", "b.png", "c.jpg", ".webp"]
    assert [r["tiles"] for r in done.rows] == [4, 4, 4, 4]
    expected = tok("encode", photos, "-o", "-", "--tile").data
    got = b"".join((tmp_path / "t" / n).read_bytes() for n in names(tmp_path / "t"))
    assert [r.ids.tolist() for r in tokfile.unpack(got)] == [r.ids.tolist() for r in tokfile.unpack(expected)]
    done = tok("decode", tmp_path / "t", "-o", tmp_path / "p", "--batch-size", batch)
    assert done.code == 0 and psnr(read(tmp_path / "p/sub/c.png"), read(photos / "sub/c.jpg")) > 18


@pytest.mark.parametrize("kind", ["tok", "jsonl", "npz", "safetensors"])
def test_every_format_separately_and_as_one_file(tok, photos, tmp_path, kind):
    assert tok("encode", photos, "-o", tmp_path / "t", "--format", kind, "--tokens", 9).code == 0
    assert names(tmp_path / "t") == [f"a.{kind}", f"b.{kind}", f"sub/c.{kind}", f"sub/deep/d.{kind}"]
    done = tok("encode", photos, "-o", tmp_path / f"all.{kind}", "--tokens", 9)
    assert done.code == 0 and names(tmp_path)[0] == f"all.{kind}"
    assert tok("decode", tmp_path / "t", "-o", tmp_path / "p1").code == 0
    assert tok("decode", tmp_path / f"all.{kind}", "-o", tmp_path / "p2").code == 0
    one = [read(tmp_path / "p1" / n) for n in names(tmp_path / "p1")]
    two = [read(tmp_path / "p2" / n) for n in names(tmp_path / "p2")]
    assert len(one) == 4 and all(torch.equal(a, b) for a, b in zip(one, two))
    assert names(tmp_path / "p2")[0] == ("all/a.png" if kind == "tok" else "all/00000.png")
    info = tok("info", tmp_path / f"all.{kind}", "--json")
    assert [r["tokens"] for r in info.rows] == [9] * 4 and info.rows[1]["height"] == 21


def test_several_token_files_into_one_picture_is_refused(tok, photos, tmp_path):
    tok("encode", photos, "-o", tmp_path / "t")
    done = tok("decode", tmp_path / "t", "-o", tmp_path / "x.png")
    assert done.code == 2 and "give a folder" in done.err and not (tmp_path / "x.png").exists()


def test_names_in_a_file_cannot_leave_the_folder(tok, photo, tmp_path):
    tok("encode", photo)
    seq = tokfile.load(photo.with_suffix(".tok"))
    for evil in ("../../evil.png", "/evil.png", "~/evil.png", "..", "a\\b.png", "C:x.png", 7, ".hidden/x", ""):
        data = tokfile.pack(seq, {"name": evil}) + tokfile.pack(seq, {"name": "fine.png"})
        out = tmp_path / "out"
        assert tok("decode", "-", "-o", out, "-f", stdin=data).code == 0
        assert names(out) == ["stdin/00000.png", "stdin/00001.png"]


# adaptive length -------------------------------------------------------------------------------------------------------


def test_target_psnr(tok, photos, tmp_path):
    done = tok("encode", photos, "-o", tmp_path / "t", "--target-psnr", 22, "--json")
    assert done.code == 0
    for row in done.rows:
        assert row["reached"] == (row["psnr"] >= 22) and (row["reached"] or row["tokens"] == 32)
        fitted, _ = fit(read(row["input"]), (16, 16), "resize")
        record = tokfile.unpack(Path(row["output"]).read_bytes())[0]
        assert record.tokens == row["tokens"]
        decoded = tok1d.load(tok_model(tok)).decode(torch.from_numpy(record.ids))
        assert abs(psnr(decoded, fitted) - row["psnr"]) < 0.3  # the CLI fits bytes, here floats
    assert len({r["tokens"] for r in done.rows}) > 1


def tok_model(tok) -> str:
    from tok1d import hub

    return str(hub.resolve("default"))


def test_targets_out_of_reach_are_said(tok, photos, tmp_path):
    done = tok("encode", photos, "-o", tmp_path / "t", "--target-psnr", 80)
    assert done.code == 0 and "4 of 4 images miss the target and keep all tokens they may" in done.err
    assert "32 tokens, 256 bits, 68 bytes, PSNR" in done.out


def test_max_bytes_bounds_every_record(tok, photos, tmp_path):
    assert tok("encode", photos, "-o", tmp_path / "t", "--max-bytes", 50).code == 0
    assert {(tmp_path / "t" / n).stat().st_size for n in names(tmp_path / "t")} == {50}
    done = tok("encode", photos, "-o", tmp_path / "t.tok", "--max-bytes", 80)
    assert done.code == 0 and {r.nbytes for r in tokfile.unpack((tmp_path / "t.tok").read_bytes())} <= {78, 79, 80}
    done = tok("encode", photos, "-o", tmp_path / "u", "--max-bytes", 20)
    assert done.code == 1 and "4 of 4 inputs failed" in done.err and "takes at least 37 bytes" in done.err


def test_target_lpips(tok, photos, tmp_path, monkeypatch):
    from tok1d.tokenizers import budget

    monkeypatch.setattr(budget, "lpips_on", lambda device: lambda a, b: (a - b).abs().mean((1, 2, 3)))
    done = tok("encode", photos, "-o", tmp_path / "t", "--target-lpips", 0.05, "--target-psnr", 5, "--json")
    assert done.code == 0 and all(r["reached"] == (r["lpips"] <= 0.05) and r["psnr"] > 5 for r in done.rows)
    assert any(r["reached"] for r in done.rows) and len({r["tokens"] for r in done.rows}) > 1


def test_a_budget_needs_a_nested_model(tok, photo, fixed_model):
    done = tok("encode", photo, "--target-psnr", 20, "--model", fixed_model)
    assert done.code == 1 and "makes exactly 32 tokens" in done.err and "--filter nested" in done.err
    done = tok("encode", photo, "--tokens", 8, "--model", fixed_model)
    assert done.code == 1 and "makes exactly 32 tokens, got tokens=8" in done.err
    done = tok("encode", photo, "--tokens", 33)
    assert done.code == 1 and "keeps 1 to 32 tokens" in done.err


def test_tokens_and_targets_exclude_each_other(tok, photo):
    done = tok("encode", photo, "--tokens", 3, "--max-bytes", 99)
    assert done.code == 2 and "cannot be combined" in done.err


# prefixes and devices --------------------------------------------------------------------------------------------------


def test_decode_a_prefix(tok, photo, tmp_path):
    tok("encode", photo, "-o", tmp_path / "all.tok")
    tok("encode", photo, "-o", tmp_path / "few.tok", "--tokens", 3)
    tok("decode", tmp_path / "all.tok", "-o", tmp_path / "a.png", "--tokens", 3)
    tok("decode", tmp_path / "few.tok", "-o", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_fixed_models_do_not_decode_prefixes(tok, photo, tmp_path, fixed_model):
    assert tok("encode", photo, "-o", tmp_path / "x.tok", "--model", fixed_model).code == 0
    done = tok("decode", tmp_path / "x.tok", "-o", tmp_path / "x.png", "--model", fixed_model, "--tokens", 3)
    assert done.code == 1 and "makes exactly 32 tokens" in done.err
    assert tok("decode", tmp_path / "x.tok", "-o", tmp_path / "x.png", "--model", fixed_model).code == 0


def test_tokens_of_another_model_are_refused(tok, photo, tmp_path, fixed_model):
    tok("encode", photo, "-o", tmp_path / "x.tok", "--model", fixed_model)
    done = tok("decode", tmp_path / "x.tok", "-o", tmp_path / "x.png")
    assert done.code == 1 and "Decode with the model that made them" in done.err and not (tmp_path / "x.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_a_device_that_is_not_there(tok, photo):
    done = tok("encode", photo, "--device", "cuda")
    assert done.code == 1 and "--device cuda" in done.err and "use --device cpu" in done.err
    assert "no CUDA" not in tok("encode", photo, "--device", "cpu").err


def test_bfloat16(tok, photo, tmp_path):
    assert tok("encode", photo, "--dtype", "bfloat16").code == 0
    assert tok("decode", photo.with_suffix(".tok"), "-o", tmp_path / "x.png", "--dtype", "bfloat16").code == 0
    assert psnr(read(tmp_path / "x.png"), read(photo)) > 15


# odd images ------------------------------------------------------------------------------------------------------------


def test_odd_images_are_encoded_or_refused(tok, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    base = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    base.save(folder / "turned.jpg", exif=exif)
    for mode in ("L", "LA", "P", "1", "RGBA"):
        base.convert(mode).save(folder / f"mode-{mode}.png")
    base.convert("CMYK").save(folder / "cmyk.tif")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (1, 1), "teal").save(folder / "one.png")
    Image.new("RGB", (3000, 1), "teal").save(folder / "line.png")
    base.save(folder / "moving.gif", save_all=True, append_images=[Image.new("RGB", (20, 30))])
    done = tok("encode", folder, "-o", tmp_path / "t", "--json")
    assert done.code == 1
    rows = {row["input"].rpartition("/")[2]: row for row in done.rows}
    assert [n for n, row in rows.items() if "error" in row] == ["moving.gif"]
    assert "--frame 0" in rows["moving.gif"]["error"]
    assert (rows["turned.jpg"]["height"], rows["turned.jpg"]["width"]) == (20, 30)
    assert tok("encode", folder / "moving.gif", "--frame", 0).code == 0
    assert tok("decode", tmp_path / "t", "-o", tmp_path / "p").code == 0
    assert read(tmp_path / "p/line.png").shape == (1, 3, 1, 3000)
    assert read_uint8(tmp_path / "p/one.png")[0, :, 0, 0].tolist() == pytest.approx([0, 128, 128], abs=8)


def test_large_files_beside_small_ones(tok, tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/big.png", picture(0, 700, 900))
    write(tmp_path / "in/small.png", picture(0, 7, 9))
    assert tok("encode", tmp_path / "in", "-o", tmp_path / "t", "--tile", "--batch-size", 4).code == 0
    assert tok("decode", tmp_path / "t", "-o", tmp_path / "p", "--batch-size", 7).code == 0
    assert read(tmp_path / "p/big.png").shape == (1, 3, 700, 900)
    tiles, geometry = fit(read(tmp_path / "in/big.png"), (16, 16), "tile")
    assert psnr(unfit(tiles, geometry), read(tmp_path / "p/big.png")) > 25
    assert read(tmp_path / "p/small.png").shape == (1, 3, 7, 9)
