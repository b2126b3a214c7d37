"""Owns a shard's bytes: the order of samples, the boundaries between shards, the tar and its index.

Everything here is a function of the input's content, so any number of workers write the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from isal.isal_zlib import crc32  # the same checksums as zlib's, ten times as fast

from dist_mlpl import storage
from dist_mlpl.data.manifest import Packing, ShardEntry
from dist_mlpl.data.shard_index import ShardIndex, encode_index
from dist_mlpl.errors import DataError, StorageError
from shards.images import fit_image, orientation_of
from shards.sources.base import Record, Records, keys_of

# (what is being done, how much is done, total[, bytes done])
OnProgress = Callable[..., None]

BLOCK = tarfile.BLOCKSIZE  # 512 bytes: a header takes one block, and data are padded to whole blocks
_READERS = 32  # threads that prefetch remote images
_READ_AHEAD = 64  # images prefetched
_ZEROS = bytes(BLOCK)
_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)  # a file of mode 644; time, owner and group are 0
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings shared by all shards of a build; sent to every worker once.

    Args:
        images: folder or URL of the images.
        out: folder or URL of the shards.
        scratch: folder for unfinished files, removed at the end; on the same disk as a local `out`.
        class_ids: class ids in column order.
        packing: how images and shards are made.
        plan: digest of the build's plan in the ledger; empty where there is no ledger.
    """

    images: str
    out: str
    scratch: str
    class_ids: tuple[str, ...]
    packing: Packing
    plan: str = ""


@dataclass(frozen=True, eq=False, slots=True)
class ShardJob:
    """One shard as planned.

    Args:
        stem: file name without ending, `SPLIT-000000`.
        records: n images in tar order.
        sizes: (n,) int64, sizes of their files in bytes when the plan was made.
        inputs: `Plan.inputs_of` the shard.
    """

    stem: str
    records: Records
    sizes: npt.NDArray[np.int64]
    inputs: str


class Skipped(NamedTuple):
    """An image that was skipped."""

    source_row: int
    image: str
    reason: str


class PackedShard(NamedTuple):
    """The outcome of a job."""

    entry: ShardEntry | None  # None: no image could be packed, and nothing was written
    index_bytes: int  # size of the index; 0 without one
    skipped: tuple[Skipped, ...]
    inputs: str  # `Plan.inputs_of` the shard
    num_oriented: int = 0  # images that stayed as they are though their EXIF orientation is not upright


def packing_order(seed: int, split: str, source_rows: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """A shuffle of a split's records that is the same on every machine, forever.

    Row r is ranked by output r of the SplitMix64 generator seeded with the first 8 bytes of sha256("SEED:SPLIT").

    Args:
        seed: any integer.
        split: name of the split.
        source_rows: (n,) distinct, in [0, 2**63).

    Returns:
        (n,) int64 positions in `source_rows`, in packing order. Leaving records out keeps the order of the rest.
    """
    start = np.frombuffer(hashlib.sha256(f"{seed}:{split}".encode()).digest()[:8], dtype="<u8")
    z = start + (source_rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # wraps at 2**64
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)))


def cut_shards(sample_bytes: npt.NDArray[np.int64], target_shard_bytes: int) -> list[slice]:
    """Cut samples into runs of about equal bytes, as few as keep the mean at or below the target.

    Args:
        sample_bytes: (n,) int64, bytes that each sample takes in a tar, in packing order; n > 0, each > 0.
        target_shard_bytes: target size of a shard, > 0.

    Returns:
        Slices that cover the n samples in order, none empty. No run exceeds the target by more than one sample.
    """
    ends = np.cumsum(sample_bytes)
    total = int(ends[-1])
    num_shards = -(-total // target_shard_bytes)
    limits = [total * k // num_shards for k in range(1, num_shards)]
    starts = np.unique([0, *np.searchsorted(ends - sample_bytes, limits)])  # a huge sample repeats starts
    starts = starts[starts < len(sample_bytes)]
    return [slice(int(a), int(b)) for a, b in zip(starts, [*starts[1:], len(sample_bytes)], strict=True)]


def record_json(key: str, record: Record, class_ids: Sequence[str], *, has_machine: bool) -> bytes:
    """The labels of a record as the JSON stored beside the image.

    Args:
        key: `record.key`.
        record: the image's record.
        class_ids: class ids in column order.
        has_machine: whether the source has machine labels; then `machine` is written even if empty.
    """
    document = {
        "key": key,
        "positives": [class_ids[column] for column in record.positives],
        "negatives": [class_ids[column] for column in record.negatives],
        "source": {"image": record.image, "row": record.source_row},
    }
    if has_machine:
        pairs = zip(record.machine, record.confidences, strict=True)
        document["machine"] = {class_ids[column]: shortest(confidence) for column, confidence in pairs}
    return _JSON.encode(document).encode()


@functools.cache
def shortest(confidence: float) -> float:
    """The shortest decimal number that rounds to this float16: 0.7 for 0.70019..."""
    return float(str(np.float16(confidence)))


def tar_header(name: bytes, num_bytes: int) -> bytes:
    """The USTAR header of a regular file, as `tarfile` makes it, with time, owner and group 0.

    Args:
        name: 1 to 100 bytes.
        num_bytes: size of the content, below 8 GiB.
    """
    size = b"%011o\0" % num_bytes
    checksum = _HEADER_SUM + sum(name) + sum(size)
    return b"%b%b%b%b%06o\0%b" % (
        name, _HEADER[len(name) : 124], size, _HEADER[136:148], checksum, _HEADER[155:],
    )  # fmt: skip


# Checksum of the header bytes that never change; those of the checksum field count as blanks.
_HEADER_SUM = sum(_HEADER[:124]) + sum(_HEADER[136:148]) + 8 * ord(" ") + sum(_HEADER[156:])


def padding(num_bytes: int) -> bytes:
    """Zeros that fill content of this size up to a whole block."""
    return _ZEROS[: -num_bytes % BLOCK]


class TarWriter:
    """Appends samples to a tar, and computes the digest of everything written.

    Args:
        file: an unbuffered file, positioned at its start.
    """

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0  # bytes written so far

    def add(self, key: str, image: bytes, labels: bytes) -> int:
        """Append KEY.jpg and KEY.json. Returns the offset of the image's first byte."""
        name = key.encode()
        offset = self.num_bytes + BLOCK
        header = tar_header(name + b".json", len(labels))
        rest = b"".join((padding(len(image)), header, labels, padding(len(labels))))
        self._write(tar_header(name + b".jpg", len(image)), image, rest)
        return offset

    def close(self) -> str:
        """Write the end mark, padded to whole tar records. Returns the sha256 of the tar; the file stays open."""
        size = self.num_bytes + 2 * BLOCK
        self._write(bytes(2 * BLOCK + -size % tarfile.RECORDSIZE))
        return self._digest.hexdigest()

    def _write(self, *parts: bytes) -> None:
        """Write all parts, in one system call if it accepts them all."""
        total = sum(map(len, parts))
        written = os.writev(self._file.fileno(), parts)
        if written < total:
            rest = memoryview(b"".join(parts))[written:]
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        for part in parts:
            self._digest.update(part)
        self.num_bytes += total


class _NothingToPackError(Exception):
    """No image of a job can be packed."""


def write_shard(setting: Setting, job: ShardJob, expected: ShardEntry | None = None) -> PackedShard:
    """Write one tar and its index; every image is read once. Images that cannot be packed are skipped.

    Args:
        setting: the build's setting.
        job: the shard.
        expected: entry that the shard must have, otherwise nothing is written; None accepts any.

    Raises:
        DataError: an image changed since the plan was made, or the shard differs from `expected`.
        StorageError: reading or writing failed.
    """
    skipped: list[Skipped] = []
    tar_url = storage.join(setting.out, f"{job.stem}.tar")
    index_url = storage.join(setting.out, f"{job.stem}.arrow")
    try:
        with storage.create_file(tar_url, scratch=setting.scratch) as file:
            tar = TarWriter(file)
            index, num_oriented = _write_samples(tar, setting, job, skipped)
            sha256, content = tar.close(), encode_index(index)
            entry = ShardEntry(
                file=storage.name(tar_url),
                index=storage.name(index_url),
                num_samples=index.num_samples,
                num_bytes=tar.num_bytes,
                sha256=sha256,
                index_sha256=storage.sha256_of_bytes(content),
            )
            if expected not in (None, entry):
                raise _changed(f"another shard came out of it: {entry.num_samples} samples, sha256 {sha256}", tar_url)
    except _NothingToPackError as error:
        if expected is not None:
            raise _changed("no image of it can be packed any more", tar_url) from error
        return PackedShard(None, 0, tuple(skipped), job.inputs)
    # Not synced to disk here: `storage.sync` follows once, before the manifest.
    storage.write_bytes(index_url, content, durable=False, scratch=setting.scratch)
    if storage.is_remote(setting.out):
        _check_size(tar_url, entry.num_bytes)
    return PackedShard(entry, len(content), tuple(skipped), job.inputs, num_oriented)


def _write_samples(tar: TarWriter, setting: Setting, job: ShardJob, skipped: list[Skipped]) -> tuple[ShardIndex, int]:
    """Fill a tar, append to `skipped`, and return the index and the number of images that stayed turned or mirrored."""
    has_machine, num_oriented = job.records.machine is not None, 0
    rows, offsets, sizes, checksums = [], [], [], []
    samples = zip(keys_of(job.records.images).to_pylist(), job.records, _contents(setting.images, job), strict=True)
    for row, (key, record, content) in enumerate(samples):
        image, fault = fit_image(content, record.rotation, setting.packing)
        if fault is not None:
            skipped.append(Skipped(record.source_row, record.image, fault))
            continue
        num_oriented += image is content and orientation_of(image) != 1
        labels = record_json(key, record, setting.class_ids, has_machine=has_machine)
        offsets.append(tar.add(key, image, labels))
        rows.append(row)
        sizes.append(len(image))
        checksums.append(crc32(image))
    if not rows:
        raise _NothingToPackError
    packed = job.records if not skipped else job.records.take(np.array(rows))
    index = ShardIndex(
        keys=keys_of(packed.images),
        offsets=np.array(offsets, dtype=np.uint64),
        num_bytes=np.array(sizes, dtype=np.uint32),
        source_rows=packed.source_rows,
        positives=packed.positives,
        negatives=packed.negatives,
        crc32=np.array(checksums, dtype=np.uint32),
        machine=packed.machine,
        confidences=packed.confidences,
    )
    return index, num_oriented


def _contents(images: str, job: ShardJob) -> Iterator[bytes]:
    """The images of a job in order; remote ones are prefetched, as each costs a round trip.

    Raises:
        DataError: an image vanished, or its size changed since the plan was made.
    """

    def read(name: str, size: int) -> bytes:
        url = storage.join(images, name)
        try:
            content = storage.read_bytes(url)
        except FileNotFoundError:
            content = None
        if content is None or len(content) != size:
            found = "vanished" if content is None else f"changed, {len(content)} bytes for {size},"
            raise _changed(f"an image that {found} after the build was planned", url)
        return content

    calls = zip(job.records.images.to_pylist(), job.sizes.tolist(), strict=True)
    if not storage.is_remote(images):
        yield from (read(*call) for call in calls)
        return
    with ThreadPoolExecutor(_READERS, "images") as pool:
        reads: deque[Future[bytes]] = deque(pool.submit(read, *call) for call in islice(calls, _READ_AHEAD))
        try:
            while reads:
                yield reads.popleft().result()
                reads.extend(pool.submit(read, *call) for call in islice(calls, 1))
        finally:
            pool.shutdown(cancel_futures=True)


def _changed(found: str, where: str) -> DataError:
    return DataError(
        found,
        expected="inputs that stay as they are while they are packed, and one version of dist-mlpl and Pillow",
        where=storage.shown(where),
        next_step="put the inputs back as they were; or pack them as they are now into a new folder",
    )


def _check_size(url: str, num_bytes: int) -> None:
    found = storage.size(url)
    if found != num_bytes:
        raise StorageError(
            f"{found} bytes arrived", expected=f"{num_bytes} bytes", where=url, next_step="run the same command again"
        )
