"""Owns reading data sets whose labels are CSV tables: an image's name, the names of its classes, its split."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Container, Iterator, Sequence
from typing import NamedTuple

from pydantic import Field

from dist_mlpl import storage
from dist_mlpl.data.manifest import MAX_CLASSES, ClassEntry
from dist_mlpl.errors import DataError, StorageError, nearest_names
from dist_mlpl.labels import Unlisted
from dist_mlpl.settings import Settings
from shards.sources.base import Record, Records, Source, key_of

_SEPARATOR = "|"


class TableSettings(Settings):
    """Files of a data set in CSV tables."""

    images: str = Field(description="folder of the images")
    labels: str = Field(description="CSV: image,labels with all else absent, or image,positives,negatives")
    classes: str | None = Field(None, description="CSV whose first column lists the classes in order")
    splits: str | None = Field(None, description="CSV: image,split; without it all are train")


class _Row(NamedTuple):
    line: int  # 1-based line of the file
    cells: tuple[str, ...]


class _Table(NamedTuple):
    """A CSV file that was read whole."""

    url: str
    columns: tuple[str, ...]
    rows: list[_Row]
    sha256: str

    def fault(
        self, line: int, found: str, expected: str, next_step: str = "correct the file and run again"
    ) -> DataError:
        return DataError(found, expected=expected, where=f"{storage.shown(self.url)}, line {line}", next_step=next_step)

    def column(self, name: str) -> int:
        """Position of a column.

        Raises:
            DataError: no such column.
        """
        if name not in self.columns:
            raise self.fault(1, f"columns {', '.join(self.columns)}", f"a column named {name!r}")
        return self.columns.index(name)


def read_table(images: str, labels: str, *, classes: str | None = None, splits: str | None = None) -> Source:
    """Read a data set from CSV files, each a local path or URL, in UTF-8 with a header line.

    Args:
        images: folder or URL that image names are relative to.
        labels: columns `image,labels` with the names of present classes joined by `|`, all others being absent;
            or `image,positives,negatives`, all others being unknown.
        classes: its first column lists the classes in order; None for the names in `labels`, sorted.
        splits: columns `image,split` for the same images as in `labels`; None puts all into `train`.

    Returns:
        The source, with records in the row order of `labels`.

    Raises:
        DataError: an empty file, broken quoting, a missing column, an unknown class, a class listed twice for an image,
            an image or key that occurs twice, a path that leaves the folder, or an image in only one of `labels` and
            `splits`; the message names file and line.
        StorageError: a file is missing or cannot be read.
    """
    table = _read(labels)
    rows, unlisted = _labels(table)
    class_table = None if classes is None else _read(classes)
    names = _sorted_names(rows) if class_table is None else _class_names(class_table)
    if not 0 < len(names) <= MAX_CLASSES:
        raise table.fault(1, f"{len(names)} classes", f"1 to {MAX_CLASSES}")
    split_table = None if splits is None else _read(splits)
    split_of = (lambda _: "train") if split_table is None else _split_of(split_table, table, rows)
    columns = {name: column for column, name in enumerate(names)}
    records = [
        Record(
            image=row.image,
            split=split_of(row.image),
            positives=_columns(table, row, row.positives, columns),
            negatives=_columns(table, row, row.negatives, columns),
            source_row=number,
        )
        for number, row in enumerate(rows)
    ]
    for record, row in zip(records, rows, strict=True):
        if both := set(record.positives) & set(record.negatives):
            raise table.fault(row.line, f"class {names[min(both)]!r} both present and absent", "one of the two")
    parts = {"labels": table, "classes": class_table, "splits": split_table}
    return Source(
        name="table",
        images=storage.absolute(images),
        classes=tuple(ClassEntry(id=name, name=name) for name in names),
        unlisted=unlisted,
        arguments={f"{part}_sha256": read.sha256 for part, read in parts.items() if read is not None},
        records=Records.of(records),
    )


def _fault(url: str, line: int, found: str, expected: str) -> DataError:
    where = f"{storage.shown(url)}, line {line}"
    return DataError(found, expected=expected, where=where, next_step="correct the file and run again")


def _read(url: str) -> _Table:
    digest = hashlib.sha256()
    columns: tuple[str, ...] = ()
    rows: list[_Row] = []
    line = 0

    def lines() -> Iterator[str]:
        nonlocal line
        with storage.open_read(url) as stream:
            for content in stream:
                line += 1
                digest.update(content)
                yield content.decode("utf-8-sig" if line == 1 else "utf-8")

    def fault(found: str, expected: str) -> DataError:
        return _fault(url, max(line, 1), found, expected)

    try:
        for cells in csv.reader(lines(), strict=True):
            if not cells:
                continue  # a blank line
            if not columns:
                columns = tuple(cells)
            elif len(cells) != len(columns):
                raise fault(f"{len(cells)} cells", f"{len(columns)}, as many as columns ({', '.join(columns)})")
            else:
                rows.append(_Row(line, tuple(cells)))
    except FileNotFoundError as error:
        raise storage.missing(url, what="the table", next_step="correct the path or URL") from error
    except csv.Error as error:
        raise fault(f"a line that does not read as CSV: {error}", "cells separated by commas, quotes closed") from error
    except UnicodeDecodeError as error:
        raise fault(f"bytes that are not UTF-8: {error.reason}", "a file in UTF-8") from error
    except OSError as error:
        raise StorageError(
            f"the table cannot be read: {error}",
            expected="a CSV file that may be read",
            where=storage.shown(url),
            next_step="check the path and its permissions",
        ) from error
    if not rows:
        raise fault("no row of data" if columns else "an empty file", "a header line and at least one row")
    if len(set(columns)) != len(columns):
        line = 1
        raise fault(f"columns {', '.join(columns)}", "every column once")
    return _Table(url, columns, rows, digest.hexdigest())


class _Labelled(NamedTuple):
    """One row of the labels, with classes as names."""

    line: int
    image: str
    key: str
    positives: str
    negatives: str


def _labels(table: _Table) -> tuple[list[_Labelled], Unlisted]:
    image = table.column("image")
    if "labels" in table.columns and "positives" in table.columns:
        raise table.fault(1, "both `labels` and `positives`", "image,labels or image,positives,negatives")
    unlisted: Unlisted
    if "positives" in table.columns:
        positives, negatives, unlisted = table.column("positives"), table.column("negatives"), "unknown"
    else:
        positives, negatives, unlisted = table.column("labels"), None, "absent"
    rows = [
        _Labelled(
            line,
            _checked_path(table, line, cells[image]),
            key_of(cells[image]),
            cells[positives],
            "" if negatives is None else cells[negatives],
        )
        for line, cells in table.rows
    ]
    seen: dict[str, _Labelled] = {}
    for row in rows:
        if first := seen.get(row.key):
            same = "image" if first.image == row.image else "key (the name without its ending)"
            found = f"{row.image!r} and {first.image!r} of line {first.line} have the same {same}"
            raise table.fault(row.line, found, "every image once, with a key of its own")
        seen[row.key] = row
    return rows, unlisted


def _checked_path(table: _Table, line: int, path: str) -> str:
    parts = path.split("/")
    if not path or "://" in path or "\\" in path or any(part in ("", ".", "..") for part in parts):
        raise table.fault(line, f"image {path!r}", "a path below the image folder, with `/` between its parts")
    return path


def _sorted_names(rows: Sequence[_Labelled]) -> list[str]:
    return sorted({name for row in rows for text in (row.positives, row.negatives) for name in _names(text)})


def _names(text: str) -> list[str]:
    return text.split(_SEPARATOR) if text else []


def _class_names(table: _Table) -> list[str]:
    names: list[str] = []
    known: set[str] = set()
    for line, cells in table.rows:
        name = cells[0]
        if not name or _SEPARATOR in name or name in known:
            raise table.fault(line, f"class {name!r}", f"a name without {_SEPARATOR!r} that no other line has")
        names.append(name)
        known.add(name)
    return names


def _columns(table: _Table, row: _Labelled, text: str, columns: dict[str, int]) -> tuple[int, ...]:
    """Ascending class columns of names joined by `|`."""
    names = _names(text)
    for name in names:
        if not name:
            raise table.fault(row.line, f"an empty class name in {text!r}", f"names joined by single {_SEPARATOR!r}")
        if name not in columns:
            raise table.fault(row.line, f"unknown class {name!r}", nearest_names(name, columns))
    if len(set(names)) != len(names):
        raise table.fault(row.line, f"a class listed twice in {text!r}", "every class once")
    return tuple(sorted(columns[name] for name in names))


def _split_of(table: _Table, labels: _Table, rows: Sequence[_Labelled]) -> Callable[[str], str]:
    image, split = table.column("image"), table.column("split")
    splits: dict[str, str] = {}
    for line, cells in table.rows:
        if cells[image] in splits:
            raise table.fault(line, f"image {cells[image]!r} again", "every image once")
        splits[cells[image]] = cells[split]
    _refuse_strangers(labels, [(row.line, row.image) for row in rows], splits, table)
    labelled = {row.image for row in rows}
    _refuse_strangers(table, [(line, cells[image]) for line, cells in table.rows], labelled, labels)
    return splits.__getitem__


def _refuse_strangers(table: _Table, images: list[tuple[int, str]], known: Container[str], other: _Table) -> None:
    """Refuse images of one table that the other lacks."""
    strangers = [(line, image) for line, image in images if image not in known]
    if strangers:
        shown = ", ".join(f"{image!r} (line {line})" for line, image in strangers[:5])
        more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
        found = f"{len(strangers)} images that {storage.shown(other.url)} lacks: {shown}{more}"
        raise table.fault(strangers[0][0], found, f"a row for each in {storage.shown(other.url)}")
