"""Owns the known labels of a shard as a sparse list in row-major order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dist_mlpl.data.shard_index import ShardIndex
from dist_mlpl.labels import ABSENT, PRESENT, Targets, Unlisted

_BLOCK_ENTRIES = 1 << 20  # labels listed at once: about 30 MB while they are sorted
_CLASS_BITS = 16  # class columns are uint16


class Entries(NamedTuple):
    """k known labels of a shard, in row-major order, or the labels that a view puts in their place.

    Args:
        rows: (k,) int32, row of the shard.
        classes: (k,) uint16, class column.
        values: (k,) int8, the label: -1 absent, 0 unknown, +1 present.
    """

    rows: npt.NDArray[np.int32]
    classes: npt.NDArray[np.uint16]
    values: Targets

    @property
    def codes(self) -> npt.NDArray[np.int64]:
        """(k,) one number per (row, class), ascending in row-major order."""
        return self.rows.astype(np.int64) << _CLASS_BITS | self.classes

    def where(self, mask: npt.NDArray[np.bool_]) -> Entries:
        """The entries that a (k,) mask selects."""
        return Entries(self.rows[mask], self.classes[mask], self.values[mask])

    @classmethod
    def join(cls, parts: list[Entries]) -> Entries:
        """Concatenate lists."""
        empty = Entries(np.empty(0, np.int32), np.empty(0, np.uint16), np.empty(0, np.int8))
        return cls(*(np.concatenate(columns) for columns in zip(empty, *parts, strict=True)))


def known_entries(index: ShardIndex, *, num_classes: int, unlisted: Unlisted) -> Iterator[Entries]:
    """Every known label of a shard, in blocks of whole rows.

    Args:
        index: the shard's index.
        num_classes: C.
        unlisted: what a class in neither list of a sample means. With `absent`, every label is known.

    Yields:
        Lists of up to about a million labels, or of one row if it has more.
    """
    if unlisted == "absent":
        columns = np.arange(num_classes, dtype=np.uint16)
        for start, stop in _row_blocks(np.arange(index.num_samples + 1) * num_classes):
            block = np.arange(start, stop, dtype=np.int32)
            targets = index.targets(block, num_classes, unlisted)
            yield Entries(np.repeat(block, num_classes), np.tile(columns, len(block)), targets.reshape(-1))
        return
    for start, stop in _row_blocks(index.positives.offsets + index.negatives.offsets):
        yield _listed(index, start, stop)


def positive_entries(index: ShardIndex) -> Entries:
    """The present labels of a shard."""
    lists = index.positives
    rows = np.repeat(np.arange(index.num_samples, dtype=np.int32), np.diff(lists.offsets))
    return Entries(rows, lists.values, np.full(len(rows), PRESENT, dtype=np.int8))


def _listed(index: ShardIndex, start: int, stop: int) -> Entries:
    """The listed labels of rows [start, stop); a class in both lists of a row counts as present."""
    codes, values = [], []
    for lists, value in ((index.positives, PRESENT), (index.negatives, ABSENT)):
        rows = np.repeat(np.arange(start, stop, dtype=np.int64), np.diff(lists.offsets[start : stop + 1]))
        codes.append(rows << _CLASS_BITS | lists.values[lists.offsets[start] : lists.offsets[stop]])
        values.append(np.full(len(rows), value, dtype=np.int8))
    unique, first = np.unique(np.concatenate(codes), return_index=True)
    return Entries((unique >> _CLASS_BITS).astype(np.int32), unique.astype(np.uint16), np.concatenate(values)[first])


def _row_blocks(ends: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks of at most _BLOCK_ENTRIES labels, or of one row; yields (start, stop).

    Args:
        ends: (n + 1,) number of labels before each row, then the total.
    """
    start, num_rows = 0, len(ends) - 1
    while start < num_rows:
        stop = int(np.searchsorted(ends, ends[start] + _BLOCK_ENTRIES, side="right")) - 1
        stop = min(max(stop, start + 1), num_rows)
        yield start, stop
        start = stop
