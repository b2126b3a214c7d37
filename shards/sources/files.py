"""Owns reading label files for all sources: bytes with a digest, lines, CSV, JSON, and errors that name the place."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dist_mlpl import storage
from dist_mlpl.data.manifest import MAX_CLASSES, ClassEntry
from dist_mlpl.errors import DataError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")

_READERS = 16  # threads, as each small file in a bucket costs a round trip
_ALLOWED = "correct the file and run again"


def fault(url: str, place: str, found: str, expected: str, *, next_step: str = _ALLOWED) -> DataError:
    """The error for a fault at one place of a label file; the caller raises it.

    Args:
        url: the file.
        place: place in the file, such as `line 3` or `annotations[17]`; empty for the whole file.
        found, expected, next_step: see `MlplError`.
    """
    where = f"{storage.shown(url)}, {place}" if place else storage.shown(url)
    return DataError(found, expected=expected, where=where, next_step=next_step)


@dataclass(frozen=True, eq=False, slots=True)
class LabelFile:
    """A file that was read whole.

    Args:
        url: its path or URL.
        content: its bytes.
    """

    url: str
    content: bytes

    @property
    def sha256(self) -> str:
        """Digest of the bytes."""
        return storage.sha256_of_bytes(self.content)

    def fault(self, place: str, found: str, expected: str) -> DataError:
        """The error for a fault at one place of this file; see the function `fault`."""
        return fault(self.url, place, found, expected)

    def text(self) -> str:
        """The content decoded from UTF-8, without a byte order mark.

        Raises:
            DataError: not UTF-8.
        """
        try:
            return self.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = self.content.count(b"\n", 0, error.start) + 1
            raise self.fault(f"line {line}", f"bytes that are not UTF-8: {error.reason}", "a file in UTF-8") from error

    def lines(self) -> list[tuple[int, str]]:
        """Non-blank lines, stripped, each with its number from 1.

        Raises:
            DataError: not UTF-8, or no line at all.
        """
        found = [(number, line.strip()) for number, line in enumerate(self.text().split("\n"), 1) if line.strip()]
        if not found:
            raise self.fault("", "an empty file", "at least one line")
        return found

    def rows(self, columns: Sequence[str], *, optional: Sequence[str] = ()) -> list[tuple[int, tuple[str, ...]]]:
        """Rows of a CSV file with a header, each with the number of its last line.

        Args:
            columns: columns that must exist, in any order; other columns are ignored.
            optional: columns that may exist; otherwise their cells are "".

        Returns:
            For each row, the cells of `columns`, then of `optional`.

        Raises:
            DataError: not UTF-8, broken quoting, a column missing or twice, a row of another length, no row.
        """
        reader = csv.reader(io.StringIO(self.text(), newline=""), strict=True)
        header: list[str] = []
        places: list[int | None] = []
        found: list[tuple[int, tuple[str, ...]]] = []
        try:
            for cells in reader:
                if not cells:
                    continue  # a blank line
                if not header:
                    header = cells
                    places = self._places(header, columns, optional)
                elif len(cells) != len(header):
                    line = f"line {reader.line_num}"
                    raise self.fault(line, f"{len(cells)} cells", f"{len(header)}, as many as the header has")
                else:
                    found.append((reader.line_num, tuple("" if at is None else cells[at] for at in places)))
        except csv.Error as error:
            line = f"line {max(reader.line_num, 1)}"
            raise self.fault(line, f"not CSV: {error}", "cells separated by commas, quotes closed") from error
        if not found:
            raise self.fault("", "no row of data", f"a header with {', '.join(columns)} and at least one row")
        return found

    def _places(self, header: list[str], columns: Sequence[str], optional: Sequence[str]) -> list[int | None]:
        missing = [column for column in columns if column not in header]
        if missing or len(set(header)) != len(header):
            raise self.fault("line 1", f"columns {', '.join(header)}", f"{', '.join(columns)}, every column once")
        return [header.index(column) if column in header else None for column in (*columns, *optional)]

    def json(self, *, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
        """Parse the content as JSON.

        Args:
            object_hook: reduces each object, innermost first, so that large files are never in memory as full objects.

        Raises:
            DataError: not JSON.
        """
        try:
            return json.loads(self.content, object_hook=object_hook)
        except json.JSONDecodeError as error:
            raise self.fault(f"line {error.lineno}, column {error.colno}", f"not JSON: {error.msg}", "JSON") from error
        except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, nested too deep
            raise self.fault("", f"not JSON: {error}", "JSON in UTF-8") from error


def read_file(url: str, *, what: str, option: str) -> LabelFile:
    """Read a file whole.

    Args:
        url: path or URL.
        what: what the file is, for messages.
        option: the source's option that names it, for messages.

    Raises:
        StorageError: it is missing or cannot be read.
    """
    try:
        return LabelFile(url, storage.read_bytes(url))
    except FileNotFoundError as error:
        raise storage.missing(url, what=what, next_step=f"correct `{option}`, or put the file there") from error


def read_many(urls: Sequence[str], *, what: str, option: str) -> Iterator[LabelFile]:
    """Read small files, several at a time, in the order given; the first error ends it. Raises as `read_file`."""
    pool = ThreadPoolExecutor(min(_READERS, max(len(urls), 1)), "labels")
    try:
        yield from pool.map(lambda url: read_file(url, what=what, option=option), urls)
    finally:
        pool.shutdown(cancel_futures=True)


def sha256_of_many(files: Iterable[LabelFile]) -> str:
    """A sha256 over the digests of several files, in their order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.content).digest())
    return digest.hexdigest()


def list_images(folder: str, *, option: str) -> tuple[list[str], int]:
    """List the images below a folder, by their endings.

    Returns:
        Sorted paths relative to the folder, and the number of other files.

    Raises:
        StorageError: no such folder.
        DataError: no image in it.
    """
    try:
        names = list(storage.list_files(folder))
    except FileNotFoundError as error:
        raise storage.missing(folder, what="the folder", next_step=f"correct `{option}`") from error
    images = [name for name in names if name.lower().endswith(IMAGE_ENDINGS)]
    if not images:
        step = f"correct `{option}`"
        raise fault(folder, "", f"no image among {len(names)} files", ", ".join(IMAGE_ENDINGS), next_step=step)
    return images, len(names) - len(images)


class ImagePaths:
    """Checks the image paths of one source: each must lie below the image folder, and be listed only once."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}

    def add(self, path: str, url: str, place: str) -> str:
        """Check an image's path, remember it, and return it.

        Args:
            path: the path as listed.
            url, place: where it is listed, for messages.

        Raises:
            DataError: the path leaves the folder, or was listed before.
        """
        if not path or "://" in path or "\\" in path or any(part in ("", ".", "..") for part in path.split("/")):
            raise fault(url, place, f"image {path!r}", "a path below the image folder, with `/` between its parts")
        where = f"{storage.name(url)}, {place}"
        if path in self._places:
            raise fault(url, place, f"image {path!r} again, listed in {self._places[path]}", "every image once")
        self._places[path] = where
        return path

    def __len__(self) -> int:
        return len(self._places)


def class_entries(ids: Sequence[str], names: Sequence[str], url: str) -> tuple[ClassEntry, ...]:
    """Make classes in column order.

    Args:
        ids, names: of equal length.
        url: the file they come from, for messages.

    Raises:
        DataError: no class or more than 65,536, an empty id, or an id twice.
    """
    if not 0 < len(ids) <= MAX_CLASSES:
        raise fault(url, "", f"{len(ids)} classes", f"1 to {MAX_CLASSES}")
    if "" in ids:
        raise fault(url, "", f"class {ids.index('')} without a name", "a name for every class")
    if len(set(ids)) != len(ids):
        repeated = next(name for place, name in enumerate(ids) if name in ids[:place])
        raise fault(url, "", f"class {repeated!r} twice", "every class once")
    return tuple(ClassEntry(id=key, name=name) for key, name in zip(ids, names, strict=True))


def read_class_names(url: str, *, option: str) -> tuple[tuple[ClassEntry, ...], LabelFile]:
    """Read classes from a file with one name per line, which is also the id.

    Raises:
        DataError: no class, or a name twice.
        StorageError: the file is missing.
    """
    file = read_file(url, what="the list of classes", option=option)
    names = [line for _, line in file.lines()]
    return class_entries(names, names, url), file
