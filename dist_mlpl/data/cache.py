"""Owns the copy of shards on this node's disk: shared by its ranks, bounded in bytes, keyed by URL and digest.

    DIGEST.tar              a whole shard, checked; its time of change is when it was last read
    DIGEST.NUM_BYTES.part   one that is being downloaded, NUM_BYTES long in the end
    DIGEST.lock             held by the one that downloads it; a part whose lock is free was left by a killed process
    room.lock               held while room is made

A shard is complete under its name or not there at all. Local shards are read where they are.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dist_mlpl import storage
from dist_mlpl.data.manifest import Manifest, ShardEntry
from dist_mlpl.errors import ConfigError, ShardError

_TRIES = 3
_POLL_SECONDS = 0.05


def cache_folder() -> Path:
    """MLPL_CACHE_DIR, or a folder of this user's under the system's temporary one."""
    return Path(os.environ.get("MLPL_CACHE_DIR") or Path(tempfile.gettempdir()) / f"dist-mlpl-cache-{os.getuid()}")


class ShardCache:
    """Shards as local files. Safe from many threads and processes.

    Args:
        manifest: whose shards.
        limit_bytes: of the whole folder, downloads included; least recently read shards make room.
        folder: where; every rank of a node names the same one.

    Raises:
        ConfigError: a limit below two of the largest shards, one being read and one arriving.
    """

    def __init__(self, manifest: Manifest, *, limit_bytes: int, folder: Path | None = None) -> None:
        self._manifest = manifest
        self._limit_bytes = limit_bytes
        self._folder = folder or cache_folder()
        self._is_remote = storage.is_remote(manifest.url)
        if not self._is_remote:
            return
        largest = max((s.num_bytes for split in manifest.splits.values() for s in split.shards), default=0)
        if limit_bytes < 2 * largest:
            raise ConfigError(
                f"data.cache_bytes {limit_bytes:,}",
                expected=f"at least {2 * largest:,}, two of the largest shards",
                where="data.cache_bytes",
                next_step=f"raise it, or build smaller shards; the folder is {self._folder} (MLPL_CACHE_DIR)",
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        with _locked(self._folder / "room.lock"):
            self._make_room(0)  # what a killed process left, or a larger limit of an earlier run

    def read(self, shard: ShardEntry, offset: int, num_bytes: int) -> bytes:
        """Bytes [offset, offset + num_bytes) of a shard, which is downloaded first if need be.

        Raises:
            ShardError: missing, damaged or too short.
            StorageError: it could not be downloaded.
        """
        with self._open(shard) as file:
            content = os.pread(file.fileno(), num_bytes, offset)
        if len(content) == num_bytes:
            return content
        raise ShardError(
            f"{len(content)} bytes at {offset}",
            expected=f"{num_bytes} bytes, as the index says",
            where=str(file.name),
            next_step=f"the shard is truncated: run `dist-mlpl shards verify {self._manifest.url}`",
        )

    def _open(self, shard: ShardEntry) -> IO[bytes]:
        """The shard's file, which stays readable even if another process makes room of it meanwhile."""
        url = self._manifest.shard_url(shard)
        if not self._is_remote:
            try:
                return open(url.removeprefix("file://"), "rb", buffering=0)
            except FileNotFoundError:
                raise _missing(url) from None
        path = self._folder / f"{storage.sha256_of_bytes(f'{url} {shard.sha256}'.encode())[:32]}.tar"
        with contextlib.suppress(FileNotFoundError):
            return _opened(path)
        with _locked(path.with_suffix(".lock")):
            with contextlib.suppress(FileNotFoundError):
                return _opened(path)
            return self._download(url, shard, path)

    def _download(self, url: str, shard: ShardEntry, path: Path) -> IO[bytes]:
        """Fetch a shard whose lock is held, check it, give it its name, and open it."""
        partial = path.with_suffix(f".{shard.num_bytes}.part")
        found = ""
        try:
            self._reserve(partial, shard.num_bytes)
            for _ in range(_TRIES):
                found = storage.download(url, partial)
                if found == shard.sha256:
                    file = open(partial, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
                    os.replace(partial, path)
                    return file
        except FileNotFoundError:
            raise _missing(url) from None
        finally:
            partial.unlink(missing_ok=True)
        raise ShardError(
            f"sha256 {found[:16]}... after {_TRIES} downloads",
            expected=f"sha256 {shard.sha256[:16]}..., as the manifest says",
            where=url,
            next_step="the shard was damaged or replaced: run `dist-mlpl shards verify`, then build it again",
        )

    def _reserve(self, partial: Path, num_bytes: int) -> None:
        """Wait until there is room for a part and claim it; others count it by its name from then on."""
        partial.unlink(missing_ok=True)  # a killed process's: we hold its lock now
        while True:
            with _locked(self._folder / "room.lock"):
                if self._make_room(num_bytes):
                    partial.touch()
                    return
            time.sleep(_POLL_SECONDS)  # all of the limit is being downloaded; parts end, then they can make room

    def _make_room(self, num_bytes: int) -> bool:
        """Delete parts that nobody downloads, then least recently read shards, until `num_bytes` more fit.

        Returns:
            False when downloads in progress leave too little.
        """
        used, shards = 0, []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was renamed or deleted since
                if path.suffix == ".tar":
                    state = path.stat()
                    shards.append((state.st_mtime_ns, state.st_size, path))
                    used += state.st_size
                elif path.suffix == ".part" and not _is_orphan(path):
                    used += int(path.suffixes[-2][1:])
        for _, size, path in sorted(shards):
            if used + num_bytes <= self._limit_bytes:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used + num_bytes <= self._limit_bytes


def _opened(path: Path) -> IO[bytes]:
    file = open(path, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
    os.utime(file.fileno())  # the least recently read shard makes room first
    return file


def _missing(url: str) -> ShardError:
    return ShardError(
        "the shard is not there",
        expected="a tar that the manifest lists",
        where=url,
        next_step="restore it, or build the data set again; `dist-mlpl shards verify` lists what else is missing",
    )


def _is_orphan(partial: Path) -> bool:
    """Delete a part whose lock nobody holds, and say so; one that has just become a shard still counts."""
    with open(partial.with_suffix("").with_suffix(".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        was_there = partial.exists()
        partial.unlink(missing_ok=True)
        return was_there


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock that the kernel drops with the process; works between threads too."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
