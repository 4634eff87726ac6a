"""Distances between image sets as torchmetrics, for streams of features on several ranks.

States have a fixed shape and are sums, or samples chosen by a hash of the image's name: what comes out does not depend on
the order of the images, on the batch size, or on how they were shared among ranks. Shapes: n images, D features, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from tok1d.errors import TokError
from tok1d.eval.frechet import Moments, Sums, frechet_distance, inception_score, kernel_distance_of_subsets
from tok1d.extras import require

torchmetrics = require("torchmetrics", "eval")


class FrechetDistance(torchmetrics.Metric):
    """Fréchet distance of two sets of features, or of one to a cached reference.

    Args:
        features: D.
        reference: moments of the real images; then only fakes are updated.
    """

    full_state_update = False

    def __init__(self, features: int, reference: Moments | None = None) -> None:
        super().__init__()
        if reference is not None and len(reference.mean) != features:
            raise TokError(f"the reference has {len(reference.mean)} features, this network makes {features}")
        self.reference = reference
        for side in ("real", "fake"):
            for name, shape in (("n", ()), ("sum", (features,)), ("outer", (features, features))):
                self.add_state(f"{side}_{name}", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, real: bool) -> None:
        """Float (n, D) of one side."""
        self.sums(real).update(features)

    def sums(self, real: bool) -> Sums:
        """The states of one side."""
        side = "real" if real else "fake"
        return Sums(*(getattr(self, f"{side}_{name}") for name in ("n", "sum", "outer")))

    def moments(self, real: bool) -> Moments:
        """What was seen of one side so far (of all ranks, after a sync)."""
        return self.reference if real and self.reference is not None else self.sums(real).moments()

    def compute(self) -> Tensor:
        return torch.tensor(frechet_distance(self.moments(True), self.moments(False)), dtype=torch.float64)


class FeatureSample(torchmetrics.Metric):
    """Features of at most ``size`` images of each side, those whose names have the smallest hashes.

    KID, the inception score and precision need the features themselves; a sample by hash is the same sample in any order,
    batch or rank, and memory stays bounded.

    Args:
        size: images kept.
        seed: of the hash.
    """

    full_state_update = False

    def __init__(self, size: int = 10_000, seed: int = 0) -> None:
        super().__init__()
        self.size, self.seed = size, seed
        for side in ("real", "fake"):
            self.add_state(f"{side}_keys", [], dist_reduce_fx="cat")
            self.add_state(f"{side}_features", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, names: Sequence[str], real: bool) -> None:
        """Float (n, D) features of n named images."""
        side = "real" if real else "fake"
        kept = self.sample(side, hash_keys(names, self.seed).to(features.device), features.float())
        setattr(self, f"{side}_keys", [kept[0]])
        setattr(self, f"{side}_features", [kept[1]])

    def sample(self, side: str, keys: Tensor | None = None, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and features of one side in the order of their keys, with some more images if given."""
        held = [getattr(self, f"{side}_{name}") for name in ("keys", "features")]
        held = [[h] if isinstance(h, Tensor) else list(h) for h in held]
        if keys is not None and features is not None:
            held[0].append(keys)
            held[1].append(features)
        if not held[0]:
            raise TokError("no features were seen")
        kept = least(dict(zip(("keys", "features"), map(torch.cat, held))), self.size)
        return kept["keys"], kept["features"]

    def compute(self) -> dict[str, Tensor]:
        """``real`` and ``fake`` features, float (n, D)."""
        return {side: self.sample(side)[1] for side in ("real", "fake") if getattr(self, f"{side}_keys")}


def hash_keys(names: Sequence[str], seed: int = 0) -> Tensor:
    """int64 (n,) in [0, 2^56), one a name; images with the smallest ones are the sample of any set they are in."""
    digests = [hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest() for name in names]
    return torch.tensor([int.from_bytes(digest, "big") for digest in digests], dtype=torch.int64)


def least(rows: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """The rows of the ``size`` smallest ``keys``, in their order; every tensor has a row for each key."""
    order = rows["keys"].argsort(stable=True)[:size]
    return {name: values[order] for name, values in rows.items()}


class KernelDistance(FeatureSample):
    """KID: mean over subsets of the kernel distance, and its deviation.

    Args:
        subsets, subset_size, seed: of :func:`tok1d.eval.frechet.kernel_distance_of_subsets`.
        size: images kept of each side.
    """

    def __init__(self, subsets: int = 100, subset_size: int = 1000, size: int = 10_000, seed: int = 0) -> None:
        super().__init__(size, seed)
        self.subsets, self.subset_size = subsets, subset_size

    def compute(self) -> dict[str, Tensor]:
        held = super().compute()
        if len(held) < 2:
            raise TokError("a kernel distance needs features of real and of fake images")
        mean, deviation = kernel_distance_of_subsets(
            held["real"], held["fake"], subsets=self.subsets, size=self.subset_size, seed=self.seed
        )
        return {"mean": torch.tensor(mean), "deviation": torch.tensor(deviation)}


class InceptionScore(FeatureSample):
    """Inception score of the fakes, over all of them at once as the tokenizer papers do (``splits=1``), or their mean.

    Args:
        splits: pieces.
        size: images kept.
        seed: of the sample.
    """

    def __init__(self, splits: int = 1, size: int = 50_000, seed: int = 0) -> None:
        super().__init__(size, seed)
        self.splits = splits

    def compute(self) -> dict[str, Tensor]:
        scores = torch.tensor(inception_score(super().compute()["fake"], self.splits), dtype=torch.float64)
        return {"mean": scores.mean(), "deviation": scores.std(correction=0)}
