"""Peak memory that vector quantization takes beyond what it is given: every option, forward alone and training steps.

    python -m benchmarks.vq_memory                      # 256 × 64 tokens over 65,536 codes
    python -m benchmarks.vq_memory --dim 64 --cases vq vq_ema

Each case is a process of its own and weighed twice: the most that tensors hold at a time beyond quantizer and latents, by
torch's profiler, and peak resident memory less what is resident before the first call, which counts everything but also
depends on what the system does with other processes. Gradients, of latents and codebook, are part of both. A table of all
scores would be 4 GiB. The limit, 300 MiB at width 16, decides the exit status. Results: benchmarks/results/vq_memory.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, run, save, say

CODES, IMAGES, TOKENS, LIMIT_MIB = 65_536, 256, 64, 300

# name → class, arguments, whether it is a training step. Two stages or scales of the full number of tokens are two searches.
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "vq_encode": ("vq.VQ", {}, False),
    "vq": ("vq.VQ", {}, True),
    "vq_l2": ("vq.VQ", {"l2": True}, True),
    "vq_drawn": ("vq.VQ", {"l2": True, "temperature": 0.03}, True),
    "vq_rotation": ("vq.VQ", {"rotation": True}, True),
    "vq_ema": ("vq.VQ", {"ema": True}, True),
    "vq_restart": ("vq.VQ", {"ema": True, "ema_decay": 0.5, "dead_code_threshold": 0.9}, True),  # most codes, at once
    "vq_kmeans": ("vq.VQ", {"kmeans_iterations": 1}, True),
    "vq_clustering": ("vq.VQ", {"clustering": True}, True),
    "simvq": ("simvq.SimVQ", {}, True),
    "dual": ("dual.DualVQ", {}, True),
    "residual": ("residual.ResidualVQ", {"stages": 2}, True),
    "growing": ("growing_scale.GrowingScaleVQ", {"scales": [1, 8, 64]}, True),
    "ibq": ("ibq.IBQ", {"entropy": 0.0}, True),
    "ibq_entropy": ("ibq.IBQ", {}, True),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--images", type=int, default=IMAGES, help=f"of {TOKENS} tokens each")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help="weigh this process, one case after another, and print JSON")
    args = parser.parse_args(argv)
    if args.here:
        print(json.dumps([weigh(name, args.images, args.dim) for name in args.cases]))
        return
    rows = []
    for name in args.cases:
        command = [sys.executable, "-m", "benchmarks.vq_memory", "--here", "--cases", name]
        rows += json.loads(run([*command, f"--images={args.images}", f"--dim={args.dim}"]).output)
        say("{case}: tensors {tensors_mib:.0f} MiB, process {resident_mib:.0f} MiB, {cpu_seconds:.1f} CPU seconds".format(**rows[-1]))
    body = {
        "protocol": "first call, one process a case, 1 thread: most MiB of tensors at a time (torch profiler), and peak less "
        "earlier resident memory of the process; processor time, so that other programs do not count",
        "images": args.images, "tokens": TOKENS, "codes": CODES, "dim": args.dim,
        "all_scores_mib": args.images * TOKENS * CODES * 4 / 2**20,
        "cases": rows,
    }
    name = "vq_memory" if args.dim == 16 else f"vq_memory_{args.dim}"
    print(save(name, body, threads=1, folder=args.results))
    over = [row["case"] for row in rows if max(row["tensors_mib"], row["resident_mib"]) > LIMIT_MIB]
    if args.dim == 16 and over:
        raise SystemExit(f"over {LIMIT_MIB} MiB: {', '.join(over)}")


def weigh(name: str, images: int, dim: int) -> dict[str, Any]:
    """Build a case in this process, call it and say what that took at most."""
    import torch

    torch.set_num_threads(1)
    quantizer, z = build(name, images, dim)
    (torch.randn(64, 64, requires_grad=True) @ torch.randn(64, 64)).sum().backward()  # autograd and the library behind @ start up
    before, start = _resident(), time.process_time()
    call(quantizer, z)
    seconds, resident = time.process_time() - start, _peak() - before
    row = {"case": name, "training": quantizer.training, "resident_mib": round(resident, 1), "cpu_seconds": round(seconds, 2)}
    del quantizer, z
    return {**row, "tensors_mib": round(tensors_mib(name, images, dim), 1)}


def build(name: str, images: int, dim: int) -> tuple[Any, Any]:
    """Quantizer and latents of a case."""
    import torch

    from tok1d.tokenizers.part import Quantizer, build_part

    torch.manual_seed(0)
    kind, arguments, training = CASES[name]
    sizes: dict[str, int] = {"vocab_size": CODES, "dim": dim}
    if name == "residual":
        sizes = {"codes": CODES, "dim": dim}
    elif name == "dual":
        sizes = {"vocab_size": CODES, "semantic_dim": dim - dim // 4, "pixel_dim": dim // 4}
    quantizer = build_part({"class": f"tok1d.tokenizers.quantizers.{kind}", **sizes, **arguments}, Quantizer)
    return quantizer.train(training), torch.randn(images, TOKENS, dim, requires_grad=training)


def call(quantizer: Any, z: Any) -> None:
    """Quantize; in training mode also back."""
    import torch

    with torch.set_grad_enabled(quantizer.training):
        out = quantizer(z)
        if quantizer.training:
            (out.q.square().mean() + sum(out.losses.values())).backward()


def tensors_mib(name: str, images: int, dim: int) -> float:
    """The most MiB that the tensors of one call hold at a time, by the allocations torch reports."""
    from torch.profiler import ProfilerActivity, profile

    quantizer, z = build(name, images, dim)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call(quantizer, z)
    changes = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert changes, "the profiler of this version of torch reports no allocations"
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def _resident() -> float:
    """MiB of this process that are in memory now; where the system does not say, the most there ever were."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return _peak()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
