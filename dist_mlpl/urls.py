"""Owns operations on URLs as text: remote or local, joining, naming, and display without secrets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote, unquote_plus

_HIDDEN = "***"
_MIN_SECRET_CHARS = 6  # shorter strings protect nothing, and hiding them would mangle words
_SECRET_NAMES = ("key", "secret", "token", "passw", "credential", "connection_string", "sas", "sig", "auth", "cookie")
_SECRET_VARIABLES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS_TOKEN", "AZURE_CLIENT_SECRET",
)  # fmt: skip
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s'\"<>]*[^\s'\"<>:.,;()\[\]]")  # without punctuation after it
_HOST = re.compile(r"(\[[^\]]*\]?|[^:]*)(:\d*)?")  # and its port
_QUERY_VALUE = re.compile(r"([?&][\w.%~-]+=)[^&\s'\"<>]*[^&\s'\"<>:.,;()\[\]]")

# Secrets among this process's storage options, in every spelling; set by `storage.configure_storage`.
_configured: frozenset[str] = frozenset()


def is_remote(url: str) -> bool:
    """Whether a URL has a scheme other than `file`."""
    return "://" in url and not url.startswith("file://")


def is_http(url: str) -> bool:
    """Whether a URL is http:// or https://, where a `?` begins a query; in object stores it is like any character."""
    return url.startswith(("http://", "https://"))


def local_path(url: str) -> Path:
    """Convert a path or file:// URL to a path."""
    return Path(url.removeprefix("file://"))


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL or local path; the query of an http URL, which may sign it, stays at its end."""
    base, query = _split_query(url)
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)]) + query


def absolute(url: str) -> str:
    """Make a local path absolute, since workers may start in another folder; strip slashes from a remote URL's end."""
    return url.rstrip("/") if is_remote(url) else str(local_path(url).absolute())


def name(url: str) -> str:
    """The last part of a URL, without the query of an http URL."""
    return _split_query(url)[0].rstrip("/").rsplit("/", 1)[-1]


def parent(url: str) -> str:
    """A URL without its last part; the query of an http URL stays at its end."""
    base, query = _split_query(url)
    return base.rstrip("/").rpartition("/")[0] + query


def _split_query(url: str) -> tuple[str, str]:
    base, mark, query = url.partition("?") if is_http(url) else (url, "", "")
    return base, mark + query


def shown(url: str) -> str:
    """A URL for messages: user, password and query values become `***`, query names stay; a local path is unchanged.

    The part before an `@` stays if it is a container (`abfs://container@account...`), not a user.
    """
    if not is_remote(url):
        return url
    scheme, _, rest = url.partition("://")
    rest, mark, query = rest.partition("?")
    if is_http(url):
        rest = rest.partition("#")[0]
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    if not _HOST.fullmatch(host) and (is_http(url) or "@" in path):  # `user:pass/word@host`: its end is unclear
        return f"{scheme}://{_HIDDEN}"
    if ":" in user or (user and is_http(url)):
        user = _HIDDEN
    values = "&".join(part.partition("=")[0] + f"={_HIDDEN}" if "=" in part else _HIDDEN for part in query.split("&"))
    return f"{scheme}://{user}{at}{host}{slash}{path}{mark}{values if query else ''}"


def hide_secrets_of(options: dict[str, Any]) -> None:
    """Hide the secrets among storage options in all later messages; those of earlier options are forgotten."""
    global _configured
    _configured = frozenset(spelling for secret in _secrets_among(options, named=False) for spelling in _spelt(secret))


def scrubbed(text: str, url: str = "") -> str:
    """Remove secrets from a library's text: those of the storage options, the environment, this URL and any other.

    Args:
        text: the text, such as an error's.
        url: the URL that the text is about, since libraries also quote its parts.
    """
    secrets = set(_configured)
    for secret in [*(os.environ.get(variable, "") for variable in _SECRET_VARIABLES), *_secrets_in(url)]:
        secrets.update(_spelt(secret))
    for secret in sorted(secrets, key=lambda secret: (-len(secret), secret)):  # whole secrets before their parts
        text = text.replace(secret, _HIDDEN)
    return _QUERY_VALUE.sub(rf"\1{_HIDDEN}", _URL.sub(lambda found: shown(found[0]), text))


def _secrets_in(url: str) -> Iterator[str]:
    """User, password and query values of a URL."""
    if not is_remote(url):
        return
    rest = url.partition("://")[2]
    if shown(url).endswith(f"://{_HIDDEN}"):
        yield from re.split(r"[:/@?#]", rest)
        return
    before, _, query = rest.partition("?")
    user = before.partition("/")[0].rpartition("@")[0]
    if ":" in user or is_http(url):
        yield from [user, *user.split(":", 1)]
    yield from (part.partition("=")[2] or part for part in query.split("&"))
    if is_http(url):
        yield url.partition("#")[2]


def _secrets_among(value: object, *, named: bool) -> Iterator[str]:
    """Strings under option names that suggest secrets; `named` if a name further up did."""
    if isinstance(value, dict):
        for option, inner in value.items():
            yield from _secrets_among(inner, named=named or _is_secret_name(str(option)))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _secrets_among(inner, named=named)
    elif isinstance(value, bytes):
        yield from _secrets_among(value.decode(errors="replace"), named=named)
    elif isinstance(value, str):
        if named:
            yield value
            yield from value.split()[1:]  # `Bearer TOKEN`
            for part in re.split(r"[?;&]", value):  # a connection string, a SAS token
                option, _, inner = part.partition("=")
                if _is_secret_name(option):
                    yield inner
        yield from _secrets_in(value)


def _is_secret_name(option: str) -> bool:
    return any(word in option.lower() for word in _SECRET_NAMES)


def _spelt(secret: str) -> set[str]:
    """A secret as is, as quoted in URLs, and as `repr` and JSON print it; short spellings are left out."""
    found = {secret, unquote(secret), unquote_plus(secret), repr(secret)[1:-1], json.dumps(secret)[1:-1]}
    for plain in (secret, unquote(secret)):
        found |= {quote(plain, safe=""), quote(plain), quote_plus(plain)}
    return {spelling for spelling in found if len(spelling) >= _MIN_SECRET_CHARS}
