"""Owns fetched extents on this node's disk: shared by its ranks, bounded in bytes, each whole under its name or absent.

KEY.bytes   an extent, checked; its time of change is when it was last read
KEY.part    one that is being fetched, already as long as it will be, locked by the one that fetches it;
            a part whose lock is free was left by a killed process
room.lock   held while room is made
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

_FULL_DISK_SECONDS = 60.0  # how long a disk found full is left alone
_PARTS_BETWEEN_SCANS = 8  # the folder is listed once for every eighth of the limit fetched, and emptied to 7/8


def cache_folder() -> Path:
    """MLPL_CACHE_DIR, or a folder of this user's under the system's temporary one."""
    return Path(os.environ.get("MLPL_CACHE_DIR") or Path(tempfile.gettempdir()) / f"dist-mlpl-cache-{os.getuid()}")


class ExtentCache:
    """Runs of bytes under keys. Safe from many threads and processes.

    Args:
        limit_bytes: of the whole folder, parts included; the least recently read extents make room.
        num_processes: how many use the folder at once; each may be behind with its count by a share of the limit.
        folder: where; every rank of a node names the same one. None for `cache_folder`.

    Raises:
        ConfigError: the folder may not be written.
    """

    def __init__(self, *, limit_bytes: int, num_processes: int = 1, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder()
        self._kept_bytes = limit_bytes - limit_bytes // _PARTS_BETWEEN_SCANS
        self._unscanned_limit = limit_bytes // _PARTS_BETWEEN_SCANS // num_processes
        self._unscanned_bytes = 0  # reserved since this process last listed the folder
        self._lock = threading.Lock()
        self._full_until = 0.0  # of the monotonic clock: until then the disk is taken for full
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._has_room(0, is_scan_forced=True)  # what a killed process left, or a larger limit of an earlier run
        except PermissionError as error:
            raise ConfigError(
                f"a cache folder that may not be written: {error}",
                expected="a folder of this user's",
                where=f"MLPL_CACHE_DIR: {self.folder}",
                next_step="set MLPL_CACHE_DIR to a folder on a large local disk",
            ) from error

    def has(self, key: str) -> bool:
        """Whether an extent is here now; another process may make room of it at any time."""
        return self._path(key).exists()

    def read(self, key: str, start: int, num_bytes: int) -> bytes | None:
        """Bytes [start, start + num_bytes) of an extent, or None when it is not here."""
        try:
            with open(self._path(key), "rb", buffering=0) as file:
                os.utime(file.fileno())  # the least recently read makes room first
                return os.pread(file.fileno(), num_bytes, start)
        except FileNotFoundError:
            return None
        except OSError as error:  # of this node's disk: the store has the bytes
            log.warning("an extent of the cache cannot be read: %s", error)
            return None

    def add(self, key: str, num_bytes: int, fetch: Callable[[], bytes]) -> bool:
        """Make sure that an extent is here; of several that ask at once, one fetches and the others wait.

        Args:
            key: letters, digits, `-`.
            num_bytes: its length.
            fetch: gives the checked bytes; what it raises passes through.

        Returns:
            False when there is no room for it, by the limit or on the disk.
        """
        path, part = self._path(key), self.folder / f"{key}.part"
        while not path.exists():
            if time.monotonic() < self._full_until:
                return False
            try:
                with _locked(part) as file:
                    if not _is_same(part, file):
                        continue  # renamed or removed by the one before us
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
        """Fetch into a part whose lock is held, and give it its name."""
        is_whole = False
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # counts from now on; a full disk says so before the fetch
            if self._has_room(num_bytes):
                file.write(fetch())
                file.flush()
                os.fsync(file.fileno())  # or a machine that goes down may keep the name without the bytes
                os.replace(part, path)
                is_whole = True
        finally:
            if not is_whole:  # else a part of that name is another's
                part.unlink(missing_ok=True)
        return is_whole

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.bytes"

    def _has_room(self, num_bytes: int, *, is_scan_forced: bool = False) -> bool:
        """Count a part that is there, and make room for it; listing thousands of files for each would cost too much."""
        with self._lock:
            self._unscanned_bytes += num_bytes
            if self._unscanned_bytes <= self._unscanned_limit and not is_scan_forced:
                return True
            with _locked(self.folder / "room.lock"):
                has_room = self._make_room()
            if has_room:  # else the folder is as full as before, and the next one looks again
                self._unscanned_bytes = 0
            return has_room

    def _make_room(self) -> bool:
        """Delete parts that nobody fetches, then least recently read extents, until the rest fits."""
        used, extents = 0, []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was renamed or deleted since
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
    """Delete a part whose lock nobody holds, and say so."""
    with open(part, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if _is_same(part, file):
            part.unlink(missing_ok=True)
        return True


def _is_same(path: Path, file: IO[bytes]) -> bool:
    """Whether the name still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, making it if need be, and hold its lock, which the kernel drops with the process."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:  # buffered: it writes all, or raises
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
