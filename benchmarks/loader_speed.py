"""Images/s of the data loaders alone: decode and crop, by source, loader processes and cache; nothing is trained.

Photos are drawn (JPEG 512 × 384), as files in a folder and packed in shards, so that anybody can repeat this; ``--data`` takes others.
Rows: an indexed folder, indexed shards, streamed shards, decoded photos kept in memory, and token shards.

    python -m benchmarks.loader_speed                        # 400 photos, batches of 16 at 256 pixels
    python -m benchmarks.loader_speed --data SHARD.tar --images 200

Results: benchmarks/results/loader_speed.json. Compare with ``images_per_second`` of a training run on the same machine; a run
also logs ``data_wait``, the share of its time that it waited for this.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.folder_throughput import draw
from benchmarks.record import RESULTS, machine, save, say
from tok1d.data.index import fingerprint, index_images
from tok1d.data.module import PhotoData, StreamData
from tok1d.data.shards import HEAD, Head, Notes, write_shard
from tok1d.data.tokens import TokenData
from tok1d.generators.space import TokenSpace


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", help="shards to use instead of drawn photos")
    parser.add_argument("--images", type=int, default=400, help="images timed in each row")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    rows = []
    with tempfile.TemporaryDirectory() as home:
        shards = args.data or drawn_shards(Path(home), args.images)
        common: dict[str, Any] = {"size": args.size, "batch_size": args.batch_size}
        sources = {"shards, indexed": (PhotoData, {"train": shards}), "shards, streamed": (StreamData, {"train": shards})}
        if not args.data:
            sources["folder"] = (PhotoData, {"train": [str(Path(home) / "photos")]})
        for name, (kind, options) in sources.items():
            for workers in args.workers:
                rows.append(timed(name, kind(**options, **common, workers=workers), workers, args.images, args.batch_size))
        cached = PhotoData(train=shards, **common, workers=0, cache=True)
        timed("filling the memory", cached, 0, len(index_images(shards)), args.batch_size)
        rows.append(timed("shards, kept decoded in memory", cached, 0, args.images, args.batch_size))
        drawn_tokens(Path(home) / "tokens", shards, args.size)
        rows.append(timed("token shards, 256 ids", TokenData(str(Path(home) / "tokens"), batch_size=args.batch_size), 0, 10 * args.images, args.batch_size))
    body = {
        "protocol": f"{args.images} images a row, batches of {args.batch_size} at {args.size} pixels, one thread a process, loaders alone",
        "photos": "given" if args.data else "drawn, JPEG 512 x 384",
        "load_average": machine()["load_average"],
        "rows": rows,
    }
    print(save("loader_speed", body, folder=args.results))


def timed(name: str, data: Any, workers: int, images: int, batch_size: int) -> dict[str, Any]:
    """Images/s by the clock, and by processor time of this process where it does the work itself."""
    progress = SimpleNamespace(total=SimpleNamespace(processed=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(fit_loop=loop, global_rank=0, world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    data.setup("fit")
    batches = iter(data.train_dataloader())
    for _ in range(max(1, 2 * workers)):  # processes have started and filled their queues
        next(batches)
    start, cpu = time.perf_counter(), time.process_time()
    count = sum(len(batch["key"]) for batch in islice(batches, -(-images // batch_size)))
    seconds, used = time.perf_counter() - start, time.process_time() - cpu
    row = {"source": name, "workers": workers, "images_per_second": round(count / seconds, 1)}
    if not workers:
        row["images_per_cpu_second"] = round(count / used, 1)
    say(", ".join(f"{k} {v}" for k, v in row.items()))
    return row


def drawn_shards(home: Path, count: int) -> list[str]:
    """Drawn photos as files in ``photos`` and packed in four shards."""
    say(f"drawing {count} photos")
    (home / "photos").mkdir()
    paths = []
    for part in range(4):
        path = home / f"s-{part}.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(part, count, 4):
                data, info = draw(i), tarfile.TarInfo(f"{i:05d}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                (home / "photos" / f"{i:05d}.jpg").write_bytes(data)
        paths.append(str(path))
    return paths


def drawn_tokens(out: Path, shards: list[str], size: int) -> None:
    """Token shards of random ids for the same photos: reading them costs what real ones cost."""
    samples, rng = index_images(shards), np.random.default_rng(0)
    space = TokenSpace(tokens=256, vocab_size=4096, tokenizer="random", model_id="0" * 16).to_config()
    head = Head("ids", space, [256], ["centre", "centre-flip"], [size, size], [1.0, 1.0], 0, "float32", [], ["label"], fingerprint(samples), len(samples), 1024)
    out.mkdir()
    (out / HEAD).write_bytes(head.to_json())
    for number in range(head.shards):
        keys = [s.key for s in samples[number * 1024 : (number + 1) * 1024]]
        windows = np.tile(np.array([0, 0, size, size, 0], np.int32), (len(keys), 2, 1))
        ids = rng.integers(0, 4096, (len(keys), 2, 256), dtype=np.uint16)
        write_shard(out, number, {"windows": windows, "ids": ids}, Notes(keys, [0] * len(keys), [[] for _ in keys], []))


if __name__ == "__main__":
    main()
