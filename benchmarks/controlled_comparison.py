"""Quantizers, length rules and training losses against each other: one small tokenizer, the same data, steps and seed.

    python -m benchmarks.controlled_comparison TRAIN.tar … --val VAL.tar --only vq,fsq
    python -m benchmarks.controlled_comparison --page     # rewrites the table and the plot of docs/training-choices.md

Every variant is a 1.4 M parameter TiTok for 32 × 32 pixels with 16 tokens of 12 bits that differs from ``fsq`` in one thing.
Photos are shrunk once to a shorter edge of 48 pixels. What is measured: PSNR, LPIPS (VGG16, pictures enlarged twice), use of
the codes and the entropy at each position, on centre crops of the validation photos, the averaged weights, 8-bit pictures.
A finished variant is not run again. Results: benchmarks/results/controlled_comparison.json.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.plots import FIGURES
from benchmarks.record import CACHE, RESULTS, ROOT, load, save, say
from tok1d.data.module import PhotoData
from tok1d.data.photos import Photos, decode_rgb, index_images, read_sample
from tok1d.eval.perceptual import Perceptual
from tok1d.extras import require
from tok1d.tokenizers.decoders.grid import GridDecoder
from tok1d.tokenizers.encoders.titok import TiTokEncoder
from tok1d.tokenizers.lengths import FixedLength, LengthRule, TailDrop
from tok1d.tokenizers.part import Quantizer
from tok1d.tokenizers.quantizers.bsq import BSQ
from tok1d.tokenizers.quantizers.fsq import FSQ
from tok1d.tokenizers.quantizers.grouped_lfq import GroupedLFQ
from tok1d.tokenizers.quantizers.vq import VQ
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.averaging import EMA
from tok1d.training.callbacks import entropy_bits
from tok1d.training.tasks import ReconstructionTask

lightning = require("lightning", "train")
PAGE = ROOT / "docs" / "training-choices.md"
TOKENS, SIDE, EDGE, COUNTS = 16, 32, 48, (1, 2, 4, 8, 16)
LOSSES = {"l1": 1.0, "l2": 4.0}
RECIPE = {"lr": 1e-3, "warmup_steps": 100, "final_lr": 0.05, "seed": 0}


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        what: the one thing that differs.
        quantizer: name in ``QUANTIZERS``.
        distribution: of training lengths; "" keeps every token.
        extra: losses beyond ``LOSSES``, by log name.
    """

    what: str
    quantizer: str = "fsq"
    distribution: str = ""
    extra: dict[str, float] = field(default_factory=dict)


QUANTIZERS: dict[str, Any] = {
    "vq": lambda: VQ(4096, 12, l2=True, ema=False),
    "vq_ema": lambda: VQ(4096, 12, l2=True, ema=True, dead_code_threshold=0.03),
    "fsq": lambda: FSQ([8, 8, 8, 8]),
    "bsq": lambda: BSQ(12),
    "glfq": lambda: GroupedLFQ(2, 6),
}
VARIANTS = {
    "fsq": Variant("FSQ, 8·8·8·8 levels"),
    "vq": Variant("VQ, 4096 codes, learned by gradient", "vq"),
    "vq_ema": Variant("VQ, 4096 codes, moving averages with restarts", "vq_ema"),
    "bsq": Variant("BSQ, 12 bits", "bsq"),
    "glfq": Variant("grouped LFQ, 2 × 6 bits", "glfq"),
    "tail_drop": Variant("FSQ, tail drop: uniform lengths", distribution="uniform"),
    "powers": Variant("FSQ, tail drop: powers of two", distribution="powers_of_two"),
    "align": Variant("FSQ + relations between images as a classifier sees them", extra={"relation": 0.05}),
    "gan": Variant("FSQ + adversarial loss from step 700", extra={"gan": 0.1}),
}


def build(variant: Variant) -> Tokenizer1D:
    """The tokenizer of a variant, with the same initial encoder and decoder wherever shapes agree."""
    quantizer: Quantizer = QUANTIZERS[variant.quantizer]()
    size: dict[str, Any] = {"width": 128, "depth": 3, "heads": 4, "patch_size": 8, "image_size": SIDE}
    torch.manual_seed(1)
    encoder = TiTokEncoder(TOKENS, quantizer.dim, **size)
    torch.manual_seed(2)
    decoder = GridDecoder(TOKENS, quantizer.code_dim, **size)
    lengths: LengthRule = TailDrop(variant.distribution) if variant.distribution else FixedLength()
    return Tokenizer1D(encoder, quantizer, decoder, lengths, (SIDE, SIDE), "comparison")


def task_of(variant: Variant, tokenizer: Tokenizer1D, steps: int) -> Any:
    """The training task of a variant."""
    weights = {**LOSSES, **variant.extra}
    if "gan" in variant.extra:
        from tok1d.training.losses.adversarial import Adversary
        from tok1d.training.losses.discriminators import PatchDiscriminator
        from tok1d.training.tasks import AdversarialTask

        adversary = Adversary(PatchDiscriminator(width=32, layers=2), start=min(700, steps // 3), lr=3e-4)
        return AdversarialTask(tokenizer, adversary=adversary, weights=weights, **RECIPE)
    if "relation" in variant.extra:
        from tok1d.training.losses.alignment import ImageRelation

        return ReconstructionTask(tokenizer, weights=weights, losses={"relation": ImageRelation(size=64)}, **RECIPE)
    return ReconstructionTask(tokenizer, weights=weights, **RECIPE)


def shrink(shards: list[str], name: str) -> Path:
    """The photos of some shards as one shard of PNGs with a shorter edge of 48 pixels, made once."""
    from PIL import Image

    path = CACHE / f"{name}-{EDGE}.tar"
    if path.is_file():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    samples, temporary = index_images(shards), path.with_suffix(".tmp")
    say(f"shrinking {len(samples)} photos")
    with tarfile.open(temporary, "w") as tar:
        for sample in samples:
            image = Image.fromarray(decode_rgb(read_sample(sample)))
            scale = EDGE / min(image.size)
            buffer = io.BytesIO()
            image.resize([round(s * scale) for s in image.size], Image.Resampling.LANCZOS).save(buffer, "PNG", compress_level=1)
            member = tarfile.TarInfo(sample[0].replace("/", "-") + ".png")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
    temporary.replace(path)
    return path


def train(variant: Variant, shard: Path, steps: int, batch: int) -> tuple[Tokenizer1D, float]:
    """The trained tokenizer (averaged weights) and the seconds it took."""
    tokenizer = build(variant)
    task = task_of(variant, tokenizer, steps)
    data = PhotoData([str(shard)], size=SIDE, area=(0.5, 1.0), batch_size=batch, workers=0, cache=True, seed=0)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        callbacks=[EMA(0.995)],
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(task, data)
    return task.tokenizer.eval(), time.perf_counter() - start


@torch.inference_mode()
def score(tokenizer: Tokenizer1D, images: Tensor, lpips: Perceptual) -> dict[str, Any]:
    """PSNR and LPIPS at every count, and how the codes are used.

    Args:
        tokenizer: trained.
        images: uint8 (V, 3, H, W).
        lpips: the distance.
    """
    counts = COUNTS if tokenizer.is_nested else (TOKENS,)
    seq = tokenizer.encode(images)
    target = images.float() / 255
    curve = []
    for k in counts:
        out = (tokenizer.decode(seq[:, :k]).clamp(0, 1) * 255).round() / 255
        error = (out - target).square().flatten(1).mean(1).double()
        pairs = zip(_twice(out).split(64), _twice(target).split(64), strict=True)
        distance = torch.cat([lpips(a, b) for a, b in pairs])
        psnr = -10 * error.log10()
        spread = {n: 1.96 * v.std().item() / len(v) ** 0.5 for n, v in (("psnr", psnr), ("lpips", distance.double()))}
        curve.append(
            {"tokens": k, "bits": k * tokenizer.bits_per_token, "psnr": psnr.mean().item(), "lpips": distance.mean().item(), "interval": spread}
        )
    ids = seq.data
    _, pooled = ids.unique(return_counts=True)
    positions = torch.stack([entropy_bits(ids[:, t].unique(return_counts=True)[1]) for t in range(ids.shape[1])])
    return {
        "curve": curve,
        "usage": len(pooled) / tokenizer.vocab_size,
        "perplexity": 2 ** entropy_bits(pooled).item(),
        "position_entropy": positions.mean().item(),
        "position_entropy_most": float(torch.tensor(float(len(ids))).log2()),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", nargs="*", help="shards or folders of training photos")
    parser.add_argument("--val", nargs="+", default=[], help="shards or folders that only measure")
    parser.add_argument("--only", help=f"variants, comma-separated; default: {','.join(VARIANTS)}")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="write the table and the plot of the results and stop")
    args = parser.parse_args(argv)

    if args.page:
        result = load("controlled_comparison", args.results) or {}
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")
        print(plot(result, FIGURES / "training_choices.png"))
        return
    train_shard, val_shard = shrink(args.train, "comparison-train"), shrink(args.val, "comparison-val")
    views = Photos(index_images([val_shard]), SIDE)
    images = torch.stack([views[i]["image"] for i in range(len(views))])
    lpips = Perceptual("vgg")
    for name in args.only.split(",") if args.only else VARIANTS:
        path = CACHE / f"comparison-{name}-{args.steps}x{args.batch}.json"
        if not path.is_file():
            say(f"{name}: {VARIANTS[name].what}")
            tokenizer, seconds = train(VARIANTS[name], train_shard, args.steps, args.batch)
            tokenizer.save_pretrained(path.with_suffix(""))
            path.write_text(json.dumps({"what": VARIANTS[name].what, "seconds": seconds, **score(tokenizer, images, lpips)}))
        row = json.loads(path.read_text())
        last = row["curve"][-1]
        say(f"{name}: {last['psnr']:.2f} dB, LPIPS {last['lpips']:.3f}, usage {row['usage']:.2f}, {row['seconds']:.0f} s")
    found = {n: json.loads(p.read_text()) for n in VARIANTS if (p := CACHE / f"comparison-{n}-{args.steps}x{args.batch}.json").is_file()}
    body = {
        "protocol": {
            "view": f"shorter edge to {EDGE} (Lanczos), then to {SIDE} (bicubic, antialias), centre crop",
            "psnr": "8-bit reconstruction, mean over images", "lpips": "LPIPS 0.1, VGG16, pictures enlarged to 64 pixels (bicubic)", "interval": "95 %, normal",
            "val_images": len(images),
        },
        "recipe": {"steps": args.steps, "batch": args.batch, "tokens": TOKENS, "bits_per_token": 12, "losses": LOSSES, **RECIPE},
        "variants": found,
    }  # fmt: skip
    print(save("controlled_comparison", body, threads=torch.get_num_threads(), folder=args.results))


def _twice(images: Tensor) -> Tensor:
    return F.interpolate(images, scale_factor=2, mode="bicubic").clamp(0, 1)


def page(text: str, result: dict[str, Any]) -> str:
    """The document with its table rewritten."""
    head, _, rest = text.partition("<!-- table -->")
    _, _, tail = rest.partition("<!-- end -->")
    return f"{head}<!-- table -->\n{table(result)}\n<!-- end -->{tail}"


def table(result: dict[str, Any]) -> str:
    """Markdown of the result file: every variant with all its tokens, nested ones also with fewer."""
    lines = ["| variant | tokens | bits | PSNR, dB | LPIPS (VGG) | codes used | entropy a position, bits |", "|---|--:|--:|--:|--:|--:|--:|"]
    for row in result.get("variants", {}).values():
        for p in reversed(row["curve"]):
            use = (f"{row['usage']:.0%}", f"{row['position_entropy']:.2f}") if p["tokens"] == TOKENS else ("", "")
            errors = p["interval"]
            lines.append(
                f"| {row['what']} | {p['tokens']} | {p['bits']} | {p['psnr']:.2f} ± {errors['psnr']:.2f} "
                f"| {p['lpips']:.3f} ± {errors['lpips']:.3f} | {use[0]} | {use[1]} |"
            )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> Path:
    """PSNR against LPIPS at all tokens, and PSNR by tokens of the variants that take fewer."""
    pyplot = require("matplotlib.pyplot", "eval")
    figure, (all_tokens, by_tokens) = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for row in result["variants"].values():
        last = row["curve"][-1]
        all_tokens.errorbar(last["lpips"], last["psnr"], last["interval"]["psnr"], last["interval"]["lpips"], "o", label=row["what"])
        if len(row["curve"]) > 1:
            by_tokens.plot([p["tokens"] for p in row["curve"]], [p["psnr"] for p in row["curve"]], "o-", label=row["what"])
    fixed = result["variants"]["fsq"]["curve"][-1]
    by_tokens.plot(fixed["tokens"], fixed["psnr"], "s", label="FSQ, every token kept in training")
    all_tokens.set(xlabel="LPIPS (VGG), lower is better", ylabel="PSNR (dB), higher is better", title=f"all {TOKENS} tokens, 192 bits")
    by_tokens.set(xlabel="tokens", xscale="log", ylabel="PSNR (dB)", title="fewer tokens")
    by_tokens.set_xticks(COUNTS, [str(k) for k in COUNTS])
    for axes in (all_tokens, by_tokens):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    main()
