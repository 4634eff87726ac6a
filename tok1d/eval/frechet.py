"""Distances between sets of images in a feature space: Fréchet, kernel (KID), inception score, precision and recall.

Features come from outside (one pass of a network serves all of them). Sums are float64 with one matrix product a batch;
parts of a set — batches, ranks, resumed runs, cached references — add up to the whole.

Fréchet: https://arxiv.org/abs/1706.08500; KID: https://arxiv.org/abs/1801.01401; inception score:
https://arxiv.org/abs/1606.03498; precision, recall: https://arxiv.org/abs/1904.06991; density, coverage:
https://arxiv.org/abs/2002.09797. Shapes: n images, D features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tok1d.errors import TokError


@dataclass
class Moments:
    """Number, mean and centred second moment of a set of features.

    Attributes:
        n: images.
        mean: float64 (D,).
        scatter: float64 (D, D), the sum of (x - mean)(x - mean)ᵀ.
    """

    n: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(features: Tensor) -> Moments:
        """Float (n, D) → Moments.

        Example:
            >>> Moments.of(torch.tensor([[0.0], [2.0]])).covariance.tolist()
            [[2.0]]
        """
        x = features.double()
        mean = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        x = x - mean
        return Moments(len(x), mean, x.T @ x)

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets together (Chan, Golub & LeVeque's pairwise formula)."""
        n = self.n + other.n
        if n == 0:
            return self
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(step, step) * (self.n * other.n / n)
        return Moments(n, self.mean + step * (other.n / n), scatter)

    @property
    def covariance(self) -> Tensor:
        """float64 (D, D), divided by n - 1.

        Raises:
            TokError: fewer than two images.
        """
        if self.n < 2:
            raise TokError(f"a covariance needs at least 2 images, got {self.n}")
        return self.scatter / (self.n - 1)

    def save(self, path: Path, **metadata: str) -> None:
        """Write a safetensors file, atomically; ``metadata`` says what the features are."""
        from safetensors.torch import save

        from tok1d.disk import atomic_write

        tensors = {"n": torch.tensor(self.n), "mean": self.mean.contiguous(), "scatter": self.scatter.contiguous()}
        atomic_write(path, save(tensors, metadata=metadata))

    @staticmethod
    def load(path: Path) -> Moments:
        """Read what :meth:`save` wrote.

        Raises:
            TokError: missing, damaged or another file.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            held = load_file(path)
            n, mean, scatter = int(held["n"]), held["mean"], held["scatter"]
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise TokError(f"{path}: not reference statistics ({error}); make them with tok eval stats") from error
        if mean.ndim != 1 or scatter.shape != (len(mean), len(mean)) or n < 0:
            raise TokError(f"{path}: statistics of inconsistent shapes {tuple(mean.shape)}, {tuple(scatter.shape)}; make them again")
        return Moments(n, mean.double(), scatter.double())


@dataclass
class Sums:
    """What moments are made of, added up in place: one matrix product a batch.

    Attributes:
        n: int64 (), images.
        total: float64 (D,), their sum.
        outer: float64 (D, D), the sum of x xᵀ.
    """

    n: Tensor
    total: Tensor
    outer: Tensor

    @staticmethod
    def of(features: Tensor) -> Sums:
        """Float (n, D) → Sums.

        Example:
            >>> Sums.of(torch.tensor([[0.0], [2.0]])).moments() == Moments.of(torch.tensor([[0.0], [2.0]]))
            True
        """
        x = features.double()
        return Sums(torch.tensor(len(x), device=x.device), x.sum(0), x.T @ x)

    def update(self, features: Tensor) -> None:
        """Float (n, D) more."""
        x = features.double()
        self.n += len(x)
        self.total += x.sum(0)
        self.outer.addmm_(x.T, x)

    def moments(self) -> Moments:
        """Number, mean and scatter."""
        n = int(self.n)
        mean = self.total / max(1, n)
        return Moments(n, mean, self.outer - torch.outer(mean, mean) * n)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|μa - μb|² + tr(Ca + Cb - 2 (Ca Cb)^½), never negative.

    The trace of the root is found from two symmetric eigenvalue problems, (Ca^½ Cb Ca^½)^½: no complex part, and rank-deficient
    covariances (fewer images than features) need no special care. The smaller set is biased upwards; say how many there are.

    Raises:
        TokError: sets of another width, fewer than two images, or features that are not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise TokError(f"the sets have {len(a.mean)} and {len(b.mean)} features: they come from different networks")
    if not (a.scatter.isfinite().all() and b.scatter.isfinite().all()):
        raise TokError("the features hold NaN or infinity; no distance can be told")
    first, second = a.covariance, b.covariance
    root = _matrix_root(first)
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + first.trace() + second.trace() - 2 * cross
    return max(0.0, distance.item())


def _matrix_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def kernel_distance(real: Tensor, fake: Tensor, *, unbiased: bool = True) -> float:
    """Squared maximum mean discrepancy with the kernel (x·y / D + 1)³ of KID, all pairs at once.

    Args:
        real, fake: float (n, D), (m, D).
        unbiased: leave out the diagonal (U-statistic); it may come out slightly negative.

    Raises:
        TokError: too few images.
    """
    n, m = len(real), len(fake)
    if min(n, m) < 2:
        raise TokError(f"a kernel distance needs at least 2 images on each side, got {n} and {m}")
    x, y = real.double(), fake.double()
    xx, yy, xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
    if not unbiased:
        return (xx.mean() + yy.mean() - 2 * xy.mean()).item()
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return (within - 2 * xy.mean()).item()


def kernel_distance_of_subsets(
    real: Tensor, fake: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and population deviation of :func:`kernel_distance` over random subsets, the usual form of KID.

    Args:
        real, fake: float (n, D), (m, D).
        subsets, size: how many, and of how many images (at most what there is).
        seed: of the choice.
    """
    size = min(size, len(real), len(fake))
    rng = torch.Generator().manual_seed(seed)
    values = torch.tensor(
        [
            kernel_distance(real[torch.randperm(len(real), generator=rng)[:size]], fake[torch.randperm(len(fake), generator=rng)[:size]])
            for _ in range(subsets)
        ],
        dtype=torch.float64,
    )
    return values.mean().item(), values.std(correction=0).item()


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def inception_score(logits: Tensor, splits: int = 1) -> list[float]:
    """exp(mean KL(p(class | image) ‖ p(class))) of each contiguous piece.

    Args:
        logits: float (n, K).
        splits: pieces, of almost equal length.

    Raises:
        TokError: fewer images than splits.
    """
    if len(logits) < splits or splits < 1:
        raise TokError(f"{splits} splits need at least as many images, got {len(logits)}")
    scores = []
    for part in logits.double().tensor_split(splits):
        p = part.log_softmax(-1)
        marginal = (torch.logsumexp(p, 0) - torch.log(torch.tensor(float(len(p)))))[None]
        scores.append((p.exp() * (p - marginal)).sum(-1).mean().exp().item())
    return scores


@dataclass(frozen=True)
class Coverage:
    """Precision, recall, density and coverage of fakes against reals."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real: Tensor, fake: Tensor, k: int = 5, block: int = 1024) -> Coverage:
    """How much of each set lies in the other's neighbourhoods (balls to the k-th neighbour, itself not counted).

    Args:
        real, fake: float (n, D), (m, D).
        k: neighbour.
        block: rows of distances held at once.

    Raises:
        TokError: no more than k images on a side.
    """
    if min(len(real), len(fake)) <= k:
        raise TokError(f"neighbourhoods of {k} need more than {k} images on each side, got {len(real)} and {len(fake)}")
    real, fake = real.double(), fake.double()
    real_radius, fake_radius = _kth_neighbour(real, k, block), _kth_neighbour(fake, k, block)
    inside, hits, nearest = [], torch.zeros(len(real), dtype=torch.bool, device=real.device), real_radius.new_full((len(real),), torch.inf)
    for part, radius in zip(fake.split(block), fake_radius.split(block)):
        d = torch.cdist(part, real)  # (block, n)
        inside.append((d < real_radius).sum(1))
        hits |= (d < radius[:, None]).any(0)
        nearest = torch.minimum(nearest, d.amin(0))
    counts = torch.cat(inside).double()
    return Coverage(
        precision=(counts > 0).double().mean().item(),
        recall=hits.double().mean().item(),
        density=counts.mean().item() / k,
        coverage=(nearest < real_radius).double().mean().item(),
    )


def _kth_neighbour(x: Tensor, k: int, block: int) -> Tensor:
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(block)])
