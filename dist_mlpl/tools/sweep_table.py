"""Owns the statistics of a sweep: mean and spread over seeds, and differences to a baseline, seed by seed."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from dist_mlpl.progress import without_nan

METRICS: Final = ("mAP", "OF1", "CF1", "exact_match")  # OF1 is micro-F1; CF1 is the F1 of mean precision and recall

MIN_SEEDS: Final = 3  # fewest common seeds for a verdict; the error of a mean over two is itself a guess
LEGEND: Final = (
    "higher, lower: beyond two standard errors from the baseline, over at least three seeds; level: within them; "
    "no word: fewer seeds"
)


class Result(NamedTuple):
    """The result of one finished run.

    Args:
        method: name of the method, a row of the table.
        known: how much of the labels was known, as a word.
        seed: seed of training and of the view; two results with one seed differ only in the method.
        split: the split it was evaluated on.
        metrics: metrics of its last evaluation, as fractions.
    """

    method: str
    known: str
    seed: int
    split: str
    metrics: dict[str, float]


class Spread(NamedTuple):
    """A metric over seeds; `deviation` is the sample standard deviation, NaN for one seed."""

    mean: float
    deviation: float


class Difference(NamedTuple):
    """Mean difference of a metric to the baseline over common seeds; `error` is its standard error, NaN for one."""

    mean: float
    error: float
    num_seeds: int

    @property
    def verdict(self) -> str:
        """`higher` or `lower` beyond two standard errors from 0, else `level`; empty for fewer than three seeds."""
        if self.num_seeds < MIN_SEEDS:
            return ""
        if abs(self.mean) <= 2.0 * self.error:
            return "level"
        return "higher" if self.mean > 0 else "lower"


class Row(NamedTuple):
    """A method at one known fraction; metrics that were not measured are missing from the dictionaries."""

    method: str
    known: str
    num_seeds: int
    spreads: dict[str, Spread]
    differences: dict[str, Difference]  # empty for the baseline itself, or without a baseline


def tabulate(results: Iterable[Result], *, baseline: str | None = None) -> list[Row]:
    """Group results by known fraction and method, in the order they come.

    Args:
        results: each run once.
        baseline: method to compare with; None for no comparison.
    """
    cells: dict[tuple[str, str], dict[int, Result]] = {}
    for result in results:
        cells.setdefault((result.known, result.method), {})[result.seed] = result
    rows = []
    for known in dict.fromkeys(known for known, _ in cells):
        base = {} if baseline is None else cells.get((known, baseline), {})
        for (own_known, method), own in cells.items():
            if own_known == known:
                spreads = {name: spread(values) for name, values in _columns(own.values()).items()}
                differences = {} if method == baseline else _differences(own, base)
                rows.append(Row(method, known, len(own), spreads, differences))
    return rows


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of one or more values."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan)


def _columns(results: Iterable[Result]) -> dict[str, list[float]]:
    """Values of each metric that all results have."""
    listed = list(results)
    return {
        name: [result.metrics[name] for result in listed]
        for name in METRICS
        if all(name in result.metrics for result in listed)
    }


def _differences(own: dict[int, Result], base: dict[int, Result]) -> dict[str, Difference]:
    seeds = sorted(own.keys() & base.keys())
    if not seeds:
        return {}
    mine, theirs = (_columns(side[seed] for seed in seeds) for side in (own, base))
    found = {}
    for name in mine.keys() & theirs.keys():
        mean, deviation = spread([a - b for a, b in zip(mine[name], theirs[name], strict=True)])
        found[name] = Difference(mean, deviation / math.sqrt(len(seeds)), len(seeds))
    return found


def results_csv(results: Iterable[Result]) -> str:
    """CSV with one line per run, from which all other numbers are computed."""
    lines = [["method", "known", "seed", "split", *METRICS]]
    for result in results:
        numbers = [repr(result.metrics[name]) if name in result.metrics else "" for name in METRICS]
        lines.append([result.method, result.known, str(result.seed), result.split, *numbers])
    return _csv(lines)


def table_csv(rows: Iterable[Row]) -> str:
    """CSV with one line per row of the table, numbers unrounded."""
    suffixes = ("", "_deviation", "_difference", "_difference_error", "_verdict")
    lines = [["method", "known", "num_seeds", *(f"{name}{suffix}" for name in METRICS for suffix in suffixes)]]
    for row in rows:
        cells: list[str] = [row.method, row.known, str(row.num_seeds)]
        for name in METRICS:
            own, difference = row.spreads.get(name), row.differences.get(name)
            cells += ["", ""] if own is None else [repr(own.mean), _number(own.deviation)]
            cells += (
                ["", "", ""]
                if difference is None
                else [repr(difference.mean), _number(difference.error), difference.verdict]
            )
        lines.append(cells)
    return _csv(lines)


def rows_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The table as plain dictionaries; numbers that need several seeds are None for one."""
    return [
        {
            "method": row.method,
            "known": row.known,
            "num_seeds": row.num_seeds,
            **{name: without_nan(own._asdict()) for name, own in row.spreads.items()},
            "differences": {
                name: without_nan(one._asdict()) | {"verdict": one.verdict} for name, one in row.differences.items()
            },
        }
        for row in rows
    ]


def _number(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _csv(lines: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
