"""Token shards drawn by formula: a row is an arithmetic progression whose step its class gives, so a generator can learn it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tok1d.data.shards import Head, Notes, id_dtype, write_shard
from tok1d.disk import atomic_write
from tok1d.generators.space import TokenSpace

SPACE = TokenSpace(tokens=16, vocab_size=64, nested=True, tokenizer="drawn", model_id="0123456789abcdef")
CLASSES = ["ones", "threes", "fives"]


def rows(count: int, space: TokenSpace = SPACE, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    """int64 (count, N) ids and their labels."""
    draw = np.random.default_rng(seed)
    label, first = np.arange(count) % len(CLASSES), draw.integers(space.vocab_size, size=count)
    return (first[:, None] + np.arange(space.tokens) * (1 + 2 * label[:, None])) % space.vocab_size, label.tolist()


def drawn(folder: Path, count: int = 96, space: TokenSpace = SPACE, classes: list[str] = CLASSES, seed: int = 0) -> Path:
    """One shard of them, in one view."""
    fields = ["label"] if classes else []
    head = Head("ids", space.to_config(), [space.tokens], ["centre"], [32, 32], [1.0, 1.0], 0, "torch.float32", classes, fields, "drawn", count, count)
    folder.mkdir(parents=True)
    atomic_write(folder / "tokens.json", head.to_json())
    ids, labels = rows(count, space, seed)
    arrays = {"ids": ids[:, None].astype(id_dtype(space.vocab_size)), "windows": np.zeros((count, 1, 5), np.int32)}
    write_shard(folder, 0, arrays, Notes([f"{i:04d}" for i in range(count)], labels, [[] for _ in range(count)]))
    return folder
