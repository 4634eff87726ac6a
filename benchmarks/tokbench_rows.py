"""Our T-ACC and T-NED on the recognition rows that TokBench ships as sample output: every row and mean must be the same.

The rows (36,087 words of seven sets with their own terms) are not part of this project: give the path of the gzipped lines
(``{"set", "image", "gt", "pred", "ratio", "acc", "ned"}``), beside it optionally ``tokbench_rows.summary.json``.

    python -m benchmarks.tokbench_rows /data/tokbench_rows.jsonl.gz

Results: benchmarks/results/tokbench_rows.json; the program fails if anything differs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import RESULTS, save
from tok1d.eval.binned import Bins
from tok1d.eval.bootstrap import clustered_intervals
from tok1d.eval.text import SCORES, VARIANTS, ChanceFloor, TextAccuracy, TextNED, text_scores

SETTINGS = ("text-v1-256", "text-v1-512", "text-v1-1024")
# Of the seven sets at setting 256, in per cent: instances, T-ACC, T-NED by bin.
PUBLISHED = {"n": [995, 406, 526], "acc": [0.30, 0.74, 10.65], "ned": [5.76, 8.84, 31.30]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)

    with gzip.open(args.rows, "rt", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    truths, readings, scales, sets = ([r[k] for r in rows] for k in ("gt", "pred", "ratio", "set"))
    start = time.perf_counter()
    ours = {score: text_scores(truths, readings, score) for score in SCORES}
    seconds = time.perf_counter() - start
    differences = {s: int((ours[s] != torch.tensor([float(r[s]) for r in rows], dtype=torch.float64)).sum()) for s in SCORES}

    groups = list(dict.fromkeys(sets))
    tables: dict[str, Any] = {}
    for name in SETTINGS:
        bins = Bins.named(name)
        for kind in (TextAccuracy, TextNED):
            for variant in VARIANTS:
                metric = kind(bins, variant, groups)
                metric.update(truths, readings, scales, sets)
                of_sets = {g: t.as_dict() for g, t in metric.by_group().items()} if variant == "raw" else {}
                tables.setdefault(name, {})[f"{kind.score}_{variant}"] = {"all": metric.compute().as_dict(), **of_sets}
        images = [f"{r['set']}/{r['image']}" for r in rows]
        for score in SCORES:
            floor = ChanceFloor(bins, score)
            floor.update([f"{image}#{i}" for i, image in enumerate(images)], truths, readings, scales)
            tables[name][f"{score}_chance"] = {"all": floor.compute().as_dict()}
            intervals = clustered_intervals(ours[score].numpy(), scales, images, bins)
            tables[name][f"{score}_intervals"] = {k: [v.low, v.high, v.n, v.clusters] for k, v in intervals.items()}

    at_256 = tables[SETTINGS[0]]
    differences["published"] = int(at_256["acc_raw"]["all"]["n"] != PUBLISHED["n"]) + sum(
        round(100 * mean, 2) != wanted for s in SCORES for mean, wanted in zip(at_256[f"{s}_raw"]["all"]["mean"], PUBLISHED[s])
    )
    differences["summary"] = _summary(args.rows.with_name("tokbench_rows.summary.json"), sets, np.array(scales), ours)
    body = {"rows": len(rows), "differences": differences, "seconds_for_all_scores": round(seconds, 3), "tables": tables}
    print(save("tokbench_rows", body, folder=args.results))
    for score in SCORES:
        table = at_256[f"{score}_raw"]["all"]
        print(f"{score}: {[round(100 * m, 2) for m in table['mean']]} % of {table['n']} words, macro {100 * table['macro']:.2f} %")
    print(f"{len(rows)} rows, differences: {differences}")
    if any(differences.values()):
        raise SystemExit("the rows are not reproduced")


def _summary(path: Path, sets: list[str], scales: np.ndarray, ours: dict[str, torch.Tensor]) -> int:
    """Counts and means of a summary that differ from ours (by more than 1e-12 for means); 0 without one."""
    if not path.is_file():
        return 0
    different = 0
    names = np.array(sets)
    for name, wanted in json.loads(path.read_text())["sets"].items():
        inside = names == name
        different += int(inside.sum()) != wanted["words"]
        for score in SCORES:
            values = ours[score].numpy()
            different += abs(values[inside].mean() - wanted[f"mean_{score}"]) > 1e-12
            for lowest in ("0.02", "0.01", "0.005"):
                large = inside & (scales >= float(lowest))
                different += int(large.sum()) != wanted[f"ratio_ge_{lowest}"]
                different += abs(values[large].mean() - wanted[f"at_{lowest}"][score]) > 1e-12
    return int(different)


if __name__ == "__main__":
    main()
