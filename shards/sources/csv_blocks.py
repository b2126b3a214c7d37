"""Owns reading CSV files too large for memory: blocks of whole rows, parsed by threads, errors with line numbers."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.csv

from dist_mlpl import storage
from dist_mlpl.errors import DataError, StorageError
from shards.sources.files import fault

T = TypeVar("T")

BLOCK_BYTES = 4 << 20
_MAX_ROW_BYTES = 8 * BLOCK_BYTES  # a longer row has an unclosed quote, or the file is not CSV
_THREADS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class Wrong(NamedTuple):
    """A fault in one row."""

    found: str
    expected: str


RowCheck = Callable[[Mapping[str, str]], Wrong | None]  # from cells by column to what is wrong with the row


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """Whole rows of a file, without the header.

    Args:
        url: the file.
        columns: all columns of the file, in order.
        line: 1-based line of the file in which the first row begins.
        content: the rows' bytes.
    """

    url: str
    columns: tuple[str, ...]
    line: int
    content: bytes

    def table(self, types: Mapping[str, pa.DataType]) -> pa.Table:
        """Parse some columns, each to the given type; an empty cell is null, except in text columns.

        Raises:
            pa.ArrowInvalid: a row of another length, a cell of another type, or text not in UTF-8; `fault` says where.
        """
        has_quotes = b'"' in self.content
        return pyarrow.csv.read_csv(
            pa.BufferReader(self.content),
            pyarrow.csv.ReadOptions(
                use_threads=False, block_size=len(self.content) + 1, column_names=list(self.columns)
            ),
            pyarrow.csv.ParseOptions(quote_char='"' if has_quotes else False, newlines_in_values=has_quotes),
            pyarrow.csv.ConvertOptions(column_types=dict(types), include_columns=list(types), null_values=[""]),
        )

    def fault(self, check: RowCheck, doubt: str) -> DataError:
        """The error for the first wrong row, found by parsing the block again slowly; the caller raises it.

        Args:
            check: returns what is wrong with a row that has the right number of cells, or None.
            doubt: what to report for the whole block if no row is found.
        """
        line, end = self.line, self.line
        lines = self._decoded()
        reader = csv.reader(lines, strict=True)
        try:
            for cells in reader:
                end = self.line + reader.line_num
                if cells and len(cells) != len(self.columns):
                    expected = f"{len(self.columns)}, as many as columns ({', '.join(self.columns)})"
                    return fault(self.url, f"line {line}", f"{len(cells)} cells", expected)
                if cells and (wrong := check(dict(zip(self.columns, cells, strict=True)))):
                    return fault(self.url, f"line {line}", *wrong)
                line = end
        except csv.Error as error:
            found = f"a row that does not read as CSV: {error}"
            return fault(self.url, f"line {line}", found, "cells separated by commas, quotes closed")
        except UnicodeDecodeError as error:
            found = f"bytes that are not UTF-8: {error.reason}"
            return fault(self.url, f"line {self.line + reader.line_num}", found, "a file in UTF-8")
        return fault(self.url, f"lines {self.line} to {max(end - 1, self.line)}", doubt, "rows as the header says")

    def _decoded(self) -> Iterator[str]:
        for content in self.content.splitlines(keepends=True):
            yield content.decode("utf-8")


class CsvFile:
    """A CSV file with a header line, in UTF-8, local or remote, of any size.

    Args:
        url: the file.
        needed: columns that must exist.
        what: what the file is, for messages.
        option: the source's option that names it, for messages.
    """

    def __init__(self, url: str, needed: Sequence[str], *, what: str, option: str) -> None:
        self.url = url
        self._needed, self._what, self._option = tuple(needed), what, option
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Digest of the file, valid once it has been read to its end."""
        return self._digest.hexdigest()

    def map(self, work: Callable[[Block], T]) -> Iterator[T]:
        """Apply `work` to each block, on several threads a few blocks ahead; results are in the file's order.

        Raises:
            DataError: no header, a column missing or twice, no row, or an unclosed quote.
            StorageError: the file is missing or cannot be read.
            Exception: whatever `work` raises, for the first block on which it fails.
        """
        waiting: deque[Future[T]] = deque()
        with ThreadPoolExecutor(_THREADS, "csv") as pool:
            try:
                for block in self._blocks():
                    waiting.append(pool.submit(work, block))
                    if len(waiting) > _THREADS:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _blocks(self) -> Iterator[Block]:
        self._digest = hashlib.sha256()
        columns: tuple[str, ...] = ()
        line, rest, has_rows = 1, b"", False
        for content in self._read():
            is_last = not content
            rest += content
            if not columns:
                if not is_last and b"\n" not in rest and len(rest) <= _MAX_ROW_BYTES:
                    continue
                header, _, rest = rest.partition(b"\n")
                columns, line = self._columns(header), 2
            length = _whole_rows(rest)
            if is_last and rest.count(b'"') % 2 == 0:
                length = len(rest)
            if (is_last and length < len(rest)) or len(rest) - length > _MAX_ROW_BYTES:
                bad = Block(self.url, columns, line + rest.count(b"\n", 0, length), rest[length:])
                raise bad.fault(lambda _: None, f"a row of more than {_MAX_ROW_BYTES:,} bytes")
            block, rest = rest[:length], rest[length:]
            if block.strip():
                has_rows = True
                yield Block(self.url, columns, line, block)
            line += block.count(b"\n")
        if not has_rows:
            raise fault(self.url, "line 1", "no row of data", "a header line and at least one row")

    def _read(self) -> Iterator[bytes]:
        """The file in pieces, then an empty piece."""
        try:
            with storage.open_read(self.url) as stream:
                while content := stream.read(BLOCK_BYTES):
                    self._digest.update(content)
                    yield content
            yield b""
        except FileNotFoundError as error:
            raise storage.missing(
                self.url, what=self._what, next_step=f"correct `{self._option}`, or put the file there"
            ) from error
        except OSError as error:
            raise StorageError(
                f"{self._what} cannot be read: {error}",
                expected="a CSV file that may be read",
                where=storage.shown(self.url),
                next_step="check the path and its permissions",
            ) from error

    def _columns(self, header: bytes) -> tuple[str, ...]:
        def wrong(found: str) -> DataError:
            return fault(self.url, "line 1", found, f"a header with {', '.join(self._needed)}, every column once")

        try:
            columns = tuple(next(csv.reader([header.decode("utf-8-sig").rstrip("\r")], strict=True), []))
        except (UnicodeDecodeError, csv.Error) as error:
            raise wrong(f"a header that does not read: {error}") from error
        if not columns:
            raise wrong("an empty file")
        missing = [column for column in self._needed if column not in columns]
        if missing or len(set(columns)) != len(columns):
            shown = ", ".join(columns)
            raise wrong(f"columns {shown[:200]}{' ...' * (len(shown) > 200)}")
        return columns


def _whole_rows(content: bytes) -> int:
    """Number of bytes up to the last line end outside quotes; 0 if there is none.

    A quote inside a quoted cell is doubled, so a line end is outside quotes when the quotes before it are even.
    """
    end = content.rfind(b"\n") + 1
    if b'"' not in content:
        return end
    is_inside = content.count(b'"', 0, end) % 2 == 1
    while end and is_inside:
        before = content.rfind(b"\n", 0, content.rfind(b'"', 0, end)) + 1
        is_inside ^= content.count(b'"', before, end) % 2 == 1
        end = before
    return end
