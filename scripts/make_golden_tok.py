"""Write the golden files of the .tok format, version 1: tests/golden/tok_v1/*.tok and expected.json.

Run once, when a version is born. Version 1 must open for ever, so what exists is never overwritten: a change that makes the
committed files unreadable is a bug, and a new version gets a new folder.

    python scripts/make_golden_tok.py [FOLDER]
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from tok1d.tokens import Geometry, TokenSequence, bits_for_vocab
from tok1d.tokfile import pack, unpack

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "golden" / "tok_v1"
MODEL = 0x0123456789ABCDEF


def ids(rows: int, tokens: int, vocab: int) -> torch.Tensor:
    """int64 (rows, tokens) spread over [0, vocab) by multiplicative hashing; the first is 0, the last vocab - 1."""
    flat = [(i * 0x9E3779B97F4A7C15 % 2**64) * vocab >> 64 for i in range(rows * tokens)]
    flat[-1] = vocab - 1
    return torch.tensor(flat, dtype=torch.int64).view(rows, tokens)


def sequence(
    tokens: int, vocab: int, geometry: tuple[Geometry, ...] | None, rows: int = 1, nested: bool = True
) -> TokenSequence:
    return TokenSequence(ids(rows, tokens, vocab), vocab, model_id=MODEL, geometry=geometry, nested=nested)


def files() -> dict[str, bytes]:
    """File name → bytes."""
    square = (Geometry(256, 256),)
    names = [{"name": "a.png"}, {"name": "größe.jpg", "psnr": 21.5}, {}]
    several = sequence(6, 64000, (Geometry(480, 640, "crop"), Geometry(300, 200, "pad"), Geometry(1, 65535, "resize")), rows=3)
    lengths = torch.tensor([6, 1, 3])
    several = TokenSequence(several.data * (torch.arange(6) < lengths[:, None]), 64000, lengths, None, MODEL, several.geometry)
    code = (ids(1, 5 * 64, 2) ^ ids(1, 5 * 64, 7)).bitwise_and(1).to(torch.uint8).view(1, 5, 64)
    return {
        "bits12_tokens32.tok": pack(sequence(32, 4096, square)),
        "bits16_tokens256.tok": pack(sequence(256, 65536, square)),
        "bits1_tokens13.tok": pack(sequence(13, 2, None)),
        "bits62_tokens9.tok": pack(sequence(9, 2**62, square)),
        "vocab1000_fixed.tok": pack(sequence(7, 1000, square, nested=False)),
        "vocab_wide.tok": pack(sequence(5, 7**20, square)),
        "tiles2x3.tok": pack(sequence(4, 4096, (Geometry(300, 700, "tile", 2, 3),), rows=6)),
        "several_json.tok": pack(several, names),
        "codes64.tok": pack(TokenSequence(None, 2**64, bits=code, model_id=MODEL, geometry=square)),
        "frames17.tok": pack(sequence(8, 4096, square), {"fps": 8}, frames=17),
    }


def describe(data: bytes) -> dict[str, object]:
    """What a reader must find in a file."""
    records = []
    for r in unpack(data):
        g = r.geometry
        tokens = r.ids.tolist() if r.ids is not None else [["".join(map(str, t)) for t in tile] for tile in r.data.tolist()]
        records.append(
            {
                "ids" if r.ids is not None else "bits": tokens,
                "bits_per_token": bits_for_vocab(r.vocab_size),
                "vocab_size": r.vocab_size,
                "model_id": f"{r.model_id:016x}",
                "geometry": None if g is None else [g.height, g.width, g.policy, g.rows, g.cols],
                "frames": r.frames,
                "nested": r.nested,
                "meta": r.meta,
                "nbytes": r.nbytes,
                "payload_bits": r.payload_bits,
            }
        )
    return {"sha256": hashlib.sha256(data).hexdigest(), "nbytes": len(data), "records": records}


def main(folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = files()
    if taken := [name for name in [*made, "expected.json"] if (folder / name).exists()]:
        sys.exit(f"{folder} holds {', '.join(taken)} already; golden files are never overwritten. Name another folder")
    expected = {name: describe(data) for name, data in made.items()}
    for name, data in made.items():
        (folder / name).write_bytes(data)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    print(f"{len(made)} files in {folder}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
