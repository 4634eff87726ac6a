"""Autoregressive sampling with a cache beside the plain sampler that computes the whole prefix again for every token.

Both run the same weights, guided in one batch of twice the rows, and choose with the same numbers; the plain one keeps nothing
between tokens, as several published samplers do. Tokens must be the same (up to a rare tip by rounding), states within 1e-4.

    python -m benchmarks.generator_speed
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import RESULTS, save, say
from tok1d.generators.ar import AutoregressiveGenerator
from tok1d.generators.cache import KVCache
from tok1d.generators.condition import ClassCondition
from tok1d.generators.sampling import uniforms
from tok1d.generators.space import TokenSpace

GUIDANCE = 3.0
TOLERANCE = 1e-4  # of states after the last norm, which are about 1


def build(width: int, depth: int, tokens: int, vocab: int) -> AutoregressiveGenerator:
    """Random weights with a head that is not zero, so that tokens depend on the states."""
    torch.manual_seed(0)
    model = AutoregressiveGenerator(TokenSpace(tokens=tokens, vocab_size=vocab, nested=True), ClassCondition(1000), width, depth)
    torch.nn.init.normal_(model.head.out.weight, std=width**-0.5)
    return model.eval().requires_grad_(False)


def plain_step(model: AutoregressiveGenerator, data: Tensor, label: Tensor, i: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Token i from those before it, all of which are computed again: int64 (B,) and the states (2B, W) it comes from."""
    rows = len(data)
    given = model.condition({"label": label}, rows).join(model.condition.null(rows))
    states = model.states(given, data[:, : i + 1].repeat(2, 1))[:, i]
    return model.head.sample(states, uniform[:, i, :-1], GUIDANCE), states


@torch.inference_mode()
def cached_states(model: AutoregressiveGenerator, data: Tensor, label: Tensor) -> Tensor:
    """States (2B, N, W) that the cache gives for tokens (B, N), one position at a time."""
    rows = len(data)
    given = model.condition({"label": label}, rows).join(model.condition.null(rows))
    start = model.start.expand(2 * rows, 1, -1)
    cache = model.trunk.cache(2 * rows)
    found = [model.trunk(torch.cat([given.tokens, start], 1), causal=True, cache=cache)[:, -1:]]
    x = model.head.embed(data).repeat(2, 1, 1)
    found += [model.trunk(x[:, i : i + 1], causal=True, cache=cache) for i in range(data.shape[1] - 1)]
    return torch.cat(found, 1)


@torch.inference_mode()
def measure(model: AutoregressiveGenerator, batch: int, repeats: int, stride: int) -> dict[str, Any]:
    """Seconds and ratio for one batch size; the plain sampler is timed at every ``stride``-th token."""
    tokens, label = model.space.tokens, torch.arange(batch)
    model.generate(batch, label=label, tokens=min(4, tokens), guidance=GUIDANCE)  # warm
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        made = model.generate(batch, label=label, guidance=GUIDANCE)
        times.append(time.perf_counter() - start)
    uniform = uniforms(range(batch), tokens, model.head.draws + 1)
    expected, timed = cached_states(model, made.ids, label), range(stride - 1, tokens, stride)
    plain, error, same = 0.0, 0.0, 0
    plain_step(model, made.ids, label, min(3, tokens - 1), uniform)  # warm
    for i in timed:
        start = time.perf_counter()
        token, states = plain_step(model, made.ids, label, i, uniform)
        plain += time.perf_counter() - start
        error = max(error, (states - expected[:, i]).abs().max().item())
        same += int((token == made.ids[:, i]).sum())
    plain *= tokens / len(timed)
    cached = statistics.median(times)
    trunk = model.trunk
    cache = trunk.cache(2 * batch, model.condition.places + tokens)
    shape = (trunk.depth, 2 * batch, trunk.heads, cache.places, trunk.width // trunk.heads)
    row: dict[str, Any] = {"batch": batch, "tokens": tokens, "cached_s": round(cached, 3), "plain_s": round(plain, 3)}
    row |= {"ratio": round(plain / cached, 2), "cached_tokens_per_s": round(batch * tokens / cached, 1), "max_error": error}
    row |= {"same_tokens": same / (batch * len(timed)), "plain_tokens_timed": len(timed), "repeats": repeats}
    row |= {"cache_bytes": cache.bytes, "cache_bytes_predicted": KVCache.predicted_bytes(*shape)}
    say(
        f"batch {batch}  cached {cached:8.2f} s  plain {plain:8.2f} s  × {plain / cached:.1f}, states within {error:.1e}, "
        f"{row['same_tokens']:.2%} of tokens equal, cache {cache.bytes / 2**20:.1f} MiB as predicted"
    )
    if not error <= TOLERANCE or row["same_tokens"] < 0.99:
        raise SystemExit(f"batch {batch}: the samplers differ (states by {error:.2g}, {row['same_tokens']:.2%} of tokens equal)")
    if row["cache_bytes"] != row["cache_bytes_predicted"]:
        raise SystemExit(f"the cache takes {row['cache_bytes']} bytes, {row['cache_bytes_predicted']} were predicted")
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batches", default="1,8", help="comma-separated (default: 1,8)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of the cached sampler; the median counts")
    parser.add_argument("--stride", type=int, default=4, help="time the plain sampler at every so-many-th token above batch 1")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write generator_speed.json in")
    args = parser.parse_args(argv)
    model = build(args.width, args.depth, args.tokens, args.vocab)
    weights = sum(p.numel() for p in model.parameters())
    rows = [measure(model, b, args.repeats, 1 if b == 1 else min(args.stride, args.tokens)) for b in map(int, args.batches.split(","))]
    body = {"width": args.width, "depth": args.depth, "vocab": args.vocab, "parameters": weights, "dtype": "float32"}
    body |= {"guidance": GUIDANCE, "tolerance": TOLERANCE, "rows": rows}
    save("generator_speed", body, threads=torch.get_num_threads(), folder=args.out)


if __name__ == "__main__":
    main()
