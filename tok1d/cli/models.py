"""``tok models`` and ``tok show``: which models there are, and what one of them is. No torch for the table and our folders."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tok1d.cli.options import add_json, add_license, add_verb
from tok1d.errors import ModelError

if TYPE_CHECKING:
    from tok1d.hub import Found
    from tok1d.presets import Preset


def add_parsers(verbs: Any) -> None:
    parser = add_verb(verbs, "models", run_models, "list the models that can be loaded by name")
    parser.add_argument(
        "--filter",
        default="",
        metavar="WORD",
        help="nested (any number of tokens), fixed, continuous, research (only), free, or a word of name, family, place or description",
    )
    add_json(parser)
    parser = add_verb(verbs, "show", run_show, "print the card, the configuration and the sizes of a model")
    parser.add_argument("model", help="name (tok models; nothing is fetched), folder, weights file, or hub id owner/name")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    add_license(parser)
    add_json(parser)


def run_models(args: Namespace) -> int:
    from tok1d.hub import list_models

    found = list_models(args.filter)
    if args.json:
        for preset in found:
            print(json.dumps(row_of(preset)))
        return 0
    if not found:
        raise ModelError(f"no model matches {args.filter!r}; tok models lists all")
    rows = [("NAME", "TOKENS", "BITS/TOKEN", "SIZE", "PARAMETERS", "LICENCE", "WHERE", "DESCRIPTION")]
    for p in found:
        tokens = f"1..{p.tokens}" if p.nested else str(p.tokens)
        size = f"{p.image_size[0]}×{p.image_size[1]}"
        bits = str(p.bits_per_token) if p.bits_per_token else "latents"
        rows.append((p.name, tokens, bits, size, _short(p.parameters), _licence(p), p.where.removeprefix("hub:"), p.description))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


def run_show(args: Namespace) -> int:
    from tok1d import hub
    from tok1d.presets import PRESETS

    preset = next((p for p in PRESETS if args.model in (p.name, p.hub_id)), None)
    try:
        # A table row must not cost a download of gigabytes: what is not on this machine is described by the table.
        found = hub.find(args.model, revision=args.revision, accept_license=args.accept_license, cached=preset is not None)
    except ModelError:
        if preset is None or not preset.hub_id:
            raise
        print(json.dumps({"fetched": False, **row_of(preset)}) if args.json else _table_row(preset))
        return 0
    show(found, args.model, args.json)
    return 0


def show(found: Found, name: str, as_json: bool) -> None:
    """Print what a model on this machine is."""
    info = describe(found.path) if found.ours else describe_published(found)
    card = found.path / "README.md"
    if as_json:
        print(json.dumps({"name": name, **info, "card": card.read_text("utf-8") if card.is_file() else None}))
        return
    if card.is_file():
        print(card.read_text("utf-8").rstrip() + "\n")
    if found.preset is not None and found.preset.hub_id:
        print(_table_row(found.preset, fetched=True))
    if "family" in info:
        print(f"family      {info['family']}")
    print(f"folder      {info['folder']}")
    print(f"parameters  {info['parameters']:,} ({_short(info['parameters'])})")
    for part, count in info["parts"].items():
        print(f"  {part:<10}{count:,}")
    print(f"weights     {info['weight_bytes']:,} bytes, {', '.join(info['dtypes'])}")
    print(f"config      {json.dumps(info['config'], indent=2)}")


def describe(folder: Path) -> dict[str, Any]:
    """Configuration and sizes of a model folder of ours, read from its JSON and the header of its weights.

    Raises:
        ModelError: damaged files.
    """
    from tok1d.sources import CONFIG, OUR_WEIGHTS

    weights = folder / OUR_WEIGHTS
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
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


def describe_published(found: Found) -> dict[str, Any]:
    """The same of published weights, and their ``family``; ``config`` is ours, as it would be loaded. Imports torch.

    Raises:
        ModelError: as loading them.
    """
    from tok1d.tokenizers.official import layout_named, recognise
    from tok1d.tokenizers.official.read import read

    published = read(found.path)
    family = layout_named(found.preset.layout) if found.preset else recognise(published.shapes)
    config = family.config(published.shapes, published.config, found.name)
    parts: dict[str, int] = {}
    for key, value in published.state.items():
        part = key.partition(".")[0]
        parts[part] = parts.get(part, 0) + value.numel()
    return {
        "folder": str(found.path),
        "family": family.name,
        "parameters": sum(parts.values()),
        "parts": parts,
        "weight_bytes": sum(v.numel() * v.element_size() for v in published.state.values()),
        "dtypes": sorted({str(v.dtype).removeprefix("torch.") for v in published.state.values()}),
        "config": config,
    }


def row_of(preset: Preset) -> dict[str, Any]:
    """The table's row as plain data."""
    return {**asdict(preset), "bits_per_image": preset.bits_per_image, "url": preset.url}


def _table_row(p: Preset, fetched: bool = False) -> str:
    """What the table knows of a published model, and how to get it."""
    tokens = f"any number from 1 to {p.tokens}" if p.nested else str(p.tokens)
    each = "continuous latents" if p.continuous else f"{p.bits_per_token} bits each, {p.bits_per_image:,} bits an image"
    lines = {
        "model": f"{p.name}: {p.description}",
        "family": p.layout,
        "tokens": f"{tokens}, {each}",
        "size": f"{p.image_size[0]}×{p.image_size[1]}",
        "parameters": f"{p.parameters:,} ({_short(p.parameters)}) in {p.tensors} tensors",
        "licence": f"{_licence(p)}, {p.url}",
        "printed": ", ".join(f"{name} {value:g}" for name, value in p.printed.items()) + " (by its authors, not measured by us)" if p.printed else "",
        "where": ", ".join(w.removeprefix("hub:") for w in (p.where, *p.also)),
        "paper": p.paper,
        "code": p.code,
    }
    if not fetched:
        extra = " --accept-license" if p.research_only else ""
        lines["fetch"] = f"not on this machine; any use fetches it: tok reconstruct photo.jpg --model {p.name}{extra}"
    return "\n".join(f"{key:<12}{text}" for key, text in lines.items() if text)


def _licence(p: Preset) -> str:
    return p.licence + (" (research only)" if p.research_only else "")


def _short(count: int) -> str:
    """12_345_678 → ``12.3 M``."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return str(count)
