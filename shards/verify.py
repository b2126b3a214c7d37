"""Owns verifying that a packed data set is whole: every byte is read again, and all faults are reported."""

from __future__ import annotations

import contextlib
import json
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dist_mlpl import storage
from dist_mlpl.data.manifest import Manifest, ShardEntry, load_manifest
from dist_mlpl.data.shard_index import ShardIndex, read_index
from dist_mlpl.errors import DataError, ShardError
from shards.images import check_image
from shards.pack import OnProgress, shortest
from shards.processes import Mapper, on_processes
from shards.scan import scan_tar

_MAX_FAULTS_PER_SHARD = 20  # a shard that is wrong from some byte on would otherwise yield thousands


class Fault(NamedTuple):
    """One fault of a packed set."""

    file: str  # shard or index
    where: str  # a sample's key or row; empty for the whole file
    found: str
    expected: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of a verification.

    Args:
        manifest: the set's manifest.
        faults: in manifest order; empty when the set is whole.
    """

    manifest: Manifest
    faults: tuple[Fault, ...]

    @property
    def num_without_digest(self) -> int:
        """Number of tars indexed in place, which have no digest: pixels that changed since go unnoticed."""
        return sum(not entry.sha256 for split in self.manifest.splits.values() for entry in split.shards)


def verify(
    url: str,
    *,
    decode: bool = False,
    workers: int | None = None,
    mapper: Mapper | None = None,
    on_progress: OnProgress | None = None,
) -> VerifyReport:
    """Read a packed data set again and check that its parts agree.

    Checked are digests and sizes of tars and indexes; members, their names and order; that each index row points to a
    JPEG from its first to its last marker; that the labels beside each image equal those in the index; and that the
    folder has no shard that the manifest lacks. At most 20 faults per shard are listed. Tars indexed in place have no
    digest and may contain other members: their keys, offsets, labels and JPEG markers are compared.

    Args:
        url: folder, or manifest.json.
        decode: also decode every image.
        workers: number of processes on this machine; None for one per core.
        mapper: runs the work elsewhere; None for `workers`.
        on_progress: called after each shard.

    Raises:
        ManifestError: the manifest is missing or inconsistent.
        StorageError: the storage failed; a missing shard or index is a fault instead.
        RunError: a worker died.
    """
    mapper, tell = mapper or on_processes(workers), on_progress or (lambda *_: None)
    manifest = load_manifest(url)
    entries = [entry for split in manifest.splits.values() for entry in split.shards]
    num_samples, done, num_bytes = sum(entry.num_samples for entry in entries), 0, 0
    faults: list[list[Fault]] = [[] for _ in entries]
    frame = manifest.model_copy(update={"splits": {}})  # workers do not need the list of shards, which may be long
    for number, found in mapper(partial(_verify_entry, frame, decode), ((entry,) for entry in entries)):
        faults[number] = found
        done += entries[number].num_samples
        num_bytes += entries[number].num_bytes
        tell("verifying", done, num_samples, num_bytes)
    listed = {file for entry in entries for file in (entry.file, entry.index)}
    endings = (".tar", ".arrow") if manifest.packing else (".arrow",)  # other tars may lie beside tars indexed in place
    strays = [
        Fault(name, "", "a file that the manifest lacks", "no other shards in the folder: remove it")
        for name in storage.list_names(manifest.url)
        if name.endswith(endings) and name not in listed
    ]
    return VerifyReport(manifest, tuple(fault for part in [*faults, strays] for fault in part))


def _verify_entry(manifest: Manifest, decode: bool, entry: ShardEntry) -> list[Fault]:
    return verify_shard(manifest, entry, decode)


def verify_shard(manifest: Manifest, entry: ShardEntry, decode: bool) -> list[Fault]:
    """The faults of one shard and its index, at most 20."""
    faults: list[Fault] = []
    index: ShardIndex | None = None
    try:
        index = read_index(manifest, entry)
    except ShardError as error:
        faults.append(Fault(entry.index, "", error.found, error.expected))
    try:
        with _local_copy(manifest.shard_url(entry)) as (path, digest):
            if path.stat().st_size != entry.num_bytes:
                faults.append(Fault(entry.file, "", f"{path.stat().st_size} bytes", f"{entry.num_bytes} bytes"))
            if entry.sha256 and digest != entry.sha256:
                faults.append(Fault(entry.file, "", f"sha256 {digest}", entry.sha256))
            if index is not None:
                compare = _member_faults if entry.sha256 else _scan_faults
                for fault in compare(path, entry, index, manifest.class_ids, decode):
                    if len(faults) == _MAX_FAULTS_PER_SHARD:
                        break
                    faults.append(fault)
    except FileNotFoundError:
        faults.append(Fault(entry.file, "", "no such file", f"a shard of {entry.num_samples} samples"))
    return faults


@contextlib.contextmanager
def _local_copy(url: str) -> Iterator[tuple[Path, str]]:
    """Yield a local path with the object's bytes, and their sha256; a remote object's copy is deleted afterwards."""
    if not storage.is_remote(url):
        path = Path(url.removeprefix("file://"))
        yield path, storage.sha256_of_file(path)
        return
    with tempfile.TemporaryDirectory(prefix="mlpl-verify-") as folder:
        path = Path(folder, storage.name(url))
        digest = storage.download(url, path)
        yield path, digest


def _member_faults(
    path: Path, entry: ShardEntry, index: ShardIndex, class_ids: tuple[str, ...], decode: bool
) -> Iterator[Fault]:
    """Compare the tar's members with the index, one image in memory at a time."""

    def fault(where: str, found: str, expected: str) -> Fault:
        return Fault(entry.file, where, found, expected)

    row = 0
    try:
        with open(path, "rb") as images, tarfile.open(path, mode="r:", encoding="utf-8") as tar:
            members = iter(tar)
            for image in members:
                labels = next(members, None)
                if row == index.num_samples:
                    yield fault(image.name, "a member beyond the index", f"{index.num_samples} samples")
                    return
                key = index.keys[row].as_py()
                names = (image.name, None if labels is None else labels.name)
                if labels is None or names != (f"{key}.jpg", f"{key}.json"):
                    yield fault(f"row {row}", f"members {names}", f"{key}.jpg and {key}.json")
                    return  # later members would be compared with the wrong rows
                place, wanted = (image.offset_data, image.size), (int(index.offsets[row]), int(index.num_bytes[row]))
                if place != wanted:
                    yield fault(key, f"offset and length {place}", f"{wanted}, from the index")
                images.seek(wanted[0])
                content = images.read(wanted[1])
                if reason := check_image(content, decode=decode):
                    yield fault(key, reason, "a whole JPEG where the index points")
                if index.crc32 is not None and zlib.crc32(content) != index.crc32[row]:
                    yield fault(key, "another image", "the one whose checksum is in the index")
                yield from (fault(key, *pair) for pair in _label_faults(tar, labels, index, row, class_ids))
                row += 1
    # tarfile raises ValueError for a damaged header that it takes for an extended one.
    except (tarfile.TarError, ValueError) as error:
        yield fault(f"row {row}", f"a tar that does not read: {error}", "a USTAR tar")
        return
    if row != index.num_samples:
        yield fault("", f"{row} samples", f"{index.num_samples}, from the index")


def _scan_faults(
    path: Path, entry: ShardEntry, index: ShardIndex, class_ids: tuple[str, ...], decode: bool
) -> Iterator[Fault]:
    """Compare a tar indexed in place with its index, one image in memory at a time."""
    try:
        scan = scan_tar(str(path), path.stat().st_size)
        columns = scan.columns(class_ids, entry.file)
    except DataError as error:
        yield Fault(entry.file, "", error.found, error.expected)
        return
    if scan.keys != (keys := index.keys.to_pylist()):
        both = min(len(scan.keys), len(keys))
        row = next((row for row in range(both) if scan.keys[row] != keys[row]), both)
        yield Fault(entry.file, f"row {row}", f"keys {scan.keys[row : row + 1]}", f"{keys[row : row + 1]}")
        return
    with open(path, "rb") as images:
        for row, key in enumerate(keys):
            place = scan.offsets[row], scan.num_bytes[row]
            wanted = int(index.offsets[row]), int(index.num_bytes[row])
            if place != wanted:
                yield Fault(entry.file, key, f"offset and length {place}", f"{wanted}, from the index")
            images.seek(wanted[0])
            if reason := check_image(images.read(wanted[1]), decode=decode):
                yield Fault(entry.file, key, reason, "a whole JPEG where the index points")
            listed = tuple(index.positives_of(row).tolist()), tuple(index.negatives_of(row).tolist())
            if columns[row] != listed:
                yield Fault(entry.file, key, f"classes {columns[row]} in the tar", f"{listed}, from the index")


def _label_faults(
    tar: tarfile.TarFile, member: tarfile.TarInfo, index: ShardIndex, row: int, class_ids: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Differences between the labels in the tar and those in the index, as (found, expected)."""
    file = tar.extractfile(member)
    try:
        document: Any = json.loads(file.read() if file else b"")
        found = [document["key"], document["positives"], document["negatives"], document["source"]["row"]]
        if index.machine is not None:
            found.append(document["machine"])
    except (ValueError, KeyError, TypeError) as error:
        yield f"labels that do not read: {error!r}", "a JSON object with key, positives, negatives, source"
        return
    wanted = [
        index.keys[row].as_py(),
        [class_ids[column] for column in index.positives_of(row)],
        [class_ids[column] for column in index.negatives_of(row)],
        int(index.source_rows[row]),
    ]
    if index.machine is not None:
        columns, confidences = index.machine_of(row)
        wanted.append({class_ids[c]: shortest(x) for c, x in zip(columns, confidences.tolist(), strict=True)})
    names = ("key", "positives", "negatives", "source row", "machine")
    for name, ours, theirs in zip(names, found, wanted, strict=False):
        if ours != theirs:
            yield f"{name} {ours} in the tar", f"{theirs}, from the index"
