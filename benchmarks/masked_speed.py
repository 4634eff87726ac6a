"""Masked generation with one batched forward a guided step beside the plain sampler, which takes two.

Both run the same weights. The plain one works as published samplers do: a forward with the condition and one without, logits of all
places from both, Gumbel noise for every id of every place. Ours: one forward of twice the rows (of the rows alone where a schedule
leaves guidance out), guidance of states, logits and choices of masked places alone, one random number a choice. At temperature 0
both must make the same tokens.

    python -m benchmarks.masked_speed
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import RESULTS, save, say
from tok1d.generators.condition import ClassCondition
from tok1d.generators.guidance import combine, strengths
from tok1d.generators.masked import MaskedGenerator
from tok1d.generators.masked_bert import BertBody
from tok1d.generators.masked_body import MaskedBody, TrunkBody
from tok1d.generators.masked_uvit import UViTBody
from tok1d.generators.space import TokenSpace

BODIES: dict[str, type[MaskedBody]] = {"trunk": TrunkBody, "bert": BertBody, "uvit": UViTBody}
TEMPERATURE, GUIDANCE = 4.5, 4.0


def build(body: str, width: int, depth: int, tokens: int, vocab: int) -> MaskedGenerator:
    """Random weights with a head that is not zero, so that tokens depend on the states."""
    torch.manual_seed(0)
    network = BODIES[body](width=width, depth=depth, heads=max(1, width // 64))
    model = MaskedGenerator(TokenSpace(tokens=tokens, vocab_size=vocab), ClassCondition(1000), network)
    torch.nn.init.normal_(model.body.head.weight, std=width**-0.5)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def plain(model: MaskedGenerator, label: Tensor, steps: int, schedule: str, temperature: float, draw: torch.Generator) -> Tensor:
    """int64 (B, N) ids by two forwards a step."""
    rows, tokens, mask = len(label), model.space.tokens, model.space.vocab_size
    ids = torch.full((rows, tokens), mask)
    for step, g in enumerate(strengths(GUIDANCE, schedule, steps)):
        ratio = (step + 1) / steps
        logits = model.body.head(model.body(ids, model.condition({"label": label}, rows)))
        if g != 1:
            logits = combine(logits, model.body.head(model.body(ids, model.condition.null(rows))), g)
        heat = temperature * (1 - ratio)
        noisy = logits + heat * -torch.log(-torch.log(torch.rand(logits.shape, generator=draw).clamp_(1e-20, 1 - 1e-7)))
        drawn = noisy.argmax(-1)
        hidden = ids == mask
        sure = logits.gather(-1, drawn[..., None]).squeeze(-1).masked_fill(~hidden, math.inf)
        sure = sure + heat * -torch.log(-torch.log(torch.rand(sure.shape, generator=draw).clamp_(1e-20, 1 - 1e-7)))
        ids = torch.where(hidden, drawn, ids)
        if step + 1 < steps:
            left = math.floor(tokens * math.acos(ratio) / (math.pi / 2))
            left = max(1, min(int(hidden[0].sum()) - 1, left))
            ids = ids.masked_fill(sure <= sure.sort(-1).values[:, left - 1 : left], mask)
    return ids


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Of a clock on the wall, and of the processor (what a quiet machine would take, times its threads)."""
    start = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def measure(model: MaskedGenerator, batch: int, steps: int, schedule: str, repeats: int) -> dict[str, Any]:
    """Seconds of both and their ratio for one batch size."""
    label, draw = torch.arange(batch), torch.Generator().manual_seed(0)
    options = {"label": label, "steps": steps, "guidance": GUIDANCE, "schedule": schedule}
    ours, wanted = model.generate(batch, temperature=0.0, **options).ids, plain(model, label, steps, schedule, 0.0, draw)
    same = (ours == wanted).double().mean().item()
    if same < 0.99:  # rounding may tip a choice, and what follows from it
        raise SystemExit(f"batch {batch}: only {same:.2%} of the tokens are those of the plain sampler")
    found: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
    for _ in range(repeats):  # in turns: a machine's speed drifts
        found["plain"].append(seconds(lambda: plain(model, label, steps, schedule, TEMPERATURE, draw)))
        found["ours"].append(seconds(lambda: model.generate(batch, temperature=TEMPERATURE, **options)))
    row: dict[str, Any] = {"batch": batch, "schedule": schedule, "steps": steps, "same_tokens": same, "repeats": repeats}
    for i, clock in enumerate(("wall", "cpu")):
        both = {name: statistics.median(pair[i] for pair in pairs) for name, pairs in found.items()}
        row |= {f"{name}_{clock}_s": round(value, 3) for name, value in both.items()}
        row["ratio"] = round(both["plain"] / both["ours"], 2)  # of the last, the processor: a busy machine's wall clock says little
    say(
        f"batch {batch}  {schedule:16s} seconds of the processor: ours {row['ours_cpu_s']:6.2f}, plain {row['plain_cpu_s']:6.2f}  "
        f"× {row['ratio']:.2f}, {same:.2%} of tokens equal"
    )
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--body", choices=BODIES, default="trunk")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batches", default="1,8", help="comma-separated (default: 1,8)")
    parser.add_argument("--schedules", default="constant,linear", help="comma-separated (default: constant,linear)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, in turns; medians count")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write masked_speed.json in")
    args = parser.parse_args(argv)
    model = build(args.body, args.width, args.depth, args.tokens, args.vocab)
    rows = [
        measure(model, batch, args.steps, schedule, args.repeats)
        for batch in map(int, args.batches.split(","))
        for schedule in args.schedules.split(",")
    ]
    body: dict[str, Any] = {"body": args.body, "width": args.width, "depth": args.depth, "tokens": args.tokens, "vocab": args.vocab}
    body |= {"parameters": sum(p.numel() for p in model.parameters()), "dtype": "float32", "guidance": GUIDANCE, "rows": rows}
    save("masked_speed", body, threads=torch.get_num_threads(), folder=args.out)


if __name__ == "__main__":
    main()
