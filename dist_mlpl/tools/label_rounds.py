"""Owns inspecting a run's rounds of labels (listing, contents, differences), and rolling back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dist_mlpl import storage
from dist_mlpl.build import build_view
from dist_mlpl.chain import read_head
from dist_mlpl.config import read_run_config
from dist_mlpl.data.held_out import run_manifest
from dist_mlpl.data.label_store import LabelStore
from dist_mlpl.data.overlays import (
    Overlay,
    RoundCommit,
    document_bytes,
    newest_round,
    read_overlay,
    read_plan,
    read_round,
    round_numbers,
    round_url,
    unfinished_round,
)
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.errors import CheckpointError, ConfigError, OvertakenError
from dist_mlpl.labels import ABSENT, PRESENT, UNKNOWN
from dist_mlpl.progress import read_rows
from dist_mlpl.rounds.truth import measure, summary

MEASURED = ("hidden_precision_present", "hidden_recall_present", "hidden_precision_absent", "hidden_recall_absent",
            "num_flipped", "num_flipped_right", "num_flipped_wrong")  # fmt: skip


class Round(NamedTuple):
    """One round, for the log."""

    number: int
    state: str  # "in force", "committed" or "unfinished"
    parent: int
    restores: int | None
    strategy: str
    step: int | None  # step of the (first) model that scored
    committed_at: str | None  # UTC, to the second; None if unfinished or if the store does not tell
    metrics: dict[str, float]  # `summary`, and measurements against hidden labels that a run reported


def rounds_of(run: str) -> list[Round]:
    """Every round of a run, oldest first.

    Raises:
        CheckpointError: a plan or commit cannot be read.
    """
    head = read_head(run)
    in_force, newest = head.round if head else 0, newest_round(run)
    told = {row["round"]: row for row in read_rows(run) if row["event"] == "round"}
    found = []
    for number in round_numbers(run):
        is_committed = number <= newest
        record = read_round(run, number) if is_committed else read_plan(run, number)
        metrics, moment = {}, None
        if isinstance(record, RoundCommit):
            row = told.get(number, {})
            metrics = summary(record) | {name: row[name] for name in MEASURED if row.get(name) is not None}
            moment = storage.written_at(round_url(run, number, "commit.json"))
        state = "in force" if number == in_force else "committed" if is_committed else "unfinished"
        restores = record.restores if isinstance(record, RoundCommit) else None
        step = record.models[0].step if record.models else None
        committed_at = None if moment is None else moment.isoformat(sep=" ", timespec="seconds")
        found.append(Round(number, state, record.parent, restores, record.strategy, step, committed_at, metrics))
    return found


def truth_of(run: str, commit: RoundCommit, index: SplitIndex) -> dict[str, float]:
    """A round measured against labels that the run's view hides; empty without a view. See `rounds.truth.measure`.

    Raises:
        CheckpointError: a file of the round is missing or damaged.
    """
    view = build_view(read_run_config(run).data, index)
    return {} if view is None else measure(run, commit, LabelStore(index, view).at(0))


class ClassCounts(NamedTuple):
    """Numbers of beliefs by class."""

    class_ids: list[str]
    names: list[str]
    counts: npt.NDArray[np.int64]  # (C, k), one column per kind of belief


def open_split(run: str, manifest_url: str | None = None) -> SplitIndex:
    """Open the split that the rounds of a run are about.

    Raises:
        CheckpointError: no run.
        ManifestError: its shards are missing.
    """
    config = read_run_config(run)
    return SplitIndex(run_manifest(config.data, manifest_url), config.data.train_split)


def committed(run: str, number: int | None, *, is_none_allowed: bool = False) -> RoundCommit:
    """Read a committed round, the newest by default; `is_none_allowed` if the caller takes 0 for no beliefs.

    Raises:
        CheckpointError: no committed round, or no such one.
    """
    newest = newest_round(run)
    if newest == 0:
        raise CheckpointError(
            "no committed round",
            expected="a run that has relabelled",
            where=storage.shown(run),
            next_step="`dist-mlpl relabel RUN` makes a round, a config with `curriculum:` makes them all",
        )
    if number is not None and not 0 < number <= newest:
        raise CheckpointError(
            "round 0, which stands for no beliefs" if number == 0 else f"no committed round {number}",
            expected=f"a round in [0, {newest}], 0 for no beliefs" if is_none_allowed else f"a round in [1, {newest}]",
            where=storage.shown(storage.join(run, "rounds")),
            next_step="`dist-mlpl labels log RUN` lists the rounds",
        )
    return read_round(run, number or newest)


def _overlays(run: str, commit: RoundCommit, index: SplitIndex) -> Iterator[Overlay]:
    for shard, entry in enumerate(index.shards):
        yield read_overlay(
            run, commit, shard, num_samples=entry.num_samples, num_classes=index.manifest.num_classes
        )  # fmt: skip


def class_counts(run: str, commit: RoundCommit, index: SplitIndex) -> ClassCounts:
    """How many labels of each class a round believes present, believes absent, and only proposes: (C, 3) counts.

    Raises:
        CheckpointError: a file of the round is missing or damaged.
    """
    classes = index.manifest.classes
    counts = np.zeros((len(classes), 3), dtype=np.int64)
    for overlay in _overlays(run, commit, index):
        for column, value in enumerate((PRESENT, ABSENT, UNKNOWN)):
            counts[:, column] += np.bincount(overlay.classes[overlay.values == value], minlength=len(classes))
    return ClassCounts([entry.id for entry in classes], [entry.name for entry in classes], counts)


DIFFERENCES = ("added_present", "added_absent", "removed_present", "removed_absent",
               "flipped_to_present", "flipped_to_absent", "unchanged")  # fmt: skip


def differences(run: str, first: RoundCommit, second: RoundCommit, index: SplitIndex) -> ClassCounts:
    """How beliefs changed between two rounds, by class; the columns are those in DIFFERENCES.

    Raises:
        CheckpointError: a file of a round is missing or damaged.
    """
    classes = index.manifest.classes
    counts = np.zeros((len(classes), len(DIFFERENCES)), dtype=np.int64)
    for old, new in zip(_overlays(run, first, index), _overlays(run, second, index), strict=True):
        before, after = old.believed, new.believed
        codes = np.union1d(before.codes, after.codes)
        values = np.zeros((2, len(codes)), dtype=np.int8)
        values[0, np.searchsorted(codes, before.codes)] = before.values
        values[1, np.searchsorted(codes, after.codes)] = after.values
        columns = codes & 0xFFFF
        kinds = {(0, 1): 0, (0, -1): 1, (1, 0): 2, (-1, 0): 3, (-1, 1): 4, (1, -1): 5, (1, 1): 6, (-1, -1): 6}
        for (was, now), kind in kinds.items():
            chosen = columns[(values[0] == was) & (values[1] == now)]
            counts[:, kind] += np.bincount(chosen, minlength=len(classes))
    return ClassCounts([entry.id for entry in classes], [entry.name for entry in classes], counts)


def roll_back(run: str, to: int | None = None) -> str:
    """Drop an unfinished round if there is one; otherwise restore an earlier round as a new one.

    Committed rounds never change and are never deleted: restoring round 2 makes a new round with the content of round
    2. A running training switches to it at its next epoch.

    Args:
        run: URL of the run folder, RUN.
        to: round to restore, 0 for no beliefs; None for the parent of the newest round.

    Returns:
        A line that says what was done.

    Raises:
        CheckpointError: no such round.
        ConfigError: that round is the newest already.
        OvertakenError: another round was committed meanwhile.
    """
    unfinished = unfinished_round(run)
    if unfinished is not None:
        storage.remove_folder(round_url(run, unfinished))
        return f"round {unfinished}, which was never finished, is dropped; round {newest_round(run)} is the newest"
    newest = committed(run, None)
    target = newest.parent if to is None else to
    if target in (newest.round, newest.restores):
        raise ConfigError(
            f"round {target} is the newest already",
            expected="an earlier round, or 0 for no beliefs",
            where="--to",
            next_step="`dist-mlpl labels log RUN` lists the rounds",
        )
    if target == 0:
        counts = {name: n for name, n in newest.counts.items() if "known" in name or name.startswith("num_sam")}
        beliefs = dict.fromkeys(("num_present", "num_absent", "num_proposed"), 0)
        changes: dict[str, Any] = {
            "parent": 0, "strategy": "none", "parameters": {}, "models": (), "decided": {}, "files": (),
            "counts": counts | beliefs, "has_soft": False,
        }  # fmt: skip
        document = newest.model_copy(update=changes)
    else:
        document = committed(run, target, is_none_allowed=True)
    document = document.model_copy(update={"round": newest.round + 1, "restores": target})
    url = round_url(run, document.round, "commit.json")
    if not storage.create_exclusive(url, document_bytes(document)):
        raise OvertakenError(
            f"round {document.round} was committed by another job meanwhile",
            expected="one job at a time",
            where=storage.shown(url),
            next_step="look at `dist-mlpl labels log RUN` and try again",
        )
    return f"round {document.round} holds what round {target} held; a running training takes it up at its next epoch"
