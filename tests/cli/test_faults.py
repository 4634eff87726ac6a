"""What goes wrong: one line, the right exit code, and nothing half done."""

import errno
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from tests.dct_model import picture
from tok1d import tokfile
from tok1d.image_io import read, write


def files(folder) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


# usage -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["encdoe", "x.png"], "did you mean encode?"),
        (["encode", "x.png", "--token", "3"], "did you mean --tokens?"),
        (["encode", "x.png", "--target-pnsr=3"], "did you mean --target-psnr?"),
        (["decode", "x.tok", "--modle", "m"], "did you mean --model?"),
        (["encode", "x.png", "--device", "cdua"], "did you mean cuda?"),
        (["encode", "x.png", "--format", "jsnol"], "did you mean jsonl?"),
        (["--verison"], "did you mean --version?"),
        (["encode"], "required: IMAGE"),
        (["encode", "x.png", "--tokens", "0"], "an integer of at least 1 is needed, got '0'"),
        (["encode", "x.png", "--tokens", "many"], "an integer of at least 1"),
        (["encode", "x.png", "--target-psnr", "nan"], "a number above 0"),
        (["encode", "x.png", "--frame", "-1"], "at least 0"),
        (["reconstruct", "x.png", "--tokens", "1,x"], "an integer of at least 1"),
        (["encode", "a.png", "-o", "x.foo"], "the suffix says no token format"),
        (["encode", "a.png", "-o", "x.npz", "--format", "tok"], "is a .npz file"),
        (["encode", "-", "--format", "jsonl"], "standard output carries .tok only"),
        (["encode", "a.png", "-o", "-", "--json"], "cannot both go to standard output"),
        (["encode", "-", "b.png"], "needs -o"),
        (["decode", "a.tok", "-o", "x.foo"], "no image format"),
        (["decode", "a.tok", "--format", "foo"], "no image format"),
        (["decode", "a.tok", "-o", "x.png", "--format", "jpg"], "ends in .png"),
        (["truncate", "a.tok", "--tokens", "3"], "give the output with -o"),
        (["truncate", "a.tok"], "required: --tokens"),
        (["reconstruct", "a.png", "-o", "grid.tok"], "image suffix"),
        (["reconstruct", "a.png", "--height", "9999"], "at most 4096"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(tok, args, message):
    done = tok(*args)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1 and not done.out


def test_no_verb_shows_the_help(tok):
    done = tok()
    assert done.code == 2 and "encode" in done.err and not done.out


def test_help_and_version(tok):
    for args in (["--help"], ["encode", "--help"], ["reconstruct", "-h"], ["--version"]):
        done = tok(*args)
        assert done.code == 0 and done.out and not done.err
    assert "undone on decode (default)" in " ".join(tok("encode", "--help").out.split())


def test_wrong_model_names_get_a_guess(tok, photo):
    done = tok("encode", photo, "--model", "defualt")
    assert done.code == 1 and "did you mean 'default'" in done.err and done.err.count("\n") == 1


# outputs ---------------------------------------------------------------------------------------------------------------


def test_two_inputs_for_one_output_stop_before_any_work(tok, photos, tmp_path):
    write(photos / "a.jpg", picture(9))
    done = tok("encode", photos, "-o", tmp_path / "t")
    assert done.code == 2 and "a.jpg" in done.err and "a.png" in done.err and "both be written to" in done.err
    assert not (tmp_path / "t").exists()
    done = tok("encode", photos / "a.png", photos / "sub" / ".." / "a.jpg", "-o", tmp_path / "t")
    assert done.code == 2
    assert tok("encode", photos, "-o", tmp_path / "all.tok").code == 0, "one file takes both"
    assert tok("decode", tmp_path / "all.tok", "-o", tmp_path / "p").code == 0
    assert files(tmp_path / "p") == [f"{i:05d}.png" for i in range(5)], "a.jpg and a.png would both become a.png"


def test_an_input_is_never_replaced(tok, photo, tmp_path):
    tok("encode", photo)
    file = photo.with_suffix(".tok")
    before = file.read_bytes()
    for args in (["truncate", file, "--tokens", 2, "-o", file, "-f"], ["encode", photo, file, "-o", file, "-f"]):
        done = tok(*args)
        assert done.code == 2 and "would replace an input" in done.err
    done = tok("reconstruct", photo, "-o", photo, "-f")
    assert done.code == 2 and "would replace an input" in done.err
    assert file.read_bytes() == before and read(photo).shape == (1, 3, 40, 56)


def test_existing_files_are_kept_without_force(tok, photos, tmp_path):
    out = tmp_path / "t"
    out.mkdir()
    (out / "b.tok").write_bytes(b"mine")
    done = tok("encode", photos, "-o", out)
    assert done.code == 1 and "b.tok exists already; -f overwrites" in done.err and files(out) == ["b.tok"]
    done = tok("encode", photos, "-o", out, "--skip-existing")
    assert done.code == 0 and (out / "b.tok").read_bytes() == b"mine" and len(files(out)) == 4
    assert "1 existing outputs are kept" in done.err
    done = tok("encode", photos, "-o", out, "--skip-existing", "--json")
    assert done.code == 0 and done.rows == []
    assert tok("encode", photos, "-o", out, "-f").code == 0 and (out / "b.tok").read_bytes() != b"mine"
    assert not [n for n in files(out) if "tmp" in n]
    done = tok("decode", out / "a.tok", "-o", photos / "a.png")
    assert done.code == 1 and "exists already" in done.err
    tok("encode", photos, "-o", tmp_path / "all.tok")
    assert tok("encode", photos, "-o", tmp_path / "all.tok").code == 1
    assert tok("encode", photos, "-o", tmp_path / "all.tok", "--skip-existing").code == 0


def test_a_run_is_resumed(tok, photos, tmp_path):
    tok("encode", photos, "-o", tmp_path / "t")
    (tmp_path / "t/sub/c.tok").unlink()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "t").rglob("*.tok")}
    done = tok("encode", photos, "-o", tmp_path / "t", "--skip-existing", "--json")
    assert [r["input"] for r in done.rows] == [str(photos / "sub/c.jpg")]
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items())
    tok("decode", tmp_path / "t", "-o", tmp_path / "p")
    (tmp_path / "p/a.png").unlink()
    done = tok("decode", tmp_path / "t", "-o", tmp_path / "p", "--skip-existing", "--json")
    assert [r["input"] for r in done.rows] == [str(tmp_path / "t/a.tok")]


def test_outputs_that_cannot_be_written(tok, photos, tmp_path):
    (tmp_path / "wall").write_text("a file")
    done = tok("encode", photos / "a.png", "-o", f"{tmp_path}/wall/")
    assert done.code == 1 and done.err.splitlines()[-1].startswith("tok: ")
    (tmp_path / "x.tok").mkdir()
    done = tok("encode", photos / "a.png", "-o", tmp_path / "x.tok")
    assert done.code == 0 and (tmp_path / "x.tok/a.tok").is_file(), "an existing folder is a folder, whatever its name"
    (tmp_path / "t").mkdir()
    (tmp_path / "t/a.tok").mkdir()
    done = tok("encode", photos, "-o", tmp_path / "t")
    assert done.code == 2 and "is a folder" in done.err


# inputs ----------------------------------------------------------------------------------------------------------------


def test_one_bad_file_never_ends_the_run(tok, photos, tmp_path):
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:80])
    (photos / "empty.png").write_bytes(b"")
    (photos / "text.jpg").write_text("no")
    done = tok("encode", photos, tmp_path / "missing.png", "-o", tmp_path / "t")
    assert done.code == 1 and files(tmp_path / "t") == ["a.tok", "b.tok", "c.tok", "d.tok"]
    tail = done.err.splitlines()
    assert "tok: 4 of 8 inputs failed:" in tail
    for name, why in (("broken.png", "damaged or truncated"), ("empty.png", "0 bytes"), ("text.jpg", "not an image"), ("missing.png", "no such file")):
        assert any(name in line and why in line for line in tail), done.err
    assert "Traceback" not in done.err
    done = tok("encode", photos, "-o", tmp_path / "u", "--json")
    assert sum("error" in r for r in done.rows) == 3 and sum("tokens" in r for r in done.rows) == 4


def test_one_bad_token_file_never_ends_the_run(tok, photos, tmp_path):
    t = tmp_path / "t"
    tok("encode", photos, "-o", t)
    good = (t / "a.tok").read_bytes()
    flipped = bytearray(good)
    flipped[40] ^= 4
    for name, data in (("cut", good[:50]), ("flipped", bytes(flipped)), ("empty", b""), ("png", (photos / "a.png").read_bytes()), ("tail", good + b"xx")):
        (t / f"bad-{name}.tok").write_bytes(data)
    done = tok("decode", t, "-o", tmp_path / "p")
    assert done.code == 1 and "5 of 9 inputs failed" in done.err and files(tmp_path / "p") == ["a.png", "b.png", "c.png", "d.png"]
    assert "tok encode" in done.err and "checksum" in done.err
    done = tok("info", t)
    assert done.code == 1 and done.out.count("model  ") == 4
    done = tok("truncate", t, "--tokens", 2, "-o", tmp_path / "u")
    assert done.code == 1 and files(tmp_path / "u") == ["a.tok", "b.tok", "c.tok", "d.tok"]


def test_a_single_failure_is_one_line(tok, tmp_path):
    done = tok("encode", tmp_path / "none.png", "-q")
    assert done.code == 1 and done.err == f"tok: {tmp_path}/none.png: no such file\n"
    done = tok("decode", tmp_path / "none.tok")
    assert done.code == 1 and done.err.count("\n") == 1 and "cannot be read" in done.err
    done = tok("decode", "-", stdin=b"")
    assert done.code == 1 and "empty" in done.err
    done = tok("encode", "-", stdin=b"garbage")
    assert done.code == 1 and "not an image" in done.err and not done.data


def test_folders_without_images(tok, tmp_path):
    (tmp_path / "void").mkdir()
    done = tok("encode", tmp_path / "void")
    assert done.code == 1 and "no images in this folder" in done.err
    done = tok("info", tmp_path / "void")
    assert done.code == 1 and "no token files in this folder" in done.err


def test_a_forged_size_is_refused_before_decoding(tok, photo, tmp_path, monkeypatch):
    from dataclasses import replace

    from tok1d.tokens import Geometry

    tok("encode", photo)
    record = tokfile.unpack(photo.with_suffix(".tok").read_bytes())[0]
    (tmp_path / "f.tok").write_bytes(replace(record, geometry=Geometry(65535, 65535, "resize")).to_bytes())
    done = tok("decode", tmp_path / "f.tok", "-o", tmp_path / "f.png")
    assert done.code == 1 and "not plausible" in done.err and not (tmp_path / "f.png").exists()


def test_one_bad_image_in_a_batch_fails_alone(tok, photos, tmp_path, monkeypatch):
    from tok1d.tokenizers.tokenizer import Tokenizer1D

    encode = Tokenizer1D.encode
    poison = read(photos / "b.png")
    calls = []

    def picky(self, images, *args, **kwargs):
        calls.append(len(images))
        from tok1d.image_io import fit, read_uint8

        bad = fit(read_uint8(photos / "b.png"), (16, 16), "resize")[0][0]
        if any((image == bad).all() for image in images):
            raise RuntimeError("out of luck")
        return encode(self, images, *args, **kwargs)

    monkeypatch.setattr(Tokenizer1D, "encode", picky)
    done = tok("encode", photos, "-o", tmp_path / "t")
    assert done.code == 1 and files(tmp_path / "t") == ["a.tok", "c.tok", "d.tok"] and len(poison) == 1
    assert "b.png: RuntimeError: out of luck" in done.err and calls == [4, 1, 1, 1, 1]


def test_debug_shows_the_traceback(tok, tmp_path, photo):
    for args in (["encode", tmp_path / "none.png", "--debug"], ["--debug", "encode", tmp_path / "none.png"], ["encode", photo, "--model", "nope", "--debug"]):
        done = tok(*args)
        assert done.code == 1 and "Traceback" in done.err
    assert "Traceback" not in tok("encode", tmp_path / "none.png").err


def test_a_bug_of_ours_is_one_line_too(tok, photo, monkeypatch):
    from tok1d.cli import encode

    monkeypatch.setattr(encode, "plan", lambda *a: 1 / 0)
    done = tok("encode", photo)
    assert done.code == 1 and "internal error, ZeroDivisionError" in done.err and done.err.count("\n") == 1


def test_file_names_of_any_bytes(tok, photos, tmp_path):
    odd = os.fsdecode(b"na\xff\xefve.png")
    try:
        (photos / odd).write_bytes((photos / "a.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    done = tok("encode", photos, "-o", tmp_path / "t")
    assert done.code == 0 and "na\\udcff" in done.out
    done = tok("encode", photos, "-o", tmp_path / "all.tok", "--json")
    assert done.code == 0 and str(photos / odd) in [r["input"] for r in done.rows]
    assert tok("decode", tmp_path / "all.tok", "-o", tmp_path / "p").code == 0
    assert (tmp_path / "p/all" / odd).is_file()
    done = tok("encode", tmp_path / odd)
    assert done.code == 1 and "no such file" in done.err


# signals and pipes -----------------------------------------------------------------------------------------------------


def test_interrupted_leaves_nothing_half_done(tok, photos, tmp_path, monkeypatch):
    from tok1d.tokenizers.tokenizer import Tokenizer1D

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer1D, "encode", stop)
    for output in (tmp_path / "t", tmp_path / "all.tok"):
        done = tok("encode", photos, "-o", output)
        assert done.code == 130 and done.err.endswith("tok: interrupted\n")
    assert not [n for n in files(tmp_path) if n.endswith(".tok") or n.startswith(".tok1d")]


def test_a_broken_pipe_is_quiet(tok, photos, tmp_path, monkeypatch):
    tok("encode", photos, "-o", tmp_path / "t")
    from tok1d.cli import info

    def gone(*args):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(info, "summary", gone)
    done = tok("info", tmp_path / "t")
    assert done.code == 141 and done.err == ""


def test_a_real_broken_pipe_and_a_real_interrupt(tmp_path):
    """In processes of their own: a reader that has left, and Ctrl-C while standard input is awaited."""
    (tmp_path / "x.tok").write_bytes(b"")
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "tok1d.cli.main", "info"]
    done = subprocess.run([*command, "--json", tmp_path], stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(theirs)
    assert done.returncode == 141 and done.stderr == ""
    code = "import sys\nfrom tok1d.cli.main import main\nprint('ready', flush=True)\nsys.exit(main(['info', '-']))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # a shell starts what it runs in the background deaf to Ctrl-C, and children inherit that
    hearing = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    child = subprocess.Popen([sys.executable, "-c", code], **pipes, text=True, preexec_fn=hearing)
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.2)
    os.kill(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert child.returncode == 130 and err == "tok: interrupted\n"
