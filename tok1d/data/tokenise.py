"""Making token shards: every image of a data set, in named views, through a frozen tokenizer, once.

The images are cut in runs of ``per_shard``, one run a shard, and shards go round the ranks. A shard's content does not depend on what
was made before it or by whom, so a killed run goes on at the first unfinished shard and ends with the same bytes.

Shapes: V views of an image, N tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tok1d.data.facts import Facts, check_names, class_names, fields_of, label_of, read_facts
from tok1d.data.index import Sample, fingerprint, read_sample
from tok1d.data.photos import decode_rgb
from tok1d.data.shards import HEAD, Arrays, Head, Notes, id_dtype, read_head, read_notes, write_shard
from tok1d.data.views import Window, cut, named_view, view_names
from tok1d.errors import ImageError, TokError, UsageError

if TYPE_CHECKING:
    from tok1d.tokenizers.tokenizer import Tokenizer1D

WHAT = ("ids", "latents", "vae")


@dataclass
class Made:
    """What a run did.

    Attributes:
        head: of the set.
        shards, images: made by this run on this rank.
        kept: shards that were finished before.
        broken: (key, reason) of images that could not be read.
        unfinished: shards that other ranks have not finished yet.
    """

    head: Head
    shards: int
    images: int
    kept: int
    broken: list[tuple[str, str]]
    unfinished: int


def plan(
    model: Tokenizer1D,
    samples: Sequence[Sample],
    *,
    what: str = "ids",
    views: str = "centre",
    area: tuple[float, float] = (0.35, 1.0),
    seed: int = 0,
    per_shard: int = 1024,
    classes: Sequence[str] | None = None,
) -> Head:
    """What a set of shards will be.

    Args:
        model: the frozen tokenizer.
        samples: the data.
        what: ``ids`` (bits for codes beyond 62 bits), ``latents`` (what the decoder takes) or ``vae`` (of the VAE in the encoder).
        views: as :func:`tok1d.data.views.view_names`.
        area, seed: of random views.
        per_shard: images of a shard.
        classes: names in the order of their numbers; those of the class folders in sorted order if None.

    Raises:
        UsageError: what this model cannot make, unknown views, or class names without numbers.
    """
    from tok1d.generators.space import TokenSpace

    if what not in WHAT or per_shard < 1 or not 0 < area[0] <= area[1] <= 1:
        raise UsageError(f"what is one of {', '.join(WHAT)}, per_shard at least 1, area two rising shares; got {what!r}, {per_shard}, {area}")
    if what == "ids" and not model.is_discrete:
        raise UsageError(f"{model.name} is continuous and has no ids; keep its latents: --what latents")
    if what == "vae" and not hasattr(model.encoder, "latents"):
        raise UsageError(f"--what vae: the encoder of {model.name} has no VAE in it")
    names = class_names(samples) if classes is None else list(classes)
    check_names(samples, names)
    space = TokenSpace.of(model, None if what == "ids" else "latents")
    kind = space.kind if what == "ids" else what
    height, width = model.image_size
    with torch.inference_mode():
        shape = list(_encode(model, torch.zeros(1, 3, height, width), kind).shape[1:])
    return Head(
        kind, space.to_config(), shape, view_names(views), [height, width], list(map(float, area)), seed, str(model.dtype), names,
        [f for f in fields_of(samples) if f in ("label", "text")], fingerprint(samples), len(samples), per_shard,
    )  # fmt: skip


def tokenise(
    model: Tokenizer1D,
    samples: Sequence[Sample],
    out: Path,
    head: Head,
    *,
    batch_size: int = 16,
    readers: int = 2,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Made:
    """Make the shards of ``out`` that are not finished.

    Args:
        model, samples, head: as given to :func:`plan`, and what it returned.
        out: folder.
        batch_size: views at once.
        readers: threads that read and decode.
        rank, ranks: this process makes every ``ranks``-th shard.
        progress: called after each image with the number of the shard.

    Raises:
        UsageError: ``out`` holds another set.
        TokError: it cannot be written (a full disk); finished shards stay.
    """
    _begin(out, head)
    mine = range(rank, head.shards, ranks)
    todo = [number for number in mine if read_notes(out, number) is None]
    made = Made(head, 0, 0, len(mine) - len(todo), [], 0)
    with ThreadPoolExecutor(readers) as pool:
        for number in todo:
            run = samples[number * head.per_shard : (number + 1) * head.per_shard]
            notes = Notes()
            windows, values = _shard(model, run, head, notes, batch_size, pool, lambda at=number: progress and progress(at))
            write_shard(out, number, {"windows": windows, **values}, notes)
            made.shards, made.images = made.shards + 1, made.images + len(notes.keys)
            made.broken += [(key, reason) for key, reason in notes.broken]
    made.unfinished = sum(read_notes(out, number) is None for number in range(head.shards))
    return made


def _begin(out: Path, head: Head) -> None:
    """Write the head, or see that the one there asks for the same."""
    from tok1d.disk import atomic_write

    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / HEAD).exists() and any(out.glob("*.safetensors")):
            raise UsageError(f"{out} holds .safetensors files that are no token shards; choose another folder")
        if not (out / HEAD).exists():
            atomic_write(out / HEAD, head.to_json())
    except OSError as error:
        raise TokError(f"{out} cannot be written: {error}") from error
    there, asked = read_head(out), Head(**json.loads(head.to_json()))
    if there != asked:
        raise UsageError(f"{out} holds another set of token shards ({there.differences(asked)}): repeat what made it, or choose another folder")


def _shard(
    model: Tokenizer1D, samples: Sequence[Sample], head: Head, notes: Notes, batch_size: int, pool: ThreadPoolExecutor, done: Callable[[], Any]
) -> tuple[NDArray[np.int32], Arrays]:
    """Windows and packed values of a run of images; what could not be read goes into the notes."""
    places = {name: number for number, name in enumerate(head.classes)}
    windows: list[list[Window]] = []
    rows: list[Tensor] = []
    waiting: list[Tensor] = []
    with torch.inference_mode():
        for sample, found in _read(samples, head, places, pool, ahead=max(2, batch_size // len(head.views))):
            done()
            if isinstance(found, str):
                notes.broken.append([sample.key, found])
                continue
            views, cuts, facts = found
            notes.keys.append(sample.key)
            notes.labels.append(facts.label)
            notes.texts.append(list(facts.texts))
            windows.append(cuts)
            waiting += views
            while len(waiting) >= batch_size:
                rows.append(_encode(model, torch.stack(waiting[:batch_size]), head.kind))
                waiting = waiting[batch_size:]
        if waiting:
            rows.append(_encode(model, torch.stack(waiting), head.kind))
    count = len(head.views)
    values = torch.cat(rows) if rows else torch.empty(0, *head.shape, dtype=torch.float32 if head.array == "latents" else torch.int64)
    packed = _pack(values.unflatten(0, (-1, count)) if rows else values[:, None].expand(0, count, *head.shape), head)
    return np.array(windows, np.int32).reshape(-1, count, 5), {head.array: packed}


def _read(
    samples: Sequence[Sample], head: Head, places: dict[str, int], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[Sample, tuple[list[Tensor], list[Window], Facts] | str]]:
    """Views of each image, or why there are none; in order, ``ahead`` images at once."""
    size = (head.size[0], head.size[1])

    def views(sample: Sample) -> tuple[list[Tensor], list[Window], Facts] | str:
        try:
            facts = read_facts(sample)
            label = label_of(facts, places)
            image = decode_rgb(read_sample(sample))
        except (ImageError, OSError) as error:
            return " ".join(str(error).split())
        shape = (image.shape[0], image.shape[1])
        cuts = [named_view(name, shape, size, key=sample.key, seed=head.seed, area=(head.area[0], head.area[1])) for name in head.views]
        return [cut(image, window, size) for window in cuts], cuts, replace(facts, label=label)

    for start in range(0, len(samples), ahead):
        part = samples[start : start + ahead]
        yield from zip(part, pool.map(views, part))


def _encode(model: Tokenizer1D, views: Tensor, kind: str) -> Tensor:
    """Views uint8 or float (B, 3, H, W) → ids (B, N), bits (B, N, d), or float latents (B, …), on the CPU."""
    if kind in ("ids", "bits"):
        return model.encode(views).data.cpu()
    images = views.float() / 255 if views.dtype == torch.uint8 else views
    if kind == "vae":
        return model.encoder.latents(images.to(model.device)).float().cpu()  # type: ignore[operator]
    return model.quantizer(model.encode_latents(images)).q.float().cpu()


def _pack(values: Tensor, head: Head) -> NDArray[Any]:
    """(images, V, …) as they are stored."""
    array = values.numpy()
    if head.kind == "bits":
        return np.packbits(array.astype(np.uint8), axis=-1)
    if head.kind == "ids":
        return array.astype(id_dtype(int(head.space["vocab_size"])))
    half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise TokError("latents beyond 65,504 do not fit float16: this model's latents are not scaled; nothing was written of this shard")
    return half
