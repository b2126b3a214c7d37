"""Owns the two documents that describe a packed data set: `manifest.json` and the index beside each shard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, ValidationError

from dist_mlpl import storage
from dist_mlpl.errors import ManifestError, ShardError, nearest_names
from dist_mlpl.labels import ABSENT, PRESENT, UNKNOWN, Targets, Unlisted
from dist_mlpl.settings import Settings

FORMAT = 1
FILE_NAME = "manifest.json"
MAX_CLASSES = 1 << 16  # the index stores class columns as uint16

Rows = npt.NDArray[np.int64]


class ClassEntry(Settings):
    """One class; its place in the list is its column in `targets`."""

    id: str  # the stable key: a MID, a COCO id, the name itself
    name: str  # for people; may repeat


class ShardEntry(Settings):
    """One shard and its index, both in the manifest's folder."""

    file: str = Field(pattern=r"^[\w-]+(\.[\w-]+)+$")  # a plain name: a manifest never reaches out of its folder
    index: str = Field(pattern=r"^[\w-]+(\.[\w-]+)+$")
    num_samples: int = Field(ge=1)
    num_bytes: int = Field(ge=1)  # of the tar
    sha256: str
    index_sha256: str


class Split(Settings):
    """The shards of one split, in the order that a sample's `index` counts over."""

    num_samples: int
    num_bytes: int
    shards: tuple[ShardEntry, ...]


class SourceEntry(Settings):
    """What the shards were made from; nothing here depends on where the inputs lay."""

    name: str
    arguments: dict[str, Any]
    digest: str  # sha256 over classes, records and image bytes


class Packing(Settings):
    """How the shards were made."""

    seed: int
    max_side: int | None = None  # pixels; None: images copied byte for byte
    target_shard_bytes: int


class Manifest(Settings):
    """A packed data set: classes, splits, shards.

    `url` (the folder) and `digest` (sha256 of the bytes of manifest.json) are set by `load_manifest` and
    `write_manifest` and are no part of the document.
    """

    format: Literal[1] = 1
    version: str  # of dist-mlpl that packed it
    classes: tuple[ClassEntry, ...] = Field(min_length=1, max_length=MAX_CLASSES)
    classes_sha256: str
    unlisted: Unlisted  # what a class in neither list of a sample means
    group_size_hint: int = 8
    splits: dict[str, Split]
    source: SourceEntry
    packing: Packing
    skipped: dict[str, int] = Field(default_factory=dict)  # unreadable images by reason
    url: str = Field(default="", exclude=True)
    digest: str = Field(default="", exclude=True)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.classes)

    @property
    def class_ids(self) -> tuple[str, ...]:
        """C stable keys in column order."""
        return tuple(entry.id for entry in self.classes)

    def split(self, name: str) -> Split:
        """The split of that name.

        Raises:
            ManifestError: no such split; the message lists the nearest names.
        """
        if name not in self.splits:
            raise ManifestError(
                f"no split named {name!r}",
                expected=nearest_names(name, self.splits),
                where=self.url or "manifest",
                next_step="correct the split's name, or pack the data set with that split",
            )
        return self.splits[name]

    def shard_sizes(self, split: str) -> list[int]:
        """Samples of each shard of a split, in manifest order."""
        return [entry.num_samples for entry in self.split(split).shards]

    def shard_url(self, entry: ShardEntry) -> str:
        """Where the tar lies."""
        return storage.join(self.url, entry.file)

    def index_url(self, entry: ShardEntry) -> str:
        """Where the tar's index lies."""
        return storage.join(self.url, entry.index)


def classes_digest(classes: Sequence[ClassEntry]) -> str:
    """sha256 over the ordered class ids as compact JSON: equal digests mean equal columns."""
    return storage.sha256_of_bytes(json.dumps([entry.id for entry in classes], separators=(",", ":")).encode())


def manifest_url(url: str) -> str:
    """The URL of manifest.json, given it or its folder."""
    return url if storage.name(url) == FILE_NAME else storage.join(url, FILE_NAME)


def load_manifest(url: str) -> Manifest:
    """Read and check a manifest.

    Args:
        url: the folder, or manifest.json itself.

    Raises:
        ManifestError: missing, not JSON, of another format, or not in agreement with itself.
        StorageError: it could not be read.
    """
    where = storage.absolute(manifest_url(url))
    try:
        content = storage.read_bytes(where)
    except FileNotFoundError as error:
        raise ManifestError(
            "no manifest",
            expected=f"{FILE_NAME}, which `dist-mlpl shards build` writes last",
            where=where,
            next_step="check the URL; if packing was interrupted, run it again",
        ) from error
    document = _parse(content, where)
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise _wrong("; ".join(faults[:3]), expected=f"a manifest of format {FORMAT}", where=where) from error
    _check(manifest, where)
    folder = where[: -len(FILE_NAME)].rstrip("/")
    return manifest.model_copy(update={"url": folder, "digest": storage.sha256_of_bytes(content)})


def write_manifest(manifest: Manifest, url: str) -> Manifest:
    """Write manifest.json into a folder, whole or not at all, after every shard it lists is there.

    Returns:
        The manifest with its `url` and `digest`.

    Raises:
        ManifestError: it does not agree with itself.
    """
    folder = storage.absolute(url)
    where = manifest_url(folder)
    _check(manifest, where)
    content = (json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n").encode()
    storage.write_bytes(where, content)
    return manifest.model_copy(update={"url": folder, "digest": storage.sha256_of_bytes(content)})


def _wrong(found: str, *, expected: str, where: str) -> ManifestError:
    return ManifestError(found, expected=expected, where=where, next_step="restore it, or remove it and pack again")


def _parse(content: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise _wrong(f"not JSON: {error}", expected="a JSON object", where=where) from error
    if not isinstance(document, dict):
        raise _wrong(f"a JSON {type(document).__name__}", expected="a JSON object", where=where)
    if document.get("format") != FORMAT:
        raise ManifestError(
            f"format {document.get('format')!r}",
            expected=f"format {FORMAT}",
            where=where,
            next_step="use a dist-mlpl that knows this format, or pack the set again",
        )
    return document


def _check(manifest: Manifest, where: str) -> None:
    """The sums, the digest and the names that a schema cannot check."""
    if len(set(manifest.class_ids)) != manifest.num_classes:
        raise _wrong("a class id that occurs twice", expected="distinct class ids", where=where)
    digest = classes_digest(manifest.classes)
    if digest != manifest.classes_sha256:
        raise _wrong(f"classes_sha256 {manifest.classes_sha256}", expected=f"{digest} for these ids", where=where)
    for name, split in manifest.splits.items():
        for count in ("num_samples", "num_bytes"):
            total = sum(getattr(entry, count) for entry in split.shards)
            if getattr(split, count) != total:
                raise _wrong(
                    f"splits.{name}.{count} is {getattr(split, count)}",
                    expected=f"{total}, the sum over its {len(split.shards)} shards",
                    where=where,
                )
    files = [file for split in manifest.splits.values() for entry in split.shards for file in (entry.file, entry.index)]
    if len(set(files)) != len(files):
        repeated = next(file for file in files if files.count(file) > 1)
        raise _wrong(f"{repeated!r} is listed twice", expected="every file once", where=where)


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
        """Store n lists of class columns."""
        offsets = np.zeros(len(lists) + 1, dtype=np.int64)
        np.cumsum([len(columns) for columns in lists], out=offsets[1:])
        values = np.fromiter((column for columns in lists for column in columns), np.uint16, count=int(offsets[-1]))
        return cls(values, offsets)

    def row(self, row: int) -> npt.NDArray[np.uint16]:
        """The list of one sample, a view."""
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def entries(self, rows: Rows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
        """Every listed column of the given rows.

        Args:
            rows: (m,) row numbers in [0, n), repeats allowed.

        Returns:
            (k,) places in `rows` and (k,) class columns, k being the length of their lists together.
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
    """What lies where in one shard, one row a sample, in tar order.

    Args:
        keys: (n,) Arrow strings; `keys[row].as_py()` makes one a Python string.
        offsets: (n,) uint64, first byte of the JPEG's data in the tar.
        num_bytes: (n,) uint32, length of the JPEG.
        source_rows: (n,) uint64, the sample's place in the order of the source.
        positives, negatives: class columns verified present, verified absent.
    """

    keys: pa.StringArray
    offsets: npt.NDArray[np.uint64]
    num_bytes: npt.NDArray[np.uint32]
    source_rows: npt.NDArray[np.uint64]
    positives: ClassLists
    negatives: ClassLists

    @property
    def num_samples(self) -> int:
        """n."""
        return len(self.offsets)

    def positives_of(self, row: int) -> npt.NDArray[np.uint16]:
        """Class columns present in one sample, ascending."""
        return self.positives.row(row)

    def negatives_of(self, row: int) -> npt.NDArray[np.uint16]:
        """Class columns absent from one sample, ascending."""
        return self.negatives.row(row)

    def targets(self, rows: npt.ArrayLike, num_classes: int, unlisted: Unlisted) -> Targets:
        """Dense labels of some samples.

        Args:
            rows: (m,) row numbers in [0, n), in any order, repeats allowed.
            num_classes: C.
            unlisted: what a class in neither list means.

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


def encode_index(index: ShardIndex) -> bytes:
    """An index as an Arrow IPC file; equal indexes give equal bytes."""
    lists = [
        pa.ListArray.from_arrays(pa.array(part.offsets.astype(np.int32)), pa.array(part.values))
        for part in (index.positives, index.negatives)
    ]
    numbers = [pa.array(column) for column in (index.offsets, index.num_bytes, index.source_rows)]
    batch = pa.record_batch([index.keys, *numbers, *lists], schema=_SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def decode_index(content: bytes, where: str) -> ShardIndex:
    """Read an index; columns beyond those of the format are left alone.

    Args:
        content: bytes of the Arrow IPC file.
        where: the index's URL, for messages.

    Raises:
        ShardError: not Arrow, a column missing or of another type, an empty cell, lists or rows out of order.
    """

    def wrong(found: str, expected: str) -> ShardError:
        return ShardError(found, expected=expected, where=where, next_step="run `dist-mlpl shards verify` on the set")

    try:
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise wrong(f"an index that does not read: {error}", "an Arrow IPC file") from error
    columns = {}
    for field in _SCHEMA:
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
    )
    for name, lists in (("positives", index.positives), ("negatives", index.negatives)):
        if not lists.ascends():
            raise wrong(f"a list in {name!r} that is out of order", "strictly ascending class columns")
    if not (index.offsets[1:] > index.offsets[:-1]).all():
        raise wrong("offsets that do not rise", "rows in tar order")
    return index


def _lists_of(column: Any) -> ClassLists:
    offsets = column.offsets.to_numpy().astype(np.int64)
    return ClassLists(column.flatten().to_numpy(), offsets - offsets[0])


def read_index(manifest: Manifest, entry: ShardEntry) -> ShardIndex:
    """Read the index of one shard and check it against the manifest.

    Raises:
        ShardError: missing, of another digest or number of samples, or naming a class the manifest lacks.
        StorageError: it could not be read.
    """
    where = manifest.index_url(entry)

    def wrong(found: str, expected: str) -> ShardError:
        return ShardError(found, expected=expected, where=where, next_step="run `dist-mlpl shards verify` on the set")

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
    highest = max(int(lists.values.max(initial=0)) for lists in (index.positives, index.negatives))
    if highest >= manifest.num_classes:
        raise wrong(f"class column {highest}", f"below {manifest.num_classes}, the number of classes")
    return index
