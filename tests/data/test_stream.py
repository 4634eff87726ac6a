"""ShardStream: every sample once, exact continuation, ranks and loader processes, damaged shards."""

import logging
import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.data.files import encoded, shard, shards
from tests.data.test_module import attach
from tok1d.data.index import index_images
from tok1d.data.module import StreamData
from tok1d.data.photos import Views
from tok1d.data.stream import Lane, ShardStream, expand_shards
from tok1d.errors import ImageError, UsageError

COUNTS = [5, 1, 9, 4, 7]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return shards(tmp_path_factory.mktemp("stream"), COUNTS, size=8)


def lane(files, number=0, count=1, seed=0, buffer=6, resampled=False) -> Lane:
    return Lane(files, number, count, seed, buffer, resampled, torch.zeros(len(files), dtype=torch.uint8))


def stream(files, batch=2, **options) -> ShardStream:
    place = {k: options.pop(k) for k in ("start", "rank", "ranks") if k in options}
    made = ShardStream([str(f) for f in files], Views(8, (0.5, 1.0), seed=1), batch, **{"buffer": 6, **options})
    for name, value in place.items():
        setattr(made, name, value)
    return made


def keys_of(made: ShardStream, batches: int, workers: int = 0) -> list[list[str]]:
    return [batch["key"] for batch in islice(DataLoader(made, batch_size=None, num_workers=workers), batches)]


# lanes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 6, 12])
def test_lanes_read_every_sample_once_an_epoch(files, count):
    """Also with more lanes than shards, which then are split."""
    seen = {epoch: Counter() for epoch in range(3)}
    for number in range(count):
        for epoch, sample in lane(files, number, count).samples():
            if epoch >= 3:
                break
            seen[epoch][sample.key] += 1
    for epoch in range(3):
        assert seen[epoch] == Counter({f"{i:03d}": 1 for i in range(sum(COUNTS))})


@pytest.mark.parametrize("buffer", [0, 1, 6, 100])
@pytest.mark.parametrize("resampled", [False, True])
def test_a_lane_continues_anywhere(files, buffer, resampled):
    whole = [(e, s.key) for e, s in islice(lane(files, 1, 2, buffer=buffer, resampled=resampled).samples(), 60)]
    for start in (1, 5, 11, 12, 13, 14, 27, 40, 59):
        again = [(e, s.key) for e, s in islice(lane(files, 1, 2, buffer=buffer, resampled=resampled).samples(start), 60 - start)]
        assert again == whole[start:], start


def test_the_shuffle_is_local_and_of_its_seed(tmp_path):
    one = next(iter(encoded(1, 8).values()))
    path = [shard(tmp_path / "s.tar", {f"{i:03d}.png": one for i in range(200)})]
    order = [int(s.key) for _, s in islice(lane(path, buffer=20).samples(), 200)]
    late = np.array(order) - np.arange(200)
    assert sorted(order) == list(range(200)) and abs(late).max() <= 20 and abs(late).mean() > 3
    assert [int(s.key) for _, s in islice(lane(path, buffer=0).samples(), 200)] == list(range(200))
    assert [int(s.key) for _, s in islice(lane(path, seed=1, buffer=20).samples(), 200)] != order
    second = [int(s.key) for _, s in islice(lane(path, buffer=20).samples(), 200, 400)]
    assert sorted(second) == list(range(200)) and second != order


def test_resampling_draws_shards_independently(files):
    drawn = [s.key for _, s in islice(lane(files, buffer=0, resampled=True).samples(), 400)]
    counts = Counter(drawn)
    assert max(counts.values()) - min(counts.values()) > 2, "with replacement"
    other = [s.key for _, s in islice(lane(files, 1, 2, buffer=0, resampled=True).samples(), 400)]
    assert drawn != other and set(other) == set(drawn), "every lane draws from all shards"


# batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (3, 0), (2, 2)])
def test_ranks_and_processes_share_the_lanes(files, ranks, workers):
    """With the number of lanes fixed, any of them make the same global batches."""
    rounds = 4
    shares = [keys_of(stream(files, lanes=12, rank=r, ranks=ranks), 12 * rounds // ranks, workers) for r in range(ranks)]
    together = [batch for step in zip(*shares) for batch in step]
    assert together == keys_of(stream(files, lanes=12), 12 * rounds)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 4, 9])
def test_batches_continue_exactly(files, workers, start):
    def images(begin: int, count: int) -> list[torch.Tensor]:
        loader = DataLoader(stream(files, start=begin), batch_size=None, num_workers=workers)
        return [b["image"] for b in islice(loader, count)]

    whole, again = images(0, start + 5), images(start, 5)
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], again)) and len(again) == 5


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_no_rank_reads_what_another_reads(files, ranks):
    """Until a lane's epoch is over, all keys of all ranks differ."""
    length = min(sum(1 for _ in _epoch(lane(files, r, ranks))) for r in range(ranks))
    keys = [k for r in range(ranks) for batch in keys_of(stream(files, 1, rank=r, ranks=ranks), length) for k in batch]
    assert len(keys) == len(set(keys)) == length * ranks


def _epoch(one: Lane):
    for epoch, sample in one.samples():
        if epoch:
            return
        yield sample


# faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_leave_smaller_batches(tmp_path, workers):
    files = encoded(6, 8) | {"001.png": b"x", "004.png": b"", "005.cls": b"cat"}
    made = stream([shard(tmp_path / "s.tar", files)], 2, buffer=0)
    got = keys_of(made, 6, workers)
    if workers == 0:
        assert got[:3] == [["000"], ["002", "003"], ["000"]], "the third batch has no readable image: the first of the set stands in"
        assert made.broken.item() >= 6
    assert {k for batch in got for k in batch} == {"000", "002", "003"} and made.broken.item() >= 2


def test_broken_images_do_not_move_what_follows(tmp_path):
    whole = shards(tmp_path / "a", [12], size=8)
    files = encoded(12, 8) | {"003.png": b"x"}
    cut = [shard(tmp_path / "b/s.tar", files)]
    a, b = keys_of(stream(whole, 3), 8), keys_of(stream(cut, 3), 8)
    assert [[k for k in batch if k != "003"] for batch in a] == b
    assert keys_of(stream(cut, 3, start=5), 3) == b[5:]


@pytest.mark.parametrize(("more", "what"), [(562, "ends within its member 11"), (300, "after its member 10"), (0, "after its member 10")])
def test_damaged_shards_are_used_up_to_the_damage_and_named_once(tmp_path, caplog, more, what):
    """Cut off in the data of a member, in its header, and between two members."""
    good, bad = shards(tmp_path, [4, 6], size=8)
    member = index_images([bad])[5].offset - 512
    bad.write_bytes(bad.read_bytes()[: member + more])
    made = stream([good, bad], 1)
    with caplog.at_level(logging.WARNING):
        keys = [k for batch in keys_of(made, 40) for k in batch]
    assert set(keys) == {f"{i:03d}" for i in range(9)}
    assert len(caplog.records) == 1 and re.search(rf"s-01.tar is damaged.* {what}.*its 5 images before that are used", caplog.text)
    assert made.damaged.tolist() == [0, 1]


def test_sets_without_images(tmp_path):
    empty = shard(tmp_path / "e.tar", {})
    with pytest.raises(ImageError, match="no images in 1 shards"):
        stream([empty])
    broken = shard(tmp_path / "b.tar", {"0.png": b"x", "1.png": b"y"})
    with pytest.raises(ImageError, match="none of the images in 1 shards can be read"):
        keys_of(stream([broken]), 1)
    with pytest.raises(UsageError, match="without numbers"):
        stream([shard(tmp_path / "n.tar", encoded(1, 8), {"000": {"label": "cat"}})])


def test_shard_patterns(tmp_path):
    shards(tmp_path / "a", [1, 1, 1])
    shards(tmp_path / "b", [1])
    a, b = tmp_path / "a", tmp_path / "b"
    names = [str(p.relative_to(tmp_path)) for p in expand_shards([f"{tmp_path}/{{b,a}}/s-{{00..00}}.tar", str(a)])]
    assert names == ["b/s-00.tar", "a/s-00.tar", "a/s-01.tar", "a/s-02.tar"]
    assert expand_shards(f"{tmp_path}/*/s-0[!1].tar".replace("[!1]", "?")) == [*sorted(a.glob("*.tar")), *b.glob("*.tar")]
    for wrong in (f"{a}/s-{{02..03}}.tar", f"{a}/t*.tar", str(tmp_path / "none")):
        with pytest.raises(ImageError, match=r"s-03.tar|t\*.tar|none"):
            expand_shards(wrong)


def test_impossible_settings(files):
    for wrong in ({"batch": 0}, {"buffer": -1}, {"lanes": -2}):
        with pytest.raises(UsageError, match="at least"):
            stream(files, **wrong)
    with pytest.raises(UsageError, match="multiple of 2 ranks × 1 loader"):
        keys_of(stream(files, lanes=3, ranks=2), 1)


# the module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_data_resumes_where_the_trainer_stood(files, workers):
    def images(processed: int, count: int) -> list[torch.Tensor]:
        data = StreamData([str(files[0].parent)], [str(files[0])], size=8, batch_size=3, workers=workers, buffer=5)
        return [b["image"] for b in islice(attach(data, processed).train_dataloader(), count)]

    whole, again = images(0, 8), images(3, 5)
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], again))


def test_stream_data_has_labels_and_validation(tmp_path):
    path = shard(tmp_path / "s.tar", encoded(4, 8), {f"{i:03d}": {"label": i % 2, "caption": f"number {i}"} for i in range(4)})
    data = attach(StreamData([str(path)], [str(path)], size=8, batch_size=4, workers=0))
    batch = next(iter(data.train_dataloader()))
    assert batch["label"].tolist() == [int(k) % 2 for k in batch["key"]] and batch["text"] == [f"number {int(k)}" for k in batch["key"]]
    assert len(data.val_set) == 4 and data.describe()["images"] is None


def test_a_streamed_run_that_crashed_equals_one_that_did_not(tmp_path, files):
    """Through the trainer, which reads ahead."""
    from tests.training import tiny
    from tok1d.training.tasks import ReconstructionTask

    def setup(place: str, **more) -> tiny.Setup:
        data = StreamData([str(files[0].parent)], size=16, batch_size=3, workers=2, buffer=5, seed=4)
        return tiny.Setup(tmp_path / place, ReconstructionTask(tiny.fsq(), lr=1e-2), data, 8, **more)

    whole = setup("whole").run()
    with pytest.raises(RuntimeError, match="power cut"):
        setup("cut", crash_at=5).run()
    again = setup("cut").run(tmp_path / "cut/last.ckpt")
    assert again.record.batches == whole.record.batches[4:] and again.record.losses == whole.record.losses[4:]
