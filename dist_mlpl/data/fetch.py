"""Owns where a sample's bytes come from: a local tar, an extent prefetched into the cache, or a single read.

A remote tar is fetched in extents, runs of whole samples of about EXTENT_BYTES, window after window in the order in
which training needs them. Samples needed sooner (the first steps after a start, at any position of an epoch) are read
singly, several at once, so that a run never waits for a window. All fetched bytes are verified before use.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt
from isal.isal_zlib import crc32  # the same checksums as zlib's, ten times as fast

from dist_mlpl import storage
from dist_mlpl.data.cache import ExtentCache
from dist_mlpl.data.shard_index import ShardIndex
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.tar_members import JPEG_START
from dist_mlpl.errors import ConfigError, ShardError

log = logging.getLogger(__name__)

EXTENT_BYTES = 8 << 20
_NUM_WINDOWS_HELD = 2  # windows of each lane: the current one and the next
_NUM_DIRECT_READS = 32  # single samples read at once
_NUM_EXTENTS = 4  # extents fetched at once
_NUM_OPEN_FILES = 256  # local tars kept open
_TRIES = 3

Spans = Sequence[tuple[int, int]]  # (first, stop) sample indices, each within one shard


class FetchCounts(NamedTuple):
    """Number of samples by where their bytes came from, since the fetcher was made."""

    local: int = 0
    cached: int = 0
    direct: int = 0


class Extent(NamedTuple):
    """A run of whole samples of one tar."""

    key: str
    start: int  # first byte in the tar
    stop: int
    rows: range


class Ticket(NamedTuple):
    """Pending reads of some samples; a read gives None when the bytes are on this node already."""

    places: list[tuple[int, int]]  # shard and row of each sample
    reads: list[Future[bytes | None]]  # one per sample; empty when all tars are local


class Fetcher:
    """Reads the bytes of one split's samples. Safe to use from many threads.

    Args:
        index: the split.
        cache: this node's cache; None to read every remote sample singly.
    """

    def __init__(self, index: SplitIndex, cache: ExtentCache | None = None) -> None:
        self._index, self._cache = index, cache
        self.is_remote = index.is_remote
        self._keys: dict[int, str] = {}  # prefix of each shard's extent keys: hash of its URL and digest
        self._files: OrderedDict[int, IO[bytes]] = OrderedDict()
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(FetchCounts._fields, 0)
        self._direct = ThreadPoolExecutor(_NUM_DIRECT_READS, "read")
        self._ahead = ThreadPoolExecutor(_NUM_EXTENTS, "fetch")
        self._moved = threading.Condition()
        self._round = 0  # the round being used
        self._following = 0  # number of `follow` and `close` calls; work begun before the last one is stale

    @property
    def counts(self) -> FetchCounts:
        """Counts so far."""
        with self._lock:
            return FetchCounts(**self._counts)

    def close(self) -> None:
        """Stop fetching; reads already running are left to finish."""
        self._leave()
        self._direct.shutdown(wait=False, cancel_futures=True)
        self._ahead.shutdown(wait=False, cancel_futures=True)

    # Single samples

    def begin(self, indices: npt.NDArray[np.int64]) -> Ticket:
        """Start reading the samples that are not on this node; never waits.

        Args:
            indices: (n,) int64 in [0, N).
        """
        places = self._index.rows(indices)
        if not self.is_remote:
            return Ticket(places, [])
        return Ticket(places, [self._direct.submit(self._read_if_missing, *place) for place in places])

    def take(self, ticket: Ticket) -> Iterator[bytes]:
        """The JPEG bytes of the ticket's samples, in order; waits for pending reads.

        Raises:
            ShardError: a shard is missing, damaged or replaced.
            StorageError: a shard could not be read.
        """
        for number, (shard, row) in enumerate(ticket.places):
            content = ticket.reads[number].result() if ticket.reads else None
            yield self._read_here(shard, row) if content is None else content

    def _read_if_missing(self, shard: int, row: int) -> bytes | None:
        if not storage.is_remote(self._url(shard)):
            return None
        if self._cache is not None and self._cache.has(self._extent(shard, row).key):
            return None
        return self._read_sample(shard, row)

    def _read_here(self, shard: int, row: int) -> bytes:
        table = self._index.shard_index(shard)
        offset, num_bytes = int(table.offsets[row]), int(table.num_bytes[row])
        if not self.is_remote or not storage.is_remote(self._url(shard)):
            return self._read_local(shard, row, offset, num_bytes)
        if self._cache is not None:
            extent = self._extent(shard, row)
            content = self._cache.read(extent.key, offset - extent.start, num_bytes)
            if content is not None:
                if len(content) == num_bytes and _is_sound(content, offset, table, row):
                    self._count("cached")
                    return content
                self._cache.drop(extent.key)
        return self._read_sample(shard, row)  # not cached, evicted meanwhile, or unsound

    def _read_local(self, shard: int, row: int, offset: int, num_bytes: int) -> bytes:
        try:
            content = os.pread(self._local_file(shard).fileno(), num_bytes, offset)
        except OSError:  # for example a network disk that failed over: reopen and retry for a while
            with self._lock:
                self._files.pop(shard, None)
            try:
                content = storage.read_bytes(self._url(shard), offset, offset + num_bytes)
            except FileNotFoundError:  # never there, or deleted while its handle was kept open here
                raise _missing(self._url(shard)) from None
        if len(content) != num_bytes:
            raise _truncated(self._url(shard), f"{len(content)} bytes at {offset}", f"{num_bytes}, as the index says")
        table = self._index.shard_index(shard)
        if not _is_sound(content, offset, table, row):
            raise _truncated(
                self._url(shard), f"sample {table.keys[row]} with other bytes than were packed", "the same"
            )
        return content

    def _local_file(self, shard: int) -> IO[bytes]:
        """A shard's tar, opened; the last used stay open."""
        with self._lock:
            if shard not in self._files:
                url = self._url(shard)
                self._files[shard] = open(url.removeprefix("file://"), "rb", buffering=0)  # noqa: SIM115 - closed with the last user
                if len(self._files) > _NUM_OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(shard)
            self._counts["local"] += 1
            return self._files[shard]

    def _read_sample(self, shard: int, row: int) -> bytes:
        table = self._index.shard_index(shard)
        start = int(table.offsets[row])
        content = self._read_checked(shard, start, start + int(table.num_bytes[row]), range(row, row + 1))
        self._count("direct")
        return content

    # Extents

    def follow(self, rounds: Iterable[tuple[int, Spans]]) -> None:
        """Prefetch the extents of these rounds from now on, in place of any earlier rounds; never waits.

        Args:
            rounds: (number, spans) in ascending order; `use` says which round is current. Only the current round and
                the one after it are fetched.
        """
        self._leave()
        if not self.is_remote or self._cache is None:
            return
        following = self._following
        threading.Thread(target=self._follow, args=(following, iter(rounds)), name="follow", daemon=True).start()

    def use(self, number: int) -> None:
        """Declare a round current, so that the next one may be fetched."""
        with self._moved:
            if number != self._round:
                self._round = number
                self._moved.notify_all()

    def _leave(self) -> None:
        with self._moved:
            self._following += 1
            self._round = 0
            self._moved.notify_all()

    def _follow(self, following: int, rounds: Iterator[tuple[int, Spans]]) -> None:
        for number, spans in rounds:
            with self._moved:
                while self._following == following and self._round < number - 1:
                    self._moved.wait()
                if self._following != following:
                    return
            try:
                jobs = [self._ahead.submit(self._fetch_span, following, number, *span) for span in spans]
            except RuntimeError:  # the pool was closed
                return
            for job in jobs:
                try:
                    job.result()
                except CancelledError:
                    return
                except Exception as error:
                    # The samples are read singly when needed; a failure there stops the run.
                    log.warning("what is read next could not be fetched ahead: %s", error)

    def _fetch_span(self, following: int, number: int, first: int, stop: int) -> None:
        """Fetch the extents that hold samples [first, stop), which lie in one shard."""
        assert self._cache is not None
        ((shard, row),) = self._index.rows(np.array([first]))
        if not storage.is_remote(self._url(shard)):
            return
        end = row + stop - first
        while row < end:
            extent = self._extent(shard, row)
            if self._following != following or number < self._round:
                return  # superseded, or too late to be of use
            fetch = partial(self._read_checked, shard, extent.start, extent.stop, extent.rows)
            self._cache.add(extent.key, extent.stop - extent.start, fetch)
            row = extent.rows.stop

    def _extent(self, shard: int, row: int) -> Extent:
        """The extent that holds a row: all samples whose first byte lies in the same EXTENT_BYTES of the tar."""
        table = self._index.shard_index(shard)
        number = int(table.offsets[row]) // EXTENT_BYTES
        first, stop = np.searchsorted(table.offsets, np.array([number, number + 1], dtype=np.uint64) * EXTENT_BYTES)
        if shard not in self._keys:
            entry = self._index.shards[shard]
            identity = f"{self._url(shard)} {entry.sha256 or entry.index_sha256} {EXTENT_BYTES}"
            self._keys[shard] = storage.sha256_of_bytes(identity.encode())[:32]
        return Extent(
            key=f"{self._keys[shard]}-{number:06d}",
            start=int(table.offsets[first]),
            stop=int(table.offsets[stop - 1] + table.num_bytes[stop - 1]),
            rows=range(int(first), int(stop)),
        )

    # Fetching and checking

    def _read_checked(self, shard: int, start: int, stop: int, rows: range) -> bytes:
        """Read bytes [start, stop) of a remote tar and verify the samples `rows` in it, reading up to _TRIES times.

        Raises:
            ShardError: the tar is missing, or does not hold what its index says.
            StorageError: it could not be read.
        """
        url, table = self._url(shard), self._index.shard_index(shard)
        for _ in range(_TRIES):
            try:
                content = storage.read_bytes(url, start, stop)
            except FileNotFoundError:
                raise _missing(url) from None
            bad = next((row for row in rows if not _is_sound(content, start, table, row)), None)
            if bad is None:
                return content
        raise _truncated(
            url, f"sample {table.keys[bad]} with other bytes than were packed, {_TRIES} times", "those of its index"
        )

    def _url(self, shard: int) -> str:
        return self._index.manifest.shard_url(self._index.shards[shard])

    def _count(self, kind: str) -> None:
        with self._lock:
            self._counts[kind] += 1


def _is_sound(content: bytes, start: int, table: ShardIndex, row: int) -> bool:
    """Whether a sample's bytes match the index: its checksum, or the JPEG start marker where the index has none."""
    begin = int(table.offsets[row]) - start
    sample = memoryview(content)[begin : begin + int(table.num_bytes[row])]
    if table.crc32 is None:  # the index was made from tar headers alone
        return bytes(sample[: len(JPEG_START)]) == JPEG_START
    return crc32(sample) == int(table.crc32[row])


def least_cache_bytes(index: SplitIndex, *, num_lanes: int, window_samples: int) -> int:
    """Smallest sensible cache of a node in bytes: two windows of each lane that it reads, with room for eviction.

    Args:
        index: the split.
        num_lanes: lanes read by the ranks of this node.
        window_samples: `data.window_samples`.
    """
    if index.num_samples == 0:
        return 0
    held = min(num_lanes * _NUM_WINDOWS_HELD * window_samples, index.num_samples)
    # Extents are whole, so those at both ends of a lane's two windows reach beyond them.
    num_bytes = min(held * index.num_bytes // index.num_samples + num_lanes * 2 * EXTENT_BYTES, index.num_bytes)
    return num_bytes * 8 // 7 + 2 * EXTENT_BYTES


def check_cache_limit(limit_bytes: int, index: SplitIndex, *, num_lanes: int, window_samples: int) -> int:
    """Refuse a cache too small for the windows being read; 0 means no cache and is accepted.

    Args:
        limit_bytes: `data.cache_bytes`, >= 0.
        index: the split.
        num_lanes: lanes read by the ranks of this node.
        window_samples: `data.window_samples`.

    Returns:
        The smallest size that would do, in bytes.

    Raises:
        ConfigError: the limit is above 0 and too small; the message names that size and how many lanes would fit.
    """
    least = least_cache_bytes(index, num_lanes=num_lanes, window_samples=window_samples)
    if limit_bytes == 0 or limit_bytes >= least:
        return least
    fewer = range(num_lanes - 1, 0, -1)
    served = next(
        (n for n in fewer if least_cache_bytes(index, num_lanes=n, window_samples=window_samples) <= limit_bytes), 0
    )
    raise ConfigError(
        f"data.cache_bytes {limit_bytes:,}",
        expected=f"at least {least:,} on this node: two windows of {window_samples:,} samples of {num_lanes} lanes",
        where="data.cache_bytes",
        next_step="raise it (MLPL_CACHE_DIR places it), "
        + (f"set data.num_lanes to {served} before the run begins, " if served else "")
        + "use smaller data.window_samples, or set it to 0 to read every sample by itself",
    )


def _missing(url: str) -> ShardError:
    return ShardError(
        "the shard is not there",
        expected="a tar that the manifest lists",
        where=storage.shown(url),
        next_step="restore it, or build the data set again; `dist-mlpl shards verify` lists what else is missing",
    )


def _truncated(url: str, found: str, expected: str) -> ShardError:
    return ShardError(
        found,
        expected=expected,
        where=storage.shown(url),
        next_step="the shard is truncated, damaged or was replaced: run `dist-mlpl shards verify`, then restore it",
    )
