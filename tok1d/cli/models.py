"""``tok models`` and ``tok show``: which models there are, and what one of them is. Imports no torch."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tok1d.cli.options import add_json, add_verb
from tok1d.errors import ModelError


def add_parsers(verbs: Any) -> None:
    parser = add_verb(verbs, "models", run_models, "list the models that can be loaded by name")
    parser.add_argument("--filter", default="", metavar="WORD", help="nested (any number of tokens), fixed, or a word of name or description")
    add_json(parser)
    parser = add_verb(verbs, "show", run_show, "print the card, the configuration and the sizes of a model")
    parser.add_argument("model", help="name (tok models), folder, or hub id owner/name")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    add_json(parser)


def run_models(args: Namespace) -> int:
    from tok1d.hub import list_models

    found = list_models(args.filter)
    if args.json:
        for preset in found:
            print(json.dumps(asdict(preset)))
        return 0
    if not found:
        raise ModelError(f"no model matches {args.filter!r}; tok models lists all")
    rows = [("NAME", "TOKENS", "BITS/TOKEN", "SIZE", "PARAMETERS", "LICENCE", "WHERE", "DESCRIPTION")]
    for p in found:
        tokens = f"1..{p.tokens}" if p.nested else str(p.tokens)
        size = f"{p.image_size[0]}×{p.image_size[1]}"
        rows.append((p.name, tokens, str(p.bits_per_token), size, _short(p.parameters), p.licence, p.where, p.description))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


def run_show(args: Namespace) -> int:
    from tok1d import hub

    folder = hub.resolve(args.model, revision=args.revision)
    info = describe(folder)
    card = folder / "README.md"
    if args.json:
        print(json.dumps({"name": args.model, **info, "card": card.read_text("utf-8") if card.is_file() else None}))
        return 0
    if card.is_file():
        print(card.read_text("utf-8").rstrip() + "\n")
    print(f"folder      {folder}")
    print(f"parameters  {info['parameters']:,} ({_short(info['parameters'])})")
    for part, count in info["parts"].items():
        print(f"  {part:<10}{count:,}")
    print(f"weights     {info['weight_bytes']:,} bytes, {', '.join(info['dtypes'])}")
    print(f"config      {json.dumps(info['config'], indent=2)}")
    return 0


def describe(folder: Path) -> dict[str, Any]:
    """Configuration and sizes of a model folder, read from its JSON and the header of its weights.

    Raises:
        ModelError: damaged files.
    """
    from tok1d.hub import FILES

    weights = folder / FILES[1]
    try:
        config = json.loads((folder / FILES[0]).read_text("utf-8"))
        size = weights.stat().st_size
        with open(weights, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(size, 100_000_000):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        parts: dict[str, int] = {}
        dtypes = set()
        for key, entry in header.items():
            if key != "__metadata__":
                count = 1
                for n in entry["shape"]:
                    count *= n
                part = key.partition(".")[0]
                parts[part] = parts.get(part, 0) + count
                dtypes.add(entry["dtype"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}: cannot be read ({error}); copy or download the model again") from error
    total = sum(parts.values())
    return {"folder": str(folder), "parameters": total, "parts": parts, "weight_bytes": size, "dtypes": sorted(dtypes), "config": config}


def _short(count: int) -> str:
    """12_345_678 → ``12.3 M``."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return str(count)
