"""Owns storage faults: which are transient, how long to retry, the final error message; and traffic counters."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import random
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar

from dist_mlpl.errors import MlplError, StorageError, StorageRefusedError
from dist_mlpl.urls import is_remote, scrubbed, shown

T = TypeVar("T")

DEADLINE_SECONDS = 60.0  # default for how long one call keeps retrying
_deadline_seconds = DEADLINE_SECONDS
_MAX_PAUSE_SECONDS = 5.0

_TRANSIENT_ERRNO = {
    errno.EIO, errno.ESTALE, errno.EBUSY, errno.EAGAIN, errno.EPIPE, errno.ETIMEDOUT, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENETUNREACH, errno.EHOSTUNREACH,
}  # fmt: skip
_PERMANENT = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_HTTP_PACKAGES = ("botocore", "aiohttp", "aiobotocore", "urllib3", "requests", "azure")
_PASSING_WORDS = (
    "Connect", "Timeout", "IncompleteRead", "ClientPayload", "ServerDisconnected", "HTTPClient", "ServiceRequest",
    "ServiceResponse", "ResponseParser",
    "CredentialRetrieval", "MetadataRetrieval",  # many ranks ask a node's metadata service at once
)  # fmt: skip
_STATUS_OF = {  # by error class, the attribute that holds the HTTP status
    "ClientResponseError": "status",  # aiohttp
    "HttpResponseError": "status_code",  # azure
    "HttpError": "code",  # gcsfs
}
_BUSY_STATUS = (408, 409, 429)  # request timeout, conflict with a concurrent writer, too many requests
_BUSY_CODES = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "IncompleteBody", "BadDigest")
_BROKEN_TLS = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)  # a cut connection
_NO_SUCH_HOST = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))  # not EAI_AGAIN
_EXPIRED_CODES = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
_BAD_REQUEST, _UNAUTHORIZED, _FORBIDDEN, _RANGE_NOT_THERE, _NOT_IMPLEMENTED = 400, 401, 403, 416, 501


class Traffic(NamedTuple):
    """Totals of this process's use of remote stores since it began; they never fall. Local files do not count."""

    bytes_read: int  # bytes of successful reads
    requests: int  # calls to a store of any kind, counting every try
    retries: int  # the requests that repeated a failed one


class _Meter:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.totals = Traffic(0, 0, 0)


_meters: dict[int, _Meter] = {}  # by process, as a forked child may inherit a lock held by another thread


def traffic() -> Traffic:
    """Totals of this process so far, over all threads; a forked child begins at 0."""
    return _meter().totals


def count(*, bytes_read: int = 0, requests: int = 0, retries: int = 0) -> None:
    """Add to the totals of this process."""
    meter = _meter()
    with meter.lock:
        old = meter.totals
        meter.totals = Traffic(old.bytes_read + bytes_read, old.requests + requests, old.retries + retries)


def _meter() -> _Meter:
    return _meters.get(os.getpid()) or _meters.setdefault(os.getpid(), _Meter())


def set_deadline(seconds: float) -> None:
    """Set how long every later call of this process keeps retrying, in seconds."""
    global _deadline_seconds
    _deadline_seconds = seconds


def deadline() -> float:
    """Seconds that calls of this process keep retrying."""
    return _deadline_seconds


def is_transient(error: BaseException) -> bool:
    """Whether a fault may pass by itself: a broken connection, a timeout, a busy or failing server."""
    if isinstance(error, _PERMANENT) or is_tls_fault(error) or is_unknown_host(error):
        return False
    if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)) or error_code(error) in _BUSY_CODES:
        return True
    if status := http_status(error):  # before errno, as s3fs turns every unknown answer into EIO
        return status in _BUSY_STATUS or (status >= 500 and status != _NOT_IMPLEMENTED)
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    return any(
        kind.__module__.split(".")[0] in _HTTP_PACKAGES and any(word in kind.__name__ for word in _PASSING_WORDS)
        for kind in type(error).__mro__
    )


def is_tls_fault(error: BaseException) -> bool:
    """Whether TLS cannot be established, mostly because a certificate is not trusted."""
    return any(isinstance(part, ssl.SSLError) and not isinstance(part, _BROKEN_TLS) for part in _chain(error))


def is_unknown_host(error: BaseException) -> bool:
    """Whether name servers answered that there is no such host; a missing answer counts as transient."""
    return any(isinstance(part, socket.gaierror) and part.errno in _NO_SUCH_HOST for part in _chain(error))


def http_status(error: BaseException) -> int:
    """HTTP status behind an error of botocore, aiohttp, azure or gcsfs; 0 without one."""
    for part in _chain(error):
        if found := _answer(part).get("ResponseMetadata", {}).get("HTTPStatusCode"):
            return int(found)
        for kind in type(part).__mro__:
            if status := getattr(part, _STATUS_OF.get(kind.__name__, ""), None):
                return int(status)
    return 0


def error_code(error: BaseException) -> str:
    """The error code of an S3 store, such as `SlowDown`; empty without one."""
    return next((str(code) for part in _chain(error) if (code := _answer(part).get("Error", {}).get("Code"))), "")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes: s3fs translates botocore's errors, which wrap aiohttp's."""
    seen: list[BaseException] = []
    while error is not None and not any(error is part for part in seen):
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _answer(error: BaseException) -> dict[str, Any]:
    response = getattr(error, "response", None)  # botocore's ClientError
    return response if isinstance(response, dict) else {}


def _asked_pause(error: BaseException) -> float:
    """Seconds asked for by a Retry-After header, a number or a date; 0 without a readable one."""
    for part in _chain(error):
        headers = _answer(part).get("ResponseMetadata", {}).get("HTTPHeaders") or getattr(part, "headers", None)
        if text := (headers or {}).get("retry-after"):
            if text.strip().isdigit():
                return float(text)
            with contextlib.suppress(ValueError, TypeError):  # TypeError: a date without a zone
                return max((parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds(), 0.0)
    return 0.0


def retried(action: Callable[[], T], *, url: str, doing: str) -> T:
    """Run an action until it succeeds, its fault is permanent, or the deadline has passed.

    Pauses between tries grow exponentially, with jitter so that ranks do not retry in step. They last at least as long
    as a busy store asks for (`Retry-After`), and at most until the deadline, when the action is tried once more.

    Args:
        action: what to do; it must be safe to repeat.
        url: for messages, which show it without its secrets.
        doing: a gerund for messages, such as "reading".

    Raises:
        FileNotFoundError, FileExistsError, MlplError: raised by the action; callers interpret them.
        StorageError: anything else, after the last try.
    """
    began, first_fault, tries = time.monotonic(), math.inf, 0
    while True:
        tries += 1
        if is_remote(url):
            count(requests=1, retries=int(tries > 1))
        try:
            return action()
        except MlplError:
            raise
        except Exception as error:
            fault = error  # handled outside, since raising here would chain this error to the new one
        if isinstance(fault, (FileNotFoundError, FileExistsError)):
            raise _named(fault, url) if is_remote(url) else fault
        now = time.monotonic()
        first_fault = min(first_fault, now)  # not from the start, as a long transfer may break late
        left = first_fault + _deadline_seconds - now
        pause = min(0.1 * 2**tries, _MAX_PAUSE_SECONDS) * (0.5 + random.random())  # jitter, as many ranks fail together
        if not is_transient(fault) or left <= 0:
            raise failure(fault, url=url, doing=doing, tries=tries, waited=now - began) from printable(fault, url)
        time.sleep(min(_asked_pause(fault) + pause, left))


def _named(error: OSError, url: str) -> OSError:
    """A FileNotFoundError or FileExistsError that names the URL without its secrets."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, _text(error, url), shown(url))
    return FileExistsError(errno.EEXIST, _text(error, url), shown(url))


def printable(error: Exception, url: str) -> Exception | None:
    """The error, to be used as another one's cause, if its traceback shows no secret; else None."""
    text = "".join(traceback.format_exception(error))
    return error if scrubbed(text, url) == text else None


def _text(error: Exception, url: str) -> str:
    # Secrets are removed first, since cut or joined ones would not be recognised afterwards.
    return " ".join(scrubbed(str(error), url).split())[:300] or type(error).__name__


def failure(error: Exception, *, url: str, doing: str, tries: int, waited: float) -> StorageError:
    """The error for an action that failed for good, StorageRefusedError if it always would; the caller raises it.

    Args:
        error: the last fault.
        url: the object.
        doing: a gerund, such as "reading".
        tries: number of tries.
        waited: seconds since the first try.
    """
    where, text, status = shown(url), _text(error, url), http_status(error)

    def said(found: str, expected: str, next_step: str, kind: type[StorageError] = StorageError) -> StorageError:
        return kind(f"{doing} {where} {found}: {text}", expected=expected, where=where, next_step=next_step)

    if error_code(error) in _EXPIRED_CODES:
        return said(
            "is not allowed, the credentials have expired",
            "credentials that are still valid",
            "get new ones (`aws sso login`, a new session token), then run the same command again, it resumes",
        )
    if isinstance(error, PermissionError) or status in (_UNAUTHORIZED, _FORBIDDEN) or _lacks_credentials(error):
        if not is_remote(url):
            step = "check the owner and mode of the file and folder"
            return said("is not allowed", "a user who may do this", step, StorageRefusedError)
        keys = "check AWS_ACCESS_KEY_ID / AWS_PROFILE (or data.storage_options) and the bucket's policy"
        signed = "a signed URL may have expired: make a new one; or give data.storage_options what the server asks for"
        kind = StorageError if _lacks_credentials(error) else StorageRefusedError  # they may come with another node
        return said("is not allowed", "credentials that may do this", signed if url.startswith("http") else keys, kind)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        step = "free some, or name another disk (MLPL_CACHE_DIR places the shard cache, TMPDIR temporary files)"
        return said("found no room", "free space", step)
    if is_tls_fault(error):
        step = "check https:// or http://, this machine's date, and its certificates (AWS_CA_BUNDLE, SSL_CERT_FILE)"
        return said("found no common TLS", "a server whose certificate is trusted here", step, StorageRefusedError)
    if is_unknown_host(error):
        return said("found no such host", "a host that is known", "check its name in the URL or in AWS_ENDPOINT_URL")
    if isinstance(error, (NotADirectoryError, IsADirectoryError)):
        step = "correct the path: a file stands where a folder is needed, or a folder where a file is"
        return said("is not possible", "a path of the right kind", step, StorageRefusedError)
    if type(error).__name__ == "ParamValidationError":  # botocore's, of a bucket's name mostly
        step = "correct the URL: s3://BUCKET/KEY, without user or password"
        return StorageRefusedError(f"{where} is no name in a store", expected="a bucket and a key", where=where,
                                   next_step=step)  # fmt: skip
    if isinstance(error, TypeError):
        step = "correct data.storage_options; options of one scheme go under its name: {s3: {...}, https: {...}}"
        return said("was not understood", "storage options that this store takes", step, StorageRefusedError)
    if status == _RANGE_NOT_THERE:
        step = "it is shorter than what refers to it says: restore it (a shard: `dist-mlpl shards verify`)"
        return said("asked for bytes behind its end", "an object that holds them", step, StorageRefusedError)
    hint = " (an expired token is answered like this, too)" if status == _BAD_REQUEST else ""
    return said(
        f"failed after {tries} tries in {waited:.1f} s: {type(error).__name__}",
        "storage that answers",
        f"check the URL, the network and AWS_ENDPOINT_URL{hint}; then run the same command again, it resumes",
    )


def _lacks_credentials(error: Exception) -> bool:
    return "Credentials" in type(error).__name__
