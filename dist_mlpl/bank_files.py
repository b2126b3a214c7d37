"""Owns banks in checkpoints: each rank writes the shards that changed, and reads the shards that it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import safetensors.torch

from dist_mlpl import comm, storage
from dist_mlpl.banks.base import Bank
from dist_mlpl.banks.held import BankSpec
from dist_mlpl.chain import BankPart, BankRecord, Commit, CommitFile, read_file
from dist_mlpl.errors import BankError, MlplError

_FILE_BYTES: Final = 64 << 20  # largest file (unless one shard is larger), as its content is in memory while written


def save_banks(
    out: str, folder: str, banks: Mapping[str, Bank], parent: Commit | None
) -> tuple[dict[str, BankRecord], list[CommitFile]]:
    """Write the shards that changed since the parent commit; the record refers to the parent's files for the rest.

    Args:
        out: URL of the run folder, RUN.
        folder: the checkpoint's folder, below RUN.
        banks: by name, the same on every rank.
        parent: parent of the commit to come; None for the first.

    Returns:
        Every bank's record and all files that they need, the same on every rank.

    Raises:
        BankError: buffered rows are refused, see `WritableBank.write`; on all ranks, and nothing is saved.
        MlplError: a rank cannot write; on all ranks.

    Collective: all ranks, `Bank.flush` of every bank and one gather of records.
    """
    for bank in banks.values():
        bank.flush()
    own: list[tuple[str, BankPart, CommitFile]] = []
    error: MlplError | None = None
    try:
        for name, bank in banks.items():
            for number, shards in enumerate(_cut(bank, bank.changed_shards())):
                path = f"{folder}/banks/{name}/{comm.rank():04d}-{number:04d}.safetensors"
                content = safetensors.torch.save(bank.pack(shards))
                storage.write_bytes(storage.join(out, path), content)
                file = CommitFile(path=path, num_bytes=len(content), sha256=storage.sha256_of_bytes(content))
                own.append((name, BankPart(path=path, shards=_ranges(shards)), file))
    except MlplError as fault:
        error = fault
    written = comm.gather_objects((own, error))
    for _, failure in written:
        if failure is not None:
            raise failure
    changed = [entry for entries, _ in written for entry in entries]
    records = {}
    for name, bank in banks.items():
        new = [part for of, part, _ in changed if of == name]
        kept = parent.banks[name].parts if parent is not None and name in parent.banks else []
        records[name] = BankRecord(spec=bank.spec, parts=[*_still_in_force(kept, new), *new])
    needed = {part.path for record in records.values() for part in record.parts}
    earlier = [file for file in parent.files if file.path in needed] if parent is not None else []
    return records, [*earlier, *(file for _, _, file in changed)]


def load_banks(out: str, commit: Commit, banks: Mapping[str, Bank]) -> None:
    """Load the rows that this rank holds, saved on any number of ranks.

    Args:
        out: URL of the run folder that has the commit.
        commit: holds the banks.
        banks: by name; the commit may hold others.

    Raises:
        BankError: the commit lacks a bank, or holds it with another specification.
        CheckpointError: a file is missing or damaged; on all ranks, whichever read it.

    Collective: all ranks, one gather of errors; see `Bank.flush` and `Bank.mark_loaded`.
    """
    for name, bank in banks.items():
        record = commit.banks.get(name)
        if record is None or record.spec != bank.spec:
            raise BankError(
                f"no bank {name!r}" if record is None else f"bank {name!r} {_differences(record.spec, bank.spec)}",
                expected="the bank that this config's method keeps",
                where=storage.join(out, "commits", f"{commit.name}.json"),
                next_step="use the method settings and the data set of that run, or start a new run folder",
            )
    for bank in banks.values():
        bank.flush()
    with comm.shared_errors():
        for name, bank in banks.items():
            held = set(bank.held_shards)
            for part in commit.banks[name].parts:
                wanted = held.intersection(shard for first, stop in part.shards for shard in range(first, stop))
                if wanted:
                    bank.unpack(safetensors.torch.load(read_file(out, commit, part.path)), wanted)
    for bank in banks.values():
        bank.mark_loaded()


def _cut(bank: Bank, shards: Iterable[int]) -> list[list[int]]:
    """Group shards into files of at most _FILE_BYTES, or of one shard."""
    files: list[list[int]] = []
    room = 0
    for shard in shards:
        size = bank.shard_bytes(shard)
        if size > room or not files:
            files.append([])
            room = _FILE_BYTES
        files[-1].append(shard)
        room -= size
    return files


def _ranges(shards: Iterable[int]) -> list[tuple[int, int]]:
    """Distinct numbers as ascending ranges [first, stop)."""
    ranges: list[tuple[int, int]] = []
    for shard in sorted(shards):
        if ranges and ranges[-1][1] == shard:
            ranges[-1] = (ranges[-1][0], shard + 1)
        else:
            ranges.append((shard, shard + 1))
    return ranges


def _still_in_force(kept: Iterable[BankPart], new: Iterable[BankPart]) -> list[BankPart]:
    """Earlier parts without the shards that newer parts hold; parts with none left are dropped."""
    replaced = {shard for part in new for first, stop in part.shards for shard in range(first, stop)}
    left = []
    for part in kept:
        shards = [shard for first, stop in part.shards for shard in range(first, stop) if shard not in replaced]
        if shards:
            left.append(BankPart(path=part.path, shards=_ranges(shards)))
    return left


def _differences(found: BankSpec, expected: BankSpec) -> str:
    ours, theirs = expected.model_dump(), found.model_dump()
    return "differs: " + "; ".join(f"{k}: {theirs[k]} there, {ours[k]} here" for k in ours if ours[k] != theirs[k])
