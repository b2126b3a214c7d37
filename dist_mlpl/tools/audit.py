"""Owns the proof that a run trained on every planned sample once: it compares the commit chain with the order."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np

from dist_mlpl import storage
from dist_mlpl.chain import Commit, read_chain, read_file
from dist_mlpl.config import read_run_config
from dist_mlpl.data.held_out import run_manifest
from dist_mlpl.data.manifest import Manifest
from dist_mlpl.data.order import EpochOrder, epoch_length
from dist_mlpl.errors import CheckpointError


class EpochProof(NamedTuple):
    """The committed chain's record of one epoch."""

    epoch: int
    num_planned: int  # number of positions consumed so far
    num_distinct: int  # number of different samples among them
    num_dropped: int  # samples not read, since they do not fill a global batch; 0 while the epoch runs
    num_bad: int  # undecodable samples, whose rows were masked
    commits: int
    is_finished: bool


class AuditReport(NamedTuple):
    """The proof for a whole run."""

    epochs: list[EpochProof]
    faults: list[str]  # contradictions to the plan; empty when the proof holds
    head: Commit


def audit(run: str, *, manifest_url: str | None = None, storage_options: dict[str, Any] | None = None) -> AuditReport:
    """Walk the committed chain and compare every consumed index with the planned order.

    The order is recomputed from seed, epoch and manifest; the consumed indices are those that the ranks were handed.
    Steps lost in a crash are in no commit, so they do not count.

    Args:
        run: URL of the run folder, RUN.
        manifest_url: where the shards are now, if they moved.
        storage_options: fsspec keywords for remote URLs; runs do not save theirs.

    Raises:
        CheckpointError: no commit, a damaged one, a manifest other than the run's, or a run over tars without an index.
    """
    storage.configure_storage(storage_options)
    config = read_run_config(run)
    if config.data.unindexed is not None:
        raise CheckpointError(
            "a run over tars without an index (data.unindexed)",
            expected="a run over a manifest, whose order can be computed again",
            where=run,
            next_step="`dist-mlpl shards index` the tars and train with data.manifest: such a run can be audited",
        )
    manifest = run_manifest(config.data, manifest_url)
    chain = read_chain(run)
    _check_manifest(manifest, chain[-1])
    sizes, parts = manifest.shard_sizes(config.data.train_split), manifest.parts.get(config.data.train_split)
    num_samples = epoch_length(sizes, parts)
    seen: dict[int, list[np.ndarray]] = {}
    bad: dict[int, int] = {}
    commits: dict[int, int] = {}
    faults: list[str] = []
    before: Commit | None = None
    left_under: dict[int, int] = {}  # by epoch, global batch of the commit that ended it
    for commit in chain:
        is_end = commit.samples_consumed == 0
        epoch = commit.epoch - 1 if is_end else commit.epoch
        start = before.samples_consumed if before and before.epoch == epoch else 0
        indices = np.load(io.BytesIO(read_file(run, commit, "consumed.npy")))
        order = EpochOrder(
            sizes, seed=config.seed, epoch=epoch, num_lanes=commit.num_lanes,
            window_samples=commit.window_samples, group_size=commit.group_size, parts=parts,
        )  # fmt: skip
        faults += _compare(commit, order, indices, start, is_end=is_end)
        seen.setdefault(epoch, []).append(indices)
        bad[epoch] = bad.get(epoch, 0) + len(commit.bad_samples)
        commits[epoch] = commits.get(epoch, 0) + 1
        for earlier in range(before.epoch if before else 0, commit.epoch):
            left_under.setdefault(earlier, commit.global_batch)
        before = commit
    epochs = []
    for epoch, pieces in sorted(seen.items()):
        consumed = np.concatenate(pieces)
        num_distinct = len(np.unique(consumed))
        if num_distinct != len(consumed) and parts is None:  # the weights of a mixture repeat samples on purpose
            faults.append(f"epoch {epoch}: {len(consumed) - num_distinct} samples were consumed twice")
        is_finished = epoch < chain[-1].epoch
        if is_finished and num_samples - len(consumed) >= left_under[epoch]:
            faults.append(f"epoch {epoch} was left with {num_samples - len(consumed)} samples still to come")
        dropped = num_samples - len(consumed) if is_finished else 0
        epochs.append(EpochProof(epoch, len(consumed), num_distinct, dropped, bad[epoch], commits[epoch], is_finished))
    expected = list(range(chain[-1].epoch + (chain[-1].samples_consumed > 0)))
    if sorted(seen) != expected:
        faults.append(f"epochs {sorted(seen)} are in the chain, {expected} should be")
    return AuditReport(epochs, faults, chain[-1])


def _compare(commit: Commit, order: EpochOrder, indices: np.ndarray, start: int, *, is_end: bool) -> list[str]:
    """Messages about deviations of one commit's consumed indices from the order; empty if there are none."""
    stop = start + len(indices)
    if not is_end and stop != commit.samples_consumed:
        return [
            f"commit {commit.step}: {len(indices)} consumed from {start}, yet it stands at {commit.samples_consumed}"
        ]
    if stop > order.num_samples:
        return [f"commit {commit.step}: {stop} positions of an epoch of {order.num_samples}"]
    planned = order.indices(start, stop)
    wrong = np.flatnonzero(planned != indices)
    if len(wrong):
        first = int(wrong[0])
        return [
            f"commit {commit.step}: {len(wrong)} of {len(indices)} samples are not the planned ones, first at position "
            f"{start + first}: {int(indices[first])} for {int(planned[first])}"
        ]
    return []


def _check_manifest(manifest: Manifest, head: Commit) -> None:
    if manifest.digest != head.digests["manifest"]:
        raise CheckpointError(
            f"manifest of digest {manifest.digest[:16]}...",
            expected=f"{str(head.digests['manifest'])[:16]}..., which the run was trained on",
            where=manifest.place,
            next_step="pass --manifest with the place of the run's own shards",
        )
