"""Owns the display of a sweep: tables for a terminal, and one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Final

from rich.table import Table

from dist_mlpl import storage
from dist_mlpl.tools.sweep_table import LEGEND, METRICS, Difference, Result, Row, Spread, results_csv, table_csv

_WORDS: Final = {"mAP": "mAP", "OF1": "OF1 (micro-F1)", "CF1": "CF1", "exact_match": "exact match"}
_COLOURS: Final = {"higher": "#1a7f37", "lower": "#b3261e", "level": "#57606a", "": "#57606a"}
_RICH: Final = {"higher": "green", "lower": "red", "level": "dim", "": "dim"}
_STYLE: Final = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #24292f; max-width: 1180px;
       margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #d0d7de; }
p.about { color: #57606a; margin-top: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #e6e8eb; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #d0d7de; }
tr.base td { background: #f6f8fa; } small { color: #57606a; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem 2rem; } svg { max-width: 100%; height: auto; }
"""


def sweep_tables(rows: Sequence[Row], *, baseline: str | None) -> list[Table]:
    """One table for each known fraction; with a baseline, also differences to it."""
    tables = []
    for known in dict.fromkeys(row.known for row in rows):
        table = Table(title=f"labels known: {known}", title_justify="left")
        table.add_column("method")
        table.add_column("seeds", justify="right")
        for name in METRICS:
            table.add_column(name, justify="right")
        if baseline is not None:
            for name in METRICS[:2]:
                table.add_column(f"{name} - {baseline}", justify="right")
            table.caption, table.caption_justify = LEGEND, "left"
        for row in _sorted(rows, known):
            cells = [row.method, str(row.num_seeds), *(_spread(row.spreads.get(name)) for name in METRICS)]
            if baseline is not None:
                cells += [_rich_difference(row.differences.get(name)) for name in METRICS[:2]]
            table.add_row(*cells)
        tables.append(table)
    return tables


def sweep_page(rows: Sequence[Row], results: Sequence[Result], *, title: str, baseline: str | None) -> str:
    """The HTML page: for each known fraction a table, best mAP first, and charts with a dot for every seed."""
    splits = ", ".join(sorted({result.split for result in results}))
    about = (
        f"{len(results)} runs, judged once, after the last epoch, on: {escape(splits)}. Mean and sample standard "
        "deviation over seeds."
    )
    if baseline is not None:
        about += (
            f" Differences are to {escape(baseline)}, seed by seed, with the standard error of their mean. "
            f"{LEGEND[0].upper()}{LEGEND[1:]}."
        )
    body = [f"<h1>{escape(title)}</h1>", f'<p class="about">{about}</p>']
    for known in dict.fromkeys(row.known for row in rows):
        own = _sorted(rows, known)
        body += [f"<h2>Labels known: {escape(known)}</h2>", _html_table(own, baseline), '<div class="charts">']
        body += [_dots(own, results, known, name) for name in METRICS[:2]]
        body.append("</div>")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _sorted(rows: Sequence[Row], known: str) -> list[Row]:
    """The rows of one known fraction, best mAP first and rows without mAP last."""
    own = [row for row in rows if row.known == known]
    return sorted(own, key=lambda row: -row.spreads["mAP"].mean if "mAP" in row.spreads else math.inf)


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.mean:.3f}" + ("" if math.isnan(spread.deviation) else f" ± {spread.deviation:.3f}")


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    error = "" if math.isnan(difference.error) else f" ± {difference.error:.3f}"
    return f"{difference.mean:+.3f}{error}"


def _rich_difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"[{_RICH[difference.verdict]}]{_difference(difference)} {difference.verdict}[/]"


def _html_table(rows: Sequence[Row], baseline: str | None) -> str:
    heads = ["method", "seeds", *(_WORDS[name] for name in METRICS)]
    if baseline is not None:
        heads += [f"{_WORDS[name]} less {baseline}'s" for name in METRICS]
    lines = []
    for row in rows:
        cells = [escape(row.method), str(row.num_seeds), *(_spread(row.spreads.get(name)) for name in METRICS)]
        if baseline is not None:
            for name in METRICS:
                one = row.differences.get(name)
                verdict = "" if one is None else one.verdict
                cells.append(
                    f'<span style="color:{_COLOURS[verdict]}">{_difference(one)} <small>{verdict}</small></span>'
                )
        kind = ' class="base"' if row.method == baseline else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{escape(word)}</th>" for word in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _dots(rows: Sequence[Row], results: Sequence[Result], known: str, metric: str) -> str:
    """An SVG chart with a line for each method: a dot for each seed, a bar at the mean."""
    left, line, width, top = 170, 20, 520, 40
    inner = width - left - 20
    places = {row.method: number for number, row in enumerate(rows)}
    own = [result for result in results if result.known == known and metric in result.metrics]
    low = math.floor(min((result.metrics[metric] for result in own), default=0.0) * 20) / 20
    high = max(low + 0.05, math.ceil(max((result.metrics[metric] for result in own), default=1.0) * 20) / 20)

    def across(value: float) -> float:
        return left + inner * (value - low) / (high - low)

    bottom = top + line * len(rows)
    parts = [f'<text x="8" y="18" font-size="13" font-weight="600">{escape(_WORDS[metric])}</text>']
    for mark in (low, (low + high) / 2, high):
        x = across(mark)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{bottom}" stroke="#e6e8eb"/>')
        parts.append(f'<text x="{x:.1f}" y="{top - 10}" font-size="11" text-anchor="middle">{mark:.3g}</text>')
    for row in rows:
        y = top + line * places[row.method] + line / 2
        parts.append(f'<text x="{left - 10}" y="{y + 4}" font-size="11" text-anchor="end">{escape(row.method)}</text>')
        if metric in row.spreads:
            x = across(row.spreads[metric].mean)
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 7}" y2="{y + 7}" stroke="#24292f" stroke-width="2"/>'
            )
    for result in own:
        y = top + line * places[result.method] + line / 2
        tip = f"{escape(result.method)}, seed {result.seed}: {result.metrics[metric]:.4f}"
        parts.append(
            f'<circle cx="{across(result.metrics[metric]):.1f}" cy="{y}" r="3.5" fill="#3b76d6" fill-opacity="0.6">'
            f"<title>{tip}</title></circle>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 10}" width="{width}" '
        f'height="{bottom + 10}" role="img" fill="#24292f" font-family="system-ui, sans-serif">{"".join(parts)}</svg>'
    )


def write_tables(out: str, rows: Sequence[Row], results: Sequence[Result], *, baseline: str | None) -> None:
    """Write OUT/results.csv (a line per run), OUT/table.csv and OUT/index.html."""
    page = sweep_page(rows, results, title=f"Sweep {storage.name(out.rstrip('/'))}", baseline=baseline)
    for name, text in (("results.csv", results_csv(results)), ("table.csv", table_csv(rows)), ("index.html", page)):
        storage.write_bytes(storage.join(out, name), text.encode())
