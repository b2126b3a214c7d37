"""Owns local files: atomic and durable writes through temporary names, listings, deletion of folders."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dist_mlpl.errors import StorageRefusedError

_NO_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@contextlib.contextmanager
def temporary_beside(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """Yield an empty file to fill and then rename or link to `path`; it is removed at the end if it still exists.

    It lies in the same folder, or in `scratch`, which must be on the same disk. Missing folders are created.
    """
    folder = scratch or path.parent
    for needed in {path.parent, folder}:
        _make_folder(needed)
    handle, text = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
    os.close(handle)
    temporary = Path(text)
    temporary.chmod(0o644)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Make a folder where it lacks, also while others remove it."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return
        except FileExistsError as error:
            if os.path.lexists(folder) and not folder.is_dir():  # else a caller would take it for its own file
                raise NotADirectoryError(errno.ENOTDIR, "a file of this name exists", str(folder)) from error


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk holds its bytes; `sync_folder` does the same for its name."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def link_exclusively(file: Path, path: Path) -> None:
    """Give a file a second name, which must be new: of any number of callers, exactly one succeeds.

    Raises:
        FileExistsError: the name exists, of another file.
        StorageRefusedError: the file system has no hard links.
    """
    try:
        os.link(file, path)
    except FileExistsError:
        if not os.path.samefile(file, path):  # else a network disk did it, and its answer was lost
            raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise StorageRefusedError(
            f"no hard link can be made: {error.strerror}",
            expected="a file system with hard links, by which one of several writers wins",
            where=str(path.parent),
            next_step="use another disk (FAT and some FUSE mounts have no links), or an object store",
        ) from error


def sync_folder(path: Path) -> None:
    """Make a file's name durable, and the name of its folder too."""
    for folder in (path.parent, path.parent.parent):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sizes_below(root: Path) -> Iterator[tuple[str, int]]:
    """Paths of all files below a folder, relative to it, and their sizes in bytes; in any order.

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
    """Delete a folder and everything below it, even while others delete the same."""
    for folder, _, files in os.walk(root, topdown=False):
        for file in files:
            Path(folder, file).unlink(missing_ok=True)
        try:
            os.rmdir(folder)
        except OSError as error:  # removed by another process, or not empty yet
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise
