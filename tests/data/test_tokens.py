"""TokenData and cached targets of PhotoData: exact continuation, ranks, equality with the model."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.data.files import encoded, folder, shard
from tests.data.test_module import attach
from tests.data.test_tokenise import make
from tests.dct_model import make_model
from tok1d.data.module import PhotoData
from tok1d.data.tokens import TokenData
from tok1d.errors import UsageError
from tok1d.generators.space import TokenSpace


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def home(tmp_path_factory, model) -> Path:
    """photos.tar (12 images, one broken) and two sets of shards made of it."""
    path = tmp_path_factory.mktemp("tokens")
    rows = {f"{i:03d}": {"label": i % 4} for i in range(12)}
    photos = shard(path / "photos.tar", encoded(12) | {"007.png": b"broken"}, rows)
    make(model, photos, path / "ten", views="ten-crop")
    make(model, photos, path / "one")
    return path


def batches(data, count: int, processed: int = 0, rank: int = 0, ranks: int = 1) -> list[dict]:
    return list(islice(attach(data, processed, rank, ranks).train_dataloader(), count))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


KINDS = {
    "tokens": lambda home, workers: TokenData(str(home / "ten"), batch_size=3, workers=workers, seed=2),
    "targets": lambda home, workers: PhotoData([str(home / "photos.tar")], size=16, batch_size=3, workers=workers, targets=str(home / "ten")),
    "photos": lambda home, workers: PhotoData([str(home / "photos.tar")], size=16, batch_size=3, workers=workers),
    "windows": lambda home, workers: PhotoData([str(home / "photos.tar")], size=16, batch_size=3, workers=workers, view="window", mirror=False),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_continue_exactly(home, kind, workers):
    whole = batches(KINDS[kind](home, 0), 9)
    again = batches(KINDS[kind](home, workers), 4, processed=5)
    assert all(same(a, b) for a, b in zip(whole[5:], again)) and len(again) == 4


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kind", ["tokens", "targets"])
def test_ranks_cover_every_image_once_an_epoch(home, kind, ranks):
    shares = [batches(KINDS[kind](home, 0), 22 // ranks + 1, 0, r, ranks) for r in range(ranks)]
    keys = [key for step in zip(*shares) for batch in step for key in batch["key"]]
    wanted = sorted(f"{i:03d}" for i in range(12) if i != 7)
    assert sorted(keys[:11]) == sorted(keys[11:22]) == wanted and keys[:11] != keys[11:22]


def test_an_epoch_takes_different_views(home):
    data = KINDS["tokens"](home, 0)
    first, later = batches(data, 1)[0], batches(data, 60)
    seen = {tuple(ids.tolist()) for b in later for key, ids in zip(b["key"], b["ids"]) if key == first["key"][0]}
    assert len(seen) >= 5 and first["label"].tolist() == [int(k) % 4 for k in first["key"]]
    assert data.space == TokenSpace.of(make_model()) and data.classes == []


@pytest.mark.parametrize("shards", ["one", "ten"])
def test_cached_codes_are_those_of_the_served_images(home, model, shards):
    """Encoding what is served gives what was cached, whatever the view."""
    data = PhotoData([str(home / "photos.tar")], [str(home / "photos.tar")], size=16, batch_size=4, workers=0, targets=str(home / shards), val_targets=str(home / shards))
    served = batches(data, 12)
    for batch in [*served, *data.val_dataloader()]:
        assert torch.equal(batch["codes"], model.encode(batch["image"]).ids) and batch["codes"].dtype == torch.int64
    assert len({tuple(c.tolist()) for b in served for c in b["codes"]}) == (11 if shards == "one" else pytest.approx(45, abs=10))
    assert sum(len(b["key"]) for b in data.val_dataloader()) == 11, "the broken one has no codes"


def test_targets_of_other_data_or_size_are_refused(home, tmp_path):
    other = folder(tmp_path, encoded(12))
    with pytest.raises(UsageError, match="made of other images"):
        attach(PhotoData([str(other)], size=16, targets=str(home / "one")))
    with pytest.raises(UsageError, match="views of 16×16 pixels; data.size is 24"):
        attach(PhotoData([str(home / "photos.tar")], size=24, targets=str(home / "one")))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_is_shared_in_equally_many_batches(home, ranks):
    shares = []
    for rank in range(ranks):
        data = attach(TokenData(str(home / "ten"), str(home / "one"), val_batch_size=2, val_images=7), 0, rank, ranks)
        shares.append([b["key"] for b in data.val_dataloader()])
    assert len({len(share) for share in shares}) == 1
    assert sorted(k for share in shares for batch in share for k in batch) == ["000", "001", "003", "004", "006", "008", "010"]


def test_settings(home):
    assert TokenData(str(home / "ten")).val_dataloader() == [] and TokenData(str(home / "ten")).describe()["views"] == 10
    with pytest.raises(UsageError, match="at least 1"):
        TokenData(str(home / "ten"), batch_size=0)
