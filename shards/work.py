"""Owns the packing of all shards of a plan: by any number of workers and builders, begun again any number of times."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

from dist_mlpl import storage
from dist_mlpl.errors import StorageError
from shards.ledger import LEASE_SECONDS, Held, Ledger
from shards.pack import OnProgress, PackedShard, Setting, ShardJob, Skipped, write_shard
from shards.plan import Plan
from shards.processes import Mapper

_POLL_SECONDS = 0.5


class FinishedElsewhereError(Exception):
    """Another builder of the same plan has written the manifest."""


class TooManySkippedError(Exception):
    """More images cannot be packed than may be.

    Args:
        skipped: those known so far.
    """

    def __init__(self, skipped: Sequence[Skipped]) -> None:
        super().__init__()
        self.skipped = tuple(skipped)


def setting_of(plan: Plan, out: str) -> Setting:
    """What all shards of a plan share."""
    class_ids = tuple(entry.id for entry in plan.source.classes)
    return Setting(plan.source.images, out, Ledger(out).folder, class_ids, plan.packing)


def pack_one(setting: Setting, job: ShardJob, generation: int) -> PackedShard | Held | None:
    """Write one shard, unless it is done or somebody else is at it.

    Args:
        setting: of the build.
        job: the shard.
        generation: of the lease to take; see `Ledger.claim`.

    Returns:
        What became of it; or who has it; or None when another builder has finished the whole.

    Raises:
        DataError, StorageError: see `write_shard`.
    """
    ledger = Ledger(setting.out)
    try:
        return _pack_one(setting, job, generation, ledger)
    except StorageError:
        if ledger.is_open:
            raise
        return None  # whoever finished has swept our files away with the records


def _pack_one(setting: Setting, job: ShardJob, generation: int, ledger: Ledger) -> PackedShard | Held | None:
    lease = ledger.claim(job.stem, generation)
    if isinstance(lease, Held):
        return ledger.committed(job.stem) or lease
    with lease:
        if packed := ledger.committed(job.stem):
            return packed
        if not ledger.is_open:
            return None
        packed = write_shard(setting, job)
        ledger.commit(job.stem, packed)
        return packed


def pack_all(
    plan: Plan, ledger: Ledger, mapper: Mapper, *, is_first: bool, max_skipped: float, tell: OnProgress
) -> dict[str, PackedShard]:
    """Have every shard of a plan packed.

    Args:
        plan: what goes where.
        ledger: of the output, begun.
        mapper: where the work is done.
        is_first: nobody worked on this plan before; else the shards are taken in an order of chance, so that builders
            seldom meet.
        max_skipped: images that may be left out.
        tell: told after each shard.

    Returns:
        What became of each shard, by stem.

    Raises:
        TooManySkippedError: as soon as more images had to be left out.
        FinishedElsewhereError: see there.
        DataError, StorageError: see `write_shard`.
    """
    state = _State(plan, max_skipped, tell)
    shards = {shard.stem: shard for shard in plan.shards}
    for stem, packed in [] if is_first else _trusted(ledger, shards):
        state.take(stem, packed)
    left = {stem: 0 for stem in shards if stem not in state.packed}  # the generation of the lease to take
    watched: dict[str, _Watched] = {}
    while left or watched:
        stems = list(left)
        if not is_first:
            random.shuffle(stems)
        calls = ((plan.job(shards[stem]), left[stem]) for stem in stems)
        with closing(mapper(partial(pack_one, setting_of(plan, ledger.out)), calls)) as outcomes:
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
    """What is done so far, told as it grows."""

    def __init__(self, plan: Plan, max_skipped: float, tell: OnProgress) -> None:
        self.packed: dict[str, PackedShard] = {}
        self._skipped = list(plan.skipped)
        self._max_skipped, self._tell = max_skipped, tell
        self._total = sum(len(shard.rows) for shard in plan.shards)
        self._done = self._num_bytes = 0
        self._check()

    def take(self, stem: str, packed: PackedShard) -> None:
        """Count a shard."""
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
    """Shards noted as done whose tar and index are there in full; the notes of others are taken back."""
    noted = ledger.all_committed(list(stems))
    sizes = sizes_in(ledger.out)
    for stem, packed in noted.items():
        entry = packed.entry
        if entry is None or (sizes.get(entry.file), sizes.get(entry.index)) == (entry.num_bytes, packed.index_bytes):
            yield stem, packed
        else:
            ledger.forget(stem)


def sizes_in(out: str) -> dict[str, int]:
    """Bytes of every file in the output."""
    try:
        return dict(storage.list_sizes(out))
    except FileNotFoundError:
        return {}


class _Watched(NamedTuple):
    held: Held
    since: float  # of this machine's monotonic clock: when it was first seen as it is


def _freed(ledger: Ledger, watched: dict[str, _Watched], state: _State) -> dict[str, int]:
    """Wait until some watched lease is nobody's, and return the generations to take; shards that get done meanwhile are
    counted. Empty when none is watched any more."""
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
            time.sleep(_POLL_SECONDS)  # between looks at other builders' work
    return {}
