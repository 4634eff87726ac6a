"""Rows of manifests: a sample as plain data and back, and the two files that hold them, JSONL and Parquet.

What is written by hand is checked field by field; messages say what is wrong with which word or face, and in which line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tok1d.errors import TokError
from tok1d.eval.manifest import Face, Point, Sample, Word, word
from tok1d.extras import require

Rows = list[tuple[int, dict[str, Any]]]  # with the number of their line
WORD_FIELDS = tuple(f.name for f in fields(Word))
FACE_FIELDS = tuple(f.name for f in fields(Face))


def to_row(sample: Sample) -> dict[str, Any]:
    """Plain data without empty fields."""
    row = {k: v for k, v in asdict(sample).items() if v not in (0, "", (), None)}
    for field in ("words", "faces"):
        if field in row:
            row[field] = [{k: _floats(v) for k, v in item.items() if v not in ((), None)} for item in row[field]]
    return row


def _floats(value: Any) -> Any:
    """Coordinates as floats, so that 1 and 1.0 are one row and one hash."""
    if isinstance(value, list | tuple):
        return [_floats(v) for v in value]
    return float(value) if isinstance(value, int | float) else value


def to_sample(row: dict[str, Any]) -> Sample:
    """Plain data → sample.

    Raises:
        ValueError: an unknown, missing or wrong field, named.
    """
    _known(row, Sample.__dataclass_fields__, "")
    texts = {k: _text(row[k], k) for k in ("id", "path", "group", "split", "sha256") if k in row}
    for name in ("id", "path"):
        if not texts.get(name):
            raise ValueError(f"{name} is missing")
    numbers = {k: _natural(row[k], k) for k in ("width", "height", "offset", "size") if k in row}
    width, height = numbers.get("width", 0), numbers.get("height", 0)
    if (width == 0) != (height == 0):
        raise ValueError(f"give both width and height or neither, got {width} and {height}")
    words = tuple(_word(item, width, height, f"words[{i}]") for i, item in enumerate(_list(row.get("words", []), "words")))
    faces = tuple(_face(item, width, height, f"faces[{i}]") for i, item in enumerate(_list(row.get("faces", []), "faces")))
    return Sample(**texts, **numbers, words=words, faces=faces, tags=_tags(row, ""))  # type: ignore[arg-type]


def _word(item: Any, width: int, height: int, where: str) -> Word:
    _known(item, WORD_FIELDS, where)
    if "value" not in item:
        raise ValueError(f"{where} has no value (what is written there)")
    box, value = _box(item.get("box"), f"{where}.box"), _text(item["value"], f"{where}.value")
    poly = None if item.get("poly") is None else _points(item["poly"], f"{where}.poly")
    if "scale" in item:
        return Word(box, value, _scale(item["scale"], where), poly, _tags(item, where))
    if not width:
        raise ValueError(f"{where} has no scale; it follows from the width and height of the image, which are missing, too")
    return Word(box, value, word(box, value, width, height).scale, poly, _tags(item, where))


def _face(item: Any, width: int, height: int, where: str) -> Face:
    _known(item, FACE_FIELDS, where)
    if "kps" not in item:
        raise ValueError(f"{where} has no kps (five landmarks); tok eval annotate finds them")
    kps = _points(item["kps"], f"{where}.kps")
    if len(kps) != 5:
        raise ValueError(f"{where} needs 5 landmarks (eyes, nose, corners of the mouth), got {len(kps)}")
    box = None if item.get("box") is None else _box(item["box"], f"{where}.box")
    person = None if item.get("person") is None else _text(item["person"], f"{where}.person")
    if "scale" in item:
        return Face(kps, _scale(item["scale"], where), box, person)
    if box is None or not width:
        raise ValueError(f"{where} has no scale; it follows from a box and the width and height of the image, of which one is missing")
    return Face(kps, max(box[2] - box[0], box[3] - box[1]) / max(width, height), box, person)


def _known(item: Any, names: Any, where: str) -> None:
    if not isinstance(item, dict):
        raise ValueError(f"{where} should be a JSON object, got {str(item)[:60]}")
    unknown = sorted(set(item) - set(names))
    if unknown:
        raise ValueError(f"{where + ' has ' if where else ''}unknown fields {', '.join(map(str, unknown))}; there are {', '.join(names)}")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} should be text, got {str(value)[:60]}")
    return value


def _natural(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise ValueError(f"{name} should be a whole number of at least 0, got {str(value)[:60]}")
    return value


def number(value: Any, name: str) -> float:
    """A finite number.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e9 <= value <= 1e9:  # NaN fails, too
        raise ValueError(f"{name} should be a finite number, got {str(value)[:60]}")
    return float(value)


def _scale(value: Any, where: str) -> float:
    scale = number(value, f"{where}.scale")
    if scale < 0:
        raise ValueError(f"{where}.scale should be at least 0, got {scale}")
    return scale


def _list(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} should be a list, got {str(value)[:60]}")
    return value


def _tags(item: dict[str, Any], where: str) -> tuple[str, ...]:
    name = f"{where}.tags" if where else "tags"
    return tuple(_text(tag, name) for tag in _list(item.get("tags", []), name))


def _box(value: Any, name: str) -> tuple[float, float, float, float]:
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f"{name} should be [x0, y0, x1, y1], got {str(value)[:60]}")
    x0, y0, x1, y1 = (number(v, name) for v in value)
    return x0, y0, x1, y1


def _points(value: Any, name: str) -> tuple[Point, ...]:
    if not all(isinstance(p, list) and len(p) == 2 for p in _list(value, name)):
        raise ValueError(f"{name} should be a list of [x, y], got {str(value)[:60]}")
    return tuple((number(x, name), number(y, name)) for x, y in value)


# files -----------------------------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> str:
    """A row as JSON that can be encoded: as it is read best, escaped where a file's name is not UTF-8."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(row)
    return text


def read_jsonl(path: Path) -> tuple[dict[str, Any], Rows]:
    """Header and rows of a JSONL file; empty lines are skipped.

    Raises:
        TokError: missing, or a line that is not a JSON object.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TokError(f"{path}: cannot be read ({error})") from error
    rows: Rows = []
    for at, content in enumerate(text.split("\n"), 1):  # not splitlines: a word may hold U+2028
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise TokError(f"{path}: line {at} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise TokError(f"{path}: line {at} is not a JSON object")
        rows.append((at, row))
    if not rows:
        raise TokError(f"{path}: an empty manifest")
    return rows[0][1], rows[1:]


def read_parquet(path: Path) -> tuple[dict[str, Any], Rows]:
    """Header and rows of a Parquet file.

    Raises:
        TokError: missing, damaged, or not a manifest.
    """
    pa, parquet = require("pyarrow", "eval"), require("pyarrow.parquet", "eval")
    try:
        table = parquet.read_table(path)
        head = json.loads((table.schema.metadata or {})[b"tok1d"])
        rows = [(at, json.loads(row)) for at, row in enumerate(table.column("row").to_pylist(), 1)]
    except (OSError, KeyError, TypeError, ValueError, RecursionError, pa.ArrowException) as error:
        raise TokError(f"{path}: not a manifest in Parquet ({error})") from error
    return head, rows


def parquet_bytes(head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bytes:
    """A Parquet file with columns ``id`` and ``row`` (JSON), and the header in its metadata."""
    pa, parquet = require("pyarrow", "eval"), require("pyarrow.parquet", "eval")
    columns = {"id": [r["id"].encode("utf-8", "replace").decode() for r in rows], "row": [line(r) for r in rows]}
    table = pa.table(columns, schema=pa.schema([("id", pa.string()), ("row", pa.string())]))
    sink = pa.BufferOutputStream()
    parquet.write_table(table.replace_schema_metadata({"tok1d": json.dumps(head)}), sink)
    return bytes(sink.getvalue().to_pybytes())
