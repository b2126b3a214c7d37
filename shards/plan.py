"""Owns the plan of a packed set: which image goes into which shard. It is made without reading an image.

The plan is a function of the records, the sizes of the image files and the settings, so that any number of workers,
restarts and builders write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from os import stat as status_of
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dist_mlpl import storage
from dist_mlpl.data.manifest import Packing
from dist_mlpl.errors import StorageError
from shards.check import check_records
from shards.pack import BLOCK, OnProgress, ShardJob, Skipped, cut_shards, packing_order
from shards.sources.base import Records, Source

_ABSENT = -1
_ASKERS = 32  # threads that look up files one by one
_NAMES_PER_CALL = 4096
_LISTED_PARTS = 64  # parts in which a folder in a bucket is listed
_JSON_BYTES = 160  # approximate size of a record's JSON without labels and names

# Bytes per pixel of photographs by JPEG quality; measured on 256 COCO images of 448 pixels.
_QUALITIES, _BYTES_PER_PIXEL = (1, 50, 75, 90, 95, 100), (0.03, 0.15, 0.23, 0.38, 0.54, 1.0)


class PlannedShard(NamedTuple):
    """One shard: its split and number, and positions in the records in tar order."""

    split: str
    number: int
    rows: npt.NDArray[np.int64]

    @property
    def stem(self) -> str:
        """File name without ending."""
        return f"{self.split}-{self.number:06d}"


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """The assignment of images to shards.

    Args:
        source: the data set to pack.
        packing: how images and shards are made.
        sizes: (n,) int64, size of each image file in bytes; -1 for a missing one.
        shards: in the order of the manifest.
        skipped: images known to be missing or empty.
        digest: sha256 over all that the output depends on, except `packing`.
    """

    source: Source
    packing: Packing
    sizes: npt.NDArray[np.int64]
    shards: tuple[PlannedShard, ...]
    skipped: tuple[Skipped, ...]
    digest: str

    def job(self, shard: PlannedShard) -> ShardJob:
        """The job for a worker to write a shard."""
        return ShardJob(shard.stem, self.source.records.take(shard.rows), self.sizes[shard.rows], self.inputs_of(shard))

    def inputs_of(self, shard: PlannedShard) -> str:
        """sha256 over which records a shard holds, in which order, and the sizes of their files."""
        sizes = self.sizes[shard.rows]
        return hashlib.sha256(shard.rows.astype("<i8").tobytes() + sizes.astype("<i8").tobytes()).hexdigest()

    @property
    def splits(self) -> list[str]:
        """Names of the splits that have images, in the order in which the records name them."""
        return split_names(self.source.records)


def make_plan(
    source: Source, packing: Packing, *, first_numbers: Mapping[str, int] | None = None, tell: OnProgress
) -> Plan:
    """Plan a packed set.

    Args:
        source: the data set to pack.
        packing: how images and shards are made.
        first_numbers: number of the first shard, by split; 0 for splits not in it.
        tell: called with the progress of looking up sizes.

    Raises:
        DataError: records that the format cannot hold; see `check_records`.
        StorageError: the image folder is missing or cannot be listed.
    """
    check_records(source)
    sizes = image_sizes(source.images, source.records.images, tell)
    skipped = tuple(
        Skipped(record.source_row, record.image, "missing file" if sizes[row] == _ABSENT else "empty file")
        for row in np.flatnonzero(sizes <= 0).tolist()
        for record in [source.records.row(row)]
    )
    sample_bytes = _bytes_in_tar(source, sizes, packing)
    shards = []
    for split in split_names(source.records):
        is_split = source.records.splits == source.records.split_names.index(split)
        rows = np.flatnonzero(is_split & (sizes > 0))
        if not len(rows):
            continue
        order = rows[packing_order(packing.seed, split, source.records.source_rows[rows])]
        parts = cut_shards(sample_bytes[order], packing.target_shard_bytes)
        first = (first_numbers or {}).get(split, 0)
        shards += [PlannedShard(split, first + number, order[part]) for number, part in enumerate(parts)]
    return Plan(source, packing, sizes, tuple(shards), skipped, input_digest(source, sizes))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The entries in which two documents differ, as text; nested documents are compared entry by entry."""
    told = []
    for name in {**there, **here}:
        theirs, ours = there.get(name), here.get(name)
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            told.append(differences(theirs, ours))
        elif theirs != ours:
            told.append(f"{name} {_short(theirs)} there, {_short(ours)} here")
    return "; ".join(filter(None, told))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:16]}..."


def split_names(records: Records) -> list[str]:
    """Names of the splits that have images, in the order in which the records name them."""
    places, firsts = np.unique(records.splits, return_index=True)
    return [records.split_names[place] for place in places[np.argsort(firsts)]]


def _bytes_in_tar(source: Source, sizes: npt.NDArray[np.int64], packing: Packing) -> npt.NDArray[np.int64]:
    """Approximate bytes that each sample takes in a tar, (n,) int64: two headers, and two contents in whole blocks.

    Sizes of resized images and of labels are estimates, the same on every machine.
    """
    images = sizes
    if packing.max_side is not None:
        pixels = packing.max_side**2 * 3 / 4
        images = np.minimum(sizes, int(pixels * np.interp(packing.quality, _QUALITIES, _BYTES_PER_PIXEL)))
    records = source.records
    id_bytes = 3 + sum(len(entry.id.encode()) for entry in source.classes) // len(source.classes)
    labels = _JSON_BYTES + 2 * pc.binary_length(records.images).to_numpy()
    for lists, extra in ((records.positives, 0), (records.negatives, 0), (records.machine, 4)):
        if lists is not None:
            labels = labels + np.diff(lists.offsets) * (id_bytes + extra)
    image_blocks, label_blocks = (-(-part.astype(np.int64) // BLOCK) for part in (images, labels))
    return (2 + image_blocks + label_blocks) * BLOCK


def input_digest(source: Source, sizes: npt.NDArray[np.int64] | None) -> str:
    """sha256 over all that the output depends on except the packing: the source's records, and file sizes unless None.

    Records with other sizes may be cut into other shards.
    """
    records = source.records
    classes = [(entry.id, entry.name) for entry in source.classes]
    names = sorted(set(split_names(records)))
    about = [source.name, source.arguments, classes, source.unlisted, names]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    place_of = np.array([names.index(name) if name in names else 0 for name in records.split_names], dtype=np.uint8)
    columns: dict[str, Any] = {
        "image_bytes": pc.binary_length(records.images).to_numpy(),
        "images": np.frombuffer(_text_of(records.images), dtype=np.uint8),
        "splits": place_of[records.splits],
        "source_rows": records.source_rows,
        "sizes": sizes,
        "rotations": records.rotations,
        "confidences": records.confidences,
    }
    for name in ("positives", "negatives", "machine"):
        lists = getattr(records, name)
        columns[f"{name}_lengths"] = None if lists is None else np.diff(lists.offsets)
        columns[name] = None if lists is None else lists.values
    for name, column in columns.items():
        if column is not None:
            little = np.ascontiguousarray(column).astype(column.dtype.newbyteorder("<"), copy=False)
            digest.update(f"{name}:{len(little)}:{little.dtype.str}:".encode())
            digest.update(little.data)
    return digest.hexdigest()


def _text_of(strings: pa.StringArray) -> memoryview:
    """The bytes of all strings, concatenated, as a view."""
    _, offsets, text = strings.buffers()
    edges = np.frombuffer(offsets, dtype=np.int32)[strings.offset : strings.offset + len(strings) + 1]
    return memoryview(text or b"")[int(edges[0]) : int(edges[-1])]


def image_sizes(images: str, names: pa.StringArray, tell: OnProgress) -> npt.NDArray[np.int64]:
    """Size of each image file, without opening any: looked up one by one on disks and web servers, listed in buckets.

    Args:
        images: folder or URL of the images.
        names: (n,) paths below it.
        tell: called with progress.

    Returns:
        (n,) int64, sizes in bytes; -1 for a missing file.

    Raises:
        StorageError: the folder is missing or cannot be listed.
    """
    if storage.is_http(images):
        return _look_up(names, lambda name: _size_of(storage.join(images, name)), tell)
    if storage.is_remote(images):
        return _listed(images, names, tell)
    root = images.removeprefix("file://").rstrip("/")
    if not stat.S_ISDIR(_mode_of(root)):
        raise _no_images(images)
    return _look_up(names, lambda name: _local_size(f"{root}/{name}"), tell)


def _no_images(images: str) -> StorageError:
    return storage.missing(images, what="the image folder", next_step="correct the path or URL of the images")


def _mode_of(path: str) -> int:
    try:
        return status_of(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _local_size(path: str) -> int:
    try:
        status = status_of(path)
    except (FileNotFoundError, NotADirectoryError):
        return _ABSENT
    except OSError:
        return storage.size(path)  # retries, then raises a StorageError
    return status.st_size if stat.S_ISREG(status.st_mode) else _ABSENT


def _size_of(url: str) -> int:
    try:
        return storage.size(url)
    except FileNotFoundError:
        return _ABSENT


def _look_up(names: pa.StringArray, size_of: Callable[[str], int], tell: OnProgress) -> npt.NDArray[np.int64]:
    sizes = np.empty(len(names), dtype=np.int64)
    step = max(1, min(_NAMES_PER_CALL, len(names) // (4 * _ASKERS)))

    def look_up(start: int) -> int:
        part = names[start : start + step].to_pylist()
        sizes[start : start + len(part)] = [size_of(name) for name in part]
        return len(part)

    done = 0
    pool = ThreadPoolExecutor(_ASKERS, "sizes")
    try:
        for count in pool.map(look_up, range(0, len(names), step)):
            done += count
            tell("looking up images", done, len(names))
    finally:
        pool.shutdown(cancel_futures=True)
    return sizes


def _listed(images: str, names: pa.StringArray, tell: OnProgress) -> npt.NDArray[np.int64]:
    """Sizes from a listing of the folder; on S3, in concurrent parts with about equal numbers of images."""
    places = np.linspace(0, len(names), _LISTED_PARTS, endpoint=False)[1:].astype(np.int64)
    starts = sorted(set(names.take(pc.sort_indices(names).take(pa.array(places))).to_pylist()))
    found: list[pa.StringArray] = []
    sizes: list[npt.NDArray[np.int64]] = []
    done = 0
    try:
        for part in _batches(storage.list_sizes(images, starts=starts)):
            found.append(pa.array([name for name, _ in part], pa.string()))
            sizes.append(np.array([size for _, size in part], dtype=np.int64))
            done += len(part)
            tell("listing images", min(done, len(names)), len(names))
    except FileNotFoundError as error:
        raise _no_images(images) from error
    places_found = pc.index_in(names, value_set=pa.concat_arrays(found))
    return pc.fill_null(pa.array(np.concatenate(sizes)).take(places_found), _ABSENT).to_numpy()


def _batches(entries: Iterable[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    entries = iter(entries)
    while part := list(islice(entries, _NAMES_PER_CALL)):
        yield part
