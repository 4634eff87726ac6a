"""Write the table of published models in docs/models.md from the rows of tok1d/presets.py.

    python scripts/model_table.py            rewrite the table
    python scripts/model_table.py --check    exit 1 if the document says anything else
"""

from __future__ import annotations

import sys
from pathlib import Path

from tok1d.presets import PRESETS, Preset

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "models.md"
START, END = "<!-- table models -->", "<!-- end -->"


def line(p: Preset) -> str:
    tokens = f"1..{p.tokens}" if p.nested else str(p.tokens)
    bits = "continuous" if p.continuous else f"{p.tokens * p.bits_per_token:,}"
    printed = ", ".join(f"{name} {value:g}" for name, value in p.printed.items()) or "–"
    where = "ships with tok1d" if p.where == "package" else p.where.removeprefix("hub:")
    count = f"{p.parameters / 1e6:.1f} M" if p.parameters < 1e9 else f"{p.parameters / 1e9:.2f} G"
    return f"| `{p.name}` | {p.layout} | {tokens} | {bits} | {count} | {p.licence} | {where} | {printed} |"


def table() -> str:
    head = [
        "| name | layout | tokens | bits per image | parameters | licence of the weights | where | printed by its paper |",
        "| --- | --- | ---: | ---: | ---: | --- | --- | --- |",
    ]
    return "\n".join([*head, *map(line, PRESETS)])


def main(check: bool) -> int:
    text = DOCUMENT.read_text("utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    made = f"{before}{START}\n{table()}\n{END}{after}"
    if check:
        return int(made != text)
    DOCUMENT.write_text(made, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
