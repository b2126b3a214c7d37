"""Owns charts as SVG text: bars, histograms, curves, points and heat maps, ready to embed in a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10
from typing import NamedTuple

INK, FAINT, GRID = "#24292f", "#6e7781", "#e6e8eb"
GREEN, RED, BLUE, AMBER, VIOLET = "#2da44e", "#cf5b52", "#3b76d6", "#c77d0a", "#8250df"
SERIES = (BLUE, AMBER, GREEN, VIOLET, RED)

_FONT = 'font-family="system-ui, -apple-system, Segoe UI, DejaVu Sans, sans-serif"'
_LETTER = 6.2  # mean width in pixels of a letter at font size 11


class Bar(NamedTuple):
    """A stacked bar."""

    name: str
    parts: tuple[tuple[int, str], ...]  # value and colour of each part
    note: str = ""  # shown after the bar


def histogram(bars: Sequence[tuple[str, int]], *, title: str, x: str, y: str = "images", colour: str = BLUE) -> str:
    """Vertical bars; names below them are thinned out where they would touch.

    Args:
        bars: name and height of each bar, in order.
        title, x, y: texts of the title and the axes.
        colour: colour of the bars.
    """
    width, height, left, top, bottom = 560, 260, 62, 34, 46
    inner_width, inner_height = width - left - 14, height - top - bottom
    marks = _ticks(max((value for _, value in bars), default=0))
    step = inner_width / max(1, len(bars))
    longest = max((len(name) for name, _ in bars), default=1) * _LETTER + 8
    every = max(1, ceil(longest / step))
    parts = [_y_grid(marks, left, top, inner_width, inner_height)]
    for place, (name, value) in enumerate(bars):
        tall = inner_height * value / marks[-1]
        at = left + place * step
        gap = min(2.0, step * 0.15)
        parts.append(
            f'<rect x="{at + gap / 2:.1f}" y="{top + inner_height - tall:.1f}" width="{max(step - gap, 0.5):.1f}" '
            f'height="{tall:.1f}" fill="{colour}"><title>{escape(name)}: {value:,}</title></rect>'
        )
        if place % every == 0:
            parts.append(_text(at + step / 2, top + inner_height + 15, name, anchor="middle"))
    parts.append(_x_line(left, top + inner_height, inner_width))
    return _svg(width, height, parts, title=title, x=x, y=y, middle=left + inner_width / 2)


def bars(rows: Sequence[Bar], *, title: str, key: Sequence[tuple[str, str]] = ()) -> str:
    """Horizontal stacked bars, one below the other, with names on their left.

    Args:
        rows: from top to bottom.
        title: text of the title.
        key: legend as (word, colour).
    """
    width, line, left, right, top = 720, 19, 190, 130, 50 if key else 34
    longest = max((sum(value for value, _ in row.parts) for row in rows), default=0) or 1
    scale = (width - left - right) / longest
    parts = []
    at = float(left)
    for word, colour in key:
        parts.append(f'<rect x="{at:.0f}" y="31" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(at + 14, 40, word))
        at += 34 + len(word) * _LETTER
    for place, row in enumerate(rows):
        y, x = top + place * line, float(left)
        parts.append(_text(left - 8, y + 12, shortened(row.name, 29), anchor="end", colour=INK, tip=row.name))
        for value, colour in row.parts:
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 2}" width="{value * scale:.1f}" height="{line - 5}" fill="{colour}">'
                f"<title>{escape(row.name)}: {value:,}</title></rect>"
            )
            x += value * scale
        parts.append(_text(x + 6, y + 12, row.note))
    return _svg(width, top + len(rows) * line + 8, parts, title=title)


def curves(series: Sequence[tuple[str, Sequence[int]]], *, title: str, x: str, y: str) -> str:
    """Curves of descending counts by rank, with both axes logarithmic; zeros are left out.

    Args:
        series: name and descending counts of each curve.
        title, x, y: texts of the title and the axes.
    """
    width, height, left, top, bottom = 720, 300, 62, 34, 46
    inner_width, inner_height = width - left - 120, height - top - bottom
    ranks = max((len(counts) for _, counts in series), default=1)
    largest = max((counts[0] for _, counts in series if len(counts)), default=1)
    decades_x, decades_y = max(1, ceil(log10(max(2, ranks)))), max(1, ceil(log10(max(2, largest))))

    def place(rank: int, count: int) -> tuple[float, float]:
        return (
            left + inner_width * log10(rank) / decades_x,
            top + inner_height * (1 - log10(count) / decades_y),
        )

    parts = []
    for decade in range(decades_y + 1):
        at = place(1, 10**decade)[1]
        parts.append(f'<line x1="{left}" x2="{left + inner_width}" y1="{at:.1f}" y2="{at:.1f}" stroke="{GRID}"/>')
        parts.append(_text(left - 8, at + 4, _short(10**decade), anchor="end"))
    for decade in range(decades_x + 1):
        at = place(10**decade, 1)[0]
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{top + inner_height}" stroke="{GRID}"/>')
        parts.append(_text(at, top + inner_height + 15, _short(10**decade), anchor="middle"))
    for number, (name, counts) in enumerate(series):
        colour = SERIES[number % len(SERIES)]
        points = [place(rank, int(counts[rank - 1])) for rank in _ranks(len(counts)) if counts[rank - 1] > 0]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y_key = top + 12 + 18 * number
        parts.append(f'<rect x="{left + inner_width + 14}" y="{y_key - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(left + inner_width + 29, y_key, shortened(name, 14), tip=name))
    return _svg(width, height, parts, title=title, x=x, y=y, middle=left + inner_width / 2)


def points(places: Sequence[tuple[int, int, int]], *, title: str, x: str, y: str) -> str:
    """Dots at integer coordinates, larger for higher counts.

    Args:
        places: (x, y, count) of each dot.
        title, x, y: texts of the title and the axes.
    """
    width, height, left, top, bottom = 560, 340, 62, 34, 46
    inner_width, inner_height = width - left - 20, height - top - bottom
    across = _ticks(max((a for a, _, _ in places), default=0))
    up = _ticks(max((b for _, b, _ in places), default=0))
    most = max((count for *_, count in places), default=1)
    parts = [_y_grid(up, left, top, inner_width, inner_height)]
    for mark in across:
        at = left + inner_width * mark / across[-1]
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{top + inner_height}" stroke="{GRID}"/>')
        parts.append(_text(at, top + inner_height + 15, _short(mark), anchor="middle"))
    for a, b, count in sorted(places, key=lambda place: -place[2]):
        radius = 2 + 8 * (count / most) ** 0.5
        parts.append(
            f'<circle cx="{left + inner_width * a / across[-1]:.1f}" cy="{top + inner_height * (1 - b / up[-1]):.1f}" '
            f'r="{radius:.1f}" fill="{BLUE}" fill-opacity="0.45"><title>{a} x {b}: {count:,}</title></circle>'
        )
    return _svg(width, height, parts, title=title, x=x, y=y, middle=left + inner_width / 2)


def heat_map(names: Sequence[str], shares: Sequence[Sequence[float | None]], *, title: str, x: str, y: str) -> str:
    """A square matrix of shares in [0, 1], darker for higher ones; None is white with a dot.

    Args:
        names: names of the rows, and of the columns.
        shares: the matrix, row by row.
        title, x, y: texts of the title and the axes.
    """
    cell, left, top = 26, 170, 160
    width, height = left + cell * len(names) + 90, top + cell * len(names) + 26
    parts = []
    for place, name in enumerate(names):
        at = top + place * cell + cell / 2
        parts.append(_text(left - 8, at + 4, shortened(name, 24), anchor="end", colour=INK, tip=name))
        across = left + place * cell + cell / 2 + 4
        words = escape(shortened(name, 18))
        parts.append(
            f'<text x="{across:.0f}" y="{top - 8}" transform="rotate(-60 {across:.0f} {top - 8})" font-size="11" '
            f'fill="{INK}">{words}</text>'
        )
    for row, values in enumerate(shares):
        for column, value in enumerate(values):
            a, b = left + column * cell, top + row * cell
            tip = f"{y} {names[row]}, {x} {names[column]}: " + ("never together" if value is None else f"{value:.1%}")
            fill = "#ffffff" if value is None else _shade(value)
            parts.append(
                f'<rect x="{a}" y="{b}" width="{cell - 1}" height="{cell - 1}" fill="{fill}">'
                f"<title>{escape(tip)}</title></rect>"
            )
            if value is None:
                parts.append(f'<circle cx="{a + cell / 2}" cy="{b + cell / 2}" r="1.5" fill="{FAINT}"/>')
            elif value >= 0.005:
                colour = "#ffffff" if value > 0.55 else INK
                parts.append(
                    _text(a + (cell - 1) / 2, b + 17, f"{value:.0%}"[:-1], anchor="middle", colour=colour, size=10)
                )
    return _svg(width, height, parts, title=title, x=f"{x} (percent)", y="", middle=left + cell * len(names) / 2)


def shortened(text: str, limit: int) -> str:
    """The text, or its beginning and three dots if it is longer than `limit`."""
    return text if len(text) <= limit else text[: limit - 3].rstrip() + "..."


def _svg(
    width: int, height: int, parts: Sequence[str], *, title: str, x: str = "", y: str = "", middle: float = 0
) -> str:
    words = [f'<text x="8" y="18" font-size="13" font-weight="600" fill="{INK}">{escape(title)}</text>']
    if x:
        words.append(_text(middle, height - 8, x, anchor="middle"))
    if y:
        words.append(
            f'<text x="13" y="{height / 2:.0f}" transform="rotate(-90 13 {height / 2:.0f})" text-anchor="middle" '
            f'font-size="11" fill="{FAINT}">{escape(y)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" {_FONT}>{"".join(words)}{"".join(parts)}</svg>'
    )


def _text(
    x: float, y: float, words: str, *, anchor: str = "start", colour: str = FAINT, size: int = 11, tip: str = ""
) -> str:
    hover = f"<title>{escape(tip)}</title>" if tip and tip != words else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">'
        f"{escape(words)}{hover}</text>"
    )


def _y_grid(marks: Sequence[int], left: int, top: int, width: int, height: int) -> str:
    parts = []
    for mark in marks:
        at = top + height * (1 - mark / marks[-1])
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{at:.1f}" y2="{at:.1f}" stroke="{GRID}"/>')
        parts.append(_text(left - 8, at + 4, _short(mark), anchor="end"))
    return "".join(parts)


def _x_line(left: int, y: int, width: int) -> str:
    return f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="{FAINT}"/>'


def _ticks(largest: int) -> list[int]:
    """Round numbers from 0 to the first at or above the largest, four to six of them."""
    if largest <= 4:
        return list(range(max(1, largest) + 1))
    power = 10 ** floor(log10(largest / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 5 >= largest)
    return list(range(0, step * ceil(largest / step) + 1, step))


def _ranks(count: int) -> list[int]:
    """Ranks from 1 to count, about 60 per decade."""
    return (
        sorted({min(count, round(10 ** (step / 60))) for step in range(60 * ceil(log10(max(2, count))) + 1)})
        if count
        else []
    )


def _short(number: int) -> str:
    for limit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{letter}"
    return str(number)


def _shade(share: float) -> str:
    """A colour from near white at 0 to deep blue at 1."""
    weight = min(1.0, max(0.0, share)) ** 0.7
    light, dark = (246, 248, 250), (9, 63, 148)
    return "#" + "".join(f"{round(a + (b - a) * weight):02x}" for a, b in zip(light, dark, strict=True))
