"""One pass over the data: read, view, reconstruct at every rate, measure; in chunks that are done once, whatever happens.

A chunk is a run of samples in the order of their ids, the same for any batch size and any number of ranks. Its rows and states are
written before it counts as done, so a run that was killed goes on where it stopped, and ranks (torchrun) share chunks without padding.
Nothing is dropped: an image that cannot be read, or has no picture at a rate, is a row with a status.

    OUT/run.json                 what was asked for; a resumed run must ask for the same
    OUT/rows/00012.jsonl         rows of chunk 12: images, words, faces
    OUT/states/rank0.safetensors sums of all chunks this rank has done, and their list
    OUT/summary.json             the result, when all chunks are done
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tok1d.disk import atomic_write
from tok1d.errors import ImageError, TokError, UsageError
from tok1d.eval.manifest import Manifest, Sample
from tok1d.eval.measures import Batch, Measure, Row, State
from tok1d.eval.protocol import Protocol, conditions, differences
from tok1d.eval.systems import System
from tok1d.eval.view import Geometry, make_view

CHUNK = 64  # images
SAVE_EVERY = 15.0  # seconds between writing the sums; a killed run does again what it did since


@dataclass(frozen=True)
class Rank:
    """One of several processes that share the chunks; (0, 1) alone."""

    index: int = 0
    count: int = 1

    @staticmethod
    def of_environment() -> Rank:
        """As torchrun sets RANK and WORLD_SIZE."""
        return Rank(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def evaluate(
    system: System,
    manifest: Manifest,
    protocol: Protocol,
    measures: Sequence[Measure],
    out: Path,
    *,
    batch_size: int = 16,
    readers: int = 2,
    rank: Rank | None = None,
    restart: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any] | None:
    """Measure a system on data and write ``out``.

    Args:
        system: what is measured.
        manifest: the data.
        protocol: how images are brought before the system.
        measures: what is computed.
        out: folder of rows, states and the summary.
        batch_size: images at once; results do not depend on it.
        readers: threads that read and view images.
        rank: which share of the chunks; of the environment if None.
        restart: forget what ``out`` holds instead of going on with it.
        progress: called with (chunks done, chunks) after each.

    Returns:
        The summary, on the rank that finished last; None on the others.

    Raises:
        UsageError: ``out`` holds another run.
        TokError: no data.
    """
    from tok1d.eval.summary import summarise

    if not len(manifest):
        raise TokError(f"{manifest.name}: no images to measure")
    rank = rank or Rank.of_environment()
    asked = conditions(
        protocol,
        data={"name": manifest.name, "hash": manifest.hash, "images": len(manifest)},
        system=system.describe(),
        rates=[r.name for r in system.rates],
        measures={m.name: m.describe() for m in measures},
        chunk=CHUNK,
    )
    store = Store(out, rank)
    store.begin(json.loads(json.dumps(asked)), restart)
    chunks = [manifest.samples[i : i + CHUNK] for i in range(0, len(manifest), CHUNK)]
    mine = [i for i in range(len(chunks)) if i % rank.count == rank.index and i not in store.done]
    began, images = time.monotonic(), 0
    with ThreadPoolExecutor(readers) as pool:
        for number in mine:
            rows = list(_chunk(chunks[number], system, manifest, protocol, measures, batch_size, pool))
            for measure in measures:
                rows += [{"table": measure.table, **row} for row in measure.flush()]
            store.finish(number, rows, {m.name: (m, m.state()) for m in measures})
            images += len(chunks[number])
            if progress:
                progress(len(store.done), len(chunks))
    seconds = time.monotonic() - began
    store.save()
    if len(store.all_done()) < len(chunks):
        return None  # other ranks are still at work; the last one sums up
    return summarise(out, measures, seconds=seconds, images=images)


def _chunk(
    samples: Sequence[Sample],
    system: System,
    manifest: Manifest,
    protocol: Protocol,
    measures: Sequence[Measure],
    batch_size: int,
    pool: ThreadPoolExecutor,
) -> Iterator[Row]:
    """Image rows of a chunk; instances and states stay with the measures until the end of it."""

    def read(sample: Sample) -> tuple[torch.Tensor, torch.Tensor, Geometry] | str:
        try:
            image = manifest.read(sample)
            return image, *make_view(image, protocol)
        except (ImageError, OSError) as error:
            return str(error)

    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        read_ones = list(zip(part, pool.map(read, part)))
        for sample, found in read_ones:
            if isinstance(found, str):
                for measure in measures:
                    measure.missing(sample, [r.name for r in system.rates])
                yield from ({"table": "images", "id": sample.id, "rate": r.name, "status": found} for r in system.rates)
        good = [(sample, found) for sample, found in read_ones if not isinstance(found, str)]
        if not good:
            continue
        batch = Batch([s for s, _ in good], torch.stack([v for _, (_, v, _) in good]), [g for _, (_, _, g) in good], [i for _, (i, _, _) in good], protocol)
        rates = list(system.reconstruct(batch.views, [s.id for s in batch.samples]))
        found_by = [measure.see(batch, rates) for measure in measures]
        for number, pictures in enumerate(rates):
            columns = {name: values for found in found_by for name, values in found[number].items()}
            for measure in measures:
                measure.after(batch, pictures, columns)
            pixels = protocol.size**2
            for i, sample in enumerate(batch.samples):
                row: Row = {"table": "images", "id": sample.id, "rate": pictures.rate.name, "status": pictures.status[i]}
                if row["status"] == "ok":
                    row |= {"group": sample.group, "bytes": pictures.bytes[i], "file_bytes": pictures.file_bytes[i]}
                    row |= {"bpp": 8 * pictures.bytes[i] / pixels, "file_bpp": 8 * pictures.file_bytes[i] / pixels}
                    row |= {name: values[i] for name, values in columns.items() if values[i] is not None}
                yield row


class Store:
    """The folder of a run.

    Args:
        out: made if missing.
        rank: whose states are kept here.
    """

    def __init__(self, out: Path, rank: Rank) -> None:
        self.out, self.rank = out, rank
        self.path = out / "states" / f"rank{rank.index}.safetensors"
        self.done: set[int] = set()
        self.own: set[int] = set()
        self.states: dict[str, State] = {}
        self.saved = time.monotonic()

    def begin(self, asked: dict[str, Any], restart: bool) -> None:
        """Take up the run that lies here, or start one.

        Raises:
            UsageError: another run lies here.
        """
        import shutil

        for folder in ("rows", "states"):
            if restart and self.rank.index == 0 and (self.out / folder).is_dir():
                shutil.rmtree(self.out / folder)
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        record = self.out / "run.json"
        if record.is_file() and not restart:
            held = json.loads(record.read_text())
            found = differences(held, asked)
            if found:
                raise UsageError(f"{self.out} holds another run ({'; '.join(found[:4])}); give another folder, or --restart to forget it")
        elif self.rank.index == 0:
            atomic_write(record, (json.dumps(asked, indent=1) + "\n").encode())
        self.done = self.all_done()  # chunks of an earlier run with another number of ranks are not done again
        self.own, self.states = self._load(self.path) if self.path.is_file() else (set(), {})

    def all_done(self) -> set[int]:
        """Chunks that any rank has done."""
        return set().union(*(self._load(p, states=False)[0] for p in sorted((self.out / "states").glob("rank*.safetensors"))))

    def finish(self, number: int, rows: list[Row], states: dict[str, tuple[Measure, State]]) -> None:
        """Write the rows of a chunk and take up its sums; it counts as done with the next :meth:`save`, due every few seconds."""
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        atomic_write(self.out / "rows" / f"{number:05d}.jsonl", lines.encode())
        for name, (measure, state) in states.items():
            self.states[name] = measure.add(self.states.get(name, {}), state)
        self.done.add(number)
        self.own.add(number)
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the sums of this rank with the list of chunks in them."""
        from safetensors.torch import save

        tensors = {f"{name}|{key}": value.contiguous() for name, state in self.states.items() for key, value in state.items()}
        atomic_write(self.path, save(tensors or {"empty": torch.zeros(1)}, metadata={"done": json.dumps(sorted(self.own))}))
        self.saved = time.monotonic()

    def merged(self, measures: Sequence[Measure]) -> dict[str, State]:
        """States of all ranks together."""
        whole: dict[str, State] = {m.name: {} for m in measures}
        for path in sorted((self.out / "states").glob("rank*.safetensors")):
            for name, state in self._load(path)[1].items():
                measure = next((m for m in measures if m.name == name), None)
                if measure is not None:
                    whole[name] = measure.add(whole[name], state)
        return whole

    @staticmethod
    def _load(path: Path, states: bool = True) -> tuple[set[int], dict[str, State]]:
        from safetensors import SafetensorError, safe_open

        held: dict[str, State] = {}
        try:
            with safe_open(path, "pt") as file:
                done = set(json.loads((file.metadata() or {}).get("done", "[]")))
                for key in file.keys() if states else ():
                    name, bar, rest = key.partition("|")
                    if bar:
                        held.setdefault(name, {})[rest] = file.get_tensor(key)
        except (OSError, SafetensorError, ValueError) as error:
            raise TokError(f"{path}: damaged ({error}); start again with --restart") from error
        return done, held


def read_rows(out: Path, table: str) -> list[Row]:
    """All rows of one table, in the order of chunks."""
    rows: list[Row] = []
    for path in sorted((out / "rows").glob("*.jsonl")):
        # One document, whose rows share the strings of their keys: about half the memory.
        rows += [row for row in json.loads(f"[{','.join(path.read_text('utf-8').splitlines())}]") if row.pop("table") == table]
    return rows
