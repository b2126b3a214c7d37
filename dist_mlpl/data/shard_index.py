"""Owns the index beside a shard: one Arrow row per sample, in tar order, with its byte range, source row and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dist_mlpl import storage
from dist_mlpl.data.manifest import Manifest, ShardEntry
from dist_mlpl.errors import ShardError
from dist_mlpl.labels import ABSENT, PRESENT, UNKNOWN, Targets, Unlisted

Rows = npt.NDArray[np.int64]

# Up to this many rows, a loop is faster than arithmetic on whole arrays; a step takes a row or two from each shard.
_FEW_ROWS = 8


@dataclass(frozen=True, eq=False, slots=True)
class ClassLists:
    """One ascending list of class columns per sample, stored end to end.

    Args:
        values: (total,) uint16, class columns.
        offsets: (n + 1,) int64; the list of row i is values[offsets[i]:offsets[i + 1]].
    """

    values: npt.NDArray[np.uint16]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> ClassLists:
        """Store n ascending lists of class columns end to end."""
        offsets = np.zeros(len(lists) + 1, dtype=np.int64)
        np.cumsum([len(columns) for columns in lists], out=offsets[1:])
        values = np.fromiter((column for columns in lists for column in columns), np.uint16, count=int(offsets[-1]))
        return cls(values, offsets)

    def row(self, row: int) -> npt.NDArray[np.uint16]:
        """The list of one sample, a view."""
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def entries(self, rows: Rows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
        """All listed class columns of the given rows.

        Args:
            rows: (m,) int64 row numbers in [0, n), repeats allowed.

        Returns:
            (k,) int64 positions in `rows` and (k,) uint16 class columns, where k is the total length of the lists.
        """
        starts = self.offsets[rows]  # (m,)
        counts = self.offsets[rows + 1] - starts
        first = np.cumsum(counts) - counts  # where each row's list starts in the answer
        places = np.repeat(np.arange(len(rows)), counts)  # (k,)
        return places, self.values[np.arange(len(places)) + np.repeat(starts - first, counts)]

    def ascends(self) -> bool:
        """True when every list is strictly ascending, so that no class is listed twice."""
        rising = np.ones(len(self.values), dtype=bool)
        rising[1:] = self.values[1:] > self.values[:-1]
        rising[self.offsets[:-1][np.diff(self.offsets) > 0]] = True  # a list's first value follows another list's last
        return bool(rising.all())


@dataclass(frozen=True, eq=False, slots=True)
class ShardIndex:
    """Byte ranges, keys and labels of one shard's n samples, in tar order.

    Args:
        keys: (n,) Arrow strings; `keys[row].as_py()` gives a Python string.
        offsets: (n,) uint64, first byte of the JPEG's data in the tar.
        num_bytes: (n,) uint32, length of the JPEG.
        source_rows: (n,) uint64, the sample's row in source order.
        positives, negatives: class columns verified present and verified absent.
        crc32: (n,) uint32, checksum of each JPEG, used to verify what is read; None for tars whose images were never
            read when they were indexed.
        machine: class columns that only machine labels call present, in neither list above; None where the source
            has no machine labels.
        confidences: (total,) float16 in [0, 1], one for each entry of `machine`; None if that is None.
    """

    keys: pa.StringArray
    offsets: npt.NDArray[np.uint64]
    num_bytes: npt.NDArray[np.uint32]
    source_rows: npt.NDArray[np.uint64]
    positives: ClassLists
    negatives: ClassLists
    crc32: npt.NDArray[np.uint32] | None = None
    machine: ClassLists | None = None
    confidences: npt.NDArray[np.float16] | None = None

    @property
    def num_samples(self) -> int:
        """Number of samples, n."""
        return len(self.offsets)

    def positives_of(self, row: int) -> npt.NDArray[np.uint16]:
        """Class columns present in one sample, ascending."""
        return self.positives.row(row)

    def negatives_of(self, row: int) -> npt.NDArray[np.uint16]:
        """Class columns absent from one sample, ascending."""
        return self.negatives.row(row)

    def machine_of(self, row: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float16]]:
        """Class columns that only machine labels call present in one sample, ascending, and their confidences."""
        if self.machine is None or self.confidences is None:
            return np.empty(0, np.uint16), np.empty(0, np.float16)
        return self.machine.row(row), self.confidences[self.machine.offsets[row] : self.machine.offsets[row + 1]]

    def targets(self, rows: npt.ArrayLike, num_classes: int, unlisted: Unlisted) -> Targets:
        """Dense labels of some samples.

        Args:
            rows: (m,) row numbers in [0, n), in any order, repeats allowed.
            num_classes: C.
            unlisted: what a class in neither list means, `absent` or `unknown`.

        Returns:
            (m, C) int8: -1 absent, 0 unknown, +1 present.

        Raises:
            ShardError: a row outside [0, n).
        """
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < self.num_samples):
            raise ShardError(
                f"row {int(wanted.min())} to row {int(wanted.max())}",
                expected=f"rows in [0, {self.num_samples})",
                where="rows asked of a shard's index",
                next_step="check that manifest and shard belong together: run `dist-mlpl shards verify`",
            )
        targets = np.full((len(wanted), num_classes), ABSENT if unlisted == "absent" else UNKNOWN, dtype=np.int8)
        for lists, code in ((self.negatives, ABSENT), (self.positives, PRESENT)):
            if len(wanted) <= _FEW_ROWS:
                for place, row in enumerate(wanted.tolist()):
                    targets[place, lists.row(row)] = code
                continue
            places, columns = lists.entries(wanted)
            targets[places, columns] = code
        return targets


_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.uint64()),
        ("num_bytes", pa.uint32()),
        ("source_row", pa.uint64()),
        ("positives", pa.list_(pa.uint16())),
        ("negatives", pa.list_(pa.uint16())),
    ]
)
# Optional columns, present where the values are known.
_CRC = pa.field("crc32", pa.uint32())
_MACHINE = pa.field("machine", pa.list_(pa.uint16()))
_CONFIDENCES = pa.field("confidences", pa.list_(pa.float16()))


def encode_index(index: ShardIndex) -> bytes:
    """Encode an index as an Arrow IPC file; equal indexes give equal bytes."""
    lists = [_list_column(part.offsets, part.values) for part in (index.positives, index.negatives)]
    numbers = [pa.array(column) for column in (index.offsets, index.num_bytes, index.source_rows)]
    fields, columns = list(_SCHEMA), [index.keys, *numbers, *lists]
    if index.crc32 is not None:
        fields, columns = [*fields, _CRC], [*columns, pa.array(index.crc32)]
    if index.machine is not None and index.confidences is not None:
        parts = [_list_column(index.machine.offsets, part) for part in (index.machine.values, index.confidences)]
        fields, columns = [*fields, _MACHINE, _CONFIDENCES], [*columns, *parts]
    schema = pa.schema(fields)
    batch = pa.record_batch(columns, schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _list_column(offsets: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def decode_index(content: bytes, where: str) -> ShardIndex:
    """Decode and check an index; columns beyond those of the format are ignored.

    Args:
        content: bytes of the Arrow IPC file.
        where: the index's URL, for messages.

    Raises:
        ShardError: not Arrow, a column missing or of another type, an empty cell, lists or rows out of order, or
            confidences outside [0, 1].
    """

    def wrong(found: str, expected: str) -> ShardError:
        return ShardError(
            found, expected=expected, where=storage.shown(where), next_step="run `dist-mlpl shards verify` on the set"
        )

    try:
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise wrong(f"an index that does not read: {error}", "an Arrow IPC file") from error
    columns = {}
    has_crc = _CRC.name in table.column_names
    has_machine = _MACHINE.name in table.column_names or _CONFIDENCES.name in table.column_names
    for field in [*_SCHEMA, *[_CRC] * has_crc, *[_MACHINE, _CONFIDENCES] * has_machine]:
        if table.column_names.count(field.name) != 1:
            raise wrong(f"columns {', '.join(table.column_names)}", f"one column {field.name!r}")
        column = table.column(field.name)
        if column.type != field.type:
            raise wrong(f"column {field.name!r} of type {column.type}", f"{field.type}")
        array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], field.type)
        if array.null_count or (pa.types.is_list(field.type) and array.flatten().null_count):
            raise wrong(f"an empty cell in column {field.name!r}", "a value in every cell")
        columns[field.name] = array
    index = ShardIndex(
        keys=columns["key"],
        offsets=columns["offset"].to_numpy(),
        num_bytes=columns["num_bytes"].to_numpy(),
        source_rows=columns["source_row"].to_numpy(),
        positives=_lists_of(columns["positives"]),
        negatives=_lists_of(columns["negatives"]),
        crc32=columns["crc32"].to_numpy() if has_crc else None,
        machine=_lists_of(columns["machine"]) if has_machine else None,
        confidences=columns["confidences"].flatten().to_numpy() if has_machine else None,
    )
    for name, lists in _class_lists(index).items():
        if not lists.ascends():
            raise wrong(f"a list in {name!r} that is out of order", "strictly ascending class columns")
    if not (index.offsets[1:] > index.offsets[:-1]).all():
        raise wrong("offsets that do not rise", "rows in tar order")
    if index.machine is not None and index.confidences is not None:
        if not np.array_equal(index.machine.offsets, _offsets_of(columns["confidences"])):
            raise wrong("lists in 'machine' and 'confidences' of different lengths", "a confidence for each class")
        if not ((index.confidences >= 0) & (index.confidences <= 1)).all():
            raise wrong("a confidence outside [0, 1]", "fractions")
    return index


def _class_lists(index: ShardIndex) -> dict[str, ClassLists]:
    lists = {"positives": index.positives, "negatives": index.negatives}
    return lists if index.machine is None else {**lists, "machine": index.machine}


def _lists_of(column: Any) -> ClassLists:
    return ClassLists(column.flatten().to_numpy(), _offsets_of(column))


def _offsets_of(column: Any) -> npt.NDArray[np.int64]:
    offsets = column.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0]


def read_index(manifest: Manifest, entry: ShardEntry) -> ShardIndex:
    """Read the index of one shard and check it against the manifest.

    Raises:
        ShardError: missing, damaged, of another digest or number of samples, or with a class that the manifest lacks.
        StorageError: it could not be read.
    """
    where = manifest.index_url(entry)

    def wrong(found: str, expected: str) -> ShardError:
        return ShardError(
            found, expected=expected, where=storage.shown(where), next_step="run `dist-mlpl shards verify` on the set"
        )

    try:
        content = storage.read_bytes(where)
    except FileNotFoundError as error:
        raise wrong("no index", f"the index of {entry.file}") from error
    digest = storage.sha256_of_bytes(content)
    if digest != entry.index_sha256:
        raise wrong(f"sha256 {digest}", f"{entry.index_sha256}, from the manifest")
    index = decode_index(content, where)
    if index.num_samples != entry.num_samples:
        raise wrong(f"{index.num_samples} rows", f"{entry.num_samples}, from the manifest")
    highest = max(int(lists.values.max(initial=0)) for lists in _class_lists(index).values())
    if highest >= manifest.num_classes:
        raise wrong(f"class column {highest}", f"below {manifest.num_classes}, the number of classes")
    return index
