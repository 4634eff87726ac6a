"""Making token shards: every image of a data set, in named views, through a frozen tokenizer, once.

The images are cut in runs of ``per_shard``, one run a shard, and shards go round the ranks. A shard's content does not depend on what
was made before it or by whom, so a killed run goes on at the first unfinished shard and ends with the same bytes.

Shapes: V views of an image, B of them at once, N tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
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
from tok1d.tokens import TokenSequence

if TYPE_CHECKING:
    from tok1d.tokenizers.budget import Auto, Budget
    from tok1d.tokenizers.tokenizer import Tokenizer1D

WHAT = ("ids", "latents", "encoder", "vae")


@dataclass
class Made:
    """What a run did.

    Attributes:
        head: of the set.
        shards, images: made by this run on this rank.
        kept: shards that were finished before.
        broken: (key, reason) of images that could not be read.
        unfinished: shards that other ranks have not finished yet.
        lengths: tokens of every view made by this run on this rank, where a budget chose them.
        missed: how many of these views keep all tokens and miss the quality even so.
    """

    head: Head
    shards: int
    images: int
    kept: int
    broken: list[tuple[str, str]]
    unfinished: int
    lengths: list[int] = field(default_factory=list)
    missed: int = 0


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
    tokens: int | Budget | Auto | None = None,
) -> Head:
    """What a set of shards will be.

    Args:
        model: the frozen tokenizer.
        samples: the data.
        what: ``ids`` (bits for codes beyond 62 bits), ``latents`` (what the decoder takes), ``encoder`` (what the quantizer takes) or
            ``vae`` (of the VAE in the encoder).
        views: as :func:`tok1d.data.views.view_names`.
        area, seed: of random views.
        per_shard: images of a shard.
        classes: names in the order of their numbers; those of the class folders in sorted order if None.
        tokens: of every view, the first ones; or a budget, and every view has a length of its own. All if None.

    Raises:
        UsageError: what this model cannot make, unknown views, or class names without numbers.
        TokenError: a number of tokens this model does not make, or a budget it cannot follow.
    """
    from tok1d.generators.space import TokenSpace

    if what not in WHAT or per_shard < 1 or not 0 < area[0] <= area[1] <= 1:
        raise UsageError(f"what is one of {', '.join(WHAT)}, per_shard at least 1, area two rising shares; got {what!r}, {per_shard}, {area}")
    if what == "ids" and not model.is_discrete:
        raise UsageError(f"{model.name} is continuous and has no ids; keep its latents: --what latents")
    if what == "vae" and not hasattr(model.encoder, "latents"):
        raise UsageError(f"--what vae: the encoder of {model.name} has no VAE in it")
    if tokens is not None and what != "ids" and not (what == "encoder" and isinstance(tokens, int)):
        raise UsageError(f"--what {what} is kept whole; a number of tokens goes with ids and encoder, a budget with ids")
    names = class_names(samples) if classes is None else list(classes)
    check_names(samples, names)
    space = TokenSpace.of(model, {"ids": None, "encoder": "encoder"}.get(what, "latents"))
    budget = {} if tokens is None or isinstance(tokens, int) else _described(model, tokens)
    if isinstance(tokens, int):
        space = space.first(tokens)
    kind = space.kind if what == "ids" else what
    height, width = model.image_size
    with torch.inference_mode():
        shape = list(_encode(model, torch.zeros(1, 3, height, width), kind, space.tokens).shape[1:])
    return Head(
        kind, space.to_config(), shape, view_names(views), [height, width], list(map(float, area)), seed, str(model.dtype), names,
        [f for f in fields_of(samples) if f in ("label", "text")], fingerprint(samples), len(samples), per_shard, budget,
    )  # fmt: skip


def _described(model: Tokenizer1D, budget: Budget | Auto) -> dict[str, Any]:
    """A budget as the head of a set has it, with everything the lengths depend on."""
    from tok1d.tokenizers.budget import Auto
    from tok1d.tokenizers.folder import chunks_of, fingerprint, plain_state
    from tok1d.tokenizers.halting import head_of

    if isinstance(budget, Auto):
        chooser = head_of(model)
        quality = chooser.quality if budget.quality is None else budget.quality
        found = {"rule": "auto", "metric": chooser.metric, "quality": quality, "max_bytes": budget.max_bytes}
        found["head"] = f"{fingerprint(chooser.to_config(), chunks_of(plain_state(chooser))):016x}"
    else:
        budget.check(model)
        found = {"rule": "search", **asdict(budget)}
    return {name: value for name, value in found.items() if value is not None}


def _budget_of(head: Head) -> Budget | Auto | None:
    """The budget that a head describes."""
    from tok1d.tokenizers.budget import Auto, Budget

    values = {name: value for name, value in head.budget.items() if name not in ("rule", "metric", "head")}
    return (Auto if head.budget["rule"] == "auto" else Budget)(**values) if values else None


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
    made, budget = Made(head, 0, 0, len(mine) - len(todo), [], 0), _budget_of(head)
    with ThreadPoolExecutor(readers) as pool:
        for number in todo:
            run = samples[number * head.per_shard : (number + 1) * head.per_shard]
            notes = Notes()
            arrays, missed = _shard(model, run, head, budget, notes, batch_size, pool, lambda at=number: progress and progress(at))
            write_shard(out, number, arrays, notes)
            made.lengths += arrays["lengths"].flatten().tolist() if budget else []
            made.missed += missed
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
    model: Tokenizer1D, samples: Sequence[Sample], head: Head, budget: Budget | Auto | None, notes: Notes, batch_size: int,
    pool: ThreadPoolExecutor, done: Callable[[], Any],
) -> tuple[Arrays, int]:  # fmt: skip
    """Arrays of a run of images, and how many views miss their budget; what could not be read goes into the notes."""
    places = {name: number for number, name in enumerate(head.classes)}
    windows: list[list[Window]] = []
    rows: list[Tensor] = []
    lengths: list[int] = []
    waiting: list[Tensor] = []
    missed = 0

    def encode(views: Tensor) -> None:
        nonlocal missed
        values = _encode(model, views, head.kind, head.shape[0])
        if budget is not None:
            values, kept, late = _shortened(model, views, values, budget)
            lengths.extend(kept)
            missed += late
        rows.append(values)

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
                encode(torch.stack(waiting[:batch_size]))
                waiting = waiting[batch_size:]
        if waiting:
            encode(torch.stack(waiting))
    count = len(head.views)
    values = torch.cat(rows) if rows else torch.empty(0, *head.shape, dtype=torch.float32 if head.array == "latents" else torch.int64)
    packed = _pack(values.unflatten(0, (-1, count)) if rows else values[:, None].expand(0, count, *head.shape), head)
    arrays = {"windows": np.array(windows, np.int32).reshape(-1, count, 5), head.array: packed}
    return (arrays | {"lengths": np.array(lengths, np.int32).reshape(-1, count)} if budget is not None else arrays), missed


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


def _encode(model: Tokenizer1D, views: Tensor, kind: str, tokens: int) -> Tensor:
    """Views uint8 or float (B, 3, H, W) → the first ids (B, N) or bits (B, N, d), or float latents (B, …), on the CPU."""
    if kind in ("ids", "bits"):
        return model.encode(views, tokens).data.cpu()
    images = views.float() / 255 if views.dtype == torch.uint8 else views
    if kind == "vae":
        return model.encoder.latents(images.to(model.device)).float().cpu()  # type: ignore[operator]
    if kind == "encoder":
        return model.encode_latents(images, tokens)[:, :tokens].float().cpu()
    return model.quantizer(model.encode_latents(images)).q.float().cpu()


def _shortened(model: Tokenizer1D, views: Tensor, values: Tensor, budget: Budget | Auto) -> tuple[Tensor, tuple[int, ...], int]:
    """Ids or bits with zeros beyond the tokens that each view keeps, how many these are, and how many views miss the target."""
    fields = {"ids": values, "bits": None} if values.ndim == 2 else {"ids": None, "bits": values}
    found = budget.search(model, views, TokenSequence(**fields, vocab_size=model.vocab_size, model_id=model.model_id, nested=True))
    whole = torch.zeros_like(values)
    whole[:, : found.sequence.shape[1]] = found.sequence.data
    return whole, found.tokens, found.reached.count(False)


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
