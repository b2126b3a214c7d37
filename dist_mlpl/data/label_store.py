"""Owns which labels a sample has at a given round: human labels as the run's view shows them, then beliefs.

Human labels live in the shards and never change. Beliefs live in the run's rounds. A known human label always wins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dist_mlpl import storage
from dist_mlpl.data.last_used import LastUsed
from dist_mlpl.data.overlays import RoundCommit, codes_of, read_overlay, read_round, round_url
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.tars import AnySamples
from dist_mlpl.data.views import LabelView
from dist_mlpl.errors import CheckpointError
from dist_mlpl.labels import PRESENT, UNKNOWN, Targets

KEPT_BYTES = 256 << 20  # bytes of beliefs kept in memory: about 60 million beliefs


class Beliefs(NamedTuple):
    """A round's beliefs about n samples.

    Args:
        values: (n, C) int8: -1 absent, +1 present; 0 where nothing is believed or a human label is known.
        soft: (n, C) float32 in [0, 1], probability of presence: the human label where known, else the round's soft
            label, else 0.5; None in a round without soft labels.
    """

    values: Targets
    soft: npt.NDArray[np.float32] | None


class RoundBeliefs:
    """The beliefs of one committed round, read shard by shard on first use. Safe to use from many threads.

    Args:
        run: URL of the run folder, RUN.
        commit: the round's commit.
        index: the split that it is about.
    """

    def __init__(self, run: str, commit: RoundCommit, index: SplitIndex) -> None:
        self.commit = commit
        self._run, self._index = run, index
        self._shards = LastUsed(self._read, limit=KEPT_BYTES, cost=lambda shard: shard.num_bytes)

    def of(self, targets: Targets, indices: npt.NDArray[np.int64]) -> Beliefs:
        """The beliefs about labels that the run does not know.

        Args:
            targets: (n, C) int8, human labels as the run sees them.
            indices: (n,) int64 in [0, N), the samples they belong to.

        Raises:
            CheckpointError: a file of the round is missing or damaged.
        """
        values = np.zeros_like(targets)
        soft = np.full(targets.shape, 0.5, dtype=np.float32) if self.commit.has_soft else None
        for place, (shard, row) in enumerate(self._index.rows(indices)):
            own = self._shards[shard]
            first, stop = own.offsets[row], own.offsets[row + 1]
            values[place, own.classes[first:stop]] = own.values[first:stop]
            if soft is not None and own.soft is not None:
                soft[place, own.classes[first:stop]] = own.soft[first:stop]
        is_known = targets != UNKNOWN
        values[is_known] = UNKNOWN
        if soft is not None:
            soft[is_known] = targets[is_known] == PRESENT
        return Beliefs(values, soft)

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
    """The beliefs about one shard, stored end to end: those of row i are [offsets[i], offsets[i + 1])."""

    offsets: npt.NDArray[np.int64]
    classes: npt.NDArray[np.uint16]
    values: npt.NDArray[np.int8]
    soft: npt.NDArray[np.float16] | None

    @property
    def num_bytes(self) -> int:
        return sum(column.nbytes for column in self if column is not None)


class Labels(NamedTuple):
    """The labels in force between two rounds of a run."""

    samples: AnySamples
    view: LabelView | None
    round: RoundBeliefs | None = None

    def targets(self, indices: npt.NDArray[np.int64]) -> Targets:
        """Human labels of these samples as the view shows them.

        Args:
            indices: (n,) int64 in [0, N).

        Returns:
            (n, C) int8: -1 absent, 0 unknown (also where the view hides a label), +1 present.
        """
        targets = self.samples.targets(indices)
        return targets if self.view is None else self.view.apply(targets, indices)

    @property
    def has_soft(self) -> bool:
        """Whether beliefs come with soft labels."""
        return self.round is not None and self.round.commit.has_soft


class LabelStore:
    """The labels of one split, by round.

    Args:
        samples: the split.
        view: the view through which human labels are seen; None shows all of them.
        run: URL of the run folder whose rounds hold the beliefs; None for a store of human labels alone.
    """

    def __init__(self, samples: AnySamples, view: LabelView | None = None, *, run: str | None = None) -> None:
        self.samples = samples
        self._view, self._run = view, run

    @property
    def view_digest(self) -> str | None:
        """Digest of the view, recorded in every commit; None without a view."""
        return None if self._view is None else self._view.digest

    def at(self, round_number: int) -> Labels:
        """The labels in force at a committed round; round 0 holds no beliefs.

        Raises:
            CheckpointError: no such round, or one made from other shards or another view.
            ValueError: a round above 0 of a store without a run, or of tars without an index.
        """
        if round_number == 0:
            return Labels(self.samples, self._view)
        if self._run is None or not isinstance(self.samples, SplitIndex):
            raise ValueError(f"round {round_number} of a store that holds none")
        commit = read_round(self._run, round_number)
        check_belongs(self._run, commit, self.samples, self._view)
        return Labels(self.samples, self._view, RoundBeliefs(self._run, commit, self.samples))


def check_belongs(run: str, commit: RoundCommit, samples: SplitIndex, view: LabelView | None) -> None:
    """Refuse a round that was made from other shards or another view.

    Args:
        run: URL of the run folder, RUN.
        commit: the round's commit.
        samples: the split as it is now.
        view: the run's view, or None.

    Raises:
        CheckpointError: the split, manifest, view or number of shards differs.
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
