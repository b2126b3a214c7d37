"""Owns the way from a sample's index to its shard, row and labels; per-shard indexes are read on first use."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise

import numpy as np
import numpy.typing as npt

from dist_mlpl import storage
from dist_mlpl.data.last_used import LastUsed
from dist_mlpl.data.manifest import Manifest, ShardEntry
from dist_mlpl.data.order import Parts, epoch_length
from dist_mlpl.data.shard_index import ShardIndex, read_index

KEPT_INDEXES = 2048  # indexes of a split kept in memory: about 80 bytes a sample, 160 MB at 1,000 samples a shard
_READ_AHEAD = 16


class SplitIndex:
    """The shards of one split, addressed by sample index. Safe to use from many threads.

    Args:
        manifest: from `load_manifest` or a mixture.
        split: name of the split.
    """

    def __init__(self, manifest: Manifest, split: str) -> None:
        self.manifest = manifest
        self.split = split
        self.shards: list[ShardEntry] = list(manifest.split(split).shards)
        sizes = np.array([shard.num_samples for shard in self.shards], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(sizes)])  # (S + 1,) first sample of each shard, then N
        self._indexes: LastUsed[int, ShardIndex] = LastUsed(
            lambda shard: read_index(manifest, self.shards[shard]), limit=KEPT_INDEXES
        )

    @property
    def num_samples(self) -> int:
        """Number of samples in this split, N."""
        return int(self.starts[-1])

    @property
    def num_bytes(self) -> int:
        """Total size of the split's tars in bytes."""
        return self.manifest.split(self.split).num_bytes

    @property
    def epoch_samples(self) -> int:
        """Samples of a training epoch: N, or in a mixture what its weights give; see `epoch_length`."""
        return epoch_length(self.shard_sizes, self.parts)

    @property
    def parts(self) -> Parts | None:
        """(Number of shards, weight) of each set of a mixture; None for a single set."""
        return self.manifest.parts.get(self.split)

    @property
    def is_remote(self) -> bool:
        """Whether any tar lies in a remote store."""
        return any(storage.is_remote(url) for url in {entry.tars or self.manifest.tars_url for entry in self.shards})

    def is_sound(self, shard: int) -> bool:
        """Whether every image of a shard was decoded whole when packed, and its bytes are verified when read."""
        packing = self.manifest.packing
        return packing is not None and packing.decode and self.shard_index(shard).crc32 is not None

    @property
    def shard_sizes(self) -> list[int]:
        """Number of samples in each shard, in manifest order."""
        return np.diff(self.starts).tolist()

    def shard_of(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Shard number of each sample index, (n,) int64."""
        return np.searchsorted(self.starts, indices, side="right") - 1

    def shard_index(self, shard: int) -> ShardIndex:
        """The index of one shard, read and verified on first use; the KEPT_INDEXES most recently used are kept.

        Raises:
            ShardError: the index is missing or damaged.
            StorageError: it could not be read.
        """
        return self._indexes[shard]

    def shard_indexes(self) -> Iterator[ShardIndex]:
        """All indexes in manifest order, several read at once. Raises as `shard_index`."""
        with ThreadPoolExecutor(_READ_AHEAD, "index") as pool:
            shards = iter(range(len(self.shards)))
            jobs = [pool.submit(self.shard_index, shard) for shard in islice(shards, 2 * _READ_AHEAD)]
            while jobs:
                yield jobs.pop(0).result()
                jobs += [pool.submit(self.shard_index, shard) for shard in islice(shards, 1)]

    def rows(self, indices: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        """Shard number and row within it of each sample index (n,)."""
        shards = self.shard_of(indices)
        return list(zip(shards.tolist(), (indices - self.starts[shards]).tolist(), strict=True))

    def spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Cut samples [start, stop), start < stop, into runs (first, stop), each within one shard."""
        inside = self.starts[(self.starts > start) & (self.starts < stop)]
        edges = [start, *inside.tolist(), stop]
        return list(pairwise(edges))

    def name(self, index: int) -> str:
        """A sample as `shard file: sample key`, for messages."""
        ((shard, row),) = self.rows(np.array([index]))
        return f"{self.shards[shard].file}: {self.shard_index(shard).keys[row]}"

    def targets(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
        """Human labels of any samples.

        Args:
            indices: (n,) int64 in [0, N).

        Returns:
            (n, C) int8: -1 absent, 0 unknown, +1 present.
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
        """(N,) uint64, row of each sample in the data set it was packed from; reads every index."""
        return np.concatenate([index.source_rows for index in self.shard_indexes()])
