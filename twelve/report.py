"""A standalone HTML report: one file, no scripts, nothing fetched; curves, bars, tables, facts and samples of text.

    write_report("report.html", "A run", [("Training", [curve("loss", {"train": (steps, losses)})]),
                                          ("Samples", [samples([{"prompt": "2+2", "text": "4"}])])])

Every helper returns a piece of HTML in which all given text is escaped. Numbers are drawn as they are: a smoothed curve
always stands on its raw one, and points beyond the frame are counted under it.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from twelve import files

Points = tuple[Sequence[float], Sequence[float | None]]  # x, y; a y that is None or not finite is left out

Bar = tuple[float, float | None]  # value, standard error
Section = tuple[str, Sequence[str]]  # heading, pieces of HTML

WIDTH, HEIGHT = 460, 236  # of a figure, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 10, 32  # room around the frame for ticks and labels
MAX_POINTS = 400  # drawn of a series; a longer one is cut into as many stretches, each with its extremes


def write_report(path: str | Path, title: str, sections: Sequence[Section], subtitle: str = "") -> None:
    """Write `sections`, each a heading with the pieces made by this module's helpers, as one HTML file (atomically)."""
    body = "\n".join(
        f'<section><h2>{escape(heading)}</h2><div class="grid">{"".join(pieces)}</div></section>'
        for heading, pieces in sections
    )
    ships = "".join(f'<path d="M{16 * ship + 5} 0v8h-5zm1 2l4.5 6h-4.5zm-6 7h12l-2.5 3h-7z"/>' for ship in range(12))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>
<header><svg class="ships" viewBox="0 0 190 12" role="img" aria-label="twelve ships">{ships}</svg>
<h1>{escape(title)}</h1><p class="subtitle">{escape(subtitle)}</p></header>
{body}
<footer>Written by twelve on {datetime.datetime.now():%Y-%m-%d %H:%M}; every number was measured in this run.</footer>
</main></body></html>
"""
    with files.atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


# --- pieces ---------------------------------------------------------------------------------------------------------


def tiles(values: Mapping[str, Any]) -> str:
    """A row of large figures, each with its name: {"parameters": "4.1M"}."""
    cells = (f"<div><b>{escape(_text(value))}</b><span>{escape(name)}</span></div>" for name, value in values.items())
    return f'<div class="tiles wide">{"".join(cells)}</div>'


def facts(values: Mapping[str, Any]) -> str:
    """Names and values, one a line: what was run, on what machine."""
    rows = (f"<dt>{escape(name)}</dt><dd>{escape(_text(value))}</dd>" for name, value in values.items())
    return f'<dl class="wide">{"".join(rows)}</dl>'


def text(paragraph: str) -> str:
    """A paragraph."""
    return f'<p class="wide">{escape(paragraph)}</p>'


def table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> str:
    """Rows that share their keys; the first row's keys are the head."""
    if not rows:
        return text("(no rows)")
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(_cell(row.get(name)) for name in rows[0]) + "</tr>" for row in rows)
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll wide"><table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def samples(items: Sequence[Mapping[str, Any]]) -> str:
    """What a model was asked and what it said, word for word.

    Keys of an item: `text`; optional `prompt`, `reasoning` (folded away), `note`, `correct` (bool: marks the card).
    """
    cards = []
    for item in items:
        mark = {True: "right", False: "wrong", None: ""}[item.get("correct")]
        parts = [f'<p class="note">{escape(item["note"])}</p>'] if item.get("note") else []
        if item.get("prompt") is not None:
            parts.append(f'<pre class="prompt">{escape(item["prompt"])}</pre>')
        if item.get("reasoning"):
            parts.append(f"<details><summary>reasoning</summary><pre>{escape(item['reasoning'])}</pre></details>")
        parts.append(f"<pre>{escape(item['text'])}</pre>")
        cards.append(f'<article class="{mark}">{"".join(parts)}</article>')
    return f'<div class="samples wide">{"".join(cards)}</div>'


def curve(title: str, series: Mapping[str, Points], x_label: str = "step", unit: str = "") -> str:
    """A line chart. A long, noisy series is drawn faint with its smoothing on top; a short one gets a dot a point."""
    clean = {name: _finite(points) for name, points in series.items()}
    clean = {name: points for name, points in clean.items() if points}
    if not clean:
        return _figure(title, unit, '<p class="empty">no points</p>')
    xs = [x for points in clean.values() for x, _ in points]
    low, high, beyond = _frame([y for points in clean.values() for _, y in points])
    plane = _Plane(min(xs), max(xs), low, high)
    drawn, legend = [], []
    for colour, (name, points) in enumerate(clean.items(), start=1):
        drawn.append(_line(points, plane, f"c{colour}"))
        label = f"{escape(name)} " if len(clean) > 1 else "last "
        legend.append(f'<span class="c{colour}">{label}<b>{_short(points[-1][1])}</b></span>')
    note = f"{beyond} of {len(xs)} points lie above the frame" if beyond else ""
    svg = _svg(plane.axes(x_label) + "".join(drawn), f"{title} by {x_label}")
    return _figure(title, unit, svg, "".join(legend), note)


def bars(
    title: str, values: Mapping[str, Bar] | Sequence[tuple[str, Bar]], unit: str = "", high: float | None = None
) -> str:  # fmt: skip
    """Horizontal bars {name: (value, standard error)}, or pairs of these where names may be equal, with whiskers of one
    standard error either side; None where it is not known."""
    values = list(values.items() if isinstance(values, Mapping) else values)
    if not values:
        return _figure(title, unit, '<p class="empty">no values</p>')
    top = high or max(value + (error or 0.0) for _, (value, error) in values) or 1.0
    rows = []
    for name, (value, error) in values:
        off = error or 0.0
        share, left, right = (100 * min(max(x / top, 0), 1) for x in (value, value - off, value + off))
        whisker = f'<i style="left:{left:.2f}%;width:{right - left:.2f}%"></i>'
        told = "" if error is None else f"<small> ± {_short(error)}</small>"
        rows.append(
            f'<span>{escape(name)}</span><div><u style="width:{share:.2f}%"></u>{whisker}</div>'
            f"<b>{_short(value)}{told}</b>"
        )
    return _figure(title, unit, f'<div class="bars">{"".join(rows)}</div>')


# --- training logs --------------------------------------------------------------------------------------------------

NAMES = {  # of the columns of training/metrics.jsonl: title, unit
    "loss": ("Loss", "nats a token"),
    "mtp_loss": ("Multi-token prediction loss", "nats a token"),
    "balance": ("Sequence balance loss", "1 is even"),
    "learning_rate": ("Learning rate", ""),
    "tokens_per_second": ("Throughput", "tokens/s"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "max_violation": ("Expert load imbalance", "MaxVio of the worst layer"),
    "hc_gain": ("Residual gain", "largest sum of a row or column of the mappings' product"),
}
CLOCKS = ("step", "tokens", "seconds")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`. A line cut short by a kill is left out; a resume's rows replace older ones."""
    rows: dict[int, dict[str, Any]] = {}
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def training_curves(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One curve for every number that the rows hold, the known ones first; a part that the model lacks stays at 0."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if _is_number(value) and value)
    known = [key for key in NAMES if key in keys]
    others = [key for key in keys if key not in NAMES and key not in CLOCKS]
    steps = [row["step"] for row in rows]
    curves = []
    for key in known + others:
        title, unit = NAMES.get(key, (key.replace("_", " ").capitalize(), ""))
        curves.append(curve(title, {key.replace("_", " "): (steps, [row.get(key) for row in rows])}, unit=unit))
    return curves


# --- drawing --------------------------------------------------------------------------------------------------------


class _Plane:
    """From data to SVG units."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float):
        self.x_low, self.x_high = x_low, x_high if x_high > x_low else x_low + 1
        self.y_ticks = _ticks(y_low, y_high, 5)
        self.y_low, self.y_high = min(y_low, self.y_ticks[0]), max(y_high, self.y_ticks[-1])

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - min(max(share, -0.02), 1.02) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)

    def axes(self, x_label: str) -> str:
        floor = HEIGHT - BOTTOM
        parts = []
        for tick, label in zip(self.y_ticks, _labels(self.y_ticks), strict=True):
            y = self.y(tick)
            parts.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text class="tick end" x="{LEFT - 7}" y="{y + 3.5:.1f}">{label}</text>')
        x_ticks = [tick for tick in _ticks(self.x_low, self.x_high, 6) if self.x_low <= tick <= self.x_high]
        for tick, label in zip(x_ticks, _labels(x_ticks), strict=True):
            parts.append(f'<text class="tick mid" x="{self.x(tick):.1f}" y="{floor + 15}">{label}</text>')
        parts.append(f'<text class="tick end" x="{WIDTH - RIGHT}" y="{floor + 28}">{escape(x_label)}</text>')
        return "".join(parts)


def _line(points: list[tuple[float, float]], plane: _Plane, colour: str) -> str:
    raw = _thin(points)
    if len(points) <= 40:
        dots = "".join(_dot(x, y, plane, 2.4) for x, y in points)
        return f'<g class="{colour}"><path class="line" d="{plane.path(raw)}"/>{dots}</g>'
    faint, line = "", points
    if _is_noisy(points):
        faint, line = f'<path class="raw" d="{plane.path(raw)}"/>', _smooth(points)
    spots = "".join(_dot(x, y, plane, 5, "hover") for x, y in line[:: max(1, len(line) // 60)])
    last = _dot(*line[-1], plane, 2.8)
    return f'<g class="{colour}">{faint}<path class="line" d="{plane.path(_thin(line))}"/>{last}{spots}</g>'


def _dot(x: float, y: float, plane: _Plane, radius: float, kind: str = "dot") -> str:
    tip = f"<title>{_short(x)}: {_short(y)}</title>"
    return f'<circle class="{kind}" cx="{plane.x(x):.1f}" cy="{plane.y(y):.1f}" r="{radius}">{tip}</circle>'


def _svg(inside: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{inside}</svg>'


def _figure(title: str, unit: str, inside: str, legend: str = "", note: str = "") -> str:
    head = f"<b>{escape(title)}</b> <span>{escape(unit)}</span>"
    foot = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<figure><figcaption>{head}<div class="legend">{legend}</div></figcaption>{inside}{foot}</figure>'


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*points, strict=True) if y is not None and math.isfinite(y)]


def _frame(values: list[float]) -> tuple[float, float, int]:
    """Lowest and highest value to show, and how many lie above: a lone spike must not flatten the rest."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual = ordered[int(0.98 * (len(ordered) - 1))]
    if len(values) > 40 and usual > 0 and high > 4 * usual:
        high = 1.3 * usual
    if 0 <= low < 0.35 * high:
        low = 0.0
    if low == high:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    return low, high, sum(value > high for value in values)


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: the lowest and the highest of each stretch."""
    if len(points) <= MAX_POINTS:
        return points
    kept = []
    stretch = len(points) / (MAX_POINTS // 2)
    for index in range(MAX_POINTS // 2):
        part = points[int(index * stretch) : int((index + 1) * stretch)]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def _is_noisy(points: list[tuple[float, float]]) -> bool:
    """Whether the series often changes direction; a schedule does not, and smoothing would bend its corners."""
    rises = [b[1] - a[1] for a, b in pairwise(points)]
    turns = sum(a * b < 0 for a, b in pairwise(rises))
    return turns > 0.1 * len(points)


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Triangular mean over a fortieth of the series, narrower towards the ends so that it does not lag there."""
    values = [y for _, y in points]
    reach = max(1, len(points) // 80)
    for _ in range(2):  # a box filter twice is a triangle
        sums = [0.0]
        for value in values:
            sums.append(sums[-1] + value)
        widths = [min(reach, index, len(values) - 1 - index) for index in range(len(values))]
        values = [(sums[i + near + 1] - sums[i - near]) / (2 * near + 1) for i, near in enumerate(widths)]
    values[-1] = sum(y for _, y in points[-reach:]) / reach  # else the end would be one raw, noisy point
    return [(x, value) for (x, _), value in zip(points, values, strict=True)]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that cover low..high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _labels(ticks: Sequence[float]) -> list[str]:
    """Ticks of one axis, written alike: 0, 500, 1k; 0.2, 0.4; 2e-4."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(ticks[0]) or 1.0
    top = max(abs(tick) for tick in ticks)
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if top >= size * (1 if suffix != "k" else 2):
            digits = max(0, -math.floor(math.log10(step / size) + 1e-9))
            return [f"{tick / size:.{digits}f}{suffix}" if tick else "0" for tick in ticks]
    if top < 1e-2:
        power = math.floor(math.log10(top))
        return [f"{tick / 10**power:.3g}e{power}" if tick else "0" for tick in ticks]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick:.{digits}f}" for tick in ticks]


def _short(value: float) -> str:
    """Three or four significant digits for people: 12,345 · 3.142 · 0.0021."""
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M" if abs(value) < 1e9 else f"{value / 1e9:.3g}G"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return "" if value is None else _short(value) if _is_number(value) else str(value)


def _cell(value: Any) -> str:
    return f'<td{" class=number" if _is_number(value) else ""}>{escape(_text(value))}</td>'


STYLE = """
:root{color-scheme:light dark;--page:#f7f6f3;--card:#fff;--ink:#1d2126;--soft:#626a73;--line:#e4e2dc;--rule:#eceae4;
--c1:#2660c9;--c2:#c9581d;--c3:#14815b;--c4:#8245b8;--right:#14815b;--wrong:#b8433a;--quote:#f3f1ec}
@media(prefers-color-scheme:dark){:root{--page:#121418;--card:#1a1d23;--ink:#e6e8ea;--soft:#959da7;--line:#2b3038;
--rule:#262a31;--c1:#74a2f8;--c2:#f0935c;--c3:#4fc496;--c4:#bf93ec;--right:#4fc496;--wrong:#ef8279;--quote:#22262d}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI","Apple SD Gothic Neo","Noto Sans CJK KR","Noto Sans KR",sans-serif}
main{max-width:1040px;margin:0 auto;padding:44px 24px 40px}
header{border-bottom:1px solid var(--line);padding-bottom:20px}
.ships{width:190px;height:12px;display:block;fill:var(--c1);opacity:.8}
h1{font-size:30px;line-height:1.2;letter-spacing:-.02em;margin:14px 0 2px;font-weight:650}
.subtitle{margin:0;color:var(--soft);max-width:76ch}
section{margin-top:34px}
h2{font-size:12.5px;letter-spacing:.09em;text-transform:uppercase;color:var(--soft);margin:0 0 12px;font-weight:650}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px}
.wide{grid-column:1/-1;margin:0}
figure,dl,.scroll,article,.tiles>div{background:var(--card);border:1px solid var(--line);border-radius:10px}
figure{margin:0;padding:14px 16px 10px;min-width:0}
figcaption{display:flex;flex-wrap:wrap;align-items:baseline;gap:0 8px;margin-bottom:8px}
figcaption>span{color:var(--soft);font-size:12.5px}
.legend{margin-left:auto;font-size:12.5px;display:flex;gap:14px;color:var(--soft)}
.legend span::before{content:"";display:inline-block;width:12px;height:3px;border-radius:2px;margin-right:6px;
vertical-align:middle;background:var(--now)}
.legend b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
svg{width:100%;height:auto;display:block}
.c1{--now:var(--c1)}.c2{--now:var(--c2)}.c3{--now:var(--c3)}.c4{--now:var(--c4)}
.rule{stroke:var(--rule);stroke-width:1;fill:none}
.tick{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}.end{text-anchor:end}.mid{text-anchor:middle}
.line{fill:none;stroke:var(--now);stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}
.raw{fill:none;stroke:var(--now);stroke-width:1;opacity:.24;stroke-linejoin:round}
.dot{fill:var(--now);stroke:var(--card);stroke-width:1.2}
.hover{fill:var(--now);opacity:0}.hover:hover{opacity:.55}
.note,.empty,footer{color:var(--soft);font-size:12.5px;margin:4px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:12px}
.tiles>div{padding:13px 16px}
.tiles b{display:block;font-size:22px;line-height:1.25;font-weight:620;letter-spacing:-.01em}
.tiles span{color:var(--soft);font-size:12.5px}
dl{padding:12px 16px;display:grid;grid-template-columns:max-content 1fr;gap:5px 20px;font-size:14px}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
caption{text-align:left;padding:12px 16px 4px;color:var(--soft)}
th{text-align:left;font-weight:600;font-size:12.5px;color:var(--soft)}
th,td{padding:8px 16px;border-bottom:1px solid var(--rule);white-space:nowrap}
tr:last-child td{border-bottom:0}.number{font-variant-numeric:tabular-nums}
.bars{display:grid;grid-template-columns:max-content 1fr max-content;gap:10px 14px;align-items:center;font-size:13.5px}
.bars>div{position:relative;height:14px;background:var(--rule);border-radius:4px}
.bars u{position:absolute;inset:0 auto 0 0;background:var(--c1);border-radius:4px}
.bars i{position:absolute;top:6px;height:2px;background:var(--ink)}
.bars i::before,.bars i::after{content:"";position:absolute;top:-3px;height:8px;width:1.5px;background:var(--ink)}
.bars i::before{left:0}.bars i::after{right:0}
.bars b{font-weight:600;font-variant-numeric:tabular-nums}.bars small{color:var(--soft);font-weight:400}
.samples{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px}
article{padding:12px 16px;border-left:3px solid var(--line);min-width:0}
article.right{border-left-color:var(--right)}article.wrong{border-left-color:var(--wrong)}
pre{margin:6px 0;white-space:pre-wrap;overflow-wrap:anywhere;font:inherit}
.prompt{background:var(--quote);border-radius:6px;padding:8px 10px}
summary{cursor:pointer;color:var(--soft);font-size:13px}details pre{color:var(--soft)}
footer{margin-top:40px;border-top:1px solid var(--line);padding-top:14px}
"""
