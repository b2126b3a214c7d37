"""Owns the way from a sample's address to its shard, row and bytes; per-shard indexes are read when first touched."""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dist_mlpl.data.manifest import Manifest, ShardEntry
from dist_mlpl.data.shard_index import ShardIndex, read_index


class Place(NamedTuple):
    """Where one sample's JPEG lies."""

    shard: int  # position in the split's list of shards
    row: int  # of the shard
    offset: int  # of the first JPEG byte in the tar
    num_bytes: int


class SplitIndex:
    """The shards of one split, addressed by sample.

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
        self._indexes: dict[int, ShardIndex] = {}
        self._locks = [threading.Lock() for _ in self.shards]  # different shards are read side by side

    @property
    def num_samples(self) -> int:
        """N of this split."""
        return int(self.starts[-1])

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard in manifest order."""
        return np.diff(self.starts).tolist()

    def shard_of(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Shard of each sample, (n,) int64."""
        return np.searchsorted(self.starts, indices, side="right") - 1

    def shard_index(self, shard: int) -> ShardIndex:
        """The Arrow index of one shard, read and verified on first use, kept after. Safe from many threads."""
        if shard not in self._indexes:
            with self._locks[shard]:
                if shard not in self._indexes:
                    self._indexes[shard] = read_index(self.manifest, self.shards[shard])
        return self._indexes[shard]

    def place(self, index: int) -> Place:
        """Where one sample's JPEG lies."""
        shard = int(self.shard_of(np.array([index]))[0])
        row = index - int(self.starts[shard])
        table = self.shard_index(shard)
        return Place(shard, row, int(table.offsets[row]), int(table.num_bytes[row]))

    def name(self, index: int) -> str:
        """`shard file: sample key`, for messages."""
        place = self.place(index)
        return f"{self.shards[place.shard].file}: {self.shard_index(place.shard).keys[place.row]}"

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
        return np.concatenate([self.shard_index(shard).source_rows for shard in range(len(self.shards))])
