"""Owns measuring a round's beliefs against labels that a view hides. The results are reported, never learned from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from dist_mlpl import comm
from dist_mlpl.data.label_store import Labels
from dist_mlpl.data.overlays import Overlay, RoundCommit, read_overlay, read_round
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.views import LabelView
from dist_mlpl.labels import ABSENT, PRESENT, UNKNOWN, Targets
from dist_mlpl.rounds.commit import own_shards

_BLOCK_ENTRIES = 4_000_000  # dense labels in memory at once
_NAMES = ("hidden_present", "hidden_absent", "believed_present", "believed_absent", "right_present", "right_absent",
          "flipped", "flipped_right", "flipped_wrong")  # fmt: skip
_SIGNS = ((PRESENT, "present"), (ABSENT, "absent"))


def summary(commit: RoundCommit) -> dict[str, float]:
    """A round's commit as numbers: counts, thresholds from the data, and `labelled_fraction`, the share of labels that
    are known or believed (NaN if there are none).
    """
    counts = commit.counts
    known = counts.get("num_known_present", 0) + counts.get("num_known_absent", 0)
    total = known + counts.get("num_unknown", 0)
    believed = counts.get("num_present", 0) + counts.get("num_absent", 0)
    labelled = (known + believed) / total if total else float("nan")
    return {**{k: float(v) for k, v in counts.items()}, **commit.decided, "labelled_fraction": labelled}


def measure(run: str, commit: RoundCommit, labels: Labels) -> dict[str, float]:
    """Compare a round's beliefs, and how they changed since the previous round, with labels that the view hides.

    Args:
        run: URL of the run folder, RUN.
        commit: the round's commit.
        labels: labels of the split, seen through the view.

    Returns:
        For present and absent beliefs each, in [0, 1] or NaN: `hidden_precision_*`, the share of beliefs about hidden
        labels that are right; `hidden_recall_*`, the share of hidden labels that are believed correctly.
        `num_flipped`, the number of beliefs whose sign changed since the previous round, checkable or not;
        `num_flipped_right` and `num_flipped_wrong`, those about hidden labels, by whether the new sign is right. Empty
        without hidden labels.

    Raises:
        CheckpointError: a file of this or the previous round is missing or damaged; on all ranks.

    Collective: all ranks, one gather of errors and one sum of a few counts.
    """
    if labels.view is None or not isinstance(labels.samples, SplitIndex):
        return {}
    index, counts = labels.samples, np.zeros(len(_NAMES), dtype=np.int64)
    with comm.shared_errors():
        parent = read_round(run, commit.parent) if commit.parent else None
        for shard in own_shards(index):
            overlay = _believed(run, commit, index, shard)
            before = _believed(run, parent, index, shard) if parent else Overlay.empty()
            is_flipped = _flipped(overlay, before)
            counts[_NAMES.index("flipped")] += np.count_nonzero(is_flipped)
            for first, truth in _hidden(labels.view, index, shard):
                rows = slice(*np.searchsorted(overlay.rows, [first, first + len(truth)]))
                counts += _count(truth, overlay.where(rows), is_flipped[rows], first)
    comm.reduce_sum(torch.from_numpy(counts))
    return _metrics(dict(zip(_NAMES, counts.tolist(), strict=True)))


def _metrics(counts: dict[str, int]) -> dict[str, float]:
    if counts["hidden_present"] + counts["hidden_absent"] == 0:
        return {}
    metrics = {}
    for _, sign in _SIGNS:
        right, believed, hidden = (counts[f"{what}_{sign}"] for what in ("right", "believed", "hidden"))
        metrics[f"hidden_precision_{sign}"] = right / believed if believed else float("nan")
        metrics[f"hidden_recall_{sign}"] = right / hidden if hidden else float("nan")
    return metrics | {f"num_{name}": float(counts[name]) for name in ("flipped", "flipped_right", "flipped_wrong")}


def _believed(run: str, commit: RoundCommit, index: SplitIndex, shard: int) -> Overlay:
    num_samples, num_classes = index.shards[shard].num_samples, index.manifest.num_classes
    return read_overlay(run, commit, shard, num_samples=num_samples, num_classes=num_classes).believed


def _flipped(overlay: Overlay, before: Overlay) -> npt.NDArray[np.bool_]:
    """Which beliefs of `overlay` had the other sign in `before`, (k,) bool."""
    places = np.searchsorted(before.codes, overlay.codes)
    inside = places < len(before.rows)
    found = np.zeros(len(overlay.rows), dtype=bool)
    at = places[inside]
    found[inside] = (before.codes[at] == overlay.codes[inside]) & (before.values[at] == -overlay.values[inside])
    return found


def _hidden(view: LabelView, index: SplitIndex, shard: int) -> Iterator[tuple[int, Targets]]:
    """Hidden labels of a shard, 0 elsewhere, in blocks of rows: (first row, (n, C) int8)."""
    start, stop = index.starts[shard : shard + 2].tolist()
    step = max(1, _BLOCK_ENTRIES // index.manifest.num_classes)
    for first in range(start, stop, step):
        indices = np.arange(first, min(first + step, stop))
        yield first - start, np.where(view.hidden(indices), index.targets(indices), np.int8(UNKNOWN))


def _count(
    truth: Targets, beliefs: Overlay, is_flipped: npt.NDArray[np.bool_], first_row: int
) -> npt.NDArray[np.int64]:
    """Counts over some rows of a shard, in the order of _NAMES; `flipped` is counted by the caller and 0 here."""
    told = truth[beliefs.rows - first_row, beliefs.classes]
    is_hidden, is_right = told != UNKNOWN, told == beliefs.values
    counts: dict[str, int | np.integer] = {"flipped": 0}
    for value, sign in _SIGNS:
        counts[f"hidden_{sign}"] = np.count_nonzero(truth == value)
        counts[f"believed_{sign}"] = np.count_nonzero(is_hidden & (beliefs.values == value))
        counts[f"right_{sign}"] = np.count_nonzero(is_hidden & is_right & (beliefs.values == value))
    counts["flipped_right"] = np.count_nonzero(is_flipped & is_hidden & is_right)
    counts["flipped_wrong"] = np.count_nonzero(is_flipped & is_hidden & ~is_right)
    return np.array([counts[name] for name in _NAMES], dtype=np.int64)
