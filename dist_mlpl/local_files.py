"""Owns files of this machine: written whole and durably under a temporary name, listed, deleted with their folder."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def temporary_beside(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """An empty file to fill and rename, or link, to `path`; removed at the end if it is still there.

    It lies in the same folder, or in `scratch`, which must be on the same disk. Folders are made where they lack.
    """
    folder = scratch or path.parent
    for needed in {path.parent, folder}:
        needed.mkdir(parents=True, exist_ok=True)
    handle, text = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
    os.close(handle)
    temporary = Path(text)
    temporary.chmod(0o644)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk holds its bytes; `sync_folder` does so for its name."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make a name as durable as the file it names, and the folder's own name with it."""
    for folder in (path.parent, path.parent.parent):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sizes_below(root: Path) -> Iterator[tuple[str, int]]:
    """Paths of all files below a folder, relative to it, and their sizes; in any order.

    Raises:
        FileNotFoundError: no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(str(root))
    folders = [""]
    while folders:
        below = folders.pop()
        with os.scandir(root / below) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{below}{entry.name}/")
                elif entry.is_file():
                    yield f"{below}{entry.name}", entry.stat().st_size


def remove_tree(root: Path) -> None:
    """Delete a folder with all that is below it, also while others delete the same."""
    for folder, _, files in os.walk(root, topdown=False):
        for file in files:
            Path(folder, file).unlink(missing_ok=True)
        try:
            os.rmdir(folder)
        except OSError as error:  # removed by another process, or filled by one that removes it later
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise
