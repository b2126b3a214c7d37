"""Owns checking a source's records against the limits of the format, for any kind of source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dist_mlpl.data.shard_index import ClassLists
from dist_mlpl.errors import DataError
from shards.sources.base import Records, Source, keys_of

_MAX_KEY_BYTES = 100 - len(".json")  # a USTAR header has 100 bytes for a name without folders
_ROTATIONS = (0, 90, 180, 270)
_BLOCK_ROWS = 1 << 20  # rows whose lists are compared at once


class _Fault(NamedTuple):
    row: int
    found: str
    expected: str


def check_records(source: Source) -> None:
    """Refuse records that the format cannot hold, or that would lead out of the image folder.

    Raises:
        DataError: the message names the first such record: a path that is empty, absolute or contains `..`, a key that
            repeats or is too long, a split name unfit for files, source rows that do not ascend, class columns out of
            order or range, a class in two lists, confidences outside [0, 1], a rotation other than by right angles.
            Also if there is no record at all.
    """
    records = source.records
    if not len(records):
        raise DataError(
            "no image", expected="at least one", where=f"source {source.name!r}", next_step="check the source's files"
        )
    for fault in _faults(records, len(source.classes)):
        raise DataError(
            fault.found,
            expected=fault.expected,
            where=f"image {records.images[fault.row].as_py()!r}, row {int(records.source_rows[fault.row])} of source "
            f"{source.name!r}",
            next_step="rename the image or split, or correct its labels, in the source",
        )


def _faults(records: Records, num_classes: int) -> Iterator[_Fault]:
    yield from _name_faults(records)
    for place in np.unique(records.splits):
        name = records.split_names[place]
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            row = int(np.argmax(records.splits == place))
            yield _Fault(row, f"split {name!r}", "letters, digits, `_` and `-`: it names files")
    if len(falling := np.flatnonzero(records.source_rows[1:] <= records.source_rows[:-1])):
        yield _Fault(int(falling[0]) + 1, "a source row that is not above the one before", "rows that ascend")
    yield from _label_faults(records, num_classes)
    if records.rotations is not None and len(odd := np.flatnonzero(~np.isin(records.rotations, _ROTATIONS))):
        yield _Fault(int(odd[0]), f"rotation {records.rotations[odd[0]]}", "0, 90, 180 or 270 degrees")


def _name_faults(records: Records) -> Iterator[_Fault]:
    outside = pc.match_substring_regex(records.images, r"\\|://|\x00|(^|/)\.{0,2}(/|$)")
    if (place := _first(outside)) is not None:
        found = f"image {records.images[place].as_py()!r}"
        yield _Fault(place, found, "a path below the image folder, with `/` between its parts")
    keys = keys_of(records.images)
    if (place := _first(pc.greater(pc.binary_length(keys), _MAX_KEY_BYTES))) is not None:
        yield _Fault(place, f"key {keys[place].as_py()!r}", f"at most {_MAX_KEY_BYTES} bytes")
    if pc.count_distinct(keys).as_py() < len(keys):
        counts = pc.value_counts(keys)
        key = counts.field("values")[_first(pc.greater(counts.field("counts"), 1))]
        rows = np.flatnonzero(pc.equal(keys, key).to_numpy(zero_copy_only=False))
        first = records.images[int(rows[0])].as_py()
        found = f"key {key.as_py()!r} is also that of {first!r}"
        yield _Fault(int(rows[1]), found, "every image once, with a key of its own")


def _first(found: pa.BooleanArray) -> int | None:
    """The first row that is true; None if there is none."""
    place = pc.index(found, True).as_py()
    return None if place < 0 else place


def _label_faults(records: Records, num_classes: int) -> Iterator[_Fault]:
    lists = {"present": records.positives, "absent": records.negatives}
    if records.machine is not None:
        lists["present by machine"] = records.machine
    for part in lists.values():
        if not part.ascends():
            row = next(row for row in range(len(records)) if (np.diff(part.row(row).astype(int)) <= 0).any())
            yield _Fault(row, f"class columns {part.row(row).tolist()}", "strictly ascending")
        if int(part.values.max(initial=0)) >= num_classes:
            row = int(np.searchsorted(part.offsets, np.argmax(part.values >= num_classes), side="right")) - 1
            yield _Fault(row, f"class columns {part.row(row).tolist()}", f"in [0, {num_classes})")
    names = list(lists)
    for one, other in [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]:
        if (place := _first_in_both(lists[one], lists[other])) is not None:
            yield _Fault(place, f"a class both {one} and {other}", "one of the two")
    confidences = records.confidences
    if records.machine is not None and (confidences is None or len(confidences) != len(records.machine.values)):
        yield _Fault(0, "machine labels and confidences of different number", "a confidence for each")
    elif confidences is not None and not ((confidences >= 0) & (confidences <= 1)).all():
        at = int(np.argmin((confidences >= 0) & (confidences <= 1)))
        row = int(np.searchsorted(records.machine.offsets, at, side="right")) - 1 if records.machine is not None else 0
        yield _Fault(row, f"confidence {confidences[at]}", "a fraction in [0, 1]")


def _first_in_both(one: ClassLists, other: ClassLists) -> int | None:
    """The first row where two lists share a class; None if there is none."""
    num_rows = len(one.offsets) - 1
    for start in range(0, num_rows, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, num_rows)
        shared = np.intersect1d(_codes(one, start, stop), _codes(other, start, stop), assume_unique=True)
        if len(shared):
            return start + int(shared[0] >> 16)
    return None


def _codes(lists: ClassLists, start: int, stop: int) -> npt.NDArray[np.int64]:
    """A number for each entry of rows [start, stop): (row - start) << 16 | class."""
    rows = np.repeat(np.arange(stop - start), np.diff(lists.offsets[start : stop + 1]))
    return rows << 16 | lists.values[lists.offsets[start] : lists.offsets[stop]]
