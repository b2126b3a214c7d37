"""Owns bytes at URLs: ranged reads, atomic writes, exclusive creates and retries, alike on disk and in object stores.

Every verb takes a URL (`s3://bucket/key`, `gs://...`, `/local/path`) and nothing else that knows of a store.
The filesystem object is looked up at each call: fsspec keeps one instance per process and options, so a forked
or spawned child gets its own.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import math
import os
import random
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
import pyarrow.fs

from dist_mlpl.errors import ConfigError, MlplError, StorageError

T = TypeVar("T")

# One process-wide setting, made once at start-up from `data.storage_options`.
_options: dict[str, Any] = {}
DEADLINE_SECONDS = 60.0  # how long one call keeps retrying, unless configured
_deadline_seconds = DEADLINE_SECONDS

# Keeps filesystems alive for the sake of forked children: one that collected its parent's would close the inherited
# connections, and so take sockets out of the parent's event loop too (both poll the same epoll instance).
_used: dict[tuple[int, Any], Any] = {}

_TRANSIENT_ERRNO = {
    errno.EIO, errno.EBUSY, errno.EAGAIN, errno.EPIPE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED,
    errno.ECONNABORTED, errno.ENETUNREACH, errno.EHOSTUNREACH,
}  # fmt: skip
_PERMANENT = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_HTTP_PACKAGES = ("botocore", "aiohttp", "aiobotocore", "urllib3", "requests")
_BUSY_STATUS = (408, 409, 429)  # timed out, in conflict with another writer of the moment, too many requests
_PRECONDITION_FAILED, _NOT_IMPLEMENTED = 412, 501
_BLOCK_BYTES = 16 << 20


def configure_storage(options: dict[str, Any] | None = None, *, deadline_seconds: float | None = None) -> None:
    """Set what every later call in this process uses.

    Args:
        options: keyword arguments of the fsspec filesystem of remote URLs (say `anon`, `endpoint_url`). The
            standard AWS variables, AWS_ENDPOINT_URL among them, work without any.
        deadline_seconds: how long one call keeps retrying faults that may pass, from the first one on;
            None for DEADLINE_SECONDS.
    """
    global _deadline_seconds
    _options.clear()
    _options.update(options or {})
    _deadline_seconds = DEADLINE_SECONDS if deadline_seconds is None else deadline_seconds


def is_remote(url: str) -> bool:
    """True for a URL with a scheme other than `file`."""
    return "://" in url and not url.startswith("file://")


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL or local path."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(url: str) -> str:
    """A local path made absolute, a remote URL as it is: workers may start in another folder."""
    return url.rstrip("/") if is_remote(url) else str(_local(url).absolute())


def name(url: str) -> str:
    """The last part of a URL."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def _local(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def _remote(url: str) -> tuple[Any, str]:
    options = copy.deepcopy(_options)  # botocore changes nested ones, and fsspec finds its instance by their value
    if url.startswith("s3"):
        # botocore would retry for minutes by itself, deadline or not; `retried` does it by one rule for all stores.
        options.setdefault("config_kwargs", {}).setdefault("retries", {"total_max_attempts": 1})
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"no way to open {url!r}: {error}",
            expected="a local path, s3://, or a scheme whose fsspec package is installed",
            where="URL",
            next_step="check the scheme; `pip install 'dist-mlpl[gcs]'` or `[azure]` adds gs:// and abfs://",
        ) from error
    _used[os.getpid(), filesystem] = filesystem
    return filesystem, path


def is_transient(error: BaseException) -> bool:
    """True for a fault that may pass by itself: a broken connection, a timeout, a busy or failing server."""
    if isinstance(error, _PERMANENT):
        return False
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if status := _http_status(error):  # before errno: s3fs calls every answer that it does not know EIO
        return status in _BUSY_STATUS or (status >= 500 and status != _NOT_IMPLEMENTED)
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    words = ("Connect", "Timeout", "IncompleteRead", "ClientPayload", "ServerDisconnected", "HTTPClient")
    return any(
        kind.__module__.split(".")[0] in _HTTP_PACKAGES and any(word in kind.__name__ for word in words)
        for kind in type(error).__mro__
    )


def _http_status(error: BaseException) -> int:
    """Status of the answer behind an error of botocore, or of s3fs, which translates those; 0 without one."""
    for part in (error, error.__cause__):
        response = getattr(part, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return 0


def retried(action: Callable[[], T], *, url: str, doing: str) -> T:
    """Run an action until it succeeds, the fault is permanent, or the deadline has passed.

    Args:
        action: what to do; it must be safe to repeat.
        url: for the message.
        doing: a verb phrase for the message ("reading").

    Raises:
        FileNotFoundError, FileExistsError, MlplError: as they are; callers give them meaning.
        StorageError: anything else, after the last try.
    """
    began, first_fault, attempt = time.monotonic(), math.inf, 0
    while True:
        try:
            return action()
        except (FileNotFoundError, FileExistsError, MlplError):
            raise
        except Exception as error:
            attempt += 1
            now = time.monotonic()
            first_fault = min(first_fault, now)  # not from the beginning: a long transfer may break late
            pause = min(0.1 * 2**attempt, 5.0) * (0.5 + random.random())  # jitter: many ranks fail together
            if not is_transient(error) or now + pause - first_fault > _deadline_seconds:
                raise _storage_error(error, url=url, doing=doing, attempts=attempt, waited=now - began) from error
            time.sleep(pause)


def _storage_error(error: Exception, *, url: str, doing: str, attempts: int, waited: float) -> StorageError:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        keys = "check AWS_ACCESS_KEY_ID / AWS_PROFILE (or data.storage_options) and the bucket's policy"
        return StorageError(
            f"{doing} {url} is not allowed: {text}",
            expected="credentials that may do this" if is_remote(url) else "a user who may do this",
            where=url,
            next_step=keys if is_remote(url) else "check the owner and mode of the file and its folder",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"{doing} {url} found no room: {text}",
            expected="free space",
            where=url,
            next_step="free some, or name a folder on another disk (MLPL_CACHE_DIR places the shard cache)",
        )
    return StorageError(
        f"{doing} {url} failed after {attempts} tries in {waited:.1f} s: {type(error).__name__}: {text}",
        expected="storage that answers",
        where=url,
        next_step="check the URL, the network and AWS_ENDPOINT_URL; then run the same command again, it resumes",
    )


def missing(url: str, *, what: str, next_step: str) -> StorageError:
    """The error for an object that must exist and does not."""
    return StorageError(f"{what} not found", expected=f"an object at {url}", where=url, next_step=next_step)


def read_bytes(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """Read [start, end) of an object, or the whole of it.

    Raises:
        FileNotFoundError: no such object.
        StorageError: it could not be read, or the range came back short.
    """

    def read() -> bytes:
        if not is_remote(url):
            with open(_local(url), "rb") as file:
                if start:
                    file.seek(start)
                return file.read() if end is None else file.read(end - (start or 0))
        filesystem, path = _remote(url)
        return filesystem.cat_file(path, start=start, end=end)

    content = retried(read, url=url, doing="reading")
    if end is not None and len(content) != end - (start or 0):
        raise StorageError(
            f"{len(content)} bytes came back",
            expected=f"{end - (start or 0)} bytes at [{start or 0}, {end})",
            where=url,
            next_step="the object is shorter than its index says: run `dist-mlpl shards verify`",
        )
    return content


def open_read(url: str) -> IO[bytes]:
    """Open an object for reading from start to end. The caller closes it.

    Raises:
        FileNotFoundError: no such object.
    """
    if not is_remote(url):
        return open(_local(url), "rb")
    filesystem, path = _remote(url)
    return retried(lambda: filesystem.open(path, "rb"), url=url, doing="opening")


def size(url: str) -> int:
    """Bytes of an object.

    Raises:
        FileNotFoundError: no such object.
    """

    def ask() -> int:
        if not is_remote(url):
            return _local(url).stat().st_size
        filesystem, path = _remote(url)
        filesystem.invalidate_cache(path)
        return int(filesystem.info(path)["size"])

    return retried(ask, url=url, doing="looking up")


def exists(url: str) -> bool:
    """True when an object is there now; listings are never trusted from a cache."""
    try:
        size(url)
    except FileNotFoundError:
        return False
    return True


def list_names(url: str) -> list[str]:
    """Sorted names directly under a folder URL, dot files left out; empty when the folder does not exist."""

    def ask() -> list[str]:
        if not is_remote(url):
            return sorted(entry.name for entry in _local(url).iterdir())
        filesystem, path = _remote(url)
        filesystem.invalidate_cache(path)
        found = filesystem.ls(path, detail=False)
        return sorted({name(entry) for entry in found} - {"", name(path)})

    try:
        return [entry for entry in retried(ask, url=url, doing="listing") if not entry.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_files(url: str) -> Iterator[str]:
    """Paths of all files below a folder URL, relative to it, sorted.

    Raises:
        FileNotFoundError: no such folder.
    """

    def ask() -> list[str]:
        if not is_remote(url):
            root = _local(url)
            if not root.is_dir():
                raise FileNotFoundError(url)
            return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        filesystem, path = _remote(url)
        filesystem.invalidate_cache(path)
        found = filesystem.find(path)
        if not found:
            raise FileNotFoundError(url)
        return sorted(entry[len(path.rstrip("/")) + 1 :] for entry in found)

    yield from retried(ask, url=url, doing="listing")


def write_bytes(url: str, content: bytes) -> None:
    """Write an object whole: a reader sees the old bytes or the new ones, never a part.

    Raises:
        StorageError: it could not be written.
    """

    def write() -> None:
        if is_remote(url):
            filesystem, path = _remote(url)
            filesystem.pipe_file(path, content)
            return
        with _temporary_beside(_local(url)) as temporary:
            _write_durably(temporary, content)
            os.replace(temporary, _local(url))
        _sync_folder(_local(url))

    _no_missing(write, url=url)


def create_exclusive(url: str, content: bytes) -> bool:
    """Create an object only if none is there: one winner among any number of writers.

    Locally a hard link, which fails when the name exists; on object stores a conditional put (`If-None-Match`).

    Args:
        url: the object.
        content: bytes that no other writer of the same object writes; let them hold a name or a random token. A put
            whose answer was lost is repeated, by us or by the library below, and then finds the object there: only
            its content says who made it.

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
            with _temporary_beside(_local(url)) as temporary:
                _write_durably(temporary, content)
                os.link(temporary, _local(url))
            _sync_folder(_local(url))
            return
        filesystem, path = _remote(url)
        try:
            filesystem.pipe_file(path, content, mode="create")
        except OSError as error:
            if _http_status(error) == _PRECONDITION_FAILED:  # not every store says which condition, as s3fs expects
                raise FileExistsError(url) from error
            raise

    try:
        _no_missing(create, url=url)
    except FileExistsError:
        return (is_remote(url) or attempts > 1) and read_bytes(url) == content
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
            where=url,
            next_step="use a store with conditional writes, or a local or shared disk",
        )


def download(url: str, path: Path) -> str:
    """Copy an object to a local file and return its sha256.

    The file is complete only when this returns; write to a temporary name and rename. Each block is retried by itself,
    so a connection that breaks late does not start a large object over.

    Raises:
        FileNotFoundError: no such object.
        StorageError: it could not be read, or the local disk is full.
    """
    digest = hashlib.sha256()
    num_bytes = size(url)
    try:
        with open(path, "wb") as target:
            for start in range(0, num_bytes, _BLOCK_BYTES):
                block = read_bytes(url, start, min(start + _BLOCK_BYTES, num_bytes))
                digest.update(block)
                target.write(block)
    except FileNotFoundError:
        raise
    except OSError as error:  # of the local file: reading raises StorageError
        raise _storage_error(error, url=str(path), doing="writing", attempts=1, waited=0.0) from error
    return digest.hexdigest()


def upload(path: Path, url: str) -> None:
    """Copy a local file to an object, whole or not at all."""

    def copy() -> None:
        if is_remote(url):
            filesystem, remote_path = _remote(url)
            filesystem.put_file(str(path), remote_path)
            return
        with _temporary_beside(_local(url)) as temporary:
            with open(path, "rb") as source, open(temporary, "wb") as target:
                while block := source.read(_BLOCK_BYTES):
                    target.write(block)
                target.flush()
                os.fsync(target.fileno())
            os.replace(temporary, _local(url))

    _no_missing(copy, url=url)


def remove(url: str) -> None:
    """Delete an object; a missing one is fine."""

    def delete() -> None:
        if is_remote(url):
            filesystem, path = _remote(url)
            filesystem.rm_file(path)
        else:
            _local(url).unlink()

    with contextlib.suppress(FileNotFoundError):
        retried(delete, url=url, doing="deleting")


def arrow_filesystem(url: str) -> tuple[Any, str]:
    """A pyarrow filesystem over ours, and the path on it: what Ray Train takes as its storage."""
    if not is_remote(url):
        return None, absolute(url)
    filesystem, path = _remote(url)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path


def sha256_of_bytes(content: bytes) -> str:
    """Hexadecimal digest of bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hexadecimal digest of a local file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _no_missing(write: Callable[[], None], *, url: str) -> None:
    """Run a write; a FileNotFoundError then means a bucket that does not exist."""
    try:
        retried(write, url=url, doing="writing")
    except FileNotFoundError as error:
        raise missing(
            url, what="the bucket or folder to write to", next_step="create it, or correct the URL"
        ) from error


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """A name in the same folder, so that a rename or link stays on one disk; removed at the end if still there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, text = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(text)
    temporary.chmod(0o644)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make a name as durable as the file it names, and the folder's own name with it."""
    for folder in (path.parent, path.parent.parent):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
