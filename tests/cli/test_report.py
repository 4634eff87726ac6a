import io
import json

import pytest
from PIL import Image

pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")


def one_pixel() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (1, 1)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def run_folder(tmp_path, photos, monkeypatch):
    from tok1d.eval.gallery import Gallery
    from tok1d.eval.manifest import Manifest
    from tok1d.eval.measures import Pixels
    from tok1d.eval.protocol import Protocol
    from tok1d.eval.run import evaluate
    from tok1d.eval.systems import ResizeSystem

    small = Protocol("small-v1", 16, "crop", "bicubic", "model", "text-v1-256", "face-v2-256", "tests")
    evaluate(ResizeSystem([8, 16]), Manifest.load(photos), small, [Pixels(), Gallery()], tmp_path / "runs" / "resize")
    return tmp_path / "runs" / "resize"


def test_report_of_a_run(tok, run_folder, tmp_path, monkeypatch):
    from tok1d.eval import report_plots

    done = tok("report", run_folder, "-o", tmp_path / "out" / "page.html")
    assert (done.code, done.err) == (0, "") and done.out.strip() == str(tmp_path / "out" / "page.html")
    assert (tmp_path / "out" / "page.html").read_text("utf-8").startswith("<!doctype html>")
    assert (tmp_path / "out" / "page_files" / "psnr.png").stat().st_size > 10_000
    monkeypatch.setattr(report_plots, "draw", lambda *_, **__: one_pixel())  # has been shown to work
    done = tok("report", run_folder.parent, "-o", tmp_path / "b.html", "--no-png", "--json")
    assert done.rows == [{"page": str(tmp_path / "b.html"), "images": [], "notes": []}] and not (tmp_path / "b_files").exists()
    done = tok("report", run_folder, "-o", tmp_path / "c.html", "--png", tmp_path / "figures", "--json")
    assert str(tmp_path / "figures" / "psnr.png") in done.rows[0]["images"]
    sizes = []
    for n in ("0", "1", "4"):
        assert tok("report", run_folder, "-o", tmp_path / f"{n}.html", "--no-png", "--gallery", n).code == 0
        sizes.append((tmp_path / f"{n}.html").read_text("utf-8").count("<img class="))
    assert sizes == [0, 3, 12]  # an original and two rates of each image


def test_what_is_no_run_is_said(tok, run_folder, tmp_path):
    done = tok("report", tmp_path / "nowhere", "-o", tmp_path / "page.html")
    assert done.code == 1 and "no summary there" in done.err and not (tmp_path / "page.html").exists()
    assert tok("report", run_folder, "-o", tmp_path / "page.pdf").code == 2
    summary = json.loads((run_folder / "summary.json").read_text())
    summary["conditions"]["protocol"]["size"] = 32
    other = tmp_path / "runs" / "other"
    other.mkdir()
    (other / "summary.json").write_text(json.dumps(summary))
    done = tok("report", run_folder, other, "-o", tmp_path / "page.html")
    assert done.code == 2 and "protocol.size: 16 ≠ 32" in done.err
