"""Owns bytes at URLs: ranged reads, atomic writes, exclusive creates, alike on disk, in object stores and over HTTP.

Every verb takes a URL (`s3://bucket/key`, `gs://...`, `https://...`, `/local/path`) and nothing else that knows of a
store. All may be called from many threads at once. Messages show URLs without their secrets (`shown`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any

import pyarrow.fs

from dist_mlpl import local_files, retry, stores
from dist_mlpl.errors import StorageError
from dist_mlpl.listings import list_files, list_names, list_sizes
from dist_mlpl.retry import DEADLINE_SECONDS, Traffic, failure, http_status, is_transient, retried, traffic
from dist_mlpl.stores import STALL_SECONDS
from dist_mlpl.urls import absolute, is_http, is_remote, join, local_path, name, parent, shown

# The one door to storage: other rooms import this module alone.
__all__ = [
    "DEADLINE_SECONDS", "STALL_SECONDS", "Traffic", "absolute", "arrow_filesystem", "check_exclusive_create",
    "configuration", "configure_storage", "create_exclusive", "create_file", "download", "exists", "is_http",
    "is_remote", "is_transient", "join", "list_files", "list_names", "list_sizes", "missing", "name", "open_read",
    "parent", "read_bytes", "remove", "remove_folder", "retried", "sha256_of_bytes", "sha256_of_file", "shown", "size",
    "sync", "traffic", "upload", "version", "write_bytes", "written_at",
]  # fmt: skip

_PRECONDITION_FAILED = 412
_BLOCK_BYTES = 16 << 20
_STREAM_BYTES = 4 << 20
_PARTS_FROM_BYTES = 64 << 20  # larger objects are sent in parts, of which one that fails is sent again
_CHANGED = ("LastModified", "last_modified", "updated", "created")  # s3fs and HTTP, adlfs, gcsfs, memory


def configure_storage(
    options: dict[str, Any] | None = None,
    *,
    deadline_seconds: float | None = None,
    stall_seconds: float | None = None,
) -> None:
    """Set what every later call in this process uses.

    Args:
        options: keyword arguments of the fsspec filesystem of remote URLs (say `anon`, `endpoint_url`), or of one
            scheme's under its name (`{"s3": {...}, "https": {...}}`). The standard AWS variables, AWS_ENDPOINT_URL
            among them, work without any. Their secrets appear in no message.
        deadline_seconds: how long one call keeps retrying faults that may pass, from the first one on;
            None for DEADLINE_SECONDS.
        stall_seconds: how long a connection to S3 or over HTTP may be silent before it is given up and tried again;
            None for STALL_SECONDS.
    """
    stores.configure(options or {}, stall_seconds=STALL_SECONDS if stall_seconds is None else stall_seconds)
    retry.set_deadline(DEADLINE_SECONDS if deadline_seconds is None else deadline_seconds)


def configuration() -> dict[str, Any]:
    """The keywords that `configure_storage` was last called with, for processes that are to read the same stores."""
    options, stall_seconds = stores.configured()
    return {"options": options, "deadline_seconds": retry.deadline(), "stall_seconds": stall_seconds}


def missing(url: str, *, what: str, next_step: str) -> StorageError:
    """The error for an object, or a folder, that must exist and does not."""
    where = shown(url)
    return StorageError(f"{what} not found", expected=f"one at {where}", where=where, next_step=next_step)


def read_bytes(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """Read [start, end) of an object, or the whole of it.

    Raises:
        FileNotFoundError: no such object.
        StorageError: it could not be read, or the range came back short.
    """

    if is_remote(url) and end is not None and end <= (start or 0):
        return b""  # HTTP has no way to ask for nothing

    def read() -> bytes:
        if is_remote(url):
            return stores.read_range(url, start, end)
        if start is None and end is None:  # the quickest way: millions of small files are read so
            with open(url.removeprefix("file://"), "rb", buffering=0) as whole:
                return whole.readall()
        with open(local_path(url), "rb") as file:
            if start:
                file.seek(start)
            return file.read() if end is None else file.read(end - (start or 0))

    content = retried(read, url=url, doing="reading")
    if is_remote(url):
        retry.count(bytes_read=len(content))
    if end is not None and len(content) != end - (start or 0):
        raise StorageError(
            f"{len(content)} bytes came back",
            expected=f"{end - (start or 0)} bytes at [{start or 0}, {end})",
            where=shown(url),
            next_step="it is shorter than what refers to it says: restore it (a shard: `dist-mlpl shards verify`)",
        )
    return content


def open_read(url: str) -> IO[bytes]:
    """Open an object for reading from start to end. The caller closes it.

    A remote one is read in blocks, each retried by itself.

    Raises:
        FileNotFoundError: no such object.
    """
    if not is_remote(url):
        return open(local_path(url), "rb")
    return io.BufferedReader(_Blocks(url, size(url)), buffer_size=_STREAM_BYTES)


class _Blocks(io.RawIOBase):
    """A remote object as a stream."""

    def __init__(self, url: str, num_bytes: int) -> None:
        self._url, self._num_bytes, self._at = url, num_bytes, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._next(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        return self._next(self._num_bytes)

    def _next(self, num_bytes: int) -> bytes:
        content = read_bytes(self._url, self._at, min(self._at + num_bytes, self._num_bytes))
        self._at += len(content)
        return content


def size(url: str) -> int:
    """Bytes of an object.

    Raises:
        FileNotFoundError: no such object.
    """
    if not is_remote(url):
        return retried(lambda: local_path(url).stat().st_size, url=url, doing="looking up")
    return int(retried(lambda: stores.look_up(url), url=url, doing="looking up")["size"])


def version(url: str) -> str:
    """An identity of what is stored now, to be compared and not read: another one means other content.

    One look-up. The store's ETag, else size and time of change; locally size and time in nanoseconds.

    Returns:
        Text, empty when the store tells nothing that would change with the content.

    Raises:
        FileNotFoundError: no such object.
    """
    if not is_remote(url):
        status = retried(lambda: local_path(url).stat(), url=url, doing="looking up")
        return f"{status.st_size}-{status.st_mtime_ns}"
    told = retried(lambda: stores.look_up(url), url=url, doing="looking up")
    if etag := told.get("ETag") or told.get("etag"):
        return str(etag).strip('"')
    changed = next((told[key] for key in _CHANGED if told.get(key)), "")
    return f"{told['size']}-{changed}" if changed else ""


def written_at(url: str) -> datetime | None:
    """When what is stored now was written, in UTC; None where the store does not tell.

    Raises:
        FileNotFoundError: no such object.
    """
    if not is_remote(url):
        status = retried(lambda: local_path(url).stat(), url=url, doing="looking up")
        return datetime.fromtimestamp(status.st_mtime, UTC)
    told = retried(lambda: stores.look_up(url), url=url, doing="looking up")
    moment: Any = next((told[key] for key in _CHANGED if told.get(key)), None)
    if isinstance(moment, str):
        is_iso = moment[:4].isdigit()  # HTTP begins with the day of the week
        moment = datetime.fromisoformat(moment) if is_iso else parsedate_to_datetime(moment)
    if not isinstance(moment, datetime):
        return None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def exists(url: str) -> bool:
    """True when an object is there now; listings are never trusted from a cache."""
    try:
        size(url)
    except FileNotFoundError:
        return False
    return True


def write_bytes(url: str, content: bytes, *, durable: bool = True, scratch: str | None = None) -> None:
    """Write an object whole: a reader sees the old bytes or the new ones, never a part.

    Args:
        url: of the object.
        content: its bytes.
        durable: return only when a local disk holds it; without, a machine that loses power may forget it.
        scratch: as in `create_file`.

    Raises:
        StorageError: it could not be written.
    """

    def write() -> None:
        if is_remote(url):
            filesystem, path = stores.remote(url, in_parts=len(content) >= _PARTS_FROM_BYTES)
            filesystem.pipe_file(path, content)
            return
        with local_files.temporary_beside(local_path(url), _folder(scratch)) as temporary:
            (local_files.write_durably if durable else Path.write_bytes)(temporary, content)
            os.replace(temporary, local_path(url))
        if durable:
            local_files.sync_folder(local_path(url))

    _no_missing(write, url=url)


def create_exclusive(url: str, content: bytes, *, durable: bool = True) -> bool:
    """Create an object only if none is there: one winner among any number of writers.

    Locally a hard link, which fails when the name exists; on object stores a conditional put (`If-None-Match`).

    Args:
        url: the object.
        content: bytes that no other writer of the same object writes; let them hold a name or a random token. A put
            whose answer was lost is repeated, by us or by the library below, and then finds the object there: only
            its content says who made it.
        durable: as in `write_bytes`.

    Returns:
        True when this call made the object, False when it was there already.

    Raises:
        StorageError: the store failed, or cannot create exclusively.
    """
    attempts = 0

    def create() -> None:
        nonlocal attempts
        attempts += 1
        if not is_remote(url):
            with local_files.temporary_beside(local_path(url)) as temporary:
                (local_files.write_durably if durable else Path.write_bytes)(temporary, content)
                os.link(temporary, local_path(url))
            if durable:
                local_files.sync_folder(local_path(url))
            return
        filesystem, path = stores.remote(url)
        try:
            filesystem.pipe_file(path, content, mode="create")
        except OSError as error:
            if http_status(error) == _PRECONDITION_FAILED:  # not every store says which condition, as s3fs expects
                raise FileExistsError(shown(url)) from error
            raise

    try:
        _no_missing(create, url=url)
    except FileExistsError:
        try:
            return (is_remote(url) or attempts > 1) and read_bytes(url) == content
        except FileNotFoundError:  # its maker has removed it
            return False
    return True


def check_exclusive_create(url: str) -> None:
    """Prove at start that the store under `url` creates exclusively; some S3 clones ignore the condition.

    Raises:
        StorageError: the folder cannot be written, or a second create of the same name succeeded.
    """
    probe = join(url, f".probe-{secrets.token_hex(8)}")
    first = create_exclusive(probe, b"probe")
    second = create_exclusive(probe, b"probe again")
    remove(probe)
    if not first or second:
        raise StorageError(
            "two writers both created the same object",
            expected="a store that honours If-None-Match on put (a checkpoint commit depends on it)",
            where=shown(url),
            next_step="use a store with conditional writes, or a local or shared disk",
        )


def download(url: str, path: Path) -> str:
    """Copy an object to a local file and return its sha256.

    The file is complete only when this returns; write to a temporary name and rename. Each block is retried by itself,
    so a connection that breaks late does not start a large object over.

    Raises:
        FileNotFoundError: no such object.
        StorageError: it could not be read; or the local file not written: its folder is missing, its disk is full.
    """
    digest, num_bytes = hashlib.sha256(), size(url)
    if not path.parent.is_dir():
        raise missing(str(path.parent), what="the folder to write to", next_step="create it, or correct the path")
    try:
        with open(path, "wb") as target:
            for start in range(0, num_bytes, _BLOCK_BYTES):
                block = read_bytes(url, start, min(start + _BLOCK_BYTES, num_bytes))
                digest.update(block)
                target.write(block)
    except FileNotFoundError:
        raise
    except OSError as error:  # of the local file: reading raises StorageError
        raise failure(error, url=str(path), doing="writing", tries=1, waited=0.0) from error
    return digest.hexdigest()


def upload(path: Path, url: str) -> None:
    """Copy a local file to an object, whole or not at all."""

    def copy() -> None:
        if is_remote(url):
            filesystem, remote_path = stores.remote(url, in_parts=True)
            filesystem.put_file(str(path), remote_path)
            return
        with local_files.temporary_beside(local_path(url)) as temporary:
            with open(path, "rb") as source, open(temporary, "wb") as target:
                while block := source.read(_BLOCK_BYTES):
                    target.write(block)
                target.flush()
                os.fsync(target.fileno())
            os.replace(temporary, local_path(url))

    _no_missing(copy, url=url)


@contextlib.contextmanager
def create_file(url: str, *, scratch: str | None = None) -> Iterator[io.FileIO]:
    """A file to fill, unbuffered, which becomes the object when the block ends, whole; after an error nothing does.

    A local one is renamed into its place without waiting for the disk (`sync` does that). A remote one is filled on
    this machine's temporary disk, under no name, so that a killed process leaves nothing behind, and then uploaded.

    Args:
        url: of the object.
        scratch: folder for a local file while it is filled, on the same disk; None: beside it.

    Raises:
        StorageError: it could not be written.
    """
    _refuse_http(url)
    try:
        if is_remote(url):
            with tempfile.TemporaryFile(buffering=0) as file:
                yield file
                path = f"/proc/self/fd/{file.fileno()}"
                filesystem, remote_path = stores.remote(url, in_parts=True)
                _no_missing(lambda: filesystem.put_file(path, remote_path), url=url)
            return
        with local_files.temporary_beside(local_path(url), _folder(scratch)) as temporary:
            with open(temporary, "r+b", buffering=0) as file:  # ext4 flushes at its close what "w" has truncated
                yield file
            os.replace(temporary, local_path(url))
    except OSError as error:  # of the file: reading and uploading raise StorageError
        raise failure(error, url=url, doing="writing", tries=1, waited=0.0) from error


def sync(url: str) -> None:
    """Wait until the disk holds the bytes of a local file (not yet its name, which the next durable write into its
    folder settles); object stores have them already.

    Raises:
        FileNotFoundError: no such file.
    """
    if is_remote(url):
        return

    def flush() -> None:
        with open(local_path(url), "rb") as file:
            os.fsync(file.fileno())

    retried(flush, url=url, doing="writing")


def remove_folder(url: str) -> None:
    """Delete all files below a folder, and the folder; a missing one is fine, also one that others delete now."""
    _refuse_http(url)

    def delete() -> None:
        if not is_remote(url):
            local_files.remove_tree(local_path(url))
            return
        filesystem, path = stores.remote(url)
        filesystem.invalidate_cache()
        filesystem.rm(path, recursive=True)
        filesystem.invalidate_cache()

    with contextlib.suppress(FileNotFoundError):
        retried(delete, url=url, doing="deleting")


def remove(url: str) -> None:
    """Delete an object; a missing one is fine."""

    _refuse_http(url)

    def delete() -> None:
        if is_remote(url):
            filesystem, path = stores.remote(url)
            filesystem.rm_file(path)
        else:
            local_path(url).unlink()

    with contextlib.suppress(FileNotFoundError):
        retried(delete, url=url, doing="deleting")


def arrow_filesystem(url: str) -> tuple[Any, str]:
    """A pyarrow filesystem over ours, and the path on it: what Ray Train takes as its storage."""
    if not is_remote(url):
        return None, absolute(url)
    filesystem, path = stores.remote(url, in_parts=True)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path


def sha256_of_bytes(content: bytes) -> str:
    """Hexadecimal digest of bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hexadecimal digest of a local file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder(scratch: str | None) -> Path | None:
    return None if scratch is None else local_path(scratch)


def _no_missing(write: Callable[[], None], *, url: str) -> None:
    """Run a write; a FileNotFoundError then means a bucket that does not exist."""
    _refuse_http(url)
    try:
        retried(write, url=url, doing="writing")
    except FileNotFoundError as error:
        raise missing(
            url, what="the bucket or folder to write to", next_step="create it, or correct the URL"
        ) from error


def _refuse_http(url: str) -> None:
    if is_http(url):
        raise StorageError(
            f"{shown(url)} cannot be written or deleted",
            expected="a local path, s3://, gs:// or abfs://; http:// and https:// are for reading",
            where=shown(url),
            next_step="name a folder or a bucket for what is written",
        )
