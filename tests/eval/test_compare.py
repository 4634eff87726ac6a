import json
import math
import shutil

import numpy as np
import pytest

from tests.eval.test_run import SMALL, measures, photos, run, small_chunks  # noqa: F401
from tok1d.errors import UsageError
from tok1d.eval.compare import Point, bd_of, bd_rate, compare, paired
from tok1d.eval.run import evaluate
from tok1d.eval.systems import CodecSystem, ResizeSystem


def test_a_curve_shifted_in_rate():
    quality = [30.0, 32.5, 36.0, 38.0, 41.0]
    rate = np.array([0.1, 0.2, 0.5, 0.9, 2.0])
    for method in ("pchip", "akima"):
        for factor in (0.5, 0.9, 1.0, 3.0):
            delta = bd_rate(rate, quality, rate * factor, quality, method=method)
            assert delta.percent == pytest.approx(100 * (factor - 1), abs=1e-9) and delta.share == 1
    assert bd_rate(rate[::-1], quality[::-1], rate, quality).percent == pytest.approx(0, abs=1e-9)


def test_by_hand():
    # log rate is linear in quality on both sides: PCHIP is exact, A: q, B: 2q - 30 over 30..33 shared
    qa, qb = np.array([30.0, 31, 32, 33]), np.array([29.0, 30, 32, 33])
    a, b = np.exp(qa - 30), np.exp(2 * qb - 60)
    delta = bd_rate(a, qa, b, qb)
    assert delta.overlap == (30, 33)
    mean = np.mean([2 * q - 60 - (q - 30) for q in np.linspace(30, 33, 10001)])
    assert delta.percent == pytest.approx(100 * (math.exp(mean) - 1), rel=1e-6)


@pytest.mark.parametrize(
    ("curve", "reason"),
    [
        (([1, 2, 3], [1, 2, 3]), "3 points"),
        (([1, 2, 3, 4], [1, 3, 2, 4]), "does not rise"),
        (([1, 2, 3, 4], [100, 101, 102, 103]), "share 0%"),
        (([1, 2, 3, 4], [3.5, 5, 6, 7]), "share"),
        (([1, 2, 3, math.nan], [1, 2, 3, 4]), "3 points"),
    ],
)
def test_no_number_but_a_reason(curve, reason):
    delta = bd_rate([1, 2, 3, 4], [1, 2, 3, 4], *curve)
    assert delta.percent is None and reason in delta.reason
    with pytest.raises(UsageError, match="spline"):
        bd_rate([1, 2, 3, 4], [1, 2, 3, 4], *curve, method="spline")


def points(qualities, rates=(1, 2, 4, 8, 16, 32), covers=None):
    return [Point(r, q, n) for r, q, n in zip(rates, qualities, covers or [24] * len(qualities))]


def test_points_that_do_not_cover_everything_are_left_out():
    whole = points([30, 33, 36, 39])
    twice = points([10, 30, 33, 36, 39], (1, 2, 4, 8, 16), [3, 24, 24, 24, 24])  # its first point is a mean over three images
    assert bd_of(whole, twice).percent == pytest.approx(100) and bd_of(whole, twice[1:]).percent == pytest.approx(100)
    few = bd_of(whole, points([10, 30, 33, 36], covers=[3, 24, 24, 24]))
    assert few.percent is None and few.reason == "curve B has 3 points, 4 are needed; rates that do not cover all 24 are left out: 1 of curve B"
    assert bd_of([], []).percent is None


def test_points_at_the_floor_of_a_measure_are_left_out():
    rising = points([0.1, 0.3, 0.6, 0.9], (4, 8, 16, 32))
    assert bd_of(rising, points([0.11, 0.11, 0.1, 0.3, 0.6, 0.9])).percent == pytest.approx(0)
    assert "does not rise" in bd_of(rising, points([0.1, 0.3, 0.25, 0.6, 0.9])).reason
    falling = points([-q.quality for q in rising], (4, 8, 16, 32))
    assert bd_of(points([0.9, 0.5, 0.7, 0.1], (4, 8, 16, 32)), falling, better=-1).reason == "curve A does not fall: 0.5 at rate 8, 0.7 at 16"
    assert bd_of(falling, points([-0.1, -0.3, -0.6, -0.9], (2, 4, 8, 16)), better=-1).percent == pytest.approx(-50)


def test_words_of_one_image_are_drawn_together():
    rng = np.random.default_rng(1)
    images = rng.normal(0, 1, 12).repeat(40)  # forty words of twelve images agree with each other
    names = [f"image {i // 40}" for i in range(480)]
    alone, together = paired(np.zeros(480), images), paired(np.zeros(480), images, names)
    assert alone["mean"] == together["mean"] and together["high"] - together["low"] > 4 * (alone["high"] - alone["low"])


def test_pairs_see_what_means_do_not():
    rng = np.random.default_rng(0)
    base = rng.normal(30, 5, 200)
    found = paired(base, base + 0.1 + rng.normal(0, 0.05, 200))
    assert 0.08 < found["low"] < found["mean"] < found["high"] < 0.12 and found["larger"] > 0.9 and found["n"] == 200


def test_two_runs(photos, tmp_path):  # noqa: F811
    one, two = tmp_path / "one", tmp_path / "two"
    run(photos, one, ResizeSystem([4, 8, 12, 16]))
    run(photos, two, ResizeSystem([4, 6, 8, 10, 16]))
    found = compare(one, two)
    assert [p["a"] for p in found["pairs"]] == ["s4", "s8", "s16"]
    for pair in found["pairs"]:
        assert pair["differences"]["psnr"] == {"mean": 0, "low": 0, "high": 0, "n": 14, "larger": 0}
    assert abs(found["bd_rate"]["psnr over bytes"]["percent"]) < 10
    run(photos, tmp_path / "jpeg", CodecSystem("jpeg", [5, 20, 60, 90]))
    near = compare(one, tmp_path / "jpeg", match="bytes")
    assert near["pairs"] and near["systems"][1]["name"] == "jpeg"
    with pytest.raises(UsageError, match="match bytes"):
        compare(one, tmp_path / "jpeg")


def test_different_conditions_are_refused(photos, tmp_path):  # noqa: F811
    run(photos, tmp_path / "one", ResizeSystem([8]))
    run(photos.choose(9), tmp_path / "fewer", ResizeSystem([8]))
    with pytest.raises(UsageError, match=r"data.hash.*data.images: 14 ≠ 9"):
        compare(tmp_path / "one", tmp_path / "fewer")
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    summary["conditions"]["measures"]["features/colours"]["sample"] = 3
    (tmp_path / "other.json").write_text(json.dumps(summary))
    with pytest.raises(UsageError, match=r"measures\.features/colours\.sample: .* ≠ 3"):
        compare(tmp_path / "one", tmp_path / "other.json")


def test_what_one_side_did_not_measure_is_said(photos, tmp_path):  # noqa: F811
    run(photos, tmp_path / "one", ResizeSystem([8]))
    evaluate(ResizeSystem([8]), photos, SMALL, measures()[:1], tmp_path / "less")
    found = compare(tmp_path / "one", tmp_path / "less")
    assert len(found["notes"]) == 1 and found["notes"][0].startswith(f"only {tmp_path / 'one'} measured codes")
    assert found["pairs"][0]["differences"]["psnr"]["n"] == 14


def test_summaries_alone(photos, tmp_path):  # noqa: F811
    run(photos, tmp_path / "one", ResizeSystem([4, 8, 12, 16]))
    shutil.copy(tmp_path / "one" / "summary.json", tmp_path / "alone.json")
    found = compare(tmp_path / "one", tmp_path / "alone.json")
    assert found["notes"] == [f"{tmp_path / 'alone.json'} has no rows beside it: no paired differences"] and found["pairs"][0]["differences"] == {}
    assert found["bd_rate"]["psnr over bytes"]["percent"] == 0 and found["bd_rate"]["fd_colours over bytes"]["percent"] == 0


def test_words_and_faces_are_paired(tmp_path):
    def folder(name, read, cosine):
        rows = [
            {"table": "images", "id": "a", "rate": "k1", "status": "ok", "bytes": 9.0},
            *({"table": "words", "id": i, "rate": r, "word": 0, "truth": "word", "read": t, "status": "ok"} for i, r, t in (("a", "k1", "word"), ("b", "k1", read), ("b", "original", "word"))),
            {"table": "words", "id": "c", "rate": "k1", "word": 0, "truth": "w", "read": None, "status": "outside_view"},
            *({"table": "faces", "id": i, "rate": "k1", "face": 0, "similarity": c, "status": "ok"} for i, c in (("a", 0.5), ("b", cosine), ("c", None))),
        ]
        (tmp_path / name / "rows").mkdir(parents=True)
        (tmp_path / name / "rows" / "0.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        micro = {"t_acc_raw": {"micro": {"mean": 0.5, "n": 2}}, "t_ned_raw": {"micro": {"mean": 0.5, "n": 2}}}
        rate = {"rate": "k1", "ok": 1, "images": 1, "metrics": {"bytes": {"mean": 9.0, "n": 1}}, "measures": {"text": {"all": micro}}}
        asked = {"protocol": {}, "data": {}, "system": {}, "measures": {}}
        (tmp_path / name / "summary.json").write_text(json.dumps({"version": 1, "conditions": asked, "rates": [rate]}))
        return tmp_path / name

    found = compare(folder("a", "wo", 0.1), folder("b", "wor", 0.3))
    differences = found["pairs"][0]["differences"]
    assert differences["t_ned"]["mean"] == 0.125 and differences["t_acc"]["mean"] == 0 and differences["t_ned"]["n"] == 2
    assert differences["f_sim"] == pytest.approx({"mean": 0.1, "low": 0, "high": 0.2, "n": 2, "larger": 0.5})
    assert "t_acc over bytes" in found["bd_rate"] and found["bd_rate"]["t_acc over bytes"]["reason"].startswith("curve A has 1 point,")
