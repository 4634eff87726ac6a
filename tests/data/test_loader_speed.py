import json

from benchmarks import loader_speed


def test_the_loader_benchmark_runs(tmp_path, capsys):
    loader_speed.main(["--images", "8", "--size", "16", "--batch-size", "4", "--workers", "0", "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "loader_speed.json").read_text())["rows"]
    assert {r["source"] for r in rows} == {"folder", "shards, indexed", "shards, streamed", "shards, kept decoded in memory", "token shards, 256 ids"}
    assert all(r["images_per_second"] > 0 for r in rows)
