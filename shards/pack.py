"""Owns a shard's bytes: which images may enter, their order, the boundaries between shards, the tar and its index.

Everything here is a function of the input's content, so any number of workers writes the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dist_mlpl import storage
from dist_mlpl.data.manifest import ShardEntry
from dist_mlpl.data.shard_index import ClassLists, ShardIndex, encode_index
from dist_mlpl.errors import DataError, RunError, ShardError, StorageError
from shards.sources.base import Record

T = TypeVar("T")
OnProgress = Callable[[str, int, int], None]  # what is being done, samples done, samples in all

BLOCK = tarfile.BLOCKSIZE  # 512: a header takes one block, data are padded to whole blocks


class CheckedImage(NamedTuple):
    """What reading one input image showed."""

    num_bytes: int
    sha256: bytes  # empty when the file is missing
    fault: str | None  # why it may not be packed


def check_image(content: bytes, *, decode: bool) -> str | None:
    """Why an image may not be packed, or None.

    Args:
        content: the file's bytes.
        decode: decode every pixel too; finds what the markers do not show.
    """
    if not content:
        return "empty file"
    if not content.startswith(b"\xff\xd8\xff"):
        return "not a JPEG"
    # The end marker must follow the last scan's start: a thumbnail in the header has an end marker of its own,
    # and some cameras append bytes to the end.
    if not 0 <= content.rfind(b"\xff\xda") < content.rfind(b"\xff\xd9"):
        return "truncated JPEG"
    if decode:
        from dist_mlpl.data.transform import decode_jpeg  # brings torch, which a run without decoding does not need

        try:
            decode_jpeg(content)
        except ShardError:
            return "undecodable JPEG"
    return None


def check_images(images: str, names: Sequence[str], decode: bool) -> list[CheckedImage]:
    """Read and check some input images, one in memory at a time.

    Args:
        images: folder or URL.
        names: paths below it.
        decode: as in `check_image`.

    Raises:
        StorageError: the storage failed; a missing file is a fault of the image instead.
    """
    checked = []
    for name in names:
        try:
            content = storage.read_bytes(storage.join(images, name))
        except FileNotFoundError:
            checked.append(CheckedImage(0, b"", "missing file"))
            continue
        digest = hashlib.sha256(content).digest()
        checked.append(CheckedImage(len(content), digest, check_image(content, decode=decode)))
    return checked


def packing_order(seed: int, split: str, source_rows: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """A shuffle of a split's records that will be the same on any machine, forever.

    Row r is ranked by output r of the SplitMix64 generator seeded with the first 8 bytes of sha256("SEED:SPLIT").

    Args:
        seed: any integer.
        split: name of the split.
        source_rows: (n,) distinct, in [0, 2**63).

    Returns:
        (n,) positions in `source_rows`, in packing order. Leaving records out does not change the order of the rest.
    """
    start = np.frombuffer(hashlib.sha256(f"{seed}:{split}".encode()).digest()[:8], dtype="<u8")
    z = start + (source_rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # wraps at 2**64
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)))


def cut_shards(sample_bytes: npt.NDArray[np.int64], target_shard_bytes: int) -> list[slice]:
    """Cut samples into runs of about equal bytes, as few as keep the average at or below the target.

    Args:
        sample_bytes: (n,) bytes that each sample takes in a tar, in packing order; n > 0, each > 0.
        target_shard_bytes: > 0.

    Returns:
        Slices that cover the n samples in order, none empty. None exceeds the target by more than one sample.
    """
    ends = np.cumsum(sample_bytes)
    total = int(ends[-1])
    num_shards = -(-total // target_shard_bytes)
    limits = [total * k // num_shards for k in range(1, num_shards)]
    starts = np.unique([0, *np.searchsorted(ends - sample_bytes, limits)])  # a sample above the target leaves gaps
    starts = starts[starts < len(sample_bytes)]
    return [slice(int(a), int(b)) for a, b in zip(starts, [*starts[1:], len(sample_bytes)], strict=True)]


def record_json(record: Record, class_ids: Sequence[str]) -> bytes:
    """The labels of a record as the shard stores them beside the image."""
    document = {
        "key": record.key,
        "positives": [class_ids[column] for column in record.positives],
        "negatives": [class_ids[column] for column in record.negatives],
        "source": {"image": record.image, "row": record.source_row},
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def bytes_in_tar(num_image_bytes: int, num_json_bytes: int) -> int:
    """Bytes that a sample takes in a tar: two headers, two contents in whole blocks."""
    return sum(BLOCK + -(-size // BLOCK) * BLOCK for size in (num_image_bytes, num_json_bytes))


def write_shard(
    images: str, out: str, stem: str, records: Sequence[Record], digests: Sequence[bytes], class_ids: Sequence[str]
) -> ShardEntry:
    """Write one tar and its index.

    Args:
        images: folder or URL of the inputs.
        out: folder or URL of the shards.
        stem: file name without ending, `SPLIT-000000`.
        records: in tar order.
        digests: sha256 of each image when it was checked.
        class_ids: stable keys in column order.

    Raises:
        DataError: an image is no longer what was checked.
        StorageError: reading or writing failed.
    """
    with tempfile.TemporaryDirectory(prefix="mlpl-shard-") as folder:
        path = Path(folder, f"{stem}.tar")
        with open(path, "wb") as stream:
            index = _write_tar(stream, images, records, digests, class_ids)
        index_content = encode_index(index)
        tar_url, index_url = storage.join(out, path.name), storage.join(out, f"{stem}.arrow")
        num_bytes = path.stat().st_size
        storage.upload(path, tar_url)
        storage.write_bytes(index_url, index_content)
        _check_size(tar_url, num_bytes)
        _check_size(index_url, len(index_content))
        return ShardEntry(
            file=storage.name(tar_url),
            index=storage.name(index_url),
            num_samples=len(records),
            num_bytes=num_bytes,
            sha256=storage.sha256_of_file(path),
            index_sha256=storage.sha256_of_bytes(index_content),
        )


def _write_tar(
    stream: IO[bytes], images: str, records: Sequence[Record], digests: Sequence[bytes], class_ids: Sequence[str]
) -> ShardIndex:
    offsets, sizes, checksums = [], [], []
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as tar:
        for record, digest in zip(records, digests, strict=True):
            content = _read_again(storage.join(images, record.image), digest)
            offsets.append(_add(tar, stream, f"{record.key}.jpg", content))
            sizes.append(len(content))
            checksums.append(zlib.crc32(content))
            _add(tar, stream, f"{record.key}.json", record_json(record, class_ids))
    return ShardIndex(
        keys=pa.array([record.key for record in records], pa.string()),
        offsets=np.array(offsets, dtype=np.uint64),
        num_bytes=np.array(sizes, dtype=np.uint32),
        source_rows=np.array([record.source_row for record in records], dtype=np.uint64),
        positives=ClassLists.of([record.positives for record in records]),
        negatives=ClassLists.of([record.negatives for record in records]),
        crc32=np.array(checksums, dtype=np.uint32),
    )


def _read_again(url: str, digest: bytes) -> bytes:
    try:
        content = storage.read_bytes(url)
    except FileNotFoundError:
        content = b""
    if hashlib.sha256(content).digest() != digest:
        raise DataError(
            "an image that changed or vanished after it was checked",
            expected="inputs that stay as they are while they are packed",
            where=url,
            next_step="run the same command again when nothing writes to the inputs",
        )
    return content


def _add(tar: tarfile.TarFile, stream: IO[bytes], name: str, content: bytes) -> int:
    """Append a member; a fresh TarInfo has mtime, uid and gid 0 and no names. Returns the offset of its data."""
    offset = stream.tell() + BLOCK
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    return offset


def _check_size(url: str, num_bytes: int) -> None:
    found = storage.size(url)
    if found != num_bytes:
        raise StorageError(
            f"{found} bytes arrived", expected=f"{num_bytes} bytes", where=url, next_step="run the same command again"
        )


def run_tasks(task: Callable[..., T], calls: Sequence[tuple[Any, ...]], workers: int) -> Iterator[tuple[int, T]]:
    """Run a function on many arguments in worker processes; with one worker, in this process.

    Workers are spawned, not forked: a forked child would inherit the threads of open connections.

    Args:
        task: a module's function; arguments and result cross processes.
        calls: arguments of each call.
        workers: processes at most.

    Yields:
        (number of the call, its result), as they finish. The first error ends the rest and is raised.

    Raises:
        RunError: a worker process died.
    """
    if workers == 1 or len(calls) <= 1:
        for number, call in enumerate(calls):
            yield number, task(*call)
        return
    pool = ProcessPoolExecutor(min(workers, len(calls)), mp_context=get_context("spawn"))
    try:
        futures = {pool.submit(task, *call): number for number, call in enumerate(calls)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process died",
            expected="workers that live until they are told to stop",
            where=f"one of {min(workers, len(calls))} workers",
            next_step="look for the out-of-memory killer in the system's log; run again with fewer workers",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
