"""PhotoData: order, ranks, resumption, loader processes."""

import logging
from types import SimpleNamespace

import pytest
import torch

from tests.data.files import encoded, folder, shard
from tok1d.data.drawn import DrawnImages
from tok1d.data.module import DrawnData, PhotoData, StepSampler
from tok1d.errors import UsageError


def take(sampler: StepSampler, batches: int) -> list[list[tuple[int, int]]]:
    return [batch for batch, _ in zip(sampler, range(batches))]


def attach(data: PhotoData, processed: int = 0, rank: int = 0, ranks: int = 1) -> PhotoData:
    """As the trainer would: what the loaders ask of it."""
    total = SimpleNamespace(processed=processed)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total)))
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(fit_loop=loop, global_rank=rank, world_size=ranks, strategy=strategy)
    data.setup("fit")
    return data


def first(data: PhotoData, batches: int) -> torch.Tensor:
    """Images of the first batches, (sum of B, 3, H, W)."""
    return torch.cat([batch["image"] for batch, _ in zip(data.train_dataloader(), range(batches))])


def test_every_sample_once_an_epoch():
    drawn = [pair for batch in take(StepSampler(10, 4, seed=0), 10) for pair in batch]
    assert [draw for _, draw in drawn] == list(range(40))
    epochs = [[sample for sample, _ in drawn[i : i + 10]] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len({tuple(e) for e in epochs}) == 4
    assert drawn != [pair for batch in take(StepSampler(10, 4, seed=1), 10) for pair in batch]


@pytest.mark.parametrize("start", [1, 2, 5, 23])
def test_a_later_start_continues(start):
    assert take(StepSampler(7, 3, seed=0, start=start), 4) == take(StepSampler(7, 3, seed=0), start + 4)[start:]


def test_ranks_share_the_batches_of_one():
    alone = take(StepSampler(9, 4, seed=3), 6)
    halves = [take(StepSampler(9, 2, seed=3, rank=r, ranks=2), 6) for r in range(2)]
    assert [a + b for a, b in zip(*halves)] == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_crops_do_not_depend_on_workers_or_interruption(tmp_path, workers):
    path = shard(tmp_path / "s.tar", encoded(7))
    settings = {"train": [str(path)], "size": 16, "batch_size": 3, "seed": 5}
    whole = first(attach(PhotoData(**settings, workers=0)), 6)
    again = first(attach(PhotoData(**settings, workers=workers, cache=workers == 0), processed=2), 4)
    assert torch.equal(whole[2 * 3 :], again)


def test_broken_images_are_counted_over_loader_processes(tmp_path, caplog):
    files = encoded(6) | {"002.png": b"x", "005.png": b"y"}
    data = attach(PhotoData([str(folder(tmp_path, files))], size=16, batch_size=3, workers=2))
    assert len(first(data, 4)) == 2 * 4, "two epochs of four readable images"
    assert data.train_set.broken.sum() == 2
    with caplog.at_level(logging.WARNING):
        data.teardown("fit")
    assert "2 of 6 training images could not be read" in caplog.text


def test_validation_is_spread_and_shared(tmp_path):
    path = str(folder(tmp_path, encoded(10)))
    whole = attach(PhotoData([path], [path], size=16, val_images=5, val_batch_size=2))
    assert [s[0] for s in whole.val_set.samples] == ["000.png", "002.png", "004.png", "006.png", "008.png"]
    shares = [attach(PhotoData([path], [path], size=16, val_images=5, val_batch_size=9), rank=r, ranks=2) for r in range(2)]
    parts = [torch.cat([b["image"] for b in share.val_dataloader()]) for share in shares]
    everything = torch.cat([b["image"] for b in whole.val_dataloader()])
    assert torch.equal(everything[0::2], parts[0]) and torch.equal(everything[1::2], parts[1])
    assert attach(PhotoData([path], size=16)).val_dataloader() == []


def test_description_has_no_paths(tmp_path):
    data = attach(PhotoData([str(folder(tmp_path, encoded(3)))], size=16))
    assert data.describe()["images"] == 3 and str(tmp_path) not in str(data.describe())


@pytest.mark.parametrize("wrong", [{"area": (0.0, 1.0)}, {"area": (0.9, 0.5)}, {"batch_size": 0}, {"size": 0}, {"workers": -1}])
def test_impossible_settings(wrong):
    with pytest.raises(UsageError, match="data"):
        PhotoData(["x"], **wrong)


def test_drawn_images():
    images = DrawnImages(3, 16, seed=4)
    assert len(list(images)) == 3 and images[2]["image"].dtype == torch.uint8 and images[2]["key"] == "000002"
    view = images[1]["image"]
    assert torch.equal(view, DrawnImages(9, 16, seed=4)[1, 77]["image"]) and not torch.equal(images[0]["image"], view)
    data = attach(DrawnData(images=4, val_images=2, size=16, batch_size=2))
    assert first(data, 2).shape == (4, 3, 16, 16) and len(data.val_set) == 2
