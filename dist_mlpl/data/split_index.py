"""Owns the way from a sample's address to its shard, row and labels; per-shard indexes are read when first touched."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise

import numpy as np
import numpy.typing as npt

from dist_mlpl import storage
from dist_mlpl.data.manifest import Manifest, ShardEntry
from dist_mlpl.data.order import Parts, epoch_length
from dist_mlpl.data.shard_index import ShardIndex, read_index

KEPT_INDEXES = 2048  # of a split, in memory: about 80 bytes a sample, so 160 MB with 1,000 samples a shard
_READ_AHEAD = 16


class SplitIndex:
    """The shards of one split, addressed by sample. Safe from many threads.

    Args:
        manifest: as loaded.
        split: name of the split.
    """

    def __init__(self, manifest: Manifest, split: str) -> None:
        self.manifest = manifest
        self.split = split
        self.shards: list[ShardEntry] = list(manifest.split(split).shards)
        sizes = np.array([shard.num_samples for shard in self.shards], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(sizes)])  # (S + 1,) first sample of each shard, then N
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()  # the newest used last
        self._lock = threading.Lock()
        self._shard_locks = [threading.Lock() for _ in self.shards]  # different shards are read side by side

    @property
    def num_samples(self) -> int:
        """N of this split."""
        return int(self.starts[-1])

    @property
    def num_bytes(self) -> int:
        """Bytes of the split's tars."""
        return self.manifest.split(self.split).num_bytes

    @property
    def epoch_samples(self) -> int:
        """Samples of a training epoch: N, or what the weights of a mixture make of it."""
        return epoch_length(self.shard_sizes, self.parts)

    @property
    def parts(self) -> Parts | None:
        """Shards and weight of each set of a mixture; None for a set by itself."""
        return self.manifest.parts.get(self.split)

    @property
    def is_remote(self) -> bool:
        """Whether some tar lies in a store."""
        return any(storage.is_remote(url) for url in {entry.tars or self.manifest.tars_url for entry in self.shards})

    def is_sound(self, shard: int) -> bool:
        """Whether every image of a shard was decoded whole when it was packed, and its bytes are checked when read."""
        packing = self.manifest.packing
        return packing is not None and packing.decode and self.shard_index(shard).crc32 is not None

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard in manifest order."""
        return np.diff(self.starts).tolist()

    def shard_of(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Shard of each sample, (n,) int64."""
        return np.searchsorted(self.starts, indices, side="right") - 1

    def shard_index(self, shard: int) -> ShardIndex:
        """The Arrow index of one shard, read and verified on first use; the KEPT_INDEXES last used are kept."""
        found = self._kept(shard)
        if found is None:
            with self._shard_locks[shard]:
                found = self._kept(shard) or self._keep(shard, read_index(self.manifest, self.shards[shard]))
        return found

    def _kept(self, shard: int) -> ShardIndex | None:
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
            return self._indexes.get(shard)

    def _keep(self, shard: int, index: ShardIndex) -> ShardIndex:
        with self._lock:
            self._indexes[shard] = index
            if len(self._indexes) > KEPT_INDEXES:
                self._indexes.popitem(last=False)
        return index

    def shard_indexes(self) -> Iterator[ShardIndex]:
        """Every index in manifest order, read several at once."""
        with ThreadPoolExecutor(_READ_AHEAD, "index") as pool:
            shards = iter(range(len(self.shards)))
            jobs = [pool.submit(self.shard_index, shard) for shard in islice(shards, 2 * _READ_AHEAD)]
            while jobs:
                yield jobs.pop(0).result()
                jobs += [pool.submit(self.shard_index, shard) for shard in islice(shards, 1)]

    def rows(self, indices: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        """Shard and row of each sample."""
        shards = self.shard_of(indices)
        return list(zip(shards.tolist(), (indices - self.starts[shards]).tolist(), strict=True))

    def spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Samples [start, stop) as runs (first, stop), each within one shard."""
        inside = self.starts[(self.starts > start) & (self.starts < stop)]
        edges = [start, *inside.tolist(), stop]
        return list(pairwise(edges))

    def name(self, index: int) -> str:
        """`shard file: sample key`, for messages."""
        ((shard, row),) = self.rows(np.array([index]))
        return f"{self.shards[shard].file}: {self.shard_index(shard).keys[row]}"

    def targets(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
        """Human labels of any samples.

        Args:
            indices: (n,) int64 in [0, N).

        Returns:
            (n, C) int8 in the one code.
        """
        found = np.empty((len(indices), self.manifest.num_classes), dtype=np.int8)
        shards = self.shard_of(indices)
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            found[rows] = self.shard_index(int(shard)).targets(
                indices[rows] - self.starts[shard], self.manifest.num_classes, self.manifest.unlisted
            )
        return found

    def targets_between(self, start: int, stop: int) -> npt.NDArray[np.int8]:
        """Human labels of samples [start, stop), (stop - start, C) int8."""
        return self.targets(np.arange(start, stop, dtype=np.int64))

    def source_rows(self) -> npt.NDArray[np.uint64]:
        """(N,) row of each sample in the data set it was packed from; reads every index."""
        return np.concatenate([index.source_rows for index in self.shard_indexes()])
