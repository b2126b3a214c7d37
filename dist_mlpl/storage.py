"""Owns bytes at URLs: ranged reads, atomic writes and exclusive creates, on disk, in object stores and over HTTP.

Every function takes a URL (`s3://bucket/key`, `gs://...`, `https://...`, `/local/path`) and nothing specific to a
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
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any

import pyarrow.fs

from dist_mlpl import local_files, retry, stores
from dist_mlpl.errors import StorageError, StorageRefusedError
from dist_mlpl.listings import list_files, list_names, list_sizes
from dist_mlpl.retry import DEADLINE_SECONDS, Traffic, failure, http_status, is_transient, retried, traffic
from dist_mlpl.stores import STALL_SECONDS
from dist_mlpl.urls import absolute, is_http, is_remote, join, local_path, name, parent, shown

# Other packages import storage functions from this module only.
__all__ = [
    "DEADLINE_SECONDS", "STALL_SECONDS", "Traffic", "absolute", "arrow_filesystem", "check_exclusive_create",
    "configuration", "configure_storage", "create_exclusive", "create_file", "download", "exists", "is_http",
    "is_remote", "is_transient", "join", "list_files", "list_names", "list_sizes", "missing", "name", "open_read",
    "parent", "read_bytes", "remove", "remove_folder", "retried", "sha256_of_bytes", "sha256_of_file", "shown", "size",
    "sync", "traffic", "upload", "version", "write_bytes", "written_at",
]  # fmt: skip

_PRECONDITION_FAILED = 412
_BLOCK_BYTES = 16 << 20
_DELETERS = 16  # objects of a folder that are deleted concurrently
_STREAM_BYTES = 4 << 20
_PARTS_FROM_BYTES = 64 << 20  # objects of this size or more are uploaded in parts, and a failed part is sent again
_CHANGED = ("LastModified", "last_modified", "updated", "created")  # s3fs and HTTP, adlfs, gcsfs, memory


def configure_storage(
    options: dict[str, Any] | None = None,
    *,
    deadline_seconds: float | None = None,
    stall_seconds: float | None = None,
) -> None:
    """Configure all later storage calls of this process.

    Args:
        options: keyword arguments for the fsspec filesystem of remote URLs (such as `anon`, `endpoint_url`), or for
            single schemes by name (`{"s3": {...}, "https": {...}}`). The standard AWS variables, AWS_ENDPOINT_URL
            among them, work without options. Secrets among the options appear in no message.
        deadline_seconds: how long one call keeps retrying transient faults, counted from the first fault;
            None for DEADLINE_SECONDS.
        stall_seconds: how long a connection to S3 or over HTTP may be silent before it is dropped and retried;
            None for STALL_SECONDS.
    """
    stores.configure(options or {}, stall_seconds=STALL_SECONDS if stall_seconds is None else stall_seconds)
    retry.set_deadline(DEADLINE_SECONDS if deadline_seconds is None else deadline_seconds)


def configuration() -> dict[str, Any]:
    """The keyword arguments in force for `configure_storage`, to pass to processes that use the same stores."""
    options, stall_seconds = stores.configured()
    return {"options": options, "deadline_seconds": retry.deadline(), "stall_seconds": stall_seconds}


def missing(url: str, *, what: str, next_step: str) -> StorageError:
    """The error for an object or folder that must exist and does not; the caller raises it."""
    where = shown(url)
    return StorageRefusedError(f"{what} not found", expected=f"one at {where}", where=where, next_step=next_step)


def read_bytes(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """Read bytes [start, end) of an object; None stands for its beginning and its end.

    Raises:
        FileNotFoundError: no such object.
        StorageError: it could not be read, or is shorter than `end`.
    """

    if is_remote(url) and end is not None and end <= (start or 0):
        return b""  # HTTP cannot ask for an empty range

    def read() -> bytes:
        if is_remote(url):
            return stores.read_range(url, start, end)
        if start is None and end is None:  # the fastest way, for millions of small files
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

    A remote object is read in blocks, each retried separately.

    Raises:
        FileNotFoundError: no such object.
    """
    if not is_remote(url):
        return open(local_path(url), "rb")
    return io.BufferedReader(_Blocks(url, size(url)), buffer_size=_STREAM_BYTES)


class _Blocks(io.RawIOBase):
    """A remote object as a read-only stream."""

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
    """Size of an object in bytes.

    Raises:
        FileNotFoundError: no such object.
    """
    if not is_remote(url):
        return retried(lambda: local_path(url).stat().st_size, url=url, doing="looking up")
    return int(retried(lambda: stores.look_up(url), url=url, doing="looking up")["size"])


def version(url: str) -> str:
    """An opaque version of the stored content, for comparison: a different version means different content.

    It takes one look-up. It is the store's ETag, else size and modification time; on disk, size and modification time
    in nanoseconds.

    Returns:
        Text; empty when the store gives neither an ETag nor a modification time.

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
    """When the stored content was written, in UTC; None if the store does not tell.

    Raises:
        FileNotFoundError: no such object.
    """
    if not is_remote(url):
        status = retried(lambda: local_path(url).stat(), url=url, doing="looking up")
        return datetime.fromtimestamp(status.st_mtime, UTC)
    told = retried(lambda: stores.look_up(url), url=url, doing="looking up")
    moment: Any = next((told[key] for key in _CHANGED if told.get(key)), None)
    if isinstance(moment, str):
        is_iso = moment[:4].isdigit()  # HTTP dates begin with the day of the week
        moment = datetime.fromisoformat(moment) if is_iso else parsedate_to_datetime(moment)
    if not isinstance(moment, datetime):
        return None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def exists(url: str) -> bool:
    """Whether an object exists now; cached listings are never used."""
    try:
        size(url)
    except FileNotFoundError:
        return False
    return True


def write_bytes(url: str, content: bytes, *, durable: bool = True, scratch: str | None = None) -> None:
    """Write an object atomically: a reader sees the old bytes or the new ones, never a mix.

    Args:
        url: the object.
        content: its bytes.
        durable: return only when a local disk holds the bytes; otherwise a power loss may undo the write.
        scratch: see `create_file`.

    Raises:
        StorageError: it could not be written.
    """

    def write() -> None:
        if is_remote(url):
            stores.write(url, content, in_parts=len(content) >= _PARTS_FROM_BYTES)
            return
        with local_files.temporary_beside(local_path(url), _folder(scratch)) as temporary:
            (local_files.write_durably if durable else Path.write_bytes)(temporary, content)
            os.replace(temporary, local_path(url))
        if durable:
            local_files.sync_folder(local_path(url))

    _no_missing(write, url=url)


def create_exclusive(url: str, content: bytes, *, durable: bool = True) -> bool:
    """Create an object only if it does not exist: among any number of writers, exactly one wins.

    On disk this is a hard link, which fails when the name exists; on object stores a conditional put (`If-None-Match`).

    Args:
        url: the object.
        content: bytes that no other writer of this object writes, for example with a name or a random token in them.
            A put whose answer was lost is repeated, by us or by the library, and then finds the object there: only its
            content tells who created it.
        durable: see `write_bytes`.

    Returns:
        True when this call created the object, False when it existed already.

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
                local_files.link_exclusively(temporary, local_path(url))
            if durable:
                local_files.sync_folder(local_path(url))
            return
        try:
            stores.write(url, content, mode="create")
        except OSError as error:
            # s3fs expects the store to name the failed condition, which not every store does.
            if http_status(error) == _PRECONDITION_FAILED:
                raise FileExistsError(shown(url)) from error
            raise

    try:
        _no_missing(create, url=url)
    except FileExistsError:
        try:
            return (is_remote(url) or attempts > 1) and read_bytes(url) == content
        except FileNotFoundError:  # its creator has removed it since
            return False
    return True


def check_exclusive_create(url: str) -> None:
    """Prove that the store under `url` creates exclusively; some S3 clones ignore the condition.

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

    The file is complete only when this returns, so use a temporary name and rename it. Each block is retried
    separately, so a connection that breaks late does not restart a large object.

    Raises:
        FileNotFoundError: no such object.
        StorageError: the object could not be read, or the file not written (a missing folder, a full disk).
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
    except OSError as error:  # from the local file, since reading the object raises StorageError
        raise failure(error, url=str(path), doing="writing", tries=1, waited=0.0) from error
    return digest.hexdigest()


def upload(path: Path, url: str) -> None:
    """Copy a local file to an object, atomically.

    Raises:
        StorageError: it could not be written.
    """

    def copy() -> None:
        if is_remote(url):
            stores.write_file(url, str(path))
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
    """Yield an unbuffered file to fill, which becomes the object when the block ends without an error.

    A local file is renamed into place without waiting for the disk (`sync` does that). A remote object is filled in an
    unnamed file on this machine's temporary disk, so that a killed process leaves nothing behind, and then uploaded.

    Args:
        url: the object.
        scratch: folder on the same disk that holds a local file while it is filled; None for the object's own folder.

    Raises:
        StorageError: it could not be written.
    """
    _refuse_http(url)
    try:
        if is_remote(url):
            with tempfile.TemporaryFile(buffering=0) as file:
                yield file
                path = f"/proc/self/fd/{file.fileno()}"
                _no_missing(lambda: stores.write_file(url, path), url=url)
            return
        with local_files.temporary_beside(local_path(url), _folder(scratch)) as temporary:
            with open(temporary, "r+b", buffering=0) as file:  # not "w": ext4 flushes a truncated file at close
                yield file
            os.replace(temporary, local_path(url))
    except OSError as error:  # from the file itself, since uploading raises StorageError
        raise failure(error, url=url, doing="writing", tries=1, waited=0.0) from error


def sync(url: str) -> None:
    """Wait until the disk holds the bytes of a local file; does nothing for remote objects.

    The file's name becomes durable only with the next durable write into its folder.

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
    """Delete a folder and all files below it; it may be missing, or being deleted by others.

    Raises:
        StorageError: it could not be deleted.
    """
    _refuse_http(url)

    def delete_one(path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            retried(lambda: stores.remote(url)[0].rm_file(path), url=url, doing="deleting")

    def delete() -> None:
        if not is_remote(url):
            local_files.remove_tree(local_path(url))
            return
        filesystem, path = stores.remote(url)
        filesystem.invalidate_cache()
        # Not `rm`: it treats `[`, `*` and `?` in names as patterns, and s3fs's does not report refused deletes.
        with ThreadPoolExecutor(_DELETERS, "delete") as pool:
            list(pool.map(delete_one, filesystem.find(path)))

    with contextlib.suppress(FileNotFoundError):
        retried(delete, url=url, doing="deleting")


def remove(url: str) -> None:
    """Delete an object; it may be missing.

    Raises:
        StorageError: it could not be deleted.
    """

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
    """A pyarrow filesystem and a path on it, for Ray Train's storage; (None, absolute path) for a local URL."""
    if not is_remote(url):
        return None, absolute(url)
    filesystem, path = stores.remote(url, in_parts=True)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path


def sha256_of_bytes(content: bytes) -> str:
    """Hexadecimal sha256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hexadecimal sha256 of a local file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder(scratch: str | None) -> Path | None:
    return None if scratch is None else local_path(scratch)


def _no_missing(write: Callable[[], None], *, url: str) -> None:
    """Run a write with retries; a FileNotFoundError then means that the bucket or folder does not exist."""
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
