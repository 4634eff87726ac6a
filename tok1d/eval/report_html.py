"""Pieces of HTML for the report: everything that comes from outside is escaped, numbers keep their full value beside the rounded one.

The page stands alone: style and script are inline, images are data URIs, nothing is loaded. It reads without its script, which only
sorts tables.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # not allowed in HTML


def esc(text: object) -> str:
    """Text for elements and quoted attributes; characters that HTML does not allow become �.

    Example:
        >>> esc('<b id="x">')
        '&lt;b id=&quot;x&quot;&gt;'
    """
    return html.escape(_CONTROL.sub("\ufffd", str(text)), quote=True)


@dataclass(frozen=True)
class Value:
    """A number of the summaries.

    Attributes:
        mean: None where there is nothing to average.
        low, high: 95 % interval, None if there is none.
        n: how many it covers, None if that does not apply.
        unit: what ``n`` counts.
        extra: shown below the number.
    """

    mean: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = "images"
    extra: str = ""


def number(value: float, style: str = "g") -> str:
    """For people: four digits (``g``), a share as per cent (``%``), or a whole number (``d``).

    Example:
        >>> number(0.0123), number(123456.7), number(12.0), number(1234, "d")
        ('0.01230', '123,457', '12', '1,234')
    """
    if style == "%":
        return f"{100 * value:.1f}\u00a0%"
    if style == "d" or abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}".replace("-", "−")
    shown = f"{value:#.4g}".rstrip(".")
    return shown.replace("-", "−", 1) if value < 0 else shown


def cell(value: Value | None, style: str = "g", *, missing: str = "–", count: bool = False) -> str:
    """A table cell: the number, below it its interval, and with ``count`` how many it covers; the whole truth in the tooltip."""
    if value is None or value.mean is None or not math.isfinite(value.mean):
        return f'<td class="none">{esc(missing)}</td>'
    below, full = [value.extra] if value.extra else [], repr(value.mean)
    if value.low is not None and value.high is not None:
        full += f" ({value.low!r} to {value.high!r}, 95 %)"
        if value.low != value.high:
            below.append(f"{number(value.low, style)}–{number(value.high, style)}".replace("\u00a0%–", "–"))
    if value.n is not None:
        full += f", n = {value.n} {value.unit}"
        if count:
            below.append(f"n\u00a0{value.n:,}")
    small = f"<small>{esc(' · '.join(below))}</small>" if below else ""
    return f'<td data-v="{value.mean!r}" title="{esc(full)}">{esc(number(value.mean, style))}{small}</td>'


def line(*cells: str, first: bool = False) -> str:
    """A row of a table; the ``first`` of a block has a line above it."""
    return f'<tr class="first">{"".join(cells)}</tr>' if first else f"<tr>{''.join(cells)}</tr>"


def text_cell(text: object, *, muted: bool = False, wrap: bool = False) -> str:
    """A table cell of words."""
    return f'<td class="text{" none" if muted else ""}{" wrap" if wrap else ""}">{esc(text)}</td>'


def row_head(name: str, rate: str = "") -> str:
    """The first cell of a row; it stays in view when the table is scrolled."""
    return f'<th scope="row"><b>{esc(name)}</b>{f" <span>{esc(rate)}</span>" if rate else ""}</th>'


def table(head: Sequence[str], rows: Iterable[str], *, groups: Sequence[tuple[str, int]] = (), left: int = 0, tall: bool = False) -> str:
    """A table in a box that scrolls.

    Args:
        head: titles, the first that of the row heads.
        rows: as :func:`line` makes them.
        groups: (title, columns) above ``head``, from its second column on.
        left: columns after the first that hold words.
        tall: scrolls vertically, too, beyond most of a screen.
    """
    over = "".join(f'<th colspan="{n}" scope="colgroup">{esc(t)}</th>' for t, n in groups)
    over = f'<tr class="over"><td></td>{over}</tr>' if groups else ""
    titles = "".join(f'<th scope="col"{" class=text" if 0 < i <= left else ""}>{esc(t)}</th>' for i, t in enumerate(head))
    body = "".join(rows)
    return f'<div class="box{" tall" if tall else ""}" tabindex="0"><table><thead>{over}<tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def details(title: str, body: str, *, open: bool = False) -> str:
    """A part that unfolds."""
    return f"<details{' open' if open else ''}><summary>{esc(title)}</summary>{body}</details>"


def section(anchor: str, title: str, *parts: str) -> str:
    """A chapter; empty parts are left out, and a chapter of nothing but them is nothing."""
    held = "".join(p for p in parts if p)
    return f'<section id="{esc(anchor)}"><h2>{esc(title)}</h2>{held}</section>' if held else ""


def note(text: str) -> str:
    """A quiet paragraph."""
    return f'<p class="note">{esc(text)}</p>' if text else ""


def uri(data: bytes, kind: str = "png") -> str:
    """A data URI of an image."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def plot(image: bytes, label: str, *, narrow: bool = False) -> str:
    """A plot (WebP); dark pages show it inverted, with its hues turned back."""
    return f'<figure class="plot{" narrow" if narrow else ""}"><img src="{uri(image, "webp")}" alt="{esc(label)}"></figure>'


def page(title: str, body: str) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)}</title><style>{STYLE}</style></head>\n<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1d2126;--muted:#667078;--line:#dfe3e6;--tint:#f5f7f8;--link:#0b62a4;--good:#0a7a4b;--bad:#b3361b}
@media screen and (prefers-color-scheme:dark){:root{--bg:#15181b;--fg:#e3e6e8;--muted:#98a1a8;--line:#31373c;--tint:#1d2125;--link:#7db8ea;--good:#5fce9c;--bad:#f0886d}}
@media screen and (prefers-color-scheme:dark){.plot img{filter:invert(.917) hue-rotate(180deg);mix-blend-mode:lighten}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:1280px;margin:0 auto;padding:32px 24px 80px}
h1{font-size:26px;line-height:1.25;font-weight:650;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:20px;font-weight:650;margin:56px 0 12px;padding-top:16px;border-top:1px solid var(--line)}
h3{font-size:15px;font-weight:650;margin:28px 0 8px}details h3{margin:18px 0 6px;font-size:14px}
p{margin:8px 0;max-width:78ch}
.lead{color:var(--muted);margin:0 0 20px;overflow-wrap:anywhere}
.note{color:var(--muted);font-size:13px}
.warn{border-left:3px solid var(--bad);padding:2px 0 2px 12px;font-size:14px}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:14px;margin:16px 0 24px}
a{color:var(--link);text-decoration:none}a:hover{text-decoration:underline}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:4px 20px;font-size:14px;margin:0}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
.box{overflow-x:auto;border:1px solid var(--line);border-radius:6px;margin:8px 0 16px;max-width:100%;width:fit-content}
.tall{max-height:80vh;overflow-y:auto}
table{border-collapse:separate;border-spacing:0;font-size:13px;line-height:1.35;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:right;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap;font-weight:400}
tbody tr:last-child>*{border-bottom:0}
thead th{color:var(--muted);background:var(--tint);vertical-align:bottom;font-weight:600;font-size:12px}
.tall thead tr:last-child th{position:sticky;top:0;z-index:2}
.over td{background:var(--tint);border-bottom:0}
.over th{text-align:center;border-bottom:0;border-left:1px solid var(--line)}
th:first-child,.over td:first-child{position:sticky;left:0;z-index:1;text-align:left;background:var(--bg);border-right:1px solid var(--line)}
thead th:first-child,.over td:first-child{background:var(--tint)}
.tall thead tr:last-child th:first-child{z-index:3}
tbody th span{color:var(--muted);padding-left:4px}tbody th b{font-weight:600}
tr.first>*{border-top:2px solid var(--line)}
td small{display:block;color:var(--muted);font-size:11px}
td.text,th.text{text-align:left}td.wrap{white-space:normal;min-width:15em;max-width:34em;overflow-wrap:anywhere}
td.none{color:var(--muted);font-size:12px;text-align:right}td.text.none{text-align:left}
th[role=button]{cursor:pointer}th[role=button]:hover{color:var(--fg)}
th[aria-sort=ascending]::after{content:" ▲"}th[aria-sort=descending]::after{content:" ▼"}
details{margin:10px 0}summary{cursor:pointer;color:var(--link);font-size:14px;padding:2px 0}
details>.box,details>.strip{margin-top:8px}
figure{margin:0}
.plot{margin:4px 0 20px}.plot img{display:block;width:100%;height:auto}
.plot.narrow{max-width:760px}
.shots td,.shots tbody th{padding:6px;text-align:center;vertical-align:top}
.shots thead th+th,.shots thead td+th{text-align:center}
.shots img{display:block;margin:0 auto;background:var(--tint)}
.shots img.pic{width:144px;height:144px}.shots img.face{width:64px;height:64px}.shots img.word{height:28px;width:auto;max-width:140px}
.px{image-rendering:pixelated}
.shots td+td.next,.shots th.next{border-left:2px solid var(--line)}
.name{display:block;max-width:144px;margin:3px auto 0;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;color:var(--muted);font-size:11px}
.read{display:block;font-size:12px;margin-top:2px;max-width:150px;overflow:hidden;text-overflow:ellipsis;white-space:pre}
.right{color:var(--good)}.wrong{color:var(--bad)}
.strip{display:flex;flex-wrap:wrap;gap:12px 20px}
.strip figure{width:288px;max-width:100%}.strip img{display:block;width:100%;height:auto;background:var(--tint)}
.strip figcaption{font-size:12px;color:var(--muted);overflow-wrap:anywhere}
code,pre{font:12px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
pre{background:var(--tint);padding:12px;border-radius:6px;overflow:auto;max-height:60vh;white-space:pre-wrap;overflow-wrap:anywhere}
@media (max-width:640px){main{padding:20px 12px 48px}dl{grid-template-columns:1fr}dt{margin-top:6px}.plot{overflow-x:auto}.plot img{width:960px}.plot.narrow img{width:640px}}
@page{size:landscape;margin:12mm}
@media print{main{max-width:none;padding:0}nav,summary::marker{display:none}.box,.tall{overflow:visible;max-height:none;border:0}th:first-child{position:static}
table{font-size:8px}th,td{padding:2px 4px}thead th{font-size:8px;white-space:normal}td small,td.none,.name,.read{font-size:7px}td.wrap{min-width:0}h2{break-after:avoid}figure,tr{break-inside:avoid}}
"""

SCRIPT = """
for(const t of document.querySelectorAll('table:not(.still)')){
 const heads=[...t.querySelectorAll('thead tr:last-child th')];
 heads.forEach((h,i)=>{h.setAttribute('role','button');h.tabIndex=0;
  const sort=()=>{const up=h.getAttribute('aria-sort')==='ascending'?-1:1,b=t.tBodies[0];
   heads.forEach(x=>x.removeAttribute('aria-sort'));h.setAttribute('aria-sort',up>0?'ascending':'descending');
   const v=r=>{const c=r.children[i]||r.lastChild;return c.dataset.v!==undefined?+c.dataset.v:c.textContent};
   t.querySelectorAll('.first').forEach(r=>r.classList.remove('first'));
   [...b.rows].sort((p,q)=>{const x=v(p),y=v(q);return typeof x==='number'&&typeof y==='number'?up*(x-y):typeof x==='number'?-1:typeof y==='number'?1:up*x.localeCompare(y,undefined,{numeric:true})}).forEach(r=>b.append(r))};
  h.addEventListener('click',sort);h.addEventListener('keydown',e=>{if(e.key==='Enter'||e.key===' '){e.preventDefault();sort()}})})}
"""
