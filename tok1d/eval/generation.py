"""How good generated images are: distances between their features and those of real ones, and whether a fixed classifier knows them.

The samples are a folder of ``tok generate`` (or any images, in class folders if they have classes), the real side is data as ``tok fit``
takes them. Features come from any :class:`tok1d.eval.features.FeatureNet`; only those of the Inception weights of FID are called FID.
The classifier is a linear probe on the same features, fitted in closed form on training images: nothing in it is random.

Shapes: n images, D features, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tok1d.data.facts import class_names, label_of, read_facts
from tok1d.data.index import Sample, index_images, read_sample
from tok1d.data.order import spread
from tok1d.data.photos import decode_rgb
from tok1d.errors import TokError, UsageError
from tok1d.eval.measures import Features
from tok1d.eval.picture_features import Pictures, pictures_of
from tok1d.eval.summary import clean, provenance

if TYPE_CHECKING:
    from tok1d.eval.features import FeatureNet

FORMAT = "tok1d.generation/1"
RIDGE = 0.1  # of the probe, in units of the mean eigenvalue of its normal equations


@dataclass
class Probe:
    """A linear classifier by least squares on standardised features.

    Attributes:
        mean, deviation: float64 (D,) of the features it was fitted on.
        weight: float64 (D, K).
        bias: float64 (K,).
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor

    @staticmethod
    def fit(features: Tensor, labels: Tensor, classes: int, ridge: float = RIDGE) -> Probe:
        """Ridge regression of one-hot classes.

        Args:
            features: float (n, D).
            labels: int64 (n,) in [0, K).
            classes: K.
            ridge: in units of the mean eigenvalue (n), see :data:`RIDGE`.

        Example:
            >>> Probe.fit(torch.tensor([[0.0], [1.0], [4.0], [5.0]]), torch.tensor([0, 0, 1, 1]), 2)(torch.tensor([[-9.0], [9.0]])).tolist()
            [0, 1]
        """
        x = features.double()
        mean, deviation = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
        x = (x - mean) / deviation
        y = torch.nn.functional.one_hot(labels, classes).double()
        bias = y.mean(0)
        n, dim = x.shape
        if n < dim:  # the same solution from n equations instead of D
            weight = x.T @ torch.linalg.solve(x @ x.T + ridge * n * torch.eye(n, dtype=x.dtype), y - bias)
        else:
            weight = torch.linalg.solve(x.T @ x + ridge * n * torch.eye(dim, dtype=x.dtype), x.T @ (y - bias))
        return Probe(mean, deviation, weight, bias)

    def __call__(self, features: Tensor) -> Tensor:
        """Float (n, D) → int64 (n,), the likeliest class."""
        return (((features.double() - self.mean) / self.deviation) @ self.weight + self.bias).argmax(1)


def evaluate_samples(
    samples: Path,
    reference: Sequence[Path],
    net: FeatureNet,
    *,
    train: Sequence[Path] = (),
    cache: Path | None = None,
    images: int | None = None,
    batch_size: int = 16,
    readers: int = 2,
    kept: int = 10_000,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, Any]:
    """Measure a folder of samples.

    Args:
        samples: folder of ``tok generate``, or of images.
        reference: real images: folders, tar shards, manifests; seen as centre crops of the size of the samples.
        net: of the features.
        train: labelled images for the classifier; without them there is no class accuracy.
        cache: folder that keeps features of real images by data, network and size.
        images: evenly spaced real images of ``reference``; all if None.
        batch_size, readers: images at once, and threads that read them.
        kept: images of each side for precision, recall and the kernel distance.
        progress: called with images done and their number, set by set.

    Returns:
        Plain data: ``asked``, ``features``, ``reference``, ``classifier``, ``results``, ``provenance``.

    Raises:
        TokError: nothing to compare, samples of several sizes, or labels that the training images do not have.
    """
    start = time.monotonic()
    record, found, labels, classes = _samples(samples)
    size = _size(found[0])
    view = {"net": net, "size": size, "batch_size": batch_size, "readers": readers, "progress": progress}
    made = pictures_of(found, **view, strict=True)
    real_samples = index_images(list(reference))
    if images is not None:
        real_samples = spread(real_samples, images)
    real = pictures_of(real_samples, **view, cache=cache)
    if min(len(made.keys), len(real.keys)) < 2:
        raise TokError(f"distances need at least 2 images on each side, got {len(made.keys)} samples and {len(real.keys)} real ones")
    results = distances(real, made, net, kept)
    classifier: dict[str, Any] | None = None
    if train:
        learned = index_images(list(train))
        probe, classifier, names = fit_probe(learned, pictures_of(learned, **view, cache=cache))
        right = _accuracy(probe, made, [_number(label, name, names, len(probe.bias)) for label, name in zip(labels, classes)])
        if right is not None:
            results["class_accuracy"] = right
        own = _accuracy(probe, real, _labels(real_samples, real.keys, names))
        if own is not None:
            results["class_accuracy_real"] = own
    runs = record.get("runs", [])
    if runs:
        results["images_per_second"] = sum(r["images"] for r in runs) / max(sum(r["seconds"] for r in runs), 1e-9)
    settings = record.get("settings", {})
    asked = {"samples": len(made.keys), "size": size, "options": {"tokens": settings.get("tokens"), **settings.get("options", {})}}
    return clean({
        "format": FORMAT,
        "asked": {**asked, **{k: settings[k] for k in ("generator", "tokenizer", "decoder") if k in settings}, "made_on": [f"{r['machine']}, {r['device']}, {r['threads']} threads" for r in runs]},
        "features": {"name": net.name, "id": net.id},
        "reference": {"images": len(real.keys), "data": real.data, "view": f"centre crop, {size} px", "broken": [list(b) for b in real.broken]},
        "classifier": classifier,
        "results": results,
        "provenance": provenance(time.monotonic() - start, len(made.keys)),
    })  # fmt: skip


def distances(real: Pictures, made: Pictures, net: FeatureNet, kept: int = 10_000) -> dict[str, Any]:
    """Fréchet and kernel distance, precision, recall, density, coverage and inception score, under the names of ``tok eval run``."""
    measure = Features(net, kept)
    for side, found in (("real", real), ("samples", made)):
        rows = {"pooled": found.features} | ({} if found.logits is None else {"logits": found.logits})
        measure._keep(side, found.keys, rows, torch.ones(len(found.keys), dtype=torch.bool))
    return measure.results(measure.state(), "samples")


def fit_probe(samples: Sequence[Sample], found: Pictures) -> tuple[Probe, dict[str, Any], list[str]]:
    """The classifier of labelled images, what it is, and the names of its classes.

    Raises:
        UsageError: the images have fewer than two classes.
    """
    names = class_names(samples)
    labels = torch.tensor(_labels(samples, found.keys, names))
    classes = max(len(names), int(labels.max()) + 1 if len(labels) else 0)
    known = labels >= 0
    if len(labels[known].unique()) < 2:
        raise UsageError("--train: images of at least two classes are needed (class folders, or labels beside the images)")
    probe = Probe.fit(found.features[known], labels[known], classes)
    right = (probe(found.features[known]) == labels[known]).double().mean().item()
    about = {
        "kind": f"ridge regression on standardised features, {RIDGE} × n", "images": int(known.sum()), "classes": classes, "data": found.data,
        "accuracy_on_its_images": right,
    }  # fmt: skip
    return probe, about, names


def _samples(folder: Path) -> tuple[dict[str, Any], list[Sample], list[int], list[str]]:
    """Record, places, class numbers (-1: none) and class names of a folder of samples."""
    from tok1d.generators.samples import RECORD, read_record

    if not (folder / RECORD).is_file():
        found = index_images([folder])
        facts = [read_facts(s) for s in found]
        return {}, found, [f.label for f in facts], [f.name for f in facts]
    record = read_record(folder)
    rows = [row for row in record["images"] if (folder / row["file"]).is_file()]
    if not rows:
        raise TokError(f"{folder} holds no samples yet; run the same tok generate again")
    places = [Sample(row["file"], str(folder / row["file"]), 0, (folder / row["file"]).stat().st_size) for row in rows]
    return record, places, [int(row.get("label", -1)) for row in rows], [str(row.get("class", "")) for row in rows]


def _size(sample: Sample) -> int:
    height, width = decode_rgb(read_sample(sample)).shape[:2]
    if height != width:
        raise TokError(f"{sample.file}: samples must be square, got {height} × {width}")
    return int(height)


def _labels(samples: Sequence[Sample], keys: Sequence[str], names: Sequence[str]) -> list[int]:
    """Class numbers of those that could be read, -1 for none or another one."""
    wanted, places = set(keys), {name: i for i, name in enumerate(names)}
    facts = [read_facts(s) for s in samples if s.key in wanted]
    return [label_of(f, places) if not f.name or f.name in places else -1 for f in facts]


def _number(label: int, name: str, names: Sequence[str], classes: int) -> int:
    """A class of the samples among those of the classifier: by name where both have names."""
    if name and names:
        if name not in names:
            raise TokError(f"the samples are of class {name!r:.60}, the training images have {', '.join(names[:8])}: give --train the data of the generator")
        return list(names).index(name)
    if label >= classes:
        raise TokError(f"the samples are of class {label}, the training images have 0 to {classes - 1}: give --train the data of the generator")
    return label


def _accuracy(probe: Probe, found: Pictures, labels: Sequence[int]) -> float | None:
    """Share of labelled images that the classifier knows; None if there are none."""
    truth = torch.tensor(labels)
    known = truth >= 0
    if not bool(known.any()):
        return None
    return (probe(found.features[known]) == truth[known]).double().mean().item()
