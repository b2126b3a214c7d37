"""Owns saving and resuming a run: a chain of commits, each a small file that makes a checkpoint exist.

    RUN/attempts/0002.json             an attempt's host, ranks and config digest, and whether it has taken over
    RUN/checkpoints/00001200-0002/     model.safetensors  optimizer.safetensors  optimizer.json  consumed.npy  banks/
    RUN/commits/00001200.json          the commit; created exclusively after its files, so all of it is there or none

The chain alone says where a run stands. A resumed run continues from the highest step; an attempt that was overtaken
cannot add commits to the chain.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
import secrets
import socket
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.torch

from dist_mlpl import comm, storage
from dist_mlpl.bank_files import load_banks, save_banks
from dist_mlpl.batch import Progress, RunLength
from dist_mlpl.chain import (
    FORMAT,
    BankRecord,
    Commit,
    CommitFile,
    RunIdentity,
    check_identity,
    commit_url,
    numbered_records,
    read_commit,
    read_file,
    read_head,
    read_model,
    versions,
)
from dist_mlpl.data.collate import BadSample
from dist_mlpl.data.delivery import Consumed
from dist_mlpl.data.order import PADDING, last_position
from dist_mlpl.data.tar_stream import AnyStream, TarStream
from dist_mlpl.engine import Engine
from dist_mlpl.engines.state import EngineState
from dist_mlpl.errors import BankError, CheckpointError, OvertakenError, RankMismatchError, StorageError

log = logging.getLogger(__name__)

Positions = npt.NDArray[np.int64]


class Attempt(NamedTuple):
    """One start of a run, from its first process to its last."""

    name: str  # "0001", "0002", ...
    parent: Commit | None  # head of the chain when the attempt began; None for a new run


def begin_attempt(out: str, config_digest: str, *, job: str | None = None) -> Attempt:
    """Take the next attempt number and read the head of the chain; rank 0 decides for all.

    The start may still fail, so older attempts continue until `Checkpoint.restore` takes over the run.

    Args:
        out: URL of the run folder, RUN.
        config_digest: digest of the config in force, for the attempt's record.
        job: token of the job, for the same; see `newest_job`.

    Raises:
        CheckpointError: a commit cannot be read.
        StorageError: RUN cannot be written, or its store cannot create exclusively.

    Collective: all ranks, one broadcast.
    """

    def begin() -> Attempt:
        storage.check_exclusive_create(out)
        started = {
            "config": config_digest,
            "world_size": comm.world_size(),
            "host": socket.gethostname(),
            "job": job,
            "has_taken_over": False,
            "token": secrets.token_hex(8),  # two starts never write the same bytes, so the loser sees that it lost
        }
        number = max(_attempt_numbers(out), default=0) + 1
        while not storage.create_exclusive(
            storage.join(out, "attempts", f"{number:04d}.json"),
            json.dumps(started).encode(),
        ):
            number += 1
        return Attempt(f"{number:04d}", read_head(out))

    return comm.on_first_rank(begin)


def newest_job(out: str) -> str | None:
    """The token of the job whose attempt was the last to take over the run; None without a token or an attempt.

    Raises:
        StorageError: the attempt's record could not be read.
    """
    return next((record.get("job") for _, record in _attempts_in_force(out)), None)


def take_over(out: str, attempt: Attempt) -> Commit | None:
    """Stop older attempts at their next save, and read the head of the chain."""
    url = storage.join(out, "attempts", f"{attempt.name}.json")
    record = json.loads(storage.read_bytes(url)) | {"has_taken_over": True}
    # Write the record before reading the head: an older attempt that commits later sees the record and stops.
    storage.write_bytes(url, json.dumps(record).encode())
    return read_head(out)


def _attempts_in_force(out: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers and records of the attempts that have taken over the run, newest first."""
    for number in sorted(_attempt_numbers(out), reverse=True):
        record = json.loads(storage.read_bytes(storage.join(out, "attempts", f"{number:04d}.json")))
        if record.get("has_taken_over", True):  # earlier versions took over at once, without this key
            yield number, record


def _attempt_numbers(out: str) -> list[int]:
    return numbered_records(storage.join(out, "attempts"))


class Checkpoint:
    """Saves and restores one run.

    Args:
        out: URL of the run folder, RUN.
        engine: its state is saved, with the banks of its method.
        stream: its consumed positions are saved as evidence for `audit`.
        identity: the run's setup, recorded in every commit.
        attempt: this attempt.
        length: length of the run.
        keep_checkpoints: number of newest commits whose model, optimiser and banks are kept, >= 1. Of older ones only
            the commit and the consumed samples stay, which `audit` reads.

    Raises:
        BankError: the method has banks by sample, and tars without an index do not identify samples.
    """

    def __init__(
        self,
        out: str,
        engine: Engine,
        stream: AnyStream,
        *,
        identity: RunIdentity,
        attempt: Attempt,
        length: RunLength,
        keep_checkpoints: int,
    ) -> None:
        self._banks = engine.method.banks()
        by_sample = sorted(name for name, bank in self._banks.items() if bank.is_by_sample)
        if by_sample and isinstance(stream, TarStream):
            raise BankError(
                f"banks by sample {by_sample} over tars without an index",
                expected="samples that keep their index from epoch to epoch",
                where="method, data.unindexed",
                next_step="`dist-mlpl shards index` the tars and train with data.manifest, or use another method",
            )
        self._out, self._engine, self._stream = out, engine, stream
        self._identity, self._attempt, self._length = identity, attempt, length
        self._head = attempt.parent
        self._keep_checkpoints = keep_checkpoints
        self._kept: list[Commit] | None = None  # commits whose files are kept, on rank 0; read at the first save

    @property
    def head(self) -> Commit | None:
        """The newest commit of the chain that this attempt knows; None before the first."""
        return self._head

    def restore(self) -> Progress:
        """Load the head of the chain; a new run instead loads the banks that its method wants from other runs.

        Returns:
            Where the run stands.

        Raises:
            BankError: a bank is missing or has another specification.
            CheckpointError: a file is missing or damaged, or the data set or its order has changed.

        Collective: all ranks.
        """
        if self._head is not None:
            check_identity(self._identity, self._head, out=self._out)  # before stopping a run that works
        head = self._head = comm.on_first_rank(lambda: take_over(self._out, self._attempt))
        if head is None:
            for name, run in self._engine.method.bank_sources().items():
                self._load_from(name, run)
            return Progress()
        check_identity(self._identity, head, out=self._out)
        load_banks(self._out, head, self._banks)
        self._engine.load(read_state(self._out, head))
        self._stream.remember_bad(_num_bad_in_epoch(self._out, head))
        seen = self._length.samples_seen(head.epoch, head.samples_consumed)
        fraction = min(1.0, seen / self._length.total_samples)
        return Progress(head.epoch, head.samples_consumed, head.step, head.round, fraction)

    def save(self, progress: Progress, metrics: dict[str, float] | None = None) -> Progress:
        """Save a checkpoint of the run's present state; it exists when this returns.

        Args:
            progress: where the run stands.
            metrics: recorded in the commit, without non-finite ones.

        Returns:
            `progress`.

        Raises:
            OvertakenError: another attempt has taken over the run or committed; this one must stop.
            RankMismatchError: the ranks did not consume exactly the positions that this commit covers.
            BankError: see `save_banks`.
            StorageError: a file cannot be written.

        Collective: all ranks; the engine gathers parameters and moments, and consumed samples go to rank 0.
        """
        if self._head is not None and self._head.step == progress.step:
            return progress  # no step since: the rest of the epoch was too short for a larger global batch
        state = self._engine.state()
        folder = f"checkpoints/{progress.step:08d}-{self._attempt.name}"
        banks, bank_files = save_banks(self._out, folder, self._banks, self._head)
        parts = comm.gather_on_first_rank(_flat(self._stream.take_consumed()))

        def write() -> Commit:
            assert state is not None
            positions, indices = _merged([part[:2] for part in parts])
            self._check_consumed(positions, progress)
            bad = sorted({bad for part in parts for bad in part[2]})
            contents = _state_files(state) | {"consumed.npy": _npy(indices)}
            commit = self._write(folder, contents, banks, bank_files, progress, bad, metrics or {})
            self._prune(commit)
            return commit

        self._head = comm.on_first_rank(write)
        for bank in self._banks.values():
            bank.mark_saved()
        return progress

    def _load_from(self, name: str, run: str) -> None:
        """Load one bank from the newest commit of another run over the same classes."""
        source = comm.on_first_rank(lambda: read_head(run))  # read once for all ranks, as that run may still train
        if source is None or source.digests.get("classes") != self._identity.digests["classes"]:
            raise CheckpointError(
                "no commit" if source is None else "a run over other classes",
                expected=f"a run that has saved its bank {name!r} of the same classes",
                where=run,
                next_step="check the path, and that both runs use one class list",
            )
        load_banks(run, source, {name: self._banks[name]})
        self._banks[name].mark_changed()  # the first commit of this run saves it

    def _check_consumed(self, positions: Positions, progress: Progress) -> None:
        """Check that every position since the last commit was consumed once, up to the epoch's end if it ends.

        Raises:
            RankMismatchError: otherwise.
        """
        is_end = progress.samples_consumed == 0 and len(positions) > 0
        epoch = progress.epoch - 1 if is_end else progress.epoch
        first = self._head.samples_consumed if self._head and self._head.epoch == epoch else 0
        last = progress.samples_consumed
        if is_end:
            last = last_position(first, global_batch=self._identity.global_batch, num_samples=self._length.num_samples)
        expected = np.arange(first, last)
        if not np.array_equal(positions, expected):
            both = min(len(positions), len(expected))
            wrong = np.flatnonzero(positions[:both] != expected[:both])
            place = f"position {int(positions[wrong[0]])} out of turn" if len(wrong) else f"{len(positions)} positions"
            raise RankMismatchError(
                f"{place} among those consumed since the last commit",
                expected=f"each of [{first}, {last}) once",
                where="the positions that all ranks were handed",
                next_step="this is a fault of the loader: keep the run folder and report it",
            )

    def _write(
        self,
        folder: str,
        contents: dict[str, bytes],
        banks: dict[str, BankRecord],
        bank_files: list[CommitFile],
        progress: Progress,
        bad: list[BadSample],
        metrics: dict[str, float],
    ) -> Commit:
        """Write the files, then the commit. Rank 0 only."""
        self._check_newest()
        files = []
        for name, content in contents.items():
            path = f"{folder}/{name}"
            storage.write_bytes(storage.join(self._out, path), content)
            files.append(CommitFile(path=path, num_bytes=len(content), sha256=storage.sha256_of_bytes(content)))
        commit = Commit(
            format=FORMAT,
            step=progress.step,
            epoch=progress.epoch,
            samples_consumed=progress.samples_consumed,
            round=progress.round,
            parent=self._head.step if self._head else None,
            attempt=self._attempt.name,
            world_size=comm.world_size(),
            versions=versions(),
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},  # JSON has no NaN
            bad_samples=bad,
            files=[*files, *bank_files],
            banks=banks,
            **self._identity.model_dump(),
        )
        self._check_newest()  # again, as a newer attempt may have read the head while the files were written
        if not storage.create_exclusive(commit_url(self._out, commit.step), commit.model_dump_json(indent=1).encode()):
            raise _overtaken(self._attempt.name)
        return commit

    def newest_head(self) -> Commit | None:
        """The newest commit of the chain, verified to be this attempt's; None before the first.

        Raises:
            OvertakenError: a newer attempt has taken over the run or committed; on all ranks.

        Collective: all ranks.
        """
        comm.on_first_rank(self._check_newest)
        return self._head

    def _check_newest(self) -> None:
        """Raise OvertakenError if a newer attempt has taken over the run, whether or not it has committed."""
        newest = read_head(self._out)
        if (newest and newest.step) != (self._head and self._head.step) or not self._is_in_force():
            raise _overtaken(self._attempt.name)

    def _is_in_force(self) -> bool:
        """False if a newer attempt has taken over the run."""
        return next((number for number, _ in _attempts_in_force(self._out)), None) == int(self._attempt.name)

    def _prune(self, commit: Commit) -> None:
        """Delete files that no kept commit needs. The commit is already written, so storage errors are only logged.

        At the first save, files that killed attempts left behind are deleted too. Nothing is deleted once a newer
        attempt has taken over: it may have read the head before this commit, and now be loading what would go.
        """
        folder = "checkpoints"
        try:
            if not self._is_in_force():
                return
            if self._kept is None:
                self._kept = [*_newest(self._out, self._head, self._keep_checkpoints), commit]
                found = [f"{folder}/{path}" for path in storage.list_files(storage.join(self._out, folder))]
                there = [path for path in found if 0 < _attempt_of(path) <= int(self._attempt.name)]
            else:
                self._kept.append(commit)
                there = [file.path for old in self._kept[: -self._keep_checkpoints] for file in old.files]
            self._kept = self._kept[-self._keep_checkpoints :]
            needed = {file.path for kept in self._kept for file in kept.files}  # banks may need files of older commits
            for path in there:
                if path not in needed and not path.endswith("/consumed.npy"):  # kept for `audit`
                    storage.remove(storage.join(self._out, path))
        except (CheckpointError, StorageError) as error:
            log.warning("old checkpoints could not be deleted: %s", error)


def _state_files(state: EngineState) -> dict[str, bytes]:
    """The engine's state as files by name, for `read_state`."""
    return {
        "model.safetensors": safetensors.torch.save({k: v.contiguous() for k, v in state.model.items()}),
        "optimizer.safetensors": safetensors.torch.save({k: v.contiguous() for k, v in state.moments.items()}),
        "optimizer.json": json.dumps({"num_updates": state.num_updates}).encode(),
    }


def _npy(array: Positions) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _attempt_of(path: str) -> int:
    """The attempt that wrote a file below checkpoints/STEP-ATTEMPT/; 0 for any other path."""
    match = re.match(r"checkpoints/\d+-(\d+)/", path)
    return int(match[1]) if match else 0


def _newest(out: str, head: Commit | None, count: int) -> list[Commit]:
    """The head and the commits before it, oldest first, `count` at most."""
    found: list[Commit] = []
    while head is not None and len(found) < count:
        found.append(head)
        head = read_commit(out, head.parent) if head.parent is not None else None
    return found[::-1]


def _num_bad_in_epoch(out: str, head: Commit) -> int:
    """Number of undecodable samples that the chain records for the epoch that `head` is in."""
    if head.samples_consumed == 0:
        return 0
    count, commit = 0, head
    while commit.epoch == head.epoch and commit.samples_consumed > 0:
        count += len(commit.bad_samples)
        if commit.parent is None:
            break
        commit = read_commit(out, commit.parent)
    return count


def _flat(consumed: Consumed) -> tuple[Positions, Positions, list[BadSample]]:
    """This rank's positions, their sample indices and undecodable samples since the last commit, without padding."""
    empty = np.empty(0, dtype=np.int64)
    positions, indices = (np.concatenate([empty, *parts]) for parts in (consumed.positions, consumed.indices))
    is_real = positions != PADDING
    return positions[is_real], indices[is_real], consumed.bad


def _merged(parts: Sequence[tuple[Positions, Positions]]) -> tuple[Positions, Positions]:
    """All ranks' positions, ascending, and their sample indices."""
    positions, indices = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(positions, kind="stable")
    return positions[order], indices[order]


def _overtaken(attempt: str) -> OvertakenError:
    return OvertakenError(
        "another attempt has begun or committed on this run folder",
        expected="one attempt at a time on a run folder",
        where=f"attempt {attempt}",
        next_step="let the other attempt go on; stop this one",
    )


def read_state(out: str, commit: Commit) -> EngineState:
    """Read the engine's state: model, optimiser moments and number of updates.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    moments = safetensors.torch.load(read_file(out, commit, "optimizer.safetensors"))
    document = json.loads(read_file(out, commit, "optimizer.json"))
    return EngineState(read_model(out, commit), moments, document["num_updates"])
