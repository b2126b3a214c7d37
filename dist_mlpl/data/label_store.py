"""Owns what a sample's labels are at a given round: human labels as the run's view shows them, then beliefs.

Human labels live in the shards and never change. Beliefs live in the run's rounds. A known label always wins.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dist_mlpl import storage
from dist_mlpl.data.overlays import RoundCommit, codes_of, read_overlay, read_round, round_url
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.tars import AnySamples
from dist_mlpl.data.views import LabelView
from dist_mlpl.errors import CheckpointError
from dist_mlpl.labels import PRESENT, UNKNOWN, Targets

KEPT_BYTES = 256 << 20  # of beliefs, in memory: 60 million of them


class Beliefs(NamedTuple):
    """What a round believes about some samples.

    Args:
        values: (n, C) int8: -1 absent, +1 present; 0 where nothing is believed, and wherever people have spoken.
        soft: (n, C) float32 in [0, 1], probability of presence: what people said, then the round's soft labels, and
            0.5 elsewhere; None in a round without soft labels.
    """

    values: Targets
    soft: npt.NDArray[np.float32] | None


class RoundBeliefs:
    """The beliefs of one committed round, read shard by shard when first touched. Safe from many threads.

    Args:
        run: RUN.
        commit: of the round.
        index: the split that it is about.
    """

    def __init__(self, run: str, commit: RoundCommit, index: SplitIndex) -> None:
        self.commit = commit
        self._run, self._index = run, index
        self._kept: OrderedDict[int, _ShardBeliefs] = OrderedDict()  # the last used last
        self._kept_bytes = 0
        self._lock = threading.Lock()

    def of(self, targets: Targets, indices: npt.NDArray[np.int64]) -> Beliefs:
        """What is believed where people have not spoken.

        Args:
            targets: (n, C) int8, human labels as the run sees them.
            indices: (n,) int64 in [0, N), the samples they belong to.

        Raises:
            CheckpointError: a file of the round is missing or damaged.
        """
        values = np.zeros_like(targets)
        soft = np.full(targets.shape, 0.5, dtype=np.float32) if self.commit.has_soft else None
        for place, (shard, row) in enumerate(self._index.rows(indices)):
            own = self._shard(shard)
            first, stop = own.offsets[row], own.offsets[row + 1]
            values[place, own.classes[first:stop]] = own.values[first:stop]
            if soft is not None and own.soft is not None:
                soft[place, own.classes[first:stop]] = own.soft[first:stop]
        is_known = targets != UNKNOWN
        values[is_known] = UNKNOWN
        if soft is not None:
            soft[is_known] = targets[is_known] == PRESENT
        return Beliefs(values, soft)

    def _shard(self, shard: int) -> _ShardBeliefs:
        with self._lock:
            if shard in self._kept:
                self._kept.move_to_end(shard)
                return self._kept[shard]
        own = self._read(shard)  # two threads may read the same
        with self._lock:
            if shard not in self._kept:
                self._kept[shard] = own
                self._kept_bytes += own.num_bytes
            while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
                self._kept_bytes -= self._kept.popitem(last=False)[1].num_bytes
        return own

    def _read(self, shard: int) -> _ShardBeliefs:
        num_samples = self._index.shards[shard].num_samples
        num_classes = self._index.manifest.num_classes
        found = read_overlay(self._run, self.commit, shard, num_samples=num_samples, num_classes=num_classes)
        overlay = found.believed
        ends = codes_of(np.arange(num_samples + 1), np.zeros(num_samples + 1, np.uint16))
        return _ShardBeliefs(
            np.searchsorted(overlay.codes, ends), overlay.classes, overlay.values, overlay.soft
        )  # fmt: skip


class _ShardBeliefs(NamedTuple):
    """The beliefs about one shard, end to end: those of row i are [offsets[i], offsets[i + 1])."""

    offsets: npt.NDArray[np.int64]
    classes: npt.NDArray[np.uint16]
    values: npt.NDArray[np.int8]
    soft: npt.NDArray[np.float16] | None

    @property
    def num_bytes(self) -> int:
        return sum(column.nbytes for column in self if column is not None)


class Labels(NamedTuple):
    """The labels in force for one stretch of a run."""

    samples: AnySamples
    view: LabelView | None
    round: RoundBeliefs | None = None

    def targets(self, indices: npt.NDArray[np.int64]) -> Targets:
        """What people said of these samples, as far as a method may see it.

        Args:
            indices: (n,) int64 in [0, N).

        Returns:
            (n, C) int8; entries that the view hides are 0 (unknown).
        """
        targets = self.samples.targets(indices)
        return targets if self.view is None else self.view.apply(targets, indices)

    @property
    def has_soft(self) -> bool:
        """Whether beliefs come with soft labels."""
        return self.round is not None and self.round.commit.has_soft


class LabelStore:
    """Labels of one split by round.

    Args:
        samples: the split.
        view: what to hide, or None for all that people said.
        run: RUN, whose rounds hold the beliefs; None for a store of human labels alone.
    """

    def __init__(self, samples: AnySamples, view: LabelView | None = None, *, run: str | None = None) -> None:
        self.samples = samples
        self._view, self._run = view, run

    @property
    def view_digest(self) -> str | None:
        """Digest of the view, part of every commit; None without one."""
        return None if self._view is None else self._view.digest

    def at(self, round_number: int) -> Labels:
        """Labels in force at a committed round; round 0 holds no beliefs.

        Raises:
            CheckpointError: no such round, or one of other shards or another view.
        """
        if round_number == 0:
            return Labels(self.samples, self._view)
        if self._run is None or not isinstance(self.samples, SplitIndex):
            raise ValueError(f"round {round_number} of a store that holds none")
        commit = read_round(self._run, round_number)
        check_belongs(self._run, commit, self.samples, self._view)
        return Labels(self.samples, self._view, RoundBeliefs(self._run, commit, self.samples))


def check_belongs(run: str, commit: RoundCommit, samples: SplitIndex, view: LabelView | None) -> None:
    """Refuse a round that is about other shards, or about what another view leaves unknown.

    Args:
        run: RUN.
        commit: of the round.
        samples: the split as it is now.
        view: of the run.

    Raises:
        CheckpointError: it is.
    """
    view_digest = None if view is None else view.digest
    own = {"split": samples.split, "manifest": samples.manifest.digest, "view": view_digest}
    found = {"split": commit.split, "manifest": commit.manifest_digest, "view": commit.view_digest}
    wrong = [name for name in own if own[name] != found[name]]
    if commit.files and len(commit.files) != len(samples.shards):
        wrong.append("number of shards")
    if wrong:
        raise CheckpointError(
            f"round {commit.round} of labels is about another {' and '.join(wrong)}",
            expected="; ".join(f"{name} {str(own[name])[:16]}" for name in own),
            where=storage.shown(round_url(run, commit.round, "commit.json")),
            next_step="use the shards and the view that the round was made with, or a new run folder",
        )
