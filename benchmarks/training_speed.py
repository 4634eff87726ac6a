"""Training images/s of TiTok S and B beside what the loader makes, and the share of the machine's matrix products that is used.

    python -m benchmarks.training_speed PHOTOS.tar --sizes S,B --batch 4 --steps 6
    python -m benchmarks.training_speed PHOTOS.tar --accelerator gpu --precision bf16-mixed --batch 64 --steps 30 --workers 12

A step is a whole one of ``tok fit``: crops of photos, forward, L2 (and ``--lpips``), backward, clipping, AdamW, averaged weights. Products are
counted by torch's FLOP counter over one such step; the rate they are compared with is that of a large square product in the same
precision, measured in the same run. Results: benchmarks/results/training_speed_ACCELERATOR.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import RESULTS, save, say
from tok1d.data.module import PhotoData
from tok1d.extras import require
from tok1d.tokenizers.decoders.grid import GridDecoder
from tok1d.tokenizers.encoders.titok import TiTokEncoder
from tok1d.tokenizers.quantizers.vq import VQ
from tok1d.tokenizers.tokenizer import Tokenizer1D
from tok1d.training.averaging import EMA
from tok1d.training.callbacks import Throughput
from tok1d.training.tasks import ReconstructionTask

lightning = require("lightning", "train")
SIZES = {"S": (512, 8, 128), "B": (768, 12, 64)}  # width, depth, tokens


class Steps(lightning.Callback):
    """Seconds from batch to batch, after ``warm`` of them."""

    def __init__(self, warm: int) -> None:
        self.warm, self.seconds, self._last = warm, [], 0.0

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        if task.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if batch_idx >= self.warm:
            self.seconds.append(now - self._last)
        self._last = now


def tokenizer(size: str) -> Tokenizer1D:
    """TiTok with VQ and pixels, 256 × 256."""
    width, depth, tokens = SIZES[size]
    parts: dict[str, Any] = {"width": width, "depth": depth}
    return Tokenizer1D(TiTokEncoder(tokens, 64, **parts), VQ(8192, 64), GridDecoder(tokens, 64, **parts), name=f"titok-{size}")


def product_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a square matrix product, the best of five."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def step_flops(task: ReconstructionTask, batch: int) -> int:
    """Products of one training step of so many images, forward and backward."""
    images = torch.rand(batch, 3, 256, 256)
    with FlopCounterMode(display=False) as counter:
        out = task.tokenizer(images)
        (out.reconstruction - images).square().mean().backward()
    task.zero_grad()
    return counter.get_total_flops()


def timed(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the result."""
    say(f"TiTok-{size}")
    weights = {"l2": 1.0} | ({"lpips_vgg": 1.0} if args.lpips else {})
    task = ReconstructionTask(tokenizer(size), weights=weights, warmup_steps=2)
    flops = step_flops(task, 1)
    data = PhotoData(args.data, size=256, batch_size=args.batch, workers=args.workers)
    steps, rates = Steps(warm=2), Throughput(every=10**6, probe=4)
    trainer = lightning.Trainer(
        accelerator=args.accelerator, devices=1, precision=args.precision, max_steps=args.steps + 2, gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[EMA(), rates, steps],
    )  # fmt: skip
    trainer.fit(task, data)
    median = sorted(steps.seconds)[len(steps.seconds) // 2]
    rate = args.batch / median
    peak = product_rate(task.device, torch.bfloat16 if "bf16" in args.precision else torch.float32)
    row = {
        "size": size, "parameters": sum(p.numel() for p in task.tokenizer.parameters()), "batch": args.batch, "workers": args.workers,
        "lpips": args.lpips, "images_per_second": rate, "loader_images_per_second": rates.loader_rate, "gflop_an_image": flops / 1e9,
        "product_gflops": peak / 1e9, "share_of_products": None if args.lpips else flops * rate / peak,
    }  # fmt: skip
    say(f"{rate:.2f} images/s, loader {rates.loader_rate or 0:.1f} images/s, {flops * rate / peak:.0%} of {peak / 1e9:.0f} GFLOP/s")
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="shards or folders of photos")
    parser.add_argument("--sizes", default="S,B")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--lpips", action="store_true", help="with the loss that recipes of pixels have")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    rows = [timed(size, args) for size in args.sizes.split(",")]
    body = {"precision": args.precision, "accelerator": args.accelerator, "rows": rows}
    print(save(f"training_speed_{args.accelerator}", body, threads=torch.get_num_threads(), folder=args.results))


if __name__ == "__main__":
    main()
