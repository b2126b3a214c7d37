"""Owns access to a store: fsspec's filesystem for a URL, its timeouts and options; and reads over plain HTTP.

fsspec's own HTTP reads accept a whole file as the requested range when the server ignores ranges, and treat any failed
look-up as a missing file; the functions here tell these cases apart.
"""

from __future__ import annotations

import asyncio
import copy
import math
import os
from collections.abc import Coroutine
from typing import Any

import fsspec
import fsspec.asyn
import fsspec.callbacks

from dist_mlpl.errors import ConfigError, StorageError
from dist_mlpl.retry import printable
from dist_mlpl.urls import hide_secrets_of, is_http, scrubbed, shown

STALL_SECONDS = 30.0  # default for how long a connection may be silent before it is dropped
_CONNECT_SECONDS = 10.0
_PAGE_KEYS = 1000  # largest page of an S3 listing
_NUM_CONNECTIONS = 64  # concurrent connections to one S3 endpoint; further threads wait
_SLOWEST_WRITE = 256 << 10  # bytes per second below which a write counts as stalled
_PART_BYTES, _PARTS_AT_ONCE, _MOST_PARTS = 16 << 20, 8, 10_000  # how a large file is sent to S3
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}

_SCHEMES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "http", "https", "memory")

_OK, _PARTIAL, _RANGE_NOT_THERE = 200, 206, 416
_GONE = (404, 410)
_NO_HEAD = (403, 405, 501)  # answers to HEAD from a URL signed for GET only, or a server that supports GET only

_options: dict[str, Any] = {}
_stall_seconds = STALL_SECONDS

# Keyed by process because of forks: a child needs its own filesystem but must keep its parent's alive. Garbage
# collecting the parent's would close the inherited connections and so remove sockets from the parent's event loop too
# (both poll the same epoll instance).
_made: dict[tuple[Any, ...], Any] = {}


def configure(options: dict[str, Any], *, stall_seconds: float) -> None:
    """Configure all later calls of this process; see `storage.configure_storage`."""
    global _stall_seconds
    _options.clear()
    _options.update(options)
    _stall_seconds = stall_seconds
    hide_secrets_of(options)


def configured() -> tuple[dict[str, Any], float]:
    """The options and stall seconds that `configure` was last called with."""
    return copy.deepcopy(_options), _stall_seconds


def remote(url: str, *, in_parts: bool = False) -> tuple[Any, str]:
    """The fsspec filesystem of a remote URL, shared by all threads of this process, and the path on it.

    Args:
        url: a URL with a scheme.
        in_parts: let s3fs itself retry the parts of a large upload a few times. Otherwise one call is one try, and
            `retry.retried` does all the retrying.

    Raises:
        ConfigError: an unsupported scheme, or one whose package is not installed.
    """
    scheme, _, rest = url.partition("://")
    key = (os.getpid(), scheme, rest.partition("/")[0], in_parts, repr(_options), _stall_seconds)
    try:
        if key not in _made:
            made, _ = fsspec.core.url_to_fs(url, skip_instance_cache=not in_parts, **_options_for(scheme))
            if scheme in ("s3", "s3a") and not in_parts:
                made.retries = 1
            _made.setdefault(key, made)
        return _made[key], _made[key]._strip_protocol(url)
    except (ImportError, ValueError) as error:
        fault = error
    extra = _EXTRAS.get(scheme, "")
    raise ConfigError(
        f"no way to open {shown(url)!r}: {scrubbed(str(fault), url)}",
        expected="a local path, s3://, https://, or gs:// and abfs:// with their package installed",
        where="URL",
        next_step=f"pip install -e '.[{extra}]' in the checkout" if extra else "check the scheme",
    ) from printable(fault, url)


def _options_for(scheme: str) -> dict[str, Any]:
    options = copy.deepcopy(_options)  # botocore modifies nested ones
    own = options.get(scheme, {})
    options = {**{option: value for option, value in options.items() if option not in _SCHEMES}, **own}
    if scheme in ("s3", "s3a"):
        defaults = {
            # Left alone, botocore would retry for minutes, regardless of the deadline.
            "retries": {"total_max_attempts": 1},
            "connect_timeout": min(_CONNECT_SECONDS, _stall_seconds),
            "read_timeout": _stall_seconds,
            "max_pool_connections": _NUM_CONNECTIONS,
        }
        options["config_kwargs"] = {**defaults, **options.get("config_kwargs", {})}
    return options


def read_range(url: str, start: int | None, end: int | None) -> bytes:
    """Read bytes [start, end) of a remote object, in one try; None stands for its beginning and its end.

    Raises:
        FileNotFoundError: no such object.
        StorageError: the HTTP server ignores ranges.
        Exception: whatever the library raises.
    """
    filesystem, path = remote(url)
    if is_http(url):
        return fsspec.asyn.sync(filesystem.loop, _get, filesystem, url, start, end)
    # By default s3fs asks for the size (HEAD) before it reads a whole object, and a HEAD error has no error code.
    whole = {"max_concurrency": 1} if url.startswith("s3") and start is None and end is None else {}
    return filesystem.cat_file(path, start=start, end=end, **whole)


def write(url: str, content: bytes, *, in_parts: bool = False, **how: Any) -> None:
    """Write an object, in one try with a time limit; the libraries have none while they send a request.

    Args:
        url: the object.
        content: its bytes.
        in_parts: see `remote`.
        how: keyword arguments of the filesystem's `pipe_file`, such as `mode="create"`.

    Raises:
        TimeoutError: it took longer than the configured stall plus the time for the bytes at 256 KiB per second.
        Exception: whatever the library raises.
    """
    filesystem, path = remote(url, in_parts=in_parts)
    if not isinstance(filesystem, fsspec.asyn.AsyncFileSystem):
        filesystem.pipe_file(path, content, **how)
        return
    upload = filesystem._pipe_file(path, content, **how)
    fsspec.asyn.sync(filesystem.loop, _while_it_moves, upload, _Moves(), num_bytes=len(content))


def write_file(url: str, file: str) -> None:
    """Write a local file to an object, a large one in parts, in one try with a time limit.

    Args:
        url: the object.
        file: path of the local file.

    Raises:
        TimeoutError: no part finished within the configured stall plus the time for the bytes in flight at 256 KiB per
            second.
        Exception: whatever the library raises.
    """
    filesystem, path = remote(url, in_parts=True)
    if not isinstance(filesystem, fsspec.asyn.AsyncFileSystem):
        filesystem.put_file(file, path)
        return
    in_flight, moves, how = os.path.getsize(file), _Moves(), {}
    if url.startswith(("s3://", "s3a://")):
        part = max(_PART_BYTES, math.ceil(in_flight / _MOST_PARTS))
        how = {"chunksize": part, "max_concurrency": _PARTS_AT_ONCE}
        in_flight = min(in_flight, part * _PARTS_AT_ONCE)
    upload = filesystem._put_file(file, path, callback=moves, **how)
    fsspec.asyn.sync(filesystem.loop, _while_it_moves, upload, moves, num_bytes=in_flight)


class _Moves(fsspec.callbacks.Callback):
    """Counts the finished parts of an upload."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def relative_update(self, inc: int = 1) -> None:
        self.number += 1


async def _while_it_moves(upload: Coroutine[Any, Any, None], moves: _Moves, *, num_bytes: int) -> None:
    """Run an upload, and cancel it when no part of it finishes within the time limit.

    Args:
        upload: the upload.
        moves: counts its finished parts.
        num_bytes: most bytes in flight at once.

    Raises:
        TimeoutError: it was cancelled.
    """
    limit, task = _stall_seconds + num_bytes / _SLOWEST_WRITE, asyncio.ensure_future(upload)
    number = -1
    while not task.done():
        if number == moves.number:
            task.cancel()
            await asyncio.wait({task})
            raise TimeoutError(f"nothing went through for {limit:.0f} s")
        number = moves.number
        await asyncio.wait({task}, timeout=limit)
    await task


def look_up(url: str) -> dict[str, Any]:
    """Look up a remote object, in one try: `size`, and an ETag or modification time under store-specific names.

    Raises:
        FileNotFoundError: no such object.
        StorageError: the HTTP server does not tell the size.
        Exception: whatever the library raises.
    """
    filesystem, path = remote(url)
    if is_http(url):
        return fsspec.asyn.sync(filesystem.loop, _head, filesystem, url)
    filesystem.invalidate_cache(path)
    return filesystem.info(path)


def list_page(url: str, after: str) -> tuple[list[tuple[str, int]], bool]:
    """List up to 1,000 objects below a folder on S3, in one try.

    Args:
        url: the folder, `s3://...`.
        after: path below the folder after which the page begins; empty for the first page.

    Returns:
        (path below the folder, size in bytes) of each object, in UTF-8 order; and whether this was the last page.
    """
    filesystem, path = remote(url)
    bucket, _, prefix = path.partition("/")
    prefix = f"{prefix.rstrip('/')}/" if prefix else ""
    begin = {"StartAfter": prefix + after} if after else {}
    asked = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": _PAGE_KEYS, **begin, **filesystem.req_kw}
    answer = filesystem.call_s3("list_objects_v2", **asked)
    found = [(entry["Key"][len(prefix) :], int(entry["Size"])) for entry in answer.get("Contents", ())]
    return found, not answer.get("IsTruncated", False)


async def _get(filesystem: Any, url: str, start: int | None, end: int | None) -> bytes:
    is_part = bool(start) or end is not None
    wanted = {"Range": f"bytes={start or 0}-{'' if end is None else end - 1}"} if is_part else {}
    async with await _ask(filesystem, "GET", url, wanted) as answer:
        _check(answer, url)
        told = answer.headers.get("Content-Range", "")
        if is_part and not (answer.status == _PARTIAL and told.startswith(f"bytes {start or 0}-")):
            raise StorageError(
                f"the server ignores Range: {wanted['Range']} is answered {answer.status} {told or 'with the whole'}",
                expected="206 with the range asked for",
                where=shown(url),
                next_step="serve the files with range support (nginx, S3, most CDNs), or copy them to a bucket",
            )
        return await answer.read()


async def _head(filesystem: Any, url: str) -> dict[str, Any]:
    async with await _ask(filesystem, "HEAD", url, {}) as answer:
        if answer.status not in _NO_HEAD:
            _check(answer, url)
            return _told(answer.headers, answer.headers.get("Content-Length", ""), url)
    async with await _ask(filesystem, "GET", url, {"Range": "bytes=0-0"}) as answer:
        if answer.status != _RANGE_NOT_THERE:  # which an empty file answers, as it has no first byte
            _check(answer, url)
        whole = "Content-Length" if answer.status == _OK else "Content-Range"
        return _told(answer.headers, answer.headers.get(whole, "").rpartition("/")[2], url)


async def _ask(filesystem: Any, method: str, url: str, headers: dict[str, str]) -> Any:
    import aiohttp  # only where HTTP is read

    session = await filesystem.set_session()
    options = dict(filesystem.kwargs)
    options["headers"] = {**options.get("headers", {}), "Accept-Encoding": "identity", **headers}
    connect = min(_CONNECT_SECONDS, _stall_seconds)
    options.setdefault("timeout", aiohttp.ClientTimeout(sock_connect=connect, sock_read=_stall_seconds))
    return await session.request(method, filesystem.encode_url(url), allow_redirects=True, **options)


def _check(answer: Any, url: str) -> None:
    if answer.status in _GONE:
        raise FileNotFoundError(f"HTTP {answer.status}")
    answer.raise_for_status()


def _told(headers: Any, num_bytes: str, url: str) -> dict[str, Any]:
    if not num_bytes.isdigit():
        raise StorageError(
            "the server does not tell the size of the file",
            expected="a Content-Length header",
            where=shown(url),
            next_step="serve files as they are on disk, not made on the fly",
        )
    return {"size": int(num_bytes), "ETag": headers.get("ETag"), "LastModified": headers.get("Last-Modified")}
