"""Owns joining hundreds of millions of single labels into lists by image, with one sort of packed numbers.

An entry is a uint64: the image's row in the upper 32 bits, then 16 bits of class column, then 16 bits for the claim.
When sorted, an image's entries are consecutive and its classes ascend. A pair of row and class, an entry without its
lowest 16 bits, says what the claim is about.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dist_mlpl.data.shard_index import ClassLists
from shards.sources.hierarchy import Closure

Entries = npt.NDArray[np.uint64]
Pairs = npt.NDArray[np.uint64]  # row << 16 | class column

_ROW, _CLASS = np.uint64(32), np.uint64(16)
_LOW = np.uint64(0xFFFF)
PRESENT_BIT, CROWD_BIT = 1, 2  # bits of a person's claim; claims without CROWD_BIT sort first and take precedence

_GROWTH = 1 << 20  # spare entries allocated at a time
_WINDOW_ROWS = 1 << 17  # images processed at a time


def pack(rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], claims: npt.NDArray[np.integer]) -> Entries:
    """Pack (n,) rows, class columns and claims into entries."""
    entries: Entries = (rows.astype(np.uint64) << _ROW) | (columns.astype(np.uint64) << _CLASS)
    return entries | claims.astype(np.uint64)


def machine_claims(confidences: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """Claims of a machine: the bits of the confidence as float16 in [0, 1], which ascend with it."""
    return np.abs(confidences).astype(np.float16).view(np.uint16)  # -0.0 as 0.0


class EntryList:
    """A list of entries that grows in place: entries are never held twice, and at most 8 MB of memory is spare."""

    def __init__(self) -> None:
        self._array: Entries = np.empty(0, dtype=np.uint64)
        self._length = 0

    def add(self, entries: Entries) -> None:
        """Append some entries."""
        end = self._length + len(entries)
        if end > len(self._array):
            self._array.resize(end + _GROWTH, refcheck=False)
        self._array[self._length : end] = entries
        self._length = end

    def take_sorted(self) -> Entries:
        """Return all entries, ascending, and empty this list."""
        taken, length = self._array, self._length
        self.__init__()  # type: ignore[misc]
        taken.resize(length, refcheck=False)
        taken.sort()
        return taken


@dataclass(frozen=True, eq=False, slots=True)
class LabelLists:
    """Labels by image.

    Args:
        positives, negatives, machine, confidences: see `Records`.
        dropped: number of entries that are in no list, by reason.
        implied: number of unstated labels that the hierarchy implies, by list; and `contradicted`, the number of
            implications left out because they contradict a verified label or each other.
    """

    positives: ClassLists
    negatives: ClassLists
    machine: ClassLists
    confidences: npt.NDArray[np.float16]
    dropped: Counter[str]
    implied: Counter[str]


def join_labels(verified: Entries, machine: Entries, *, num_images: int, closure: Closure | None) -> LabelLists:
    """Join single labels into lists by image.

    For each class of an image, professionals' claims take precedence over the crowd's; if the claims that count
    disagree, the class stays unknown. A machine's claim is left out if people judged the same class, whatever the
    result; of several machine claims, the most confident is kept.

    Args:
        verified: ascending entries with claims of PRESENT_BIT and CROWD_BIT.
        machine: ascending entries with claims from `machine_claims`.
        num_images: N; all rows are below it.
        closure: implications of labels; None for none. They are applied to the judged labels and change none of them.
    """
    dropped: Counter[str] = Counter()
    implied: Counter[str] = Counter()
    lists = _Lists(num_images), _Lists(num_images), _Lists(num_images)
    confidences = []
    for first in range(0, num_images, _WINDOW_ROWS):
        bounds = np.array([first, min(first + _WINDOW_ROWS, num_images)], dtype=np.uint64) << _ROW
        judged = _judge(verified[slice(*np.searchsorted(verified, bounds))], dropped)
        if closure is not None:
            judged = _imply(judged, closure, implied)
        claims, certainty = _unjudged(machine[slice(*np.searchsorted(machine, bounds))], judged.all, dropped)
        confidences.append(certainty)
        for part, pairs in zip(lists, (judged.positives, judged.negatives, claims), strict=True):
            part.add(pairs, first)
    positives, negatives, claimed = (part.build() for part in lists)
    certain = np.concatenate([np.empty(0, np.float16), *confidences])
    return LabelLists(positives, negatives, claimed, certain, dropped, implied)


class _Judged(NamedTuple):
    """The judged pairs, each list ascending."""

    positives: Pairs
    negatives: Pairs
    all: Pairs  # including pairs that stay unknown


def _judge(entries: Entries, dropped: Counter[str]) -> _Judged:
    pairs = entries >> _CLASS
    starts = np.flatnonzero(_differs_from_previous(pairs))
    if not len(starts):
        return _Judged(pairs, pairs, pairs)
    sizes = np.diff(starts, append=len(pairs))
    is_present = (entries & np.uint64(PRESENT_BIT)).astype(bool)
    crowd = entries & np.uint64(CROWD_BIT)
    counts = crowd == np.repeat(crowd[starts], sizes)  # a group's first entry has the precedence
    any_present = np.logical_or.reduceat(is_present & counts, starts)
    any_absent = np.logical_or.reduceat(~is_present & counts, starts)
    is_clear = any_present != any_absent
    agrees = np.add.reduceat(is_present == np.repeat(any_present, sizes), starts)
    dropped["verified_conflicting"] += int(sizes[~is_clear].sum())
    dropped["verified_repeated"] += int((agrees - 1)[is_clear].sum())
    dropped["verified_overruled"] += int((sizes - agrees)[is_clear].sum())
    about = pairs[starts]
    return _Judged(about[is_clear & any_present], about[is_clear & any_absent], about)


def _imply(judged: _Judged, closure: Closure, implied: Counter[str]) -> _Judged:
    present = _expand(judged.positives, closure.ancestors)
    absent = _expand(judged.negatives, closure.descendants)
    denied, met = _is_in(present, judged.negatives), _is_in(absent, judged.positives)
    present = present[~(denied | _is_in(present, judged.positives))]
    absent = absent[~(met | _is_in(absent, judged.negatives))]
    both = np.intersect1d(present, absent, assume_unique=True)
    present, absent = present[~_is_in(present, both)], absent[~_is_in(absent, both)]
    implied["positives"] += len(present)
    implied["negatives"] += len(absent)
    implied["contradicted"] += int(denied.sum() + met.sum()) + len(both)
    return _Judged(
        positives=np.union1d(judged.positives, present),
        negatives=np.union1d(judged.negatives, absent),
        all=np.unique(np.concatenate([judged.all, present, absent])),
    )


def _expand(pairs: Pairs, implications: ClassLists) -> Pairs:
    places, columns = implications.entries((pairs & _LOW).astype(np.int64))
    return np.unique((pairs[places] & ~_LOW) | columns.astype(np.uint64))


def _unjudged(entries: Entries, judged: Pairs, dropped: Counter[str]) -> tuple[Pairs, npt.NDArray[np.float16]]:
    pairs = entries >> _CLASS
    is_last = np.roll(_differs_from_previous(pairs), -1)  # the most confident of its group
    dropped["machine_repeated"] += len(pairs) - int(is_last.sum())
    pairs, bits = pairs[is_last], (entries[is_last] & _LOW).astype(np.uint16)
    is_open = ~_is_in(pairs, judged)
    dropped["machine_judged_by_people"] += len(pairs) - int(is_open.sum())
    return pairs[is_open], bits[is_open].view(np.float16)


def _differs_from_previous(values: Pairs) -> npt.NDArray[np.bool_]:
    differs = np.ones(len(values), dtype=bool)
    differs[1:] = values[1:] != values[:-1]
    return differs


def _is_in(values: Pairs, ascending: Pairs) -> npt.NDArray[np.bool_]:
    if not len(ascending):
        return np.zeros(len(values), dtype=bool)
    return ascending[np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)] == values


class _Lists:
    """Class lists of N images, filled window by window."""

    def __init__(self, num_images: int) -> None:
        self._offsets = np.zeros(num_images + 1, dtype=np.int64)
        self._values: list[npt.NDArray[np.uint16]] = []

    def add(self, pairs: Pairs, first: int) -> None:
        """Add the ascending pairs of a window that begins at image `first`."""
        counts = np.bincount((pairs >> _CLASS).astype(np.int64) - first)
        self._offsets[first + 1 : first + 1 + len(counts)] = counts
        self._values.append((pairs & _LOW).astype(np.uint16))

    def build(self) -> ClassLists:
        """Return the finished lists; call this once."""
        np.cumsum(self._offsets, out=self._offsets)
        return ClassLists(np.concatenate([np.empty(0, np.uint16), *self._values]), self._offsets)
