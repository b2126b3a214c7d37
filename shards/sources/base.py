"""Owns what every source gives the sharding tool: classes, and a table of images in the source's order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dist_mlpl.data.manifest import ClassEntry
from dist_mlpl.data.shard_index import ClassLists
from dist_mlpl.labels import Unlisted

_BLOCK_ROWS = 4096  # rows converted to Python objects at once


class Record(NamedTuple):
    """One image and its labels: a row of `Records`."""

    image: str  # path below the source's `images` folder, ending in .jpg or .jpeg
    split: str
    positives: tuple[int, ...]  # class columns that people verified present, ascending
    negatives: tuple[int, ...]  # class columns that people verified absent, ascending; none of them in `positives`
    source_row: int  # 0-based position in the source's own order, in which label masks are drawn
    machine: tuple[int, ...] = ()  # class columns that only a machine calls present, ascending; in neither list above
    confidences: tuple[float, ...] = ()  # confidence of each entry of `machine`, in [0, 1]
    rotation: int = 0  # degrees counter-clockwise that turn the image upright: 0, 90, 180 or 270

    @property
    def key(self) -> str:
        """The sample's key in the shard."""
        return key_of(self.image)


@dataclass(frozen=True, eq=False)
class Records:
    """n images in the source's order, stored by column: 9 million take about 1 GB.

    Args:
        images: (n,) Arrow strings, paths below `Source.images`.
        split_names: the source's splits, in any order.
        splits: (n,) uint8, positions in `split_names`.
        source_rows: (n,) uint64, strictly ascending: an image's position in the source's own order.
        positives, negatives: classes verified present and verified absent; a class is in at most one of them.
        machine: classes that only a machine calls present; None where the source has no machine labels.
        confidences: (total,) float16 in [0, 1], one for each entry of `machine`; None if that is None.
        rotations: (n,) uint16, degrees counter-clockwise that turn an image upright; None where all are 0.
    """

    images: pa.StringArray
    split_names: tuple[str, ...]
    splits: npt.NDArray[np.uint8]
    source_rows: npt.NDArray[np.uint64]
    positives: ClassLists
    negatives: ClassLists
    machine: ClassLists | None = None
    confidences: npt.NDArray[np.float16] | None = None
    rotations: npt.NDArray[np.uint16] | None = None

    def __len__(self) -> int:
        return len(self.splits)

    def row(self, row: int) -> Record:
        """The record of one image."""
        machine: tuple[int, ...] = ()
        confidences: tuple[float, ...] = ()
        if self.machine is not None and self.confidences is not None:
            machine = tuple(self.machine.row(row).tolist())
            first = int(self.machine.offsets[row])
            confidences = tuple(self.confidences[first : first + len(machine)].tolist())
        return Record(
            image=self.images[row].as_py(),
            split=self.split_names[self.splits[row]],
            positives=tuple(self.positives.row(row).tolist()),
            negatives=tuple(self.negatives.row(row).tolist()),
            source_row=int(self.source_rows[row]),
            machine=machine,
            confidences=confidences,
            rotation=0 if self.rotations is None else int(self.rotations[row]),
        )

    def __getitem__(self, row: int) -> Record:
        return self.row(row)

    def rows(self, rows: Iterable[int]) -> list[Record]:
        """The records of some images."""
        return [self.row(int(row)) for row in rows]

    def __iter__(self) -> Iterator[Record]:
        """The records of all images in order; several times as fast as calling `row`."""
        for start in range(0, len(self), _BLOCK_ROWS):
            yield from self._block(start, min(start + _BLOCK_ROWS, len(self)))

    def _block(self, start: int, stop: int) -> Iterator[Record]:
        nothing: list[tuple[Any, ...]] = [()] * (stop - start)
        machine = confidences = nothing
        if self.machine is not None and self.confidences is not None:
            machine = _tuples(self.machine, self.machine.values, start, stop)
            confidences = _tuples(self.machine, self.confidences, start, stop)
        return map(
            Record,
            self.images[start:stop].to_pylist(),
            [self.split_names[split] for split in self.splits[start:stop].tolist()],
            _tuples(self.positives, self.positives.values, start, stop),
            _tuples(self.negatives, self.negatives.values, start, stop),
            self.source_rows[start:stop].tolist(),
            machine,
            confidences,
            [0] * (stop - start) if self.rotations is None else self.rotations[start:stop].tolist(),
        )

    def take(self, rows: npt.NDArray[np.int64]) -> Records:
        """A new table of some rows, copied in the order given."""
        confidences = None
        if self.machine is not None and self.confidences is not None:
            confidences = self.confidences[places_of(self.machine, rows)]
        return Records(
            images=self.images.take(pa.array(rows)),
            split_names=self.split_names,
            splits=self.splits[rows],
            source_rows=self.source_rows[rows],
            positives=_taken(self.positives, rows),
            negatives=_taken(self.negatives, rows),
            machine=_taken(self.machine, rows) if self.machine is not None else None,
            confidences=confidences,
            rotations=None if self.rotations is None else self.rotations[rows],
        )

    @classmethod
    def of(cls, records: Sequence[Record]) -> Records:
        """A table of records; for sources small enough to make records one by one."""
        split_names = tuple(dict.fromkeys(record.split for record in records))
        places = {name: place for place, name in enumerate(split_names)}
        has_machine = any(record.machine for record in records)
        confidences = [value for record in records for value in record.confidences]
        has_rotation = any(record.rotation for record in records)
        return cls(
            images=pa.array([record.image for record in records], pa.string()),
            split_names=split_names,
            splits=np.array([places[record.split] for record in records], dtype=np.uint8),
            source_rows=np.array([record.source_row for record in records], dtype=np.uint64),
            positives=ClassLists.of([record.positives for record in records]),
            negatives=ClassLists.of([record.negatives for record in records]),
            machine=ClassLists.of([record.machine for record in records]) if has_machine else None,
            confidences=np.array(confidences, dtype=np.float16) if has_machine else None,
            rotations=np.array([record.rotation for record in records], dtype=np.uint16) if has_rotation else None,
        )


@dataclass(frozen=True, slots=True)
class Source:
    """A data set on disk or in a bucket, before packing. Each module of this package reads one kind.

    Args:
        name: kind of the source, for the manifest.
        images: folder or URL that every image's path is relative to; not part of the output.
        classes: in column order.
        unlisted: what a class in none of an image's lists means.
        arguments: the labels' origin for the manifest (digests of the files read, options, counts of dropped labels by
            reason), in JSON types. Without paths, as the output depends only on the input's content.
        records: in the source's order.
        notes: what a person should know of the labels, in whole sentences; not part of the output.
    """

    name: str
    images: str
    classes: tuple[ClassEntry, ...]
    unlisted: Unlisted
    arguments: dict[str, Any]
    records: Records
    notes: tuple[str, ...] = ()


def key_of(image: str) -> str:
    """The key of an image's path: without .jpg or .jpeg, and with `%`, `.` and `/` escaped as %25, %2E and %2F.

    WebDataset cuts a member's name at its first dot and reads slashes as folders, so neither may stay.
    `urllib.parse.unquote` undoes the escapes. Two names that differ only in the ending have the same key;
    the build refuses them.
    """
    stem = re.sub(r"(?<=[^/])\.jpe?g\Z", "", image, flags=re.IGNORECASE)
    return stem.replace("%", "%25").replace(".", "%2E").replace("/", "%2F")


def keys_of(images: pa.StringArray) -> pa.StringArray:
    """`key_of` for many images at once; 9 million take seconds."""
    keys = pc.replace_substring_regex(images, r"(?i)([^/])\.jpe?g$", r"\1")
    for char, escape in (("%", "%25"), (".", "%2E"), ("/", "%2F")):
        keys = pc.replace_substring(keys, char, escape)
    return keys


def places_of(lists: ClassLists, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Positions in `lists.values` of the entries of some rows, row after row, (k,) int64."""
    starts = lists.offsets[rows]
    counts = lists.offsets[rows + 1] - starts
    first = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - first, counts)


def _tuples(lists: ClassLists, values: npt.NDArray[Any], start: int, stop: int) -> list[tuple[Any, ...]]:
    """The values of rows [start, stop) as tuples; `values` is laid out like `lists.values`."""
    edges = lists.offsets[start : stop + 1] - lists.offsets[start]
    flat = values[lists.offsets[start] : lists.offsets[stop]].tolist()
    return [tuple(flat[first:end]) for first, end in pairwise(edges.tolist())]


def _taken(lists: ClassLists, rows: npt.NDArray[np.int64]) -> ClassLists:
    offsets = np.concatenate([[0], np.cumsum(lists.offsets[rows + 1] - lists.offsets[rows])])
    return ClassLists(lists.values[places_of(lists, rows)], offsets)
