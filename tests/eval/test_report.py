import base64
import hashlib
import html
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.dct_model import make_model
from tok1d.errors import TokError, UsageError
from tok1d.eval import report_plots
from tok1d.eval import run as running
from tok1d.eval.binned import Bins
from tok1d.eval.codebook import Codes
from tok1d.eval.faces import Faces
from tok1d.eval.gallery import Crops, Gallery, crop_keys
from tok1d.eval.manifest import Face, Manifest, Word
from tok1d.eval.measures import Features, Pixels
from tok1d.eval.protocol import Protocol
from tok1d.eval.report import make_report
from tok1d.eval.report_data import columns, load_runs
from tok1d.eval.report_html import esc, number
from tok1d.eval.run import Rank, evaluate, read_rows
from tok1d.eval.systems import CodecSystem, ResizeSystem, TokenizerSystem
from tok1d.eval.text_measure import Text

pytest.importorskip("matplotlib")
draw = report_plots.draw

SMALL = Protocol("small-v1", 16, "crop", "bicubic", "model", "text-v1-256", "face-v2-256", "tests")
HOSTILE = "<script>alert(1)</script>\"'&\x01$x_$"


class Colours:
    """Feature network, recogniser and embedder for tests: all see mean colours."""

    name, id, distance_name = "colours", "colours/1", "fd_colours"
    licence, size, threshold, charset = "free", 112, 0.5, None

    def features(self, images):
        return {"pooled": torch.nn.functional.avg_pool2d(images.float() / 255, images.shape[-1] // 2).flatten(1)}

    def recognise(self, crops):
        return [("abc"[int(c.mean()) % 3] + "x" * (c.shape[1] % 2), 0.5) for c in crops]

    def embed(self, aligned):
        x = torch.nn.functional.avg_pool2d(aligned.float() - 128, 56).flatten(1)
        return torch.nn.functional.normalize(x, dim=1)


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains about tags that do not match."""

    EMPTY = frozenset({"meta", "img", "source", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def values(self, name: str) -> list[str]:
        return [a[name] for _, a in self.tags if name in a]


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Plots cost a third of a second each; here they are one pixel each, and tested by themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_plots, "draw", lambda panels, ylabel, *, style="g": pixel(f"{panels}{ylabel}{style}"))
        yield


def pixel(text: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), tuple(hashlib.sha256(text.encode()).digest()[:3])).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("photos")
    rng = torch.Generator().manual_seed(0)
    for i in range(14):
        coarse = torch.rand(1, 3, 5, 5, generator=rng)
        image = torch.nn.functional.interpolate(coarse, (40, 40), mode="bicubic").clamp(0, 1)
        Image.fromarray((image[0].permute(1, 2, 0) * 255).byte().numpy()).save(folder / f"photo{i:02d}.png")
    (folder / "photo03.png").write_bytes(b"broken")
    whole = Manifest.load(folder)
    points = ((12.0, 15.0), (28.0, 15.0), (20.0, 22.0), (14.0, 30.0), (26.0, 30.0))
    samples = []
    for i, s in enumerate(whole.samples):
        words = tuple(Word((4.0 + j, 5.0, 20.0 + 2 * j, 15.0), "abc"[(i + j) % 3], (0.025, 0.035, 0.5)[j]) for j in range(3))
        face = Face(points, (0.15, 0.25, 0.35)[i % 3], person=f"p{i // 2}")
        name = HOSTILE if i == 4 else "broken<b>" if i == 3 else s.id
        samples.append(replace(s, id=name, words=words, faces=(face,), group="ab"[i % 2]))
    return replace(whole, name=f"data {HOSTILE}", samples=tuple(samples))


def every_measure():
    net = Colours()
    return [
        Pixels(), Codes(), Features(net, sample=12), Text(net, Bins.named("text-v1-256")), Faces(net, Bins.named("face-v2-256")), Gallery(fixed=3, extremes=2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(manifest, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "CHUNK", 4)
        evaluate(TokenizerSystem(make_model(), [1, 4, 16, 32]), manifest, SMALL, every_measure(), out / "tokens")
        evaluate(CodecSystem("jpeg", [5, 20, 60, 95]), manifest, SMALL, [Pixels(), Gallery(fixed=3)], out / "jpeg")
        evaluate(ResizeSystem([8, 16]), manifest, SMALL, [Pixels()], out / "resize")
    return out


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report = make_report([runs / "tokens", runs / "jpeg", runs / "resize"], folder / "page.html", folder / "png")
    return report, report.page.read_text("utf-8")


def test_a_page_stands_alone_and_is_well_formed(made):
    page = Page(made[1])
    sources = [s for a in ("src", "srcset", "data", "poster") for s in page.values(a)]
    assert len(sources) > 40 and all(s.startswith("data:image/") for s in sources)
    assert all(link.startswith("#") and link[1:] in page.values("id") for link in page.values("href"))
    assert not re.search(r"url\(|@import|<link|<iframe|<object", made[1])
    assert not page.values("onerror") and [t for t, _ in page.tags].count("script") == 1
    for source in sources:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            image.load()
    assert all(a.get("alt") for t, a in page.tags if t == "img")


def test_it_holds_every_number_of_the_summaries(made, runs):
    page = Page(made[1])
    held = {float(v) for v in page.values("data-v")}

    def wanted(value, path=()):
        if isinstance(value, dict):
            for k, v in value.items():
                # macro and micro intervals share one n; what was counted stands in tooltips and statuses
                yield from wanted(v, (*path, k))
        elif isinstance(value, int | float) and not isinstance(value, bool) and path[-1] in ("mean", "fd_colours", "perplexity", "static_bits_per_image"):
            yield path, float(value)

    found = 0
    tooltips = "\n".join(page.values("title"))
    for name in ("tokens", "jpeg", "resize"):
        for rate in json.loads((runs / name / "summary.json").read_text())["rates"]:
            for path, value in wanted({"metrics": rate["metrics"], "measures": rate.get("measures", {})}):
                if path[:3] == ("measures", "faces", "groups"):
                    continue  # under "By source", where they are made from the rows
                assert value in held or path[2:3] == ("two_photos",), (name, rate["rate"], path, value)
                found += 1
            for column, m in rate["metrics"].items():
                assert f"{m['mean']!r} ({m['low']!r} to {m['high']!r}, 95 %), n = {m['n']} images" in tooltips, column
    assert found > 300
    text = "".join(page.text)
    assert "Two photos of one person" in text and "chance floor" in text and "passes verification" in text


def test_numbers_are_rounded_for_people_and_kept_whole_beside(made, runs):
    psnr = json.loads((runs / "jpeg" / "summary.json").read_text())["rates"][1]["metrics"]["psnr"]
    assert f'<td data-v="{psnr["mean"]!r}"' in made[1] and f">{number(psnr['mean'])}<small>{number(psnr['low'])}–" in made[1]


def test_names_from_outside_are_escaped(made):
    assert "<script>alert" not in made[1] and "broken<b>" not in made[1] and "\x01" not in made[1]
    page = Page(made[1])
    shown = HOSTILE.replace("\x01", "\ufffd")
    assert any(shown in t for t in page.text) and any(shown in t for t in page.values("title"))
    assert esc("\ud800\x00ok") == "\ufffd\ufffdok"


def test_the_same_runs_give_the_same_bytes(made, runs, tmp_path):
    again = make_report([runs / "tokens", runs / "jpeg", runs / "resize"], tmp_path / "page.html", tmp_path / "png")
    assert again.page.read_bytes() == made[0].page.read_bytes()
    assert [p.read_bytes() for p in again.images] == [p.read_bytes() for p in made[0].images]


def test_plots_lie_beside_it(made):
    names = {p.name for p in made[0].images}
    assert {"psnr.png", "t_acc.png", "f_sim.png", "features_colours_fd_colours.png", "entropy_by_position.png", "t_acc_by_size.png"} <= names
    grids = [p for p in made[0].images if p.name.startswith("pictures_")]
    assert sorted(Image.open(p).size for p in grids) == [(16 * 5, 16 * 3), (16 * 5, 16 * 3)]  # original and four rates of three images


def test_curves_for_other_programs(made, runs):
    (path,) = [p for p in made[0].images if p.name == "curves.json"]
    held = {c["name"]: c for c in json.loads(path.read_text("utf-8"))}
    assert list(held) == ["dct", "jpeg", "resize"] and held["dct"]["tokens"] == [1, 4, 16, 32] and held["jpeg"]["tokens"] == [None] * 4
    rates = json.loads((runs / "jpeg" / "summary.json").read_text())["rates"]
    results = held["jpeg"]["results"]
    assert results["bpp"] == [r["metrics"]["file_bpp"]["mean"] for r in rates] and results["payload_bpp"] == [r["metrics"]["bpp"]["mean"] for r in rates]
    assert results["psnr-rgb"] == [r["metrics"]["psnr"]["mean"] for r in rates] and "t_acc" not in results and len(held["dct"]["results"]["t_acc"]) == 4
    assert all(len(values) == len(curve["rate"]) for curve in held.values() for values in curve["results"].values())


def test_plots_show_curves_levels_and_names_of_any_kind(runs):
    held = load_runs([runs / "tokens", runs / "jpeg", runs / "resize"])
    for run in held:
        run.label += HOSTILE
    psnr = next(c for c in columns(held) if c.key == "psnr")
    panels = report_plots.rate_panels(psnr, held)
    assert [p.xlabel for p in panels] == ["bits per pixel, whole file", "bits per pixel, payload", "tokens"]
    assert [line.style for line in panels[0].lines] == ["-", "--"] and len(panels[2].lines) == 1
    assert [y for y, _ in panels[0].levels] == [r["metrics"]["psnr"]["mean"] for r in held[2].rates]
    first = held[0].rates[0]["metrics"]
    assert panels[1].lines[0].points[0] == (first["bpp"]["mean"], *(first["psnr"][k] for k in ("mean", "low", "high")))
    data = draw(panels, "PSNR")
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    assert picture.size == (2400, 780) and picture.getpixel((1, 1)) == (255, 255, 255)
    wanted = np.array([int(report_plots.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)])
    assert (np.abs(np.asarray(picture).astype(int) - wanted).max(-1) < 8).sum() > 500  # the curve is there in its colour
    small = report_plots.lossless_webp(data)
    assert len(small) < 0.7 * len(data) and np.array_equal(np.asarray(Image.open(io.BytesIO(small)).convert("RGB")), np.asarray(picture))


def test_plots_of_one_rate_and_of_positions(runs):
    held = load_runs([runs / "tokens"])
    single = replace(held[0], summary={**held[0].summary, "rates": held[0].rates[:1]})
    panels = report_plots.rate_panels(next(c for c in columns([single]) if c.key == "t_acc"), [single])
    sizes = report_plots.bin_panels("text", ["all", "t_acc_raw"], ["all", "chance_acc"], ["small", "medium"], held)
    assert [p.title for p in sizes] == ["small", "medium"] and {t for _, t in sizes[0].levels} == {"chance", "originals"}
    positions = report_plots.position_panels(held)
    assert len(positions[0].lines[0].points) == 32 and {t for _, t in positions[0].levels} == {"bits of a token", "most that 13 images can show"}
    for some in (panels[:1], positions):
        assert Image.open(io.BytesIO(draw(some, "y", style="%"))).size == (1640, 780)
    assert draw(positions, "y") == draw(positions, "y")
    assert report_plots.position_panels(load_runs([runs / "jpeg"])) == []


def test_levels_share_names_and_keep_away_from_curves():
    line = report_plots.Line("a", 0, "-", [(1.0, 0.0, 0.0, 0.0), (10.0, 0.5, 0.4, 0.6), (100.0, 1.0, 0.9, 1.1)])
    panel = report_plots.Panel("", "x", "log", [line], [])
    assert report_plots._room(panel, 0.95, 1) == 0 and report_plots._room(panel, 0.95, -1) == 0.95
    assert report_plots._shortened(["resize s64", "resize s128", "chance", "a b c", "a b d"]) == ["resize s64", "s128", "chance", "a b c", "d"]


def test_a_page_is_as_large_as_its_gallery(runs, made, tmp_path):
    small = make_report([runs / "tokens", runs / "jpeg", runs / "resize"], tmp_path / "0.html", gallery=0).page.read_text("utf-8")
    one = make_report([runs / "tokens", runs / "jpeg", runs / "resize"], tmp_path / "1.html", gallery=1).page.read_text("utf-8")
    assert len(small) < len(one) < len(made[1])
    assert Page(small).values("alt").count("original") == 0 and Page(one).values("alt").count("original") == 1 and Page(made[1]).values("alt").count("original") == 3
    assert all(n in small for n in ("Rate and quality", "BD-rate", "T-ACC")) and '<section id="pictures"' not in small
    # words: an original and four rates of one word of each of three sizes
    assert Page(one).values("class").count("word") == 15 and Page(made[1]).values("class").count("word") > 30


def test_summaries_in_the_page_are_json(made, runs):
    text = re.findall(r"<pre>(.*?)</pre>", made[1], re.DOTALL)
    assert json.loads(html.unescape(text[0])) == json.loads((runs / "tokens" / "summary.json").read_text())


def test_what_was_not_measured_is_said(made):
    page = Page(made[1])
    assert page.text.count("not measured") > 4
    text = "".join(page.text)
    assert "broken<b>" in text and "unreadable_image" in text and "14" in text  # failures with their names
    assert "against" in text and "have 14 images" not in text
    assert "dct" in text and "13 / 14" in text


def test_one_run_of_few_measures_and_damaged_parts_are_reported(runs, tmp_path):
    alone = make_report([runs / "resize"], tmp_path / "a.html")
    assert alone.images == [] and alone.notes == [] and "Codebooks" not in alone.page.read_text("utf-8")
    for victim, said in (("states", "pictures cannot be read"), ("rows", "rows cannot be read")):
        copy = tmp_path / victim
        shutil.copytree(runs / "tokens", copy)
        for path in (copy / victim).iterdir():
            path.write_bytes(b"{damaged")
        report = make_report([copy], tmp_path / f"{victim}.html")
        assert any(said in n for n in report.notes) and said in report.page.read_text("utf-8")
        shutil.rmtree(copy / victim)
        Page(make_report([copy], tmp_path / f"{victim}.html").page.read_text("utf-8"))


def test_mixed_protocols_data_and_networks_are_refused(runs, tmp_path):
    for change, said in (
        (lambda c: c["protocol"].update(size=32), "protocol.size: 16 ≠ 32"),
        (lambda c: c["data"].update(hash="other"), "data.hash"),
        (lambda c: c["measures"]["text"].update(recogniser="another"), "measures.text.recogniser: colours/1 ≠ another"),
    ):
        copy = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(runs / "tokens", copy)
        summary = json.loads((copy / "summary.json").read_text())
        change(summary["conditions"])
        (copy / "summary.json").write_text(json.dumps(summary))
        with pytest.raises(UsageError, match=re.escape(said)):
            make_report([runs / "tokens", copy], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(UsageError, match=r"report\.html"):
        make_report([runs / "tokens"], tmp_path / "page.png")
    with pytest.raises(TokError, match="no summary"):
        make_report([tmp_path / "nowhere"], tmp_path / "page.html")


def test_a_folder_of_runs_and_two_runs_of_one_name(runs, tmp_path):
    assert [r.folder.name for r in load_runs([runs])] == ["jpeg", "resize", "tokens"]
    shutil.copytree(runs / "jpeg", tmp_path / "second")
    labels = [r.label for r in load_runs([runs / "jpeg", tmp_path / "second", runs / "jpeg"])]
    assert labels == ["jpeg (jpeg)", "jpeg (second)"]
    assert [c.key for c in columns(load_runs([runs]))][:5] == ["bytes", "file_bytes", "bpp", "file_bpp", "psnr"]


def test_other_versions_are_said(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs / "jpeg", copy)
    summary = json.loads((copy / "summary.json").read_text())
    summary["provenance"]["versions"]["pillow"] = "1.0"
    (copy / "summary.json").write_text(json.dumps(summary))
    notes = make_report([runs / "jpeg", copy], tmp_path / "page.html").notes
    assert any("different software" in n and "versions.pillow" in n for n in notes)


def test_crops_are_the_same_for_any_number_of_ranks(manifest, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "CHUNK", 4)
    system = TokenizerSystem(make_model(), [1, 4, 16, 32])
    for i in range(3):
        evaluate(system, manifest, SMALL, every_measure(), tmp_path, rank=Rank(i, 3), batch_size=3)
    alone, shared = (load_runs([p])[0] for p in (runs / "tokens", tmp_path))
    for measure in (Crops("text"), Crops("faces", each=6), Gallery(fixed=3, extremes=2)):
        a, b = alone.state(measure), shared.state(measure)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    state = alone.state(Crops("text"))
    rows = [r for r in read_rows(tmp_path, "words") if r["rate"] == "k4" and r["status"] == "ok" and r["scale"] == 0.025]
    keys = crop_keys([(r["id"], r["word"]) for r in rows]).sort().values[:8]
    assert torch.equal(state["k4/small/keys"], keys) and torch.equal(state["original/small/keys"], keys)
    assert state["k4/small/crops"].shape == (8, 3, 32, 160)


def test_crops_show_what_was_cropped():
    crops = Crops("text", each=2, height=4, width=10)
    picture = torch.from_numpy(np.full((3, 8, 12), 200, np.uint8))
    for number_ in range(5):
        crops.keep("k1", "large", "image", number_, picture)
    state = crops.state()
    assert state["k1/large/widths"].tolist() == [6, 6] and crops.state() == {}
    assert (state["k1/large/crops"][..., :6] == 200).all() and (state["k1/large/crops"][..., 6:] == 0).all()
    assert state["k1/large/keys"].tolist() == crop_keys([("image", i) for i in range(5)]).sort().values[:2].tolist()
