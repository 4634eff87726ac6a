"""Pictures of the report: the fixed images at every rate, the best and worst, crops of words and faces.

All come from the states that a run kept (:mod:`tok1d.eval.gallery`); names, readings and cosines from its rows. They are brought to
the size at which the page shows them and coded as WebP, so that a page stays small; tiny ones are PNG, pixel by pixel.
Shapes: pictures uint8 (n, 2, 3, S, S), crops uint8 (n, 3, h, W).
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tok1d.eval.distribution import hash_keys
from tok1d.eval.gallery import SCALE, Crops, Gallery, crop_keys
from tok1d.eval.measures import Row, State
from tok1d.eval.report_data import TITLES, Run
from tok1d.eval.report_html import details, esc, line, number, uri

ORIGINAL = "original"
PIXELATED = 64  # pixels a side; smaller pictures are shown with their pixels
QUALITY = 68  # of WebP
FIXED, THUMBNAIL, FACE = 144, 96, 96  # pixels a side of the images at every rate, of the best and worst, of faces
GAIN = 4  # of differences


def fixed(runs: Sequence[Run], count: int) -> str:
    """The same images, at most ``count``, at every rate of every system, originals first."""
    held = [(run, run.state(Gallery())) for run in runs]
    columns = [(run, str(rate["rate"]), state) for run, state in held for rate in run.rates if f"{rate['rate']}/fixed/pictures" in state]
    if not columns or not count:
        return ""
    names = _names(runs)
    originals = {int(k): p[0] for _, rate, s in reversed(columns) for k, p in zip(s[f"{rate}/fixed/keys"], s[f"{rate}/fixed/pictures"])}
    rows = []
    for key in sorted(originals)[:count]:
        name = names.get(key, "")
        cells = [f'<th scope="row">{_picture(originals[key], "original")}<span class="name" title="{esc(name)}">{esc(name)}</span></th>']
        before = None
        for run, rate, state in columns:
            at = (state[f"{rate}/fixed/keys"] == key).nonzero().flatten().tolist()
            shown = _picture(state[f"{rate}/fixed/pictures"][at[0], 1], f"{run.label} {rate}") if at else "–"
            cells.append(_next(run is not before, shown))
            before = run
        rows.append(line(*cells))
    return _shots([(run, rate) for run, rate, _ in columns], rows, ORIGINAL)


def extremes(run: Run, count: int) -> str:
    """At most ``count`` best and worst of each rate: original, reconstruction and the difference of both."""
    gallery, names = Gallery(), _names([run])
    state = run.state(gallery)
    parts = []
    for rate in run.rates:
        column = gallery.decides(rate.get("metrics", {}))
        for end in ("worst", "best"):
            side = f"{rate['rate']}/{end}"
            if column is None or not count or not len(state.get(f"{side}/keys", ())):
                continue
            figures = []
            held = zip(state[f"{side}/keys"].tolist(), state.get(f"{side}/ids", state[f"{side}/keys"]).tolist(), state[f"{side}/pictures"])
            for key, ident, pair in list(held)[:count]:
                value = abs(key) / SCALE
                a, b = _at_most(pair, THUMBNAIL)
                difference = ((a.short() - b.short()).abs() * GAIN).clamp(max=255).byte()
                image = f'<img loading="lazy" src="{_uri(torch.cat([a, b, difference], -1))}" alt="original, reconstruction, difference">'
                name = column.lstrip("-")
                said = f"{TITLES.get(name, name)} {number(value)} · {names.get(ident, '')}".rstrip(" ·")
                figures.append(f"<figure>{image}<figcaption>{esc(said)}</figcaption></figure>")
            parts.append(f"<h3>{esc(rate['rate'])}, {end}</h3><div class=\"strip\">{''.join(figures)}</div>")
    return details(f"{run.label}: best and worst of each rate (original, reconstruction, {GAIN} × difference)", "".join(parts)) if parts else ""


def words(runs: Sequence[Run], count: int) -> str:
    """Word crops, at most ``count`` of each size, with what was read in them."""

    def said(row: Row) -> str:
        read, truth = row.get("read"), row.get("truth")
        if read is None:
            return f'<span class="read">{esc(row.get("status"))}</span>'
        kind, mark = ("right", "✓") if read == truth else ("wrong", "✗")
        return f'<span class="read {kind}" title="{esc(read)}">{mark} {esc(read) or "∅"}</span>'

    return _crops(runs, Crops("text"), count, "words", "word", lambda row: f'<span class="name" title="{esc(row["id"])}">{esc(row["truth"])}</span>', said)


def faces(runs: Sequence[Run], count: int) -> str:
    """Aligned faces, at most ``count`` of each size, with their cosine to the original."""

    def said(row: Row) -> str:
        cosine = row.get("similarity")
        return f'<span class="read">{esc(row.get("status") if cosine is None else f"{cosine:.3f}")}</span>'

    return _crops(runs, Crops("faces", each=6), count, "faces", "face", lambda row: f'<span class="name" title="{esc(row["id"])}">{esc(row["id"])}</span>', said)


def _crops(runs: Sequence[Run], kept: Crops, count: int, table: str, kind: str, name, said) -> str:  # type: ignore[no-untyped-def]
    held = [(run, run.state(kept), {}) for run in runs]
    held = [(run, state, _by_key(run.rows(table), kind)) for run, state, _ in held if state]
    columns = [(run, str(r["rate"]), state, rows) for run, state, rows in held for r in run.rates if any(k.startswith(f"{r['rate']}/") for k in state)]
    if not columns or not count:
        return ""
    sides = sorted({k.rsplit("/", 2)[1] for _, _, s, _ in columns for k in s}, key=lambda b: ("small", "medium", "large", b).index(b))
    lines = []
    for label in sides:
        source = next((s for _, _, s, _ in columns if f"{ORIGINAL}/{label}/keys" in s), None)
        for i, key in enumerate(source[f"{ORIGINAL}/{label}/keys"].tolist()[:count] if source is not None else ()):
            rows = columns[0][3]
            own = rows.get((ORIGINAL, key), {"id": "", "truth": ""})
            shown = _crop(source, f"{ORIGINAL}/{label}", i, kind)  # type: ignore[arg-type]
            cells = [f'<th scope="row">{shown}{name(own)}{said(own) if kind == "word" else ""}</th><td class="text none">{esc(label)}</td>']
            before = None
            for run, rate, state, rows in columns:
                side = f"{rate}/{label}"
                at = (state[f"{side}/keys"] == key).nonzero().flatten().tolist() if f"{side}/keys" in state else []
                row = rows.get((rate, key), {})
                cells.append(_next(run is not before, (_crop(state, side, at[0], kind) if at else "") + (said(row) if row else "" if at else "–")))
                before = run
            lines.append(line(*cells, first=i == 0 and bool(lines)))
    return _shots([(run, rate) for run, rate, _, _ in columns], lines, ORIGINAL, "size") if lines else ""


def _by_key(rows: Sequence[Row], kind: str) -> dict[tuple[str, int], Row]:
    keys = crop_keys([(str(r["id"]), int(r[kind])) for r in rows]).tolist() if rows else []
    return {(str(r["rate"]), key): r for r, key in zip(rows, keys)}


def _shots(columns: Sequence[tuple[Run, str]], rows: Sequence[str], *head: str) -> str:
    """A table of pictures: a column a rate, under the names of the systems."""
    over, titles, before = "", "", None
    for run, rate in columns:
        if run is not before:
            over += f'<th colspan="{sum(r is run for r, _ in columns)}" scope="colgroup">{esc(run.label)}</th>'
        titles += f'<th scope="col"{" class=next" if run is not before else ""}>{esc(rate)}</th>'
        before = run
    first = "".join(f'<th scope="col">{esc(h)}</th>' for h in head)
    empty = "<td></td>" * len(head)
    return (
        f'<div class="box tall" tabindex="0"><table class="shots still"><thead><tr class="over">{empty}{over}</tr><tr>{first}{titles}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def grid(run: Run) -> bytes | None:
    """PNG of the fixed images: originals in the first column, then a column a rate."""
    state = run.state(Gallery())
    rates = [str(r["rate"]) for r in run.rates if f"{r['rate']}/fixed/pictures" in state]
    if not rates:
        return None
    keys = state[f"{rates[0]}/fixed/keys"].tolist()
    blank = torch.full_like(state[f"{rates[0]}/fixed/pictures"][0, 0], 255)
    lines = []
    for i, key in enumerate(keys):
        pictures = [state[f"{rates[0]}/fixed/pictures"][i, 0]]
        for rate in rates:
            at = (state[f"{rate}/fixed/keys"] == key).nonzero().flatten().tolist()
            pictures.append(state[f"{rate}/fixed/pictures"][at[0], 1] if at else blank)
        lines.append(torch.cat(pictures, -1))
    return _png(torch.cat(lines, -2))


def _names(runs: Sequence[Run]) -> dict[int, str]:
    ids = sorted({str(r["id"]) for run in runs for r in run.rows("images")})
    return dict(zip(hash_keys(ids, seed=1).tolist(), ids)) if ids else {}


def _next(first: bool, content: str) -> str:
    return f'<td{" class=next" if first else ""}>{content}</td>'


def _picture(image: Tensor, label: str) -> str:
    small = image.shape[-1] < PIXELATED
    return f'<img class="pic{" px" if small else ""}" loading="lazy" src="{_uri(_at_most(image[None], FIXED)[0])}" alt="{esc(label)}">'


def _crop(state: State, side: str, at: int, kind: str) -> str:
    crop = state[f"{side}/crops"][at][..., : int(state[f"{side}/widths"][at])]
    if kind == "face":
        crop = _at_most(crop[None], FACE)[0]
    return f'<img class="{kind}" loading="lazy" src="{_uri(crop)}" alt="{kind}">'


def _at_most(images: Tensor, side: int) -> Tensor:
    """uint8 (n, 3, S, S) → at most ``side`` pixels a side."""
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True) if images.shape[-1] > side else images


def _uri(image: Tensor) -> str:
    """uint8 (3, h, w) as a data URI."""
    from PIL import Image

    if max(image.shape[-2:]) < PIXELATED:
        return uri(_png(image))
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "WEBP", quality=QUALITY, method=6)
    return uri(buffer.getvalue(), "webp")


def _png(image: Tensor) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()
