"""Text metrics: edit distances against a plain table, bins at their edges, means by hand, exact merges, chance, bootstrap."""

import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tok1d.errors import TokError
from tok1d.eval import bootstrap, editdistance
from tok1d.eval.binned import BINS, BinnedMean, Bins
from tok1d.eval.text import SCORES, VARIANTS, ChanceFloor, TextAccuracy, TextNED, normalise, partners, text_scores

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")  # of empty metrics, on purpose

WORDS = st.text(alphabet="abcAB1! é€\0\U0001f600", max_size=12)
PAIRS = st.lists(st.tuples(WORDS, WORDS), max_size=20)

# Invented rows: (image, truth, reading, relative size of a character, right, similarity)
ROWS = [
    ("a", "Exit", "Exit", 0.05, 1, 1.0),
    ("a", "Exit", "exit", 0.04, 0, 0.75),
    ("a", "Tiredness", "Treeneas", 0.031, 0, 1 - 3 / 9),
    ("b", "way", "", 0.03, 0, 0.0),
    ("b", "10%", "10", 0.025, 0, 1 - 1 / 3),
    ("b", "of", "often", 0.02, 0, 0.4),
    ("c", "&", "8", 0.0199, 0, 0.0),
    ("c", "café", "cafe", 0.001, 0, 0.75),
]


def plain_distance(a: str, b: str) -> int:
    """The textbook table, one cell at a time."""
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return table[-1][-1]


@settings(deadline=None, max_examples=40)
@given(PAIRS)
def test_edit_distance_equals_the_plain_table(pairs: list[tuple[str, str]]) -> None:
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    ours = editdistance.levenshtein(a, b)
    assert ours.tolist() == [plain_distance(x, y) for x, y in pairs]
    assert np.array_equal(ours, editdistance.levenshtein(b, a))


def test_edit_distance_of_lengths_that_differ_much_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editdistance, "CELLS", 64)
    rng = random.Random(0)
    pairs = [("".join(rng.choices("abc", k=rng.choice([0, 1, 3, 90]))), "".join(rng.choices("abc", k=rng.choice([0, 2, 50])))) for _ in range(60)]
    ours = editdistance.levenshtein([a for a, _ in pairs], [b for _, b in pairs])
    assert ours.tolist() == [plain_distance(a, b) for a, b in pairs]


def test_edit_distance_agrees_with_torchmetrics() -> None:
    other = pytest.importorskip("torchmetrics.functional.text").edit_distance
    rng = random.Random(1)
    a, b = (["".join(rng.choices("abcd", k=rng.randint(1, 9))) for _ in range(50)] for _ in range(2))
    assert editdistance.levenshtein(a, b).tolist() == other(b, a, reduction="none").tolist()


@settings(deadline=None, max_examples=40)
@given(PAIRS, st.sampled_from(SCORES), st.sampled_from(VARIANTS))
def test_scores_are_symmetric_and_bounded(pairs: list[tuple[str, str]], score: str, variant: str) -> None:
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    forward, back = text_scores(a, b, score, variant), text_scores(b, a, score, variant)
    both = ~forward.isnan() & ~back.isnan()
    assert torch.equal(forward[both], back[both])
    assert ((forward[both] >= 0) & (forward[both] <= 1)).all()
    assert (forward.isnan() == torch.tensor([variant == "alnum" and not normalise(x, "alnum") for x in a], dtype=torch.bool)).all()
    exact = torch.tensor([normalise(x, variant) == normalise(y, variant) for x, y in pairs], dtype=torch.bool)
    assert ((forward == 1) == exact)[~forward.isnan()].all()


def test_scores_of_the_invented_rows() -> None:
    _, truths, readings, _, right, similar = (list(c) for c in zip(*ROWS))
    assert text_scores(truths, readings, "acc").tolist() == right
    assert text_scores(truths, readings, "ned").tolist() == similar
    assert text_scores(["", ""], ["", "x"], "ned").tolist() == [1.0, 0.0]
    assert text_scores(truths, readings, "acc", "caseless").tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    alnum = text_scores(truths, readings, "acc", "alnum").tolist()
    assert alnum[:6] == [1, 1, 0, 0, 1, 0] and math.isnan(alnum[6]) and alnum[7] == 0


def test_bins_are_half_open_and_named() -> None:
    bins = Bins.named("text-v1-256")
    edges = torch.tensor([0.0, 0.0199999, 0.02, 0.0299999, 0.03, 0.04, 0.9999, 1.0], dtype=torch.float64)
    assert bins.cells(edges).tolist() == [0, 0, 1, 1, 2, 3, 3, 4]
    assert [bins.index(e) for e in edges.tolist()] == [-1, -1, 0, 0, 1, 2, 2, -1]
    assert Bins.named("text-v1-1024").edges == (0.005, 0.01, 0.02, 1.0)
    assert Bins.named("face-v1-512").edges == (0.0, 0.05, 0.2, 1.0) and Bins.named("face-v2-512").edges == (0.05, 0.1, 0.2, 1.0)
    assert len(BINS) == 13 and all(b.name == name for name, b in BINS.items())
    with pytest.raises(TokError, match="text-v1-256, text-v1-512"):
        Bins.named("text")
    with pytest.raises(TokError, match="ascending"):
        Bins("x", (0.0, 0.0, 1.0, 2.0))


def test_means_by_hand() -> None:
    _, truths, readings, scales, _, similar = (list(c) for c in zip(*ROWS))
    metric = TextNED(Bins.named("text-v1-256"))
    metric.update(truths, readings, scales)
    table = metric.compute()
    means = [(2 / 3 + 0.4) / 2, (2 / 3 + 0) / 2, 1.75 / 2]
    assert table.mean == pytest.approx(means, abs=1e-12) and table.n == [2, 2, 2]
    assert (table.outside, table.uncovered, table.macro_bins) == (2, 0, 3)
    assert table.macro == pytest.approx(sum(means) / 3, abs=1e-12)
    assert table.micro == pytest.approx(sum(similar[:6]) / 6, abs=1e-12)
    assert table.overall == pytest.approx(sum(similar) / 8, abs=1e-12)
    spread = abs(similar[4] - similar[5]) / math.sqrt(2)  # standard deviation of two values
    assert table.high[0] - table.mean[0] == pytest.approx(1.959964 * spread / math.sqrt(2), rel=1e-6)
    assert table.mean[0] - table.low[0] == pytest.approx(table.high[0] - table.mean[0], rel=1e-12)


def test_empty_bins_and_what_a_metric_does_not_cover() -> None:
    metric = TextAccuracy(Bins.named("text-v1-256"), "alnum")
    metric.update(["&", "a", "b"], ["x", "A", "c"], [0.05, 0.05, 0.025])
    table = metric.compute()
    assert table.n == [1, 0, 1] and math.isnan(table.mean[1]) and table.uncovered == 1
    assert (table.macro, table.macro_bins, table.micro) == (0.5, 2, 0.5)
    assert table.as_dict()["mean"] == [0.0, None, 1.0] and table.as_dict()["low"] == [None, None, None]
    empty = TextAccuracy(Bins.named("text-v1-256")).compute()
    assert math.isnan(empty.macro) and empty.n == [0, 0, 0] and empty.macro_bins == 0


def test_groups_are_kept_apart_and_add_up() -> None:
    metric = BinnedMean(Bins.named("face-v2-256"), groups=("x", "y"))
    metric.update(torch.tensor([0.5, 0.75, -0.25]), torch.tensor([0.15, 0.15, 0.5]), ["x", "y", "y"])
    tables = metric.by_group()
    assert tables["x"].n == [1, 0, 0] and tables["y"].n == [1, 0, 1]
    assert tables["y"].mean[2] == -0.25 and metric.compute().mean[0] == 0.625
    for wrong in (["x", "y", "z"], None, ["x"]):
        with pytest.raises(TokError, match="group"):
            metric.update(torch.zeros(3), torch.zeros(3), wrong)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1)), max_size=40), st.randoms(use_true_random=False))
def test_parts_in_any_order_add_up_to_the_whole_exactly(rows: list[tuple[float, float]], rng: random.Random) -> None:
    whole, parts = BinnedMean(BINS["text-v1-512"]), [BinnedMean(BINS["text-v1-512"]) for _ in range(2)]
    values, scales = (torch.tensor([r[i] for r in rows], dtype=torch.float64) for i in (0, 1))
    whole.update(values, scales)
    mixed = rows[:]
    rng.shuffle(mixed)
    for i, (value, scale) in enumerate(mixed):
        parts[i % 3 == 0].update(torch.tensor([value], dtype=torch.float64), torch.tensor([scale], dtype=torch.float64))
    for name in ("n", "s", "ss", "uncovered"):  # what a sync does with the states of two ranks
        assert torch.equal(getattr(parts[0], name) + getattr(parts[1], name), getattr(whole, name))
    parts[0].merge_state(parts[1])
    assert parts[0].compute().as_dict() == whole.compute().as_dict()
    inside = [v for v, s in rows if s < 1]
    if inside:
        assert whole.compute().overall == pytest.approx(sum(v for v, _ in rows) / len(rows), abs=1e-12)


def test_bad_values_are_refused() -> None:
    metric = BinnedMean(BINS["text-v1-512"])
    for values, scales, message in (([0.1], [math.nan], "size"), ([math.inf], [0.1], "infinite"), ([0.1, 0.2], [0.1], "one length")):
        with pytest.raises(TokError, match=message):
            metric.update(torch.tensor(values), torch.tensor(scales))
    with pytest.raises(TokError, match="2 words"):
        text_scores(["a", "b"], ["a"])
    with pytest.raises(TokError, match="raw, caseless, alnum"):
        TextNED(BINS["text-v1-512"], "folded")
    with pytest.raises(TokError, match="acc, ned"):
        ChanceFloor(BINS["text-v1-512"], "cer")


def test_partners_are_a_rotation_that_no_order_changes() -> None:
    ids, pools = [f"w{i}" for i in range(30)], [i % 4 for i in range(30)]
    partner = partners(ids, pools)
    assert sorted(partner) == list(range(30)) and all(i != j and pools[i] == pools[j] for i, j in enumerate(partner))
    order = random.Random(3).sample(range(30), 30)
    moved = partners([ids[i] for i in order], [pools[i] for i in order])
    assert {ids[order[i]]: ids[order[j]] for i, j in enumerate(moved)} == {ids[i]: ids[j] for i, j in enumerate(partner)}
    with pytest.raises(TokError, match="'w1' appears twice"):
        partners(["w0", "w1", "w1"], [0, 0, 0])


def test_chance_floor_of_different_words_is_zero_and_of_equal_words_one() -> None:
    bins, scales = Bins.named("text-v1-256"), [0.025] * 4 + [0.05]
    floor = ChanceFloor(bins, "acc")
    floor.update(list("abcde"), ["w", "x", "y", "z", "v"], ["w", "x", "y", "z", "v"], scales)
    assert floor.compute().mean[0] == 0 and floor.compute().n == [4, 0, 0] and floor.compute().uncovered == 1
    same = ChanceFloor(bins, "ned")
    same.update(list("abcde"), ["the"] * 5, ["the"] * 5, scales)
    assert same.compute().mean[0] == 1


def test_clustered_interval_knows_that_words_of_an_image_are_not_independent() -> None:
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(40), 25)
    value = (rng.random(40)[image] + 0.1 * rng.random(1000)) / 1.1  # images differ, words of one image hardly
    names, scale = [f"i{i:02d}" for i in image], np.full(1000, 0.05)
    bins = Bins.named("text-v1-256")
    ours = bootstrap.clustered_intervals(value, scale, names, bins, draws=400)["large"]
    metric = BinnedMean(bins)
    metric.update(torch.from_numpy(value), torch.from_numpy(scale))
    plain = metric.compute()
    of_images = 1.96 * np.std([value[image == i].mean() for i in range(40)], ddof=1) / math.sqrt(40)
    assert (ours.high - ours.low) / 2 == pytest.approx(of_images, rel=0.15)
    assert ours.high - ours.low > 3 * (plain.high[2] - plain.low[2])
    assert (ours.n, ours.clusters) == (1000, 40) and ours.low < ours.mean < ours.high
    order = rng.permutation(1000)
    again = bootstrap.clustered_intervals(value[order], scale, [names[i] for i in order], bins, draws=400)["large"]
    assert again == ours
    assert bootstrap.clustered_intervals(value, scale, names, bins, draws=400, seed=1)["large"] != ours


def test_replicates_equal_a_loop_over_drawn_images(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, counts = np.array([[1.0, 2.0], [0.0, 3.0], [2.0, 0.0]]), np.array([[2.0, 2.0], [0.0, 3.0], [4.0, 0.0]])
    monkeypatch.setattr(bootstrap, "BLOCK", 6)  # two draws at once
    ours = bootstrap.replicates(sums, counts, draws=7, seed=5)
    generator = np.random.Generator(np.random.PCG64(5))
    for block in range(4):
        for row in generator.integers(3, size=(min(2, 7 - 2 * block), 3)):
            s, n = sums[row].sum(0), counts[row].sum(0)
            with np.errstate(invalid="ignore"):
                wanted = [*(s / n), (s / n).mean(), s.sum() / n.sum()]
            np.testing.assert_allclose(ours[0], wanted, rtol=1e-14)
            ours = ours[1:]
    assert len(ours) == 0


def test_intervals_of_nothing_and_of_rows_outside_the_bins() -> None:
    bins = Bins.named("text-v1-256")
    for values, scales, names in (([], [], []), ([1.0, math.nan], [0.001, 0.05], ["a", "b"])):
        result = bootstrap.clustered_intervals(values, scales, names, bins, draws=5)
        assert set(result) == {"small", "medium", "large", "macro", "micro"}
        assert all(i.n == 0 and math.isnan(i.mean) and math.isnan(i.low) for i in result.values())
    with pytest.raises(TokError, match="one length"):
        bootstrap.clustered_intervals([1.0], [0.1], [], bins)


@pytest.mark.skipif("TOKBENCH_ROWS" not in os.environ, reason="TOKBENCH_ROWS does not name the recognition rows that TokBench ships")
def test_tokbench_rows_are_reproduced(tmp_path: Path) -> None:
    from benchmarks import record, tokbench_rows

    tokbench_rows.main([os.environ["TOKBENCH_ROWS"], "--results", str(tmp_path)])
    result = record.load("tokbench_rows", tmp_path)
    assert result is not None and result["differences"] == {"acc": 0, "ned": 0, "summary": 0, "published": 0} and result["rows"] == 36087
