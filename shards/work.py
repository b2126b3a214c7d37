"""Owns packing all shards of a plan, with any number of workers, concurrent builders and restarts."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

from dist_mlpl import storage
from dist_mlpl.errors import StorageError
from shards.images import NOT_JPEG
from shards.ledger import LEASE_SECONDS, Held, Ledger
from shards.pack import OnProgress, PackedShard, Setting, ShardJob, Skipped, write_shard
from shards.plan import Plan, PlannedShard
from shards.processes import Mapper

_POLL_SECONDS = 0.5


class FinishedElsewhereError(Exception):
    """Another builder of the same plan has written the manifest."""


class TooManySkippedError(Exception):
    """More images cannot be packed than is tolerated.

    Args:
        skipped: the images known to be unfit so far.
    """

    def __init__(self, skipped: Sequence[Skipped]) -> None:
        super().__init__()
        self.skipped = tuple(skipped)


def setting_of(plan: Plan, out: str) -> Setting:
    """The setting shared by all shards of a plan."""
    class_ids = tuple(entry.id for entry in plan.source.classes)
    return Setting(plan.source.images, out, Ledger(out).folder, class_ids, plan.packing)


def still_holds(plan: Plan, shard: PlannedShard | None, packed: PackedShard) -> bool:
    """Whether a shard packed by an earlier plan of the same records is what this plan would pack.

    Between the two, image files may have changed in size, and `convert` may have been added: it bears on nothing but
    the images that were left out for want of it.

    Args:
        plan: the plan to go on with.
        shard: its shard of that name; None without one.
        packed: what was packed under that name.
    """
    if shard is None or packed.inputs != plan.inputs_of(shard):
        return False
    return not plan.packing.convert or all(image.reason != NOT_JPEG for image in packed.skipped)


def pack_one(setting: Setting, job: ShardJob, generation: int) -> PackedShard | Held | None:
    """Write one shard, unless it is done or another builder holds its lease.

    Args:
        setting: the build's setting.
        job: the shard.
        generation: generation of the lease to take; see `Ledger.claim`.

    Returns:
        The shard's outcome; or the lease of the builder that holds it; or None when another builder has finished the
        whole set.

    Raises:
        ManifestError: another builder went on with this build by another plan.
        DataError, StorageError: see `write_shard`.
    """
    ledger = Ledger(setting.out)
    try:
        return _pack_one(setting, job, generation, ledger)
    except StorageError:
        if ledger.is_open:
            raise
        return None  # the builder that finished has removed our files with the ledger


def _pack_one(setting: Setting, job: ShardJob, generation: int, ledger: Ledger) -> PackedShard | Held | None:
    lease = ledger.claim(job.stem, generation)
    if isinstance(lease, Held):
        return ledger.committed(job.stem) or lease
    with lease:
        if packed := ledger.committed(job.stem):
            return packed
        if not ledger.is_open_for(setting.plan):
            return None
        packed = write_shard(setting, job)
        ledger.commit(job.stem, packed)
        return packed


def pack_all(
    plan: Plan, ledger: Ledger, mapper: Mapper, *, is_first: bool, max_skipped: float, tell: OnProgress
) -> dict[str, PackedShard]:
    """Pack all shards of a plan.

    Args:
        plan: the plan.
        ledger: the output's ledger, after `begin`.
        mapper: runs the work.
        is_first: whether this builder is the first on this plan; otherwise shards are taken in random order, so that
            builders seldom collide.
        max_skipped: most images that may be skipped.
        tell: called after each shard.

    Returns:
        The outcome of each shard, by stem.

    Raises:
        TooManySkippedError: as soon as more images had to be skipped.
        FinishedElsewhereError: another builder has written the manifest.
        DataError, StorageError: see `write_shard`.
    """
    state = _State(plan, max_skipped, tell)
    shards = {shard.stem: shard for shard in plan.shards}
    trusted = {} if is_first else dict(_trusted(ledger, shards))
    if len(plan.skipped) + sum(len(packed.skipped) for packed in trusted.values()) > max_skipped:
        for stem in [stem for stem, packed in trusted.items() if packed.skipped]:
            del trusted[stem]  # their images are looked at again: they may have been repaired to files of the same size
            ledger.forget(stem)
    for stem, packed in trusted.items():
        state.take(stem, packed)
    left = {stem: 0 for stem in shards if stem not in state.packed}  # stem -> generation of the lease to take
    setting = dataclasses.replace(setting_of(plan, ledger.out), plan=ledger.plan_digest)
    watched: dict[str, _Watched] = {}
    while left or watched:
        stems = list(left)
        if not is_first:
            random.shuffle(stems)
        calls = ((plan.job(shards[stem]), left[stem]) for stem in stems)
        with closing(mapper(partial(pack_one, setting), calls)) as outcomes:
            for number, found in outcomes:
                if found is None:
                    raise FinishedElsewhereError
                if isinstance(found, Held):
                    watched[stems[number]] = _Watched(found, time.monotonic())
                else:
                    state.take(stems[number], found)
        left = _freed(ledger, watched, state)
    return state.packed


class _State:
    """The shards done so far; reports progress, and stops when too many images are skipped."""

    def __init__(self, plan: Plan, max_skipped: float, tell: OnProgress) -> None:
        self.packed: dict[str, PackedShard] = {}
        self._skipped = list(plan.skipped)
        self._max_skipped, self._tell = max_skipped, tell
        self._total = sum(len(shard.rows) for shard in plan.shards)
        self._done = self._num_bytes = 0
        self._check()

    def take(self, stem: str, packed: PackedShard) -> None:
        """Count a finished shard, and report progress.

        Raises:
            TooManySkippedError: too many images have been skipped.
        """
        self.packed[stem] = packed
        self._skipped += packed.skipped
        self._done += len(packed.skipped)
        if packed.entry is not None:
            self._done += packed.entry.num_samples
            self._num_bytes += packed.entry.num_bytes
        self._check()
        self._tell("packing", self._done, self._total, self._num_bytes)

    def _check(self) -> None:
        if len(self._skipped) > self._max_skipped:
            raise TooManySkippedError(self._skipped)


def _trusted(ledger: Ledger, stems: Iterable[str]) -> Iterator[tuple[str, PackedShard]]:
    """Shards recorded as done whose tar and index have their full size; the records of others are deleted."""
    noted = ledger.all_committed(list(stems))
    sizes = sizes_in(ledger.out)
    for stem, packed in noted.items():
        entry = packed.entry
        if entry is None or (sizes.get(entry.file), sizes.get(entry.index)) == (entry.num_bytes, packed.index_bytes):
            yield stem, packed
        else:
            ledger.forget(stem)


def sizes_in(out: str) -> dict[str, int]:
    """Size in bytes of every file in the output; empty if it does not exist."""
    try:
        return dict(storage.list_sizes(out))
    except FileNotFoundError:
        return {}


class _Watched(NamedTuple):
    held: Held
    since: float  # monotonic time at which it was first seen in this state


def _freed(ledger: Ledger, watched: dict[str, _Watched], state: _State) -> dict[str, int]:
    """Wait until some watched lease is free or expired, and return the generations to take by stem.

    Shards finished meanwhile are counted. Returns an empty dict when no lease is watched any more.
    """
    while watched:
        for stem, packed in ledger.all_committed(watched).items():
            del watched[stem]
            state.take(stem, packed)
        free: dict[str, int] = {}
        for stem, (held, since) in watched.items():
            now = ledger.held(stem, held.generation)
            if not now.content:
                free[stem] = held.generation
            elif now.is_dead or (now == held and time.monotonic() - since > LEASE_SECONDS):
                free[stem] = held.generation + 1
            elif now != held:
                watched[stem] = _Watched(now, time.monotonic())
        if free:
            for stem in free:
                del watched[stem]
            return free
        if watched:
            time.sleep(_POLL_SECONDS)  # between checks of other builders' work
    return {}
