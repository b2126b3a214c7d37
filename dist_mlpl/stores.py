"""Owns the way to a store: fsspec's file system of a URL, its timeouts and options; and reads over plain HTTP.

fsspec's own reads over HTTP take a whole file for the asked part of it when the server ignores ranges, and take any
failure of a look-up for a missing file; here both are told apart.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import fsspec

from dist_mlpl.errors import ConfigError, StorageError
from dist_mlpl.retry import printable
from dist_mlpl.urls import hide_secrets_of, is_http, scrubbed, shown

STALL_SECONDS = 30.0  # how long a connection may be silent before it is given up, unless configured
_CONNECT_SECONDS = 10.0
_PAGE_KEYS = 1000  # the most that S3 lists at once
_NUM_CONNECTIONS = 64  # at once to one S3 endpoint; more threads wait
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}

_SCHEMES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "http", "https", "memory")

_OK, _PARTIAL, _RANGE_NOT_THERE = 200, 206, 416
_GONE = (404, 410)
_NO_HEAD = (403, 405, 501)  # a URL signed for GET alone, a server that knows GET alone

_options: dict[str, Any] = {}
_stall_seconds = STALL_SECONDS

# By process, for forks: a child needs its own file system, and must keep its parent's alive. One that collected it
# would close the inherited connections, and so take sockets out of the parent's event loop too (both poll the same
# epoll instance).
_made: dict[tuple[Any, ...], Any] = {}


def configure(options: dict[str, Any], *, stall_seconds: float) -> None:
    """Set what every later call in this process uses; see `storage.configure_storage`."""
    global _stall_seconds
    _options.clear()
    _options.update(options)
    _stall_seconds = stall_seconds
    hide_secrets_of(options)


def configured() -> tuple[dict[str, Any], float]:
    """The options and seconds that `configure` was last called with."""
    return copy.deepcopy(_options), _stall_seconds


def remote(url: str, *, in_parts: bool = False) -> tuple[Any, str]:
    """The fsspec file system of a remote URL, shared by all threads of this process, and the path on it.

    Args:
        url: with a scheme.
        in_parts: leave it to s3fs to repeat the parts of a large upload; it then holds the connection by itself for a
            few tries. Otherwise one call is one try, and all repeating is up to `retry.retried`.

    Raises:
        ConfigError: a scheme that nothing here opens.
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
    options = copy.deepcopy(_options)  # botocore changes nested ones
    own = options.get(scheme, {})
    options = {**{option: value for option, value in options.items() if option not in _SCHEMES}, **own}
    if scheme in ("s3", "s3a"):
        defaults = {
            # botocore would retry for minutes by itself, deadline or not.
            "retries": {"total_max_attempts": 1},
            "connect_timeout": min(_CONNECT_SECONDS, _stall_seconds),
            "read_timeout": _stall_seconds,
            "max_pool_connections": _NUM_CONNECTIONS,
        }
        options["config_kwargs"] = {**defaults, **options.get("config_kwargs", {})}
    return options


def read_range(url: str, start: int | None, end: int | None) -> bytes:
    """Bytes [start, end) of a remote object, in one try.

    Raises:
        FileNotFoundError: no such object.
        StorageError: an HTTP server that ignores ranges.
        Exception: whatever the library raises.
    """
    filesystem, path = remote(url)
    if is_http(url):
        return fsspec.asyn.sync(filesystem.loop, _get, filesystem, url, start, end)
    # Left to itself, s3fs asks for the size before it reads a whole object; an answer to that names no fault (HEAD).
    whole = {"max_concurrency": 1} if url.startswith("s3") and start is None and end is None else {}
    return filesystem.cat_file(path, start=start, end=end, **whole)


def look_up(url: str) -> dict[str, Any]:
    """What the store says now of a remote object, in one try: `size`, and under names of its own an identity.

    Raises:
        FileNotFoundError: no such object.
        StorageError: an HTTP server that does not tell the size.
        Exception: whatever the library raises.
    """
    filesystem, path = remote(url)
    if is_http(url):
        return fsspec.asyn.sync(filesystem.loop, _head, filesystem, url)
    filesystem.invalidate_cache(path)
    return filesystem.info(path)


def list_page(url: str, after: str) -> tuple[list[tuple[str, int]], bool]:
    """Up to 1,000 objects below a folder on S3, in one try.

    Args:
        url: of the folder, `s3://...`.
        after: path in it that the page begins behind; empty for the first page.

    Returns:
        (path below the folder, bytes) of each, in the order of UTF-8; and whether these were the last.
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
        if answer.status != _RANGE_NOT_THERE:  # an empty file has no first byte
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
