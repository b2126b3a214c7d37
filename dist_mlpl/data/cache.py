"""Owns the copy of shards on this node's disk: shared by its ranks, bounded in bytes, keyed by URL and digest.

A shard is complete under its name or not there at all: it is downloaded under another name, checked, then renamed.
Local shards are read where they are.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dist_mlpl import storage
from dist_mlpl.data.manifest import Manifest, ShardEntry
from dist_mlpl.errors import ConfigError, ShardError

_TRIES = 3


def cache_folder() -> Path:
    """MLPL_CACHE_DIR, or a folder of this user's under the system's temporary one."""
    return Path(os.environ.get("MLPL_CACHE_DIR") or Path(tempfile.gettempdir()) / f"dist-mlpl-cache-{os.getuid()}")


class ShardCache:
    """Shards as local files.

    Args:
        manifest: whose shards.
        limit_bytes: of the whole folder; least recently read shards make room.
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

    def read(self, shard: ShardEntry, offset: int, num_bytes: int) -> bytes:
        """Bytes [offset, offset + num_bytes) of a shard, which is downloaded first if need be.

        Raises:
            ShardError: missing, damaged or too short.
        """
        for _ in range(_TRIES):
            path = self._path(shard)
            try:
                with open(path, "rb", buffering=0) as file:
                    content = os.pread(file.fileno(), num_bytes, offset)
            except FileNotFoundError:
                if self._is_remote:  # another process made room between our look and our open
                    continue
                raise _missing(self._manifest.shard_url(shard)) from None
            if len(content) == num_bytes:
                return content
            raise ShardError(
                f"{len(content)} bytes at {offset}",
                expected=f"{num_bytes} bytes, as the index says",
                where=str(path),
                next_step=f"the shard is truncated: run `dist-mlpl shards verify {self._manifest.url}`",
            )
        raise ShardError(
            f"the shard left the cache {_TRIES} times while it was being opened",
            expected="room for the shards that are being read",
            where=f"{self._folder} ({self._limit_bytes:,} bytes)",
            next_step="raise data.cache_bytes, or give each run its own MLPL_CACHE_DIR",
        )

    def _path(self, shard: ShardEntry) -> Path:
        url = self._manifest.shard_url(shard)
        if not self._is_remote:
            return Path(url.removeprefix("file://"))
        path = self._folder / f"{storage.sha256_of_bytes(f'{url} {shard.sha256}'.encode())[:32]}.tar"
        if path.exists():
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)  # the least recently used shard makes room first
            return path
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                self._download(url, shard, path)
        return path

    def _download(self, url: str, shard: ShardEntry, path: Path) -> None:
        with _locked(self._folder / "room.lock"):
            self._make_room(shard.num_bytes)
        partial = path.with_suffix(f".{os.getpid()}.part")
        found = ""
        try:
            for _ in range(_TRIES):
                found = storage.download(url, partial)
                if found == shard.sha256:
                    os.replace(partial, path)
                    return
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

    def _make_room(self, num_bytes: int) -> None:
        """Delete least recently read shards, and parts that a killed process left, until `num_bytes` more fit."""
        shards = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.suffix == ".tar":
                    state = path.stat()
                    shards.append((state.st_mtime, state.st_size, path))
                elif path.suffix == ".part" and not _is_running(int(path.suffixes[-2][1:])):
                    path.unlink()
        used = sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if used + num_bytes <= self._limit_bytes:
                break
            path.unlink(missing_ok=True)
            used -= size


def _missing(url: str) -> ShardError:
    return ShardError(
        "the shard is not there",
        expected="a tar that the manifest lists",
        where=url,
        next_step="restore it, or build the data set again; `dist-mlpl shards verify` lists what else is missing",
    )


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock that the kernel drops with the process; works between threads too."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
