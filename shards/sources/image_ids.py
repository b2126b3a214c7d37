"""Owns image ids of 16 hexadecimal digits as 64-bit numbers: parsing, formatting, and look-up in a list."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.sources.csv_blocks import Block, RowCheck, Wrong

COLUMN = "ImageID"

Ids = npt.NDArray[np.uint64]

_TEXT = pa.binary(16)
_DIGITS = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
_INVALID = 255
_VALUES = np.full(256, _INVALID, dtype=np.uint8)  # value of each byte as a hexadecimal digit
_VALUES[_DIGITS] = np.arange(16)

_COMPACT_ABOVE = 4 << 20  # ids that a set may hold beyond twice its distinct ones before duplicates are removed


def parse_ids(texts: npt.NDArray[np.uint8]) -> Ids | None:
    """Parse ids.

    Args:
        texts: (n, 16) uint8, the texts' bytes.

    Returns:
        (n,) uint64 ids; None if a byte is not a lower-case hexadecimal digit.
    """
    digits = _VALUES[texts]  # (n, 16)
    if (digits == _INVALID).any():
        return None
    pairs = (digits[:, 0::2] << 4) | digits[:, 1::2]  # (n, 8), the highest first
    return pairs.view(">u8").reshape(-1).astype(np.uint64)


def format_ids(ids: Ids) -> pa.StringArray:
    """Format (n,) ids as texts of 16 hexadecimal digits."""
    pairs = ids.astype(">u8").view(np.uint8).reshape(-1, 8)
    digits = np.empty((len(pairs), 16), dtype=np.uint8)
    digits[:, 0::2], digits[:, 1::2] = _DIGITS[pairs >> 4], _DIGITS[pairs & 15]
    texts = pa.FixedSizeBinaryArray.from_buffers(_TEXT, len(ids), [None, pa.py_buffer(digits)])
    return texts.cast(pa.binary()).cast(pa.string())


def format_id(image: int) -> str:
    """Format one id as 16 hexadecimal digits."""
    return f"{image:016x}"


def wrong_id(cells: Mapping[str, str]) -> Wrong | None:
    """The fault in a row's id; None if it is valid."""
    if re.fullmatch("[0-9a-f]{16}", cells[COLUMN]):
        return None
    return Wrong(f"image id {cells[COLUMN]!r}", "16 hexadecimal digits in lower case, such as 000026e7ee790996")


class RowIds(NamedTuple):
    """The ids of rows without consecutive repeats, since label files keep an image's rows together."""

    ids: Ids  # (m,)
    runs: npt.NDArray[np.int64]  # (n,) position in `ids` of each row's id


def read_rows(
    block: Block, types: Mapping[str, pa.DataType], check: RowCheck, *, may_be_empty: str = ""
) -> tuple[pa.Table, RowIds]:
    """Parse columns of a block, and its ids.

    Args:
        block: a block with a column of ids.
        types: types of the columns to parse besides the ids.
        check: returns what is wrong with a row, or None.
        may_be_empty: a column that may have empty cells, which become null.

    Raises:
        DataError: an unreadable row, an empty cell, or an invalid id; the message names its line.
    """
    try:
        table = block.table({COLUMN: _TEXT, **types})
    except pa.ArrowInvalid as error:
        raise block.fault(check, str(error).splitlines()[0]) from error
    if any(table[column].null_count for column in table.column_names if column != may_be_empty):
        raise block.fault(check, "an empty cell")
    texts = _bytes_of(table[COLUMN])
    halves = texts.view(np.uint64)  # (n, 2)
    is_start = np.ones(len(texts), dtype=bool)
    is_start[1:] = (halves[1:, 0] != halves[:-1, 0]) | (halves[1:, 1] != halves[:-1, 1])
    ids = parse_ids(texts[is_start])
    if ids is None:
        raise block.fault(check, "an image id that is no hexadecimal number")
    return table, RowIds(ids, np.cumsum(is_start) - 1)


def _bytes_of(column: Any) -> npt.NDArray[np.uint8]:
    """The bytes of a column of type `_TEXT`, (n, 16) uint8."""
    array = pa.concat_arrays(column.chunks)
    return np.frombuffer(array.buffers()[1], dtype=np.uint8).reshape(-1, 16)[array.offset :][: len(array)]


def repeated_id(ids: Ids) -> int | None:
    """The lowest id that occurs more than once; None if all differ."""
    ordered = np.sort(ids)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    return int(repeated[0]) if len(repeated) else None


class IdPlaces:
    """Looks up the positions of ids in a list.

    Args:
        ids: (N,) uint64, the list; all different.
    """

    def __init__(self, ids: Ids) -> None:
        self._order = np.argsort(ids)
        self._sorted = ids[self._order]

    def __len__(self) -> int:
        return len(self._sorted)

    def find(self, ids: Ids) -> npt.NDArray[np.int64]:
        """(n,) int64 positions of (n,) ids, -1 for ids not in the list."""
        if not len(self):
            return np.full(len(ids), -1, dtype=np.int64)
        nearest = np.minimum(np.searchsorted(self._sorted, ids), len(self) - 1)
        return np.where(self._sorted[nearest] == ids, self._order[nearest], -1)


class IdSet:
    """Collects distinct ids from parts that repeat them; memory stays about twice that of the distinct ids."""

    def __init__(self) -> None:
        self._parts: list[Ids] = []
        self._num_held, self._num_distinct = 0, 0

    def add(self, ids: Ids) -> None:
        """Add some ids."""
        self._parts.append(ids)
        self._num_held += len(ids)
        if self._num_held > 2 * self._num_distinct + _COMPACT_ABOVE:
            self.sorted()

    def sorted(self) -> Ids:
        """All distinct ids, ascending."""
        distinct = np.unique(np.concatenate(self._parts)) if self._parts else np.empty(0, dtype=np.uint64)
        self._parts, self._num_held, self._num_distinct = [distinct], len(distinct), len(distinct)
        return distinct
