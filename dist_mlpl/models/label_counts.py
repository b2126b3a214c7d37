"""Owns the counts of classes known to be present together, taken over all labels by all ranks, and their statistics."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.labels import PRESENT, UNKNOWN

_MOST_DENSE = 1024  # up to so many classes a whole (C, C) table is counted and reduced
_BLOCK_SAMPLES = 2048
_PENDING = 1 << 22  # rows of pair counts that may wait before they are merged

Counts = npt.NDArray[np.int64]


class ReadsTargets(Protocol):
    """A reader of labels by sample index, such as `data.label_store.Labels`."""

    def targets(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
        """Return the targets (n, C) int8 in {-1, 0, 1} of samples (n,)."""
        ...


class LabelCounts(NamedTuple):
    """Pairs of classes known to be present together in some image, sorted by first, then second; includes i = j."""

    num_classes: int
    first: Counts  # (Z,) i
    second: Counts  # (Z,) j
    together: Counts  # (Z,) images with i and j known present, >= 1; for i = j, images with i
    known: Counts  # (Z,) images with i known present and j known, present or absent

    def conditional(self, *, is_biased: bool = False) -> npt.NDArray[np.float64]:
        """Estimate the probability of j given i, (Z,) in (0, 1]; 1 for i = j.

        Args:
            is_biased: True: over all images with i, including those where j is unknown, as in the reference code; with
                a share r of labels known this is too small by a factor r for i != j.
        """
        if not is_biased:
            return self.together / self.known
        present = np.ones(self.num_classes, dtype=np.int64)
        present[self.first[self.first == self.second]] = self.together[self.first == self.second]
        return self.together / present[self.first]

    def neighbours(self, num_neighbours: int, *, with_self: bool, is_biased: bool = False) -> tuple[Tensor, Tensor]:
        """Find the classes most often seen with each class, and their probabilities given that class.

        Those with most images in common come first: the highest probabilities mostly rest on a single image.

        Args:
            num_neighbours: E.
            with_self: True: a class is its own first neighbour, with weight 1, whether it was ever seen or not.
            is_biased: see `conditional`.

        Returns:
            (C, E) int64 classes and (C, E) float32 probabilities; missing neighbours are the class itself with weight
            0.
        """
        weights = self.conditional(is_biased=is_biased)
        kept = np.flatnonzero(self.first != self.second)
        order = kept[np.lexsort((self.second[kept], -weights[kept], -self.together[kept], self.first[kept]))]
        rows = self.first[order]
        place = np.arange(len(order)) - np.searchsorted(rows, rows) + with_self  # place among the class's neighbours
        order, rows, place = (column[place < num_neighbours] for column in (order, rows, place))
        classes = np.repeat(np.arange(self.num_classes)[:, None], num_neighbours, axis=1)
        likely = np.zeros((self.num_classes, num_neighbours), dtype=np.float32)
        likely[:, 0] = with_self
        classes[rows, place], likely[rows, place] = self.second[order], weights[order]
        return torch.from_numpy(classes), torch.from_numpy(likely)


def count_cooccurrence(labels: ReadsTargets, num_samples: int, num_classes: int) -> LabelCounts:
    """Count pairs of classes over all samples of a split; each rank counts a part of the samples.

    Up to 1,024 classes a whole table is counted; above, lists, whose time and memory grow with the number of pairs of
    a present and a known label.

    Args:
        labels: the labels of the split.
        num_samples: N.
        num_classes: C.

    Returns:
        The counts of all samples, on every rank.

    Collective: all ranks; one all-reduce of 16 C^2 bytes; above 1,024 classes, each rank's list to the owners of its
        classes and the merged lists to all ranks, 24 bytes per pair each time, the latter padded to the longest.
    """
    rank, size = comm.rank(), comm.world_size()
    first, stop = rank * num_samples // size, (rank + 1) * num_samples // size
    starts = range(first, stop, _BLOCK_SAMPLES)
    blocks = (labels.targets(np.arange(start, min(stop, start + _BLOCK_SAMPLES), dtype=np.int64)) for start in starts)
    if num_classes <= _MOST_DENSE:
        table = np.zeros((2, num_classes, num_classes), dtype=np.int64)
        for block in blocks:
            present = (block == PRESENT).astype(np.float32)  # exact: sums of at most 2,048 ones
            table[0] += (present.T @ present).astype(np.int64)
            table[1] += (present.T @ (block != UNKNOWN).astype(np.float32)).astype(np.int64)
        table = comm.reduce_sum(torch.from_numpy(table)).numpy()
        i, j = np.nonzero(table[0])
        return LabelCounts(num_classes, i, j, table[0, i, j], table[1, i, j])
    own = np.empty((0, 3), dtype=np.int64)
    pending: list[Counts] = []
    for block in blocks:
        pending.append(_pairs(block))
        if sum(map(len, pending)) > _PENDING:
            own, pending = _merged([own, *pending]), []
    own = _merged([own, *pending])
    owners = own[:, 0] // num_classes * size // num_classes
    arrived, _ = comm.exchange(torch.from_numpy(own), np.bincount(owners, minlength=size).tolist())
    merged = _merged([arrived.numpy()])
    pairs = comm.gather_rows(torch.from_numpy(merged[merged[:, 1] > 0])).numpy()
    return LabelCounts(num_classes, pairs[:, 0] // num_classes, pairs[:, 0] % num_classes, pairs[:, 1], pairs[:, 2])


def _pairs(block: npt.NDArray[np.int8]) -> Counts:
    """Count pairs in a block of targets (b, C): (n, 3) of i * C + j, images with both, images with i and j known."""
    num_classes = block.shape[1]
    known_rows, known_classes = np.nonzero(block)
    starts = np.searchsorted(known_rows, np.arange(len(block) + 1))  # where each image's known labels begin
    rows, classes = np.nonzero(block == PRESENT)
    num_known = np.diff(starts)[rows]
    i = np.repeat(classes, num_known)
    place = np.arange(len(i)) - np.repeat(np.cumsum(num_known) - num_known, num_known)
    j = np.repeat(starts[rows], num_known) + place  # index of a known label of the same image
    codes = i * num_classes + known_classes[j]
    together = block[known_rows[j], known_classes[j]] == PRESENT
    return _merged([np.stack([codes, together.astype(np.int64), np.ones_like(codes)], axis=1)])


def _merged(parts: list[Counts]) -> Counts:
    """Concatenate counts (n, 3), add up those with the same code, and sort by code."""
    rows = np.concatenate(parts)
    if len(rows) == 0:
        return rows
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    starts = np.flatnonzero(np.append(True, np.diff(rows[:, 0]) != 0))
    sums = np.add.reduceat(rows[:, 1:], starts, axis=0)
    return np.concatenate([rows[starts, :1], sums], axis=1)
