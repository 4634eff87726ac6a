import math

import numpy as np
import pytest

from tests.eval.test_run import SMALL, measures, photos, run, small_chunks  # noqa: F401
from tok1d.errors import UsageError
from tok1d.eval.compare import bd_rate, compare, paired
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
    evaluate(ResizeSystem([8]), photos, SMALL, measures()[:1], tmp_path / "less")
    with pytest.raises(UsageError, match=r"data.hash.*data.images: 14 ≠ 9"):
        compare(tmp_path / "one", tmp_path / "fewer")
    with pytest.raises(UsageError, match=r"measures.*codes"):
        compare(tmp_path / "one", tmp_path / "less")
