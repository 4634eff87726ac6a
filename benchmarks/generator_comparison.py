"""Kinds of generators against each other: the same photos, tokenizer, parameters and processor time; and one kind at several lengths.

    python -m benchmarks.generator_comparison TRAIN VAL --minutes 6          # class folders; variants that are finished are kept
    python -m benchmarks.generation_tables                                   # rewrites the table of docs/generation.md

All learn the classes of TRAIN from the tokens of the shipped tokenizer, in six random crops of each photo. A variant is trained for
so many minutes of processor time (the schedule is fitted to the steps that this allows, from a few steps timed before), exported
with averaged weights, and sampled evenly over the classes with guidance 1 and 2. Measured as ``tok eval generate`` does: Fréchet distance,
precision and recall against training photos as the tokenizer shows them with so many tokens, how many samples a linear probe that
learned from those takes for their class, the Fréchet distance to the photos themselves, and images/s of sampling in processor
time, without and with the decoder. ``ceiling`` rows are validation photos, encoded and decoded. Results:
benchmarks/results/generator_comparison.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import tok1d
from benchmarks.plots import FIGURES
from benchmarks.record import CACHE, RESULTS, save, say
from tok1d.data.index import index_images
from tok1d.data.tokenise import plan, tokenise
from tok1d.data.tokens import TokenData
from tok1d.eval.features import FeatureNet, efficientnet_lite0
from tok1d.eval.generation import evaluate_samples
from tok1d.extras import require
from tok1d.generators.ar import AutoregressiveGenerator
from tok1d.generators.generator import Generator
from tok1d.generators.heads_codes import Codes
from tok1d.generators.images import paint
from tok1d.generators.masked import MaskedGenerator
from tok1d.generators.masked_codes import CodesBody
from tok1d.generators.principal import PrincipalFlow
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.averaging import EMA
from tok1d.training.tasks import GeneratorTask

lightning = require("lightning", "train")
HOME = CACHE / "generators"
VIEWS, AREA, BATCH = "6", (0.7, 1.0), 64
OPTIM = {"lr": 1e-3, "warmup_steps": 100, "final_lr": 0.02, "weight_decay": 0.02, "seed": 0}
GUIDANCE = (1.0, 2.0)
SHOWN = 800
WIDTH, HEADS = 160, 5


@dataclass(frozen=True)
class Variant:
    """One generator to train.

    Attributes:
        what: for people.
        tokens: first tokens of the tokenizer that it makes.
        kept: what of the photos is learned, ``ids`` or ``encoder``.
        make: how it is built.
        options: of sampling.
    """

    what: str
    tokens: int
    kept: str
    make: Callable[..., Generator]
    options: dict[str, Any]


def _ar(*given: Any) -> Generator:
    return AutoregressiveGenerator(*given, WIDTH, 6, HEADS, head=Codes())


VARIANTS = {
    "ar": Variant("autoregressive", 32, "ids", _ar, {}),
    "masked": Variant("masked (MaskGIT), 8 steps", 32, "ids", lambda *given: MaskedGenerator(*given, CodesBody(WIDTH, 6, HEADS)), {"steps": 8}),
    "flow": Variant("flow of components, 25 Heun steps", 32, "encoder", partial(PrincipalFlow, components=304, places=16, whitening=0.25, width=WIDTH, depth=4, heads=HEADS), {"steps": 25, "solver": "heun"}),
    "ar8": Variant("autoregressive", 8, "ids", _ar, {}),
    "ar128": Variant("autoregressive", 128, "ids", _ar, {}),
}  # fmt: skip


def shards(model: Tokenizer1D, photos: Path, what: str, tokens: int, views: str) -> str:
    """Token shards of a folder, made once."""
    out = HOME / f"{photos.name}-{what}{tokens}-{model.model_id:016x}"
    samples = index_images([photos])
    tokenise(model, samples, out, plan(model, samples, what=what, tokens=tokens, views=views, area=AREA))
    return str(out)


def data_of(variant: Variant, model: Tokenizer1D, train: Path, val: Path) -> TokenData:
    """What it learns from."""
    made = [shards(model, photos, variant.kept, variant.tokens, views) for photos, views in ((train, VIEWS), (val, "centre"))]
    return TokenData(*made, batch_size=BATCH, val_batch_size=BATCH)


def fit(variant: Variant, data: TokenData, steps: int) -> tuple[GeneratorTask, float]:
    """A finished task and its seconds of processor time a step."""
    task = GeneratorTask(variant.make, **OPTIM)
    clock = Clock()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, limit_val_batches=0,
        callbacks=[EMA(0.995, module="generator"), clock],
    )  # fmt: skip
    trainer.fit(task, data)
    return task, clock.seconds / max(1, clock.steps)


class Clock(lightning.Callback):
    """Processor time of steps but the first two."""

    def __init__(self) -> None:
        self.seconds, self.steps, self._last = 0.0, -2, 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.process_time()
        if self.steps >= 0:
            self.seconds += now - self._last
        self.steps, self._last = self.steps + 1, now


def train(variant: Variant, data: TokenData, minutes: float, out: Path) -> dict[str, Any]:
    """Train for so much processor time and write the generator to ``out``."""
    _, step = fit(variant, data, 10)
    steps = max(10, int(60 * minutes / step))
    task, step = fit(variant, data, steps)
    generator = task.generator.eval()
    with torch.no_grad():
        batch = data.val_set.__getitems__(list(range(len(data.val_set))))
        losses, _ = generator.losses(task.shortened(batch), torch.Generator().manual_seed(0))
    generator.save_pretrained(out)
    trained = sum(p.numel() for p in generator.parameters())
    found = {"parameters": trained, "steps": steps, "processor_seconds": step * steps, "val_losses": {k: v.item() for k, v in losses.items()}}
    (out / "run.json").write_text(json.dumps(found))
    return found


def sample(generator: Generator, model: Tokenizer1D, options: dict[str, Any], each: int, out: Path) -> dict[str, float]:
    """Pictures in class folders; images/s without and with the decoder."""
    names, made, painted = generator.condition.names, 0.0, 0.0
    labels = [i for i in range(len(names)) for _ in range(each)]
    for start in range(0, len(labels), 16):
        label = labels[start : start + 16]
        begun = time.process_time()
        tokens = generator.generate(len(label), label=label, seeds=start, **options)
        made += time.process_time() - begun
        pictures = (paint(model, tokens) * 255).round().byte()
        painted += time.process_time() - begun
        for i, (picture, one) in enumerate(zip(pictures, label, strict=True)):
            save_png(picture, out / names[one] / f"{start + i:05d}.png")
    return {"images_per_second": len(labels) / made, "images_per_second_painted": len(labels) / painted}


def save_png(picture: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path, compress_level=1)


def shown(model: Tokenizer1D, photos: Path, tokens: int, images: int) -> Path:
    """Evenly spaced photos as the tokenizer shows them with so many tokens, made once."""
    from tok1d.data.order import spread
    from tok1d.data.photos import Photos

    out = HOME / f"shown-{photos.name}-{tokens}"
    if out.is_dir():
        return out
    samples = spread(index_images([photos]), images)
    views, part = Photos(samples, 256), out.with_suffix(".part")
    for i, one in enumerate(samples):
        picture = model.decode(model.encode(views[i]["image"][None], tokens))[0]
        save_png((picture.clamp(0, 1) * 255).round().byte(), part / Path(one.key).parent.name / f"{i:05d}.png")
    part.rename(out)
    return out


def score(samples: Path, seen: Path, photos: Path, net: FeatureNet) -> dict[str, Any]:
    """Against the photos as the tokenizer shows them, and the Fréchet distance to the photos."""
    found = evaluate_samples(samples, [seen], net, train=[seen], cache=HOME / "features")["results"]
    plain = evaluate_samples(samples, [photos], net, cache=HOME / "features", images=2000)["results"]
    return {**found, "frechet": found.pop(net.distance_name), "frechet_photos": plain[net.distance_name]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs=2, type=Path, metavar="TRAIN VAL", help="two folders of class folders")
    parser.add_argument("--only", help=f"variants, comma-separated; default: {','.join(VARIANTS)}")
    parser.add_argument("--minutes", type=float, default=6.0, help="of processor time for each variant")
    parser.add_argument("--each", type=int, default=16, help="samples of each class")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    train_photos, val_photos = args.photos
    model, net = tok1d.load("default"), efficientnet_lite0()
    for name in args.only.split(",") if args.only else VARIANTS:
        variant, out = VARIANTS[name], HOME / f"{name}-{args.minutes:g}"
        if not (out / "run.json").is_file():
            say(f"{name}: {variant.what}, {variant.tokens} tokens")
            say(str(train(variant, data_of(variant, model, train_photos, val_photos), args.minutes, out)))
        generator = Generator.from_pretrained(out).eval()
        for g in GUIDANCE:
            samples, scores = out / f"samples-{g:g}", out / f"scores-{g:g}.json"
            if not scores.is_file():
                speed = sample(generator, model, {**variant.options, "guidance": g}, args.each, samples)
                scores.write_text(json.dumps({**speed, **score(samples, shown(model, train_photos, variant.tokens, SHOWN), train_photos, net)}))
                say(f"{name} guidance {g:g}: {scores.read_text()}")
    for tokens in sorted({v.tokens for v in VARIANTS.values()}):
        path = HOME / f"ceiling-{tokens}.json"
        if not path.is_file():
            val, seen = (shown(model, photos, tokens, SHOWN) for photos in (val_photos, train_photos))
            path.write_text(json.dumps(score(val, seen, train_photos, net)))
            say(f"ceiling {tokens}: {path.read_text()}")
    body = {
        "protocol": {
            "tokenizer": f"{model.name} {model.model_id:016x}", "views": f"{VIEWS} random crops of {AREA[0]:g} to {AREA[1]:g} of the area, mirrored half the time",
            "features": net.name, "reference": f"{SHOWN} evenly spaced training photos, encoded and decoded with as many tokens; photos: 2,000 of them as they are", "samples": f"{args.each} of each class, seeds from 0",
            "minutes": args.minutes, "batch": BATCH, "optimizer": OPTIM, "average": 0.995,
        },
        "variants": {
            name: {
                "what": v.what, "tokens": v.tokens, "options": v.options, **json.loads((HOME / f"{name}-{args.minutes:g}" / "run.json").read_text()),
                "guidance": {f"{g:g}": json.loads((HOME / f"{name}-{args.minutes:g}" / f"scores-{g:g}.json").read_text()) for g in GUIDANCE},
            }
            for name, v in VARIANTS.items() if (HOME / f"{name}-{args.minutes:g}" / f"scores-{GUIDANCE[-1]:g}.json").is_file()
        },
        "ceiling": {p.stem.split("-")[1]: json.loads(p.read_text()) for p in sorted(HOME.glob("ceiling-*.json"))},
    }  # fmt: skip
    print(save("generator_comparison", body, threads=torch.get_num_threads(), folder=args.results))
    print(pictures(args.minutes, FIGURES / "generators.jpg"))


def pictures(minutes: float, path: Path, shown: int = 3, side: int = 64) -> Path:
    """The first samples of every other class, a row a variant, guidance 2."""
    rows = []
    for name in VARIANTS:
        folder = HOME / f"{name}-{minutes:g}" / f"samples-{GUIDANCE[-1]:g}"
        if not folder.is_dir():
            continue
        found = [sorted((folder / c).iterdir())[:shown] for c in sorted(p.name for p in folder.iterdir() if p.is_dir())[::2]]
        rows.append([Image.open(p).resize((side, side), Image.Resampling.BICUBIC) for part in found for p in part])
    sheet = Image.new("RGB", (side * len(rows[0]), side * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * side, y * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=85)
    return path


if __name__ == "__main__":
    main()
