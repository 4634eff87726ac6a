"""What only a process of its own can show: start-up time, what is imported, and life without the optional packages."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.dct_model import picture
from tok1d.image_io import read, write
from tok1d.tokenizers.decoders.grid import GridDecoder
from tok1d.tokenizers.encoders.titok import TiTokEncoder
from tok1d.tokenizers.lengths import TailDrop
from tok1d.tokenizers.quantizers.fsq import FSQ
from tok1d.tokenizers.tokenizer import Tokenizer1D

ROOT = Path(__file__).parents[2]
BLOCKED = ("torchvision", "lightning", "timm", "diffusers", "lpips", "torchmetrics", "pytorch_lightning", "huggingface_hub")
BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(name + " is blocked by the test")
sys.meta_path.insert(0, Blocker())
"""


def python(code: str, *args: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def titok(tmp_path_factory):
    torch.manual_seed(0)
    tiny = {"width": 32, "depth": 1, "heads": 1, "patch_size": 8, "image_size": [16, 16]}
    model = Tokenizer1D(TiTokEncoder(8, 2, **tiny), FSQ([8, 8]), GridDecoder(8, 2, **tiny), TailDrop(), (16, 16), "tiny").eval()
    folder = tmp_path_factory.mktemp("titok")
    model.save_pretrained(folder)
    return folder


def test_encode_and_decode_without_the_optional_packages(titok, tmp_path):
    write(tmp_path / "a.png", picture(0, 20, 30))
    code = BLOCKER + (
        "import tok1d\nfrom tok1d.cli.main import main\n"
        "model, image, tokens, out = sys.argv[1:]\n"
        "assert main(['encode', image, '-o', tokens, '--model', model, '--tokens', '4']) == 0\n"
        "assert main(['decode', tokens, '-o', out, '--model', model]) == 0\n"
        "assert tok1d.load(model).encode(tok1d.read(image), policy='pad').shape == (1, 8)\n"
        f"print([m for m in {BLOCKED!r} if m in sys.modules])\n"
    )
    done = python(code, titok, tmp_path / "a.png", tmp_path / "a.tok", tmp_path / "b.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert read(tmp_path / "b.png").shape == (1, 3, 20, 30)


def test_without_the_eval_extra_lpips_is_refused_in_one_line(titok, tmp_path):
    write(tmp_path / "a.png", picture(0))
    code = BLOCKER + "from tok1d.cli.main import main\nsys.exit(main(['encode', sys.argv[2], '--model', sys.argv[1], '--target-lpips', '0.3', '-q']))"
    done = python(code, titok, tmp_path / "a.png")
    assert done.returncode == 1 and "pip install 'tok1d[eval]'" in done.stderr and done.stderr.count("\n") == 1


def test_import_tok1d_costs_next_to_nothing():
    done = python("import sys, tok1d, tok1d.cli.main as m; m.build_parser(); print(sorted(n for n in ('torch', 'numpy', 'PIL', 'huggingface_hub', 'safetensors', 'lightning', 'torchvision') if n in sys.modules))")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["encode", "--help"]])
def test_help_starts_quickly(args):
    """Processor time, which other work on the machine does not stretch as it does the clock."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "tok1d.cli.main", *args], cwd=ROOT, capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0 and done.stdout
    assert min(times) < 0.4


def test_info_needs_no_torch(titok, tmp_path):
    write(tmp_path / "a.png", picture(0))
    code = "import sys\nfrom tok1d.cli.main import main\nassert main(sys.argv[1:]) == 0\nprint('torch' in sys.modules)"
    assert python(code, "encode", tmp_path / "a.png", "--model", titok).stdout.splitlines()[-1] == "True"
    for args in (["info", tmp_path / "a.tok"], ["truncate", tmp_path / "a.tok", "--tokens", "2", "-o", tmp_path / "b.tok"], ["show", titok], ["models"]):
        done = python(code, *args)
        assert done.stdout.splitlines()[-1] == "False", (args, done.stderr)


def test_bad_requests_fail_before_torch_is_imported(tmp_path):
    write(tmp_path / "a.png", picture(0))
    (tmp_path / "a.tok").write_bytes(b"mine")
    code = "import sys\nfrom tok1d.cli.main import main\nprint(main(sys.argv[1:]), 'torch' in sys.modules)"
    for args, exit_code in ((["encode", tmp_path / "a.png"], 1), (["encode", tmp_path / "a.png", "-o", tmp_path / "b.tok", "--model", "defualt"], 1),
                            (["encode", tmp_path / "void*"], 1), (["encode", tmp_path / "a.png", "--tokens", "3", "--max-bytes", "9"], 2)):  # fmt: skip
        assert python(code, *args).stdout.strip() == f"{exit_code} False"


def test_import_tokenizers_is_never_ours():
    """A top-level folder called tokenizers would shadow the Hugging Face package of that name."""
    done = python("import os, tokenizers; print(os.path.realpath(tokenizers.__file__))")
    if done.returncode:
        assert "ModuleNotFoundError: No module named 'tokenizers'" in done.stderr
    else:
        found = Path(done.stdout.strip())
        assert ROOT not in found.parents or "site-packages" in found.parts


def test_the_progress_bar_is_for_terminals_only(titok, tmp_path):
    """Through a pseudo-terminal the bar is drawn, on standard error; standard output stays clean."""
    pty = pytest.importorskip("pty")
    (tmp_path / "in").mkdir()
    for i in range(3):
        write(tmp_path / f"in/{i}.png", picture(i))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tok1d.cli.main", "encode", tmp_path / "in", "-o", tmp_path / "t", "--model", titok, "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.returncode == 0 and done.stdout.count("\n") == 3 and "\x1b" not in done.stdout
    assert "3/3 images" in shown and "█" in shown


def test_memory_does_not_grow_with_the_number_of_files(titok, tmp_path):
    """The peak of 240 files is that of 24 (each 1.4 MB as bytes, so 216 more would show as 300 MB)."""
    image = picture(0, 640, 720)
    write(tmp_path / "one.bmp", image)
    peaks = []
    for count in (24, 240):
        folder = tmp_path / f"n{count}"
        folder.mkdir()
        for i in range(count):
            (folder / f"{i}.bmp").hardlink_to(tmp_path / "one.bmp")
        code = "import sys, resource\nfrom tok1d.cli.main import main\nassert main(sys.argv[1:]) == 0\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        done = python(code, "encode", folder, "-o", tmp_path / f"t{count}", "--model", titok, "-q")
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 30, peaks
