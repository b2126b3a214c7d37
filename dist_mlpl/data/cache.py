"""Owns fetched extents on this node's disk: shared by its ranks, bounded in bytes, each whole under its name or absent.

KEY.bytes   a verified extent; its modification time is when it was last read
KEY.part    an extent being fetched, preallocated at full length and locked by the process that fetches it;
            a part that nobody locks was left behind by a killed process
room.lock   held while extents are evicted
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from dist_mlpl.errors import ConfigError

log = logging.getLogger(__name__)

_FULL_DISK_SECONDS = 60.0  # how long to wait before writing again to a disk that was found full
_PARTS_BETWEEN_SCANS = 8  # the folder is listed after each eighth of the limit fetched, and evicted down to 7/8


def cache_folder() -> Path:
    """The cache folder: MLPL_CACHE_DIR, or a folder of this user's in the system's temporary folder."""
    return Path(os.environ.get("MLPL_CACHE_DIR") or Path(tempfile.gettempdir()) / f"dist-mlpl-cache-{os.getuid()}")


class ExtentCache:
    """A disk cache of byte runs (extents) by key. Safe to use from many threads and processes.

    Args:
        limit_bytes: most bytes in the whole folder, parts included; the least recently read extents are evicted.
        num_processes: how many processes use the folder at once; each may fetch 1 / (8 num_processes) of the limit
            between two listings of the folder.
        folder: where extents lie; every rank of a node names the same one. None for `cache_folder`.

    Raises:
        ConfigError: no permission to write the folder.
    """

    def __init__(self, *, limit_bytes: int, num_processes: int = 1, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder()
        self._kept_bytes = limit_bytes - limit_bytes // _PARTS_BETWEEN_SCANS
        self._unscanned_limit = limit_bytes // _PARTS_BETWEEN_SCANS // num_processes
        self._unscanned_bytes = 0  # reserved since this process last listed the folder
        self._lock = threading.Lock()
        self._full_until = 0.0  # on the monotonic clock: until then the disk counts as full
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Clear what a killed process or an earlier run with a larger limit left.
            self._has_room(0, is_scan_forced=True)
        except PermissionError as error:
            raise ConfigError(
                f"a cache folder that may not be written: {error}",
                expected="a folder of this user's",
                where=f"MLPL_CACHE_DIR: {self.folder}",
                next_step="set MLPL_CACHE_DIR to a folder on a large local disk",
            ) from error

    def has(self, key: str) -> bool:
        """Whether an extent is cached now; another process may evict it at any time."""
        return self._path(key).exists()

    def read(self, key: str, start: int, num_bytes: int) -> bytes | None:
        """Bytes [start, start + num_bytes) of an extent, or None when it is not cached or cannot be read.

        The result may be shorter than `num_bytes`; the caller checks it.
        """
        try:
            with open(self._path(key), "rb", buffering=0) as file:
                os.utime(file.fileno())  # the least recently read extent is evicted first
                return os.pread(file.fileno(), num_bytes, start)
        except FileNotFoundError:
            return None
        except OSError as error:  # a fault of this node's disk; the store still has the bytes
            log.warning("an extent of the cache cannot be read: %s", error)
            return None

    def drop(self, key: str) -> None:
        """Remove an extent whose bytes turned out wrong, so that it is fetched again."""
        log.warning("a damaged extent of the cache is removed: %s", self._path(key))
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:  # a fault of this node's disk; the store still has the bytes
            log.warning("it cannot be removed: %s", error)

    def add(self, key: str, num_bytes: int, fetch: Callable[[], bytes]) -> bool:
        """Make sure that an extent is cached; of several callers at once, one fetches and the others wait.

        Args:
            key: letters, digits and `-`.
            num_bytes: length of the extent.
            fetch: returns the verified bytes; its exceptions propagate.

        Returns:
            False when the limit or the disk leaves no room for it.
        """
        path, part = self._path(key), self.folder / f"{key}.part"
        while not path.exists():
            if time.monotonic() < self._full_until:
                return False
            try:
                with _locked(part) as file:
                    if not _is_same(part, file):
                        continue  # renamed or removed by the lock's previous holder
                    if path.exists():
                        part.unlink()
                        break
                    return self._fill(file, part, path, num_bytes, fetch)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self._full_until = time.monotonic() + _FULL_DISK_SECONDS
                log.warning(
                    "no room on the disk of the cache %s, so samples are read one by one: %s", self.folder, error
                )
                return False
        return True

    def _fill(self, file: IO[bytes], part: Path, path: Path, num_bytes: int, fetch: Callable[[], bytes]) -> bool:
        """Fetch into a part whose lock is held, then rename it to `path`. False when there is no room."""
        is_whole = False
        try:
            # The part counts towards the limit from now on, and a full disk fails before the fetch.
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            if self._has_room(num_bytes):
                file.write(fetch())
                file.flush()
                os.fsync(file.fileno())  # else a machine that crashes may keep the name without the bytes
                os.replace(part, path)
                is_whole = True
        finally:
            if not is_whole:  # otherwise a part of that name belongs to another process
                part.unlink(missing_ok=True)
        return is_whole

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.bytes"

    def _has_room(self, num_bytes: int, *, is_scan_forced: bool = False) -> bool:
        """Count an allocated part; once enough were added, list the folder and evict. False when no room can be made.

        Listing thousands of files for every part would cost too much.
        """
        with self._lock:
            self._unscanned_bytes += num_bytes
            if self._unscanned_bytes <= self._unscanned_limit and not is_scan_forced:
                return True
            with _locked(self.folder / "room.lock"):
                has_room = self._make_room()
            if has_room:  # otherwise the folder is still full, so the next call lists it again
                self._unscanned_bytes = 0
            return has_room

    def _make_room(self) -> bool:
        """Delete orphaned parts, then least recently read extents until the rest fits; False if it never does."""
        used, extents = 0, []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # renamed or deleted since the folder was listed
                if path.suffix == ".bytes":
                    state = path.stat()
                    extents.append((state.st_mtime_ns, state.st_size, path))
                    used += state.st_size
                elif path.suffix == ".part" and not _removed_as_orphan(path):
                    used += path.stat().st_size
        for _, size, path in sorted(extents):
            if used <= self._kept_bytes:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used <= self._kept_bytes


def _removed_as_orphan(part: Path) -> bool:
    """Delete a part whose lock nobody holds; return whether nobody held it."""
    with open(part, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if _is_same(part, file):
            part.unlink(missing_ok=True)
        return True


def _is_same(path: Path, file: IO[bytes]) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, creating it if need be, and hold its lock, which the kernel releases when the process dies."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:  # buffered: it writes all, or raises
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
