"""Owns reading data sets whose labels are CSV tables: an image's name, the names of its classes, its split."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from pydantic import Field

from dist_mlpl import storage
from dist_mlpl.data.manifest import MAX_CLASSES, ClassEntry
from dist_mlpl.errors import DataError, StorageError, nearest_names
from dist_mlpl.labels import Unlisted
from dist_mlpl.settings import Settings
from shards.sources.base import Record, Records, Source, key_of

_SEPARATOR = "|"
_FORMS = "a header line image,labels (classes not listed are absent) or image,positives,negatives (they are unknown)"
_SHOWN = 20  # classes that a note lists


class TableSettings(Settings):
    """Files of a data set in CSV tables."""

    images: str = Field(description="folder of the images")
    labels: str = Field(description="CSV: image,labels with all else absent, or image,positives,negatives")
    classes: str | None = Field(None, description="CSV with a header line; its first column lists the classes in order")
    splits: str | None = Field(None, description="CSV: image,split for the same images; without it all are train")


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
            raise self.fault(1, self.header, f"a header line with a column named {name!r}")
        return self.columns.index(name)

    @property
    def header(self) -> str:
        """The columns, for messages."""
        return f"columns {', '.join(self.columns)}"


def read_table(images: str, labels: str, *, classes: str | None = None, splits: str | None = None) -> Source:
    """Read a data set from CSV files, each a local path or URL, in UTF-8 with a header line.

    Blanks around cells and around the names in a cell are left out.

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
    if class_table is not None:
        _refuse_lost_header(table, rows, columns, class_table)
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
        notes=() if classes is not None else _notes(names, records, labels),
    )


def _notes(names: Sequence[str], records: Sequence[Record], labels: str) -> tuple[str, ...]:
    """What a person should know of classes that no list fixes: which were found, and which may be typing mistakes."""
    listed = _listed(names)
    notes = [f"without a list of classes, {len(names)} were found in {storage.shown(labels)}: {listed}"]
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault("".join(name.split()).casefold(), []).append(name)
    same = [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
    if same:
        notes.append(f"classes that differ in case or blanks alone, yet count as different ones: {_listed(same)}")
    times = Counter(chain.from_iterable(record.positives for record in records))
    single = [name for column, name in enumerate(names) if times[column] <= 1]
    if single:
        notes.append(f"present in one image at most, perhaps a typing mistake: {_listed(single)}")
    return tuple(notes)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _refuse_lost_header(table: _Table, rows: Sequence[_Labelled], columns: dict[str, int], class_table: _Table) -> None:
    """Refuse a list of classes whose first line, taken for its header, is a class of the labels."""
    first = class_table.columns[0]
    if first in columns:
        return
    shown = storage.shown(class_table.url)
    for row in rows:
        if any(first in text and first in _names(text) for text in (row.positives, row.negatives)):
            raise table.fault(
                row.line,
                f"unknown class {first!r}: the first line of {shown}, {first!r}, was taken for the header",
                "a list of classes that begins with a header line, such as `class`",
                f"add a header line to {shown} and run again",
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
        for cells in csv.reader(lines(), strict=True, skipinitialspace=True):
            if not cells:
                continue  # a blank line
            if not columns:
                columns = tuple(map(str.strip, cells))
            elif len(cells) != len(columns):
                raise fault(f"{len(cells)} cells", f"{len(columns)}, as many as columns ({', '.join(columns)})")
            else:
                rows.append(_Row(line, tuple(map(str.strip, cells))))
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
    image = _image_column(table)
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


def _image_column(table: _Table) -> int:
    """Position of the images, after checking that the columns are those of one of the two forms."""
    there = set(table.columns)
    if "labels" in there and "positives" in there:
        raise table.fault(1, "both `labels` and `positives`", _FORMS)
    if {"image", "positives"} <= there and "negatives" not in there:
        step = "rename `positives` to `labels` if classes not listed are absent; else add a column `negatives`, its "
        raise table.fault(1, table.header, _FORMS, f"{step}cells empty where no class is known to be absent")
    if "image" not in there or not there & {"labels", "positives"}:
        raise table.fault(1, table.header, _FORMS)
    return table.column("image")


def _checked_path(table: _Table, line: int, path: str) -> str:
    parts = path.split("/")
    if not path or "://" in path or "\\" in path or any(part in ("", ".", "..") for part in parts):
        raise table.fault(line, f"image {path!r}", "a path below the image folder, with `/` between its parts")
    return path


def _sorted_names(rows: Sequence[_Labelled]) -> list[str]:
    texts = {text for row in rows for text in (row.positives, row.negatives)}  # cells repeat
    return sorted({name for text in texts for name in _names(text)})


def _names(text: str) -> list[str]:
    """The names in a cell, without blanks around them."""
    return list(map(str.strip, text.split(_SEPARATOR))) if text else []


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
