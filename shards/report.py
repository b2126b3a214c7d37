"""Owns the display of a set's statistics: a page with charts, tables for a terminal, and counts and sizes as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt
from rich.table import Table

from dist_mlpl import storage
from shards.charts import GREEN, RED, VIOLET, Bar, bars, curves, heat_map, histogram, points
from shards.stats import BYTE_BINS, CONFIDENCE_BINS, SplitStatistics, Statistics

_TOP_CLASSES = 30
_MAP_CLASSES = 16
_PAIR_ROWS = 25
_PAIR_COLUMNS = 5  # columns that fit a terminal; the page also shows conditional probabilities
_MIN_TOGETHER = 5  # fewest images for a pair to be listed as surprising
_HISTOGRAM_BARS = 60

_STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #24292f; max-width: 1180px;
       margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #d0d7de; }
p.about { color: #57606a; margin-top: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e6e8eb; }
th:first-child, td:first-child, td.word, th.word { text-align: left; }
thead th { position: sticky; top: 0; background: #fff; border-bottom: 2px solid #d0d7de; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; align-items: flex-start; }
svg { max-width: 100%; height: auto; } summary { cursor: pointer; margin: 1rem 0 .5rem; }
"""


def counted(count: int, noun: str) -> str:
    """A count with its noun: `1 shard`, `2,000 shards`, `3 classes`."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{plural if count != 1 else ''}"


def size_text(num_bytes: int) -> str:
    """A size in the unit that suits it: `512 B`, `5.1 kB`, `26.3 MB`, `2,700.0 GB`."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    for unit, name in ((1e3, "kB"), (1e6, "MB")):
        if num_bytes < 999.95 * unit:  # more would read 1000.0
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes / 1e9:,.1f} GB"


def stats_page(statistics: Statistics) -> str:
    """The statistics as one self-contained HTML page."""
    manifest = statistics.manifest
    name = storage.name(manifest.url.rstrip("/"))
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="about">{escape(storage.shown(manifest.url))}, digest {manifest.digest[:16]}; '
        f"{manifest.num_classes:,} classes, those that an image does not list are {manifest.unlisted}."
        f"{_view_words(statistics)}</p>",
        _table(*_summary(statistics), num_words=1),
        '<h2>Classes</h2><div class="charts">',
        curves(
            [
                (f"{name}, {word}", np.sort(counts)[::-1].tolist())
                for name, split in statistics.splits.items()
                for word, counts in _frequency(split, statistics)
            ],
            title="Images by class, from the most frequent to the rarest",
            x="rank of the class",
            y="images",
        ),
        "</div>",
        _class_table(statistics),
    ]
    for split in statistics.splits.values():
        body += [f"<h2>{escape(split.name)}</h2>", *_split_parts(split, statistics)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}: statistics</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def stats_tables(statistics: Statistics) -> list[Table]:
    """The statistics in short, 80 characters wide: a column per split, the most frequent and rarest classes, pairs."""
    header, rows = _summary(statistics)
    columns = [list(column) for column in zip(header, *rows, strict=True)]
    tables = [_rich("", columns[0], columns[1:], num_words=1)]
    names = _names(statistics)
    for split in statistics.splits.values():
        order = np.argsort(-split.positives, kind="stable")
        shown = order if len(order) <= 16 else np.concatenate([order[:8], order[-8:]])
        title = f"{split.name}: classes" + ("" if len(order) <= 16 else ", top 8 and bottom 8")
        tables.append(
            _rich(title, ["class", "present", "absent", "unknown"], _class_rows(split, shown, names), num_words=1)
        )
        if len(split.pairs.both):
            header, rows = _pair_rows(split, split.pairs.top(8), names)
            narrow = [row[:_PAIR_COLUMNS] for row in [header, *rows]]
            tables.append(_rich(f"{split.name}: most often present together", narrow[0], narrow[1:], num_words=2))
    return tables


def _view_words(statistics: Statistics) -> str:
    view = statistics.view
    if view is None:
        return ""
    how = ", ".join(
        f"{word} {value}"
        for word, value in (
            ("fraction", view.fraction), ("seed", view.seed), ("flip present", view.flip_present),
            ("flip absent", view.flip_absent),
        )
        if value is not None
    )  # fmt: skip
    return (
        f" Split {escape(view.split)} is seen through the view {escape(storage.name(view.url))} "
        f"({escape(view.rule)}, {how}): {view.num_hidden:,} of {view.num_known:,} known labels hidden, "
        f"{view.num_replaced:,} replaced."
    )


def _summary(statistics: Statistics) -> tuple[list[str], list[list[str]]]:
    header = ["split", "images", "shards", "size", "present", "absent", "known", "present an image",
              "without any known", "without any present", "classes never present"]  # fmt: skip
    rows = [
        [
            split.name,
            f"{split.num_samples:,}",
            f"{split.num_shards:,}",
            size_text(split.num_bytes),
            f"{int(split.positives.sum()):,}",
            f"{int(split.negatives.sum()):,}",
            f"{split.density:.3g}" if 0 < split.density < 0.001 else f"{split.density:.1%}",
            f"{split.positives.sum() / max(1, split.num_samples):.2f}",
            f"{int(split.known_per_image[0]):,}",
            f"{int(split.positives_per_image[0]):,}",
            f"{int((split.positives == 0).sum()):,}",
        ]
        for split in statistics.splits.values()
    ]
    return header, rows


def _frequency(split: SplitStatistics, statistics: Statistics) -> list[tuple[str, npt.NDArray[np.int64]]]:
    """Numbers of present labels by class; also of absent ones where unlisted classes are unknown."""
    if statistics.manifest.unlisted == "absent":
        return [("present", split.positives)]
    return [("present", split.positives), ("absent", split.negatives)]


def _names(statistics: Statistics) -> list[str]:
    """Names of the classes, with the id where a name is not unique."""
    times = Counter(entry.name for entry in statistics.manifest.classes)
    return [
        entry.name if times[entry.name] == 1 else f"{entry.name} ({entry.id})" for entry in statistics.manifest.classes
    ]


def _split_parts(split: SplitStatistics, statistics: Statistics) -> list[str]:
    names = _names(statistics)
    order = np.argsort(-split.positives, kind="stable")
    top = [
        Bar(
            names[column],
            (
                (int(split.positives[column]), GREEN),
                *(((int(split.negatives[column]), RED),) if _lists_absence(statistics) else ()),
            ),
            _note(split, column, statistics),
        )
        for column in order[:_TOP_CLASSES]
    ]
    key = (("present", GREEN), ("absent", RED)) if _lists_absence(statistics) else ()
    charts = [
        bars(top, title="All classes" if len(top) == len(order) else f"The {len(top)} most frequent classes", key=key),
        histogram(_counts(split.positives_per_image), title="Present labels an image", x="labels"),
    ]
    if len(np.flatnonzero(split.known_per_image)) > 1:
        charts.append(histogram(_counts(split.known_per_image), title="Known labels an image", x="labels"))
    charts += [histogram(_byte_bars(split), title="Bytes an image", x="bytes, from"), _size_chart(split)]
    if split.confidences is not None and split.machine is not None:
        confidences = [(f"{place / CONFIDENCE_BINS:.2f}", int(count)) for place, count in enumerate(split.confidences)]
        title = f"{int(split.machine.sum()):,} machine labels by confidence"
        charts.append(histogram(confidences, title=title, x="confidence from", y="labels", colour=VIOLET))
    parts = [f'<div class="charts">{"".join(chart for chart in charts if chart)}</div>']
    if len(split.pairs.both):
        parts += ["<h3>Classes present together</h3>", _pair_words(split), _pair_map(split, order, names)]
        parts.append('<div class="charts">')
        parts.append(
            "<div><h4>Most often</h4>"
            + _table(*_pair_rows(split, split.pairs.top(_PAIR_ROWS), names), num_words=2)
            + "</div>"
        )
        parts.append(
            "<div><h4>Most surprisingly</h4>"
            + _table(*_pair_rows(split, _surprising(split), names), num_words=2)
            + "</div></div>"
        )
    return parts


def _lists_absence(statistics: Statistics) -> bool:
    return statistics.manifest.unlisted == "unknown" or statistics.view is not None


def _note(split: SplitStatistics, column: int, statistics: Statistics) -> str:
    present, absent = int(split.positives[column]), int(split.negatives[column])
    return f"{present:,} / {absent:,}" if _lists_absence(statistics) else f"{present:,}"


def _counts(histogram: npt.NDArray[np.int64]) -> list[tuple[str, int]]:
    """A bar for each count, or for equal ranges of counts if there are too many."""
    step = -(-len(histogram) // _HISTOGRAM_BARS)
    return [
        (str(start) if step == 1 else f"{start}-{start + step - 1}", int(histogram[start : start + step].sum()))
        for start in range(0, len(histogram), step)
    ]


def _byte_bars(split: SplitStatistics) -> list[tuple[str, int]]:
    used = np.flatnonzero(split.bytes_per_image)
    if not len(used):
        return []

    def words(place: int) -> str:
        size = 2.0 ** (place / 2)
        unit, word = (1e6, " MB") if size >= 1e6 else (1e3, " kB") if size >= 1e3 else (1.0, "")
        return f"{size / unit:.1f}{word}" if size < 10 * unit and word else f"{size / unit:.0f}{word}"

    return [(words(place), int(split.bytes_per_image[place])) for place in range(used[0], min(used[-1] + 1, BYTE_BINS))]


def _size_chart(split: SplitStatistics) -> str:
    if not len(split.sizes):
        return ""
    places = Counter((int(width), int(height)) for width, height in split.sizes)
    unread = f", {split.num_unreadable} unreadable" if split.num_unreadable else ""
    title = f"Width and height of {len(split.sizes):,} images{unread}"
    return points([(*place, count) for place, count in places.items()], title=title, x="pixels wide", y="pixels high")


def _pair_words(split: SplitStatistics) -> str:
    pairs = split.pairs
    some = "" if len(pairs.classes) == len(split.positives) else f" of the {len(pairs.classes):,} most frequent classes"
    return (
        f"<p>{len(pairs.both):,} pairs{some} occur together, of {pairs.num_known:,} that are known together anywhere. "
        "Counts are over images where both classes are known. Lift is how much more often than by chance.</p>"
    )


def _pair_map(split: SplitStatistics, order: npt.NDArray[np.int64], names: Sequence[str]) -> str:
    """P(column | row) among the most frequent classes."""
    shown = [int(column) for column in order[:_MAP_CLASSES] if split.positives[column] > 0]
    if len(shown) < 2:
        return ""
    pairs, place = split.pairs, {column: number for number, column in enumerate(shown)}
    # Pairs never present together are not listed: their share is 0 or undefined, and the list cannot tell which.
    shares: list[list[float | None]] = [[None] * len(shown) for _ in shown]
    for row in range(len(shown)):
        shares[row][row] = 1.0
    for number in np.flatnonzero(np.isin(pairs.first, shown) & np.isin(pairs.second, shown)):
        first, second = place[int(pairs.first[number])], place[int(pairs.second[number])]
        shares[first][second] = float(pairs.both[number] / pairs.first_known[number])
        shares[second][first] = float(pairs.both[number] / pairs.second_known[number])
    return heat_map(
        [names[column] for column in shown],
        shares,
        title="Given a row's class, how often a column's is there too; a dot: never",
        x="there too",
        y="given",
    )


def _surprising(split: SplitStatistics) -> npt.NDArray[np.int64]:
    """Positions of the pairs with the highest lift, among those present together at least _MIN_TOGETHER times."""
    lift = np.where(split.pairs.both >= _MIN_TOGETHER, split.pairs.lift(split.rate), -1.0)
    places = np.argsort(-lift, kind="stable")[:_PAIR_ROWS]
    return places[lift[places] >= 0]


def _pair_rows(
    split: SplitStatistics, places: npt.NDArray[np.int64], names: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    pairs, lift = split.pairs, split.pairs.lift(split.rate)
    header = ["class", "and", "together", "both known", "lift", "P(and | class)", "P(class | and)"]
    rows = [
        [
            names[pairs.first[place]],
            names[pairs.second[place]],
            f"{int(pairs.both[place]):,}",
            f"{int(pairs.known[place]):,}",
            f"{lift[place]:.3g}",
            f"{pairs.both[place] / pairs.first_known[place]:.1%}",
            f"{pairs.both[place] / pairs.second_known[place]:.1%}",
        ]
        for place in places
    ]
    return header, rows


def _class_rows(split: SplitStatistics, columns: npt.NDArray[np.int64], names: Sequence[str]) -> list[list[str]]:
    unknown = split.num_samples - split.positives - split.negatives
    return [
        [names[column], *(f"{int(counts[column]):,}" for counts in (split.positives, split.negatives, unknown))]
        for column in columns
    ]


def _class_table(statistics: Statistics) -> str:
    """An HTML table of all classes, in column order."""
    manifest, splits = statistics.manifest, list(statistics.splits.values())
    header = ["class", "id"]
    for split in splits:
        header += [f"{split.name}: present", "absent", "unknown"] + (["machine"] if split.machine is not None else [])
    rows = []
    for column, entry in enumerate(manifest.classes):
        row = [entry.name, entry.id]
        for split in splits:
            present, absent = int(split.positives[column]), int(split.negatives[column])
            row += [f"{present:,}", f"{absent:,}", f"{split.num_samples - present - absent:,}"]
            row += [f"{int(split.machine[column]):,}"] if split.machine is not None else []
        rows.append(row)
    return (
        f"<details><summary>All {manifest.num_classes:,} classes</summary>{_table(header, rows, num_words=2)}</details>"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, num_words: int) -> str:
    """An HTML table whose first `num_words` columns are text."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = [' class="word"' if place < num_words else "" for place in range(len(row))]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    lines = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', header)}</tr></thead><tbody>\n{lines}\n</tbody></table>"


def _rich(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, num_words: int) -> Table:
    table = Table(title=title or None, title_justify="left")
    for place, word in enumerate(header):
        is_word = place < num_words
        table.add_column(_plain(word), justify="left" if is_word else "right", no_wrap=not is_word, overflow="fold")
    for row in rows:
        table.add_row(*map(_plain, row))
    return table


def _plain(text: str) -> str:
    """Escape brackets, so that rich does not read them as markup."""
    return text.replace("[", "\\[")
