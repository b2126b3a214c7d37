"""Owns listings of folders: names, paths and sizes, on disk and in object stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any, Final

from dist_mlpl import local_files, stores
from dist_mlpl.errors import StorageError
from dist_mlpl.retry import retried
from dist_mlpl.urls import is_http, is_remote, local_path, name, shown

_LISTERS: Final = 16  # parts of an S3 folder that are listed concurrently


def list_names(url: str) -> list[str]:
    """Sorted names directly below a folder URL, without dot files; empty when the folder does not exist."""

    def ask() -> list[str]:
        if not is_remote(url):
            return sorted(entry.name for entry in local_path(url).iterdir())
        filesystem, path = stores.remote(url)
        filesystem.invalidate_cache(path)
        found = filesystem.ls(path, detail=False)
        return sorted({name(entry) for entry in found} - {"", name(path)})

    try:
        return [entry for entry in retried(ask, url=url, doing="listing") if not entry.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_files(url: str) -> list[str]:
    """Paths of all files below a folder URL, relative to it, sorted.

    Raises:
        FileNotFoundError: no such folder.
    """

    def ask() -> list[str]:
        if not is_remote(url):
            root = local_path(url)
            if not root.is_dir():
                raise FileNotFoundError(url)
            return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        filesystem, path = stores.remote(url)
        filesystem.invalidate_cache(path)
        found = filesystem.find(path)
        if not found:
            raise FileNotFoundError(url)
        return sorted(entry[len(path.rstrip("/")) + 1 :] for entry in found)

    return retried(ask, url=url, doing="listing")


def list_sizes(url: str, *, starts: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """Paths of all files below a folder URL, relative to it, and their sizes in bytes; in any order.

    S3 is listed page by page, so millions of files need little memory; other object stores are listed in one piece.

    Args:
        url: the folder.
        starts: some of the paths, ascending. On S3 the parts between them are listed concurrently.

    Raises:
        FileNotFoundError: no such folder or, in an object store, nothing in it.
        StorageError: it could not be listed; HTTP servers never can.
    """
    if is_http(url):
        raise StorageError(
            "a web server cannot be asked for a list", expected="a disk or an object store", where=shown(url),
            next_step="ask for the size of every file by itself",
        )  # fmt: skip
    if not is_remote(url):
        found = local_files.sizes_below(local_path(url))
    elif url.startswith(("s3://", "s3a://")):
        found = _pages(url, starts)
    else:
        found = _find_sizes(url)
    is_empty = True
    for entry in found:
        is_empty = False
        yield entry
    if is_empty and is_remote(url):
        raise FileNotFoundError(shown(url))


def _pages(url: str, starts: Sequence[str]) -> Iterator[tuple[str, int]]:
    """All objects of an S3 folder: the part between two starts page by page, several parts concurrently."""

    def page(after: str) -> tuple[list[tuple[str, int]], bool]:
        return retried(lambda: stores.list_page(url, after), url=url, doing="listing")

    edges = ["", *(start for start in starts if start)]
    with ThreadPoolExecutor(_LISTERS, "list") as pool:
        parts = {pool.submit(page, first): last for first, last in zip(edges, [*edges[1:], None], strict=True)}
        while parts:
            for done in wait(parts, return_when=FIRST_COMPLETED).done:
                last = parts.pop(done)
                found, is_end = done.result()
                if not is_end and (last is None or found[-1][0] < last):
                    parts[pool.submit(page, found[-1][0])] = last
                yield from (
                    entry for entry in found if (last is None or entry[0] <= last) and not entry[0].endswith("/")
                )


def _find_sizes(url: str) -> Iterator[tuple[str, int]]:
    filesystem, path = stores.remote(url)

    def find() -> dict[str, Any]:
        filesystem.invalidate_cache(path)
        return filesystem.find(path, detail=True)

    skipped = len(path.rstrip("/")) + 1
    for entry, about in retried(find, url=url, doing="listing").items():
        yield entry[skipped:], int(about["size"])
