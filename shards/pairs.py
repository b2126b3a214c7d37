"""Owns the counts of label pairs: how often two classes are known together, and how often they are then present."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dist_mlpl.data.entries import Entries
from dist_mlpl.labels import PRESENT

MAX_BYTES = 768 << 20  # memory for counts: enough for 10,033 classes, with four counts of four bytes per pair

_DENSE_CLASSES = 4096  # most classes for which the pairs of a dense block are counted as matrix products
_FINISH_BLOCK = 1 << 20  # pairs processed at once in `finish`
_DENSE_GAIN = 100  # multiply-adds of a matrix product that cost as much as counting one pair singly


class Pairs(NamedTuple):
    """p pairs of classes present together in some image, in ascending order, with first < second.

    Every count is over images where both classes are known, so none is biased by labels missing at random:
    P(second | first) is both / first_known, not both / (images of first).

    Args:
        first, second: (p,) int64, class columns.
        both: (p,) int64, images where both are present.
        first_known: (p,) int64, images where first is present and second known.
        second_known: (p,) int64, images where second is present and first known.
        known: (p,) int64, images where both are known.
        classes: (M,) int64, class columns that were counted: all, or those with the most positives.
        num_known: number of pairs of these that are known together in some image.
    """

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    both: npt.NDArray[np.int64]
    first_known: npt.NDArray[np.int64]
    second_known: npt.NDArray[np.int64]
    known: npt.NDArray[np.int64]
    classes: npt.NDArray[np.int64]
    num_known: int

    def top(self, count: int) -> npt.NDArray[np.int64]:
        """Positions of the pairs most often present together, ties in ascending order; at most `count`."""
        return np.argsort(-self.both, kind="stable")[:count]

    def lift(self, rate: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Lift of each pair, (p,) float64: how much more often both are present than if they were independent.

        Args:
            rate: (C,) float64, share of positives among the known labels of each class.
        """
        return (self.both / self.known) / (rate[self.first] * rate[self.second])


def counted_classes(positives: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The classes whose pairs fit in MAX_BYTES: all, or those with the most positives, ascending.

    Args:
        positives: (C,) int64, number of positives of each class.
    """
    limit = int(((MAX_BYTES / 2) ** 0.5) // 2)
    return np.sort(np.argsort(-positives, kind="stable")[:limit])


class PairCounts:
    """Counts every pair of M classes, in 8 M^2 bytes for any number of images; untouched memory pages cost nothing.

    There is a count for each of the four cases (absent or present, twice). This takes no more memory than sparse lists
    once a third of the pairs has been seen, and needs no sorting.

    Args:
        classes: (M,) class columns to count, ascending.
        num_classes: C.
        is_all_known: every label of every image is known, and only present ones will be added; the other counts are
            derived.
    """

    def __init__(self, classes: npt.NDArray[np.int64], num_classes: int, *, is_all_known: bool) -> None:
        self._classes = classes
        self._is_all_known = is_all_known
        self._place = np.full(num_classes, -1, dtype=np.int64)  # column -> its position among those counted
        self._place[classes] = np.arange(len(classes))
        num = np.arange(len(classes), dtype=np.int64)
        self._before = num * len(classes) - num * (num + 1) // 2 - num - 1  # pair (i, j), i < j, is before[i] + j
        self._counts = np.zeros(2 * len(classes) * max(0, len(classes) - 1), dtype=np.uint32)

    def add(self, entries: Entries) -> None:
        """Count the labels of a list of whole rows of a shard."""
        place = self._place[entries.classes]
        is_counted = place >= 0
        rows, place, present = entries.rows[is_counted], place[is_counted], entries.values[is_counted] == PRESENT
        if not len(rows):
            return
        sizes = np.diff(np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1], [True]])))
        num_products = len(sizes) * len(self._classes) ** 2
        if len(self._classes) <= _DENSE_CLASSES and num_products < _DENSE_GAIN * int((sizes * (sizes - 1) // 2).sum()):
            self._add_products(np.repeat(np.arange(len(sizes)), sizes), place, present)
        else:
            self._add_pairs(rows, place, present)

    def _add_pairs(
        self, rows: npt.NDArray[np.int32], place: npt.NDArray[np.int64], present: npt.NDArray[np.bool_]
    ) -> None:
        """Count single pairs: entries of one row that are 1, 2, ... places apart."""
        first, distance = np.flatnonzero(rows[1:] == rows[:-1]), 1
        while len(first):
            second = first + distance
            case = 2 * present[first] + present[second]
            np.add.at(self._counts, 4 * (self._before[place[first]] + place[second]) + case, np.uint32(1))
            distance += 1
            first = first[first + distance < len(rows)]
            first = first[rows[first + distance] == rows[first]]

    def _add_products(
        self, rows: npt.NDArray[np.int64], place: npt.NDArray[np.int64], present: npt.NDArray[np.bool_]
    ) -> None:
        """Count all pairs of a block as products of its dense label matrix; float32 is exact below 2**24 rows."""
        cases = np.zeros((2, int(rows[-1]) + 1, len(self._classes)), dtype=np.float32)  # absent, present
        cases[present.astype(np.int64), rows, place] = 1.0
        first, second = np.triu_indices(len(self._classes), 1)
        counts = self._counts.reshape(-1, 4)
        for case in range(4):
            counts[:, case] += (cases[case >> 1].T @ cases[case & 1])[first, second].astype(np.uint32)

    def finish(self, num_samples: int, positives: npt.NDArray[np.int64]) -> Pairs:
        """The counts of all pairs present together.

        Args:
            num_samples: N.
            positives: (C,) int64, number of positives of each class.
        """
        counts = self._counts.reshape(-1, 4)
        places, num_known = [np.empty(0, np.int64)], 0
        for start in range(0, len(counts), _FINISH_BLOCK):
            block = counts[start : start + _FINISH_BLOCK]
            places.append(start + np.flatnonzero(block[:, 3]))
            num_known += int(np.count_nonzero(block.any(axis=1)))
        together = np.concatenate(places)
        first = np.searchsorted(self._before + np.arange(len(self._classes)) + 1, together, side="right") - 1
        second = together - self._before[first]
        first, second = self._classes[first], self._classes[second]
        some = counts[together].astype(np.int64)  # (p, 4)
        both = some[:, 3]
        first_known, second_known, known = both + some[:, 2], both + some[:, 1], some.sum(axis=1)
        if self._is_all_known:
            first_known, second_known = positives[first], positives[second]
            known, num_known = np.full(len(both), num_samples), len(counts) if num_samples else 0
        return Pairs(first, second, both, first_known, second_known, known, self._classes, num_known)
