"""Owns the bank suite: claims that hold for every bank, as functions that assert, and a slow bank to hold them against.

A new bank is one row of BANKS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.bank_files import load_banks, save_banks
from dist_mlpl.banks.base import DTYPES, Bank, Column
from dist_mlpl.banks.keyed import KeyedBank
from dist_mlpl.banks.table import TableBank
from dist_mlpl.chain import FORMAT, Commit, read_chain
from dist_mlpl.errors import BankError

NUM_ROWS = 2500  # more than two rows a shard, and not the same number in each

# A bank on this rank; the argument is a folder for those that are memory-mapped.
BANKS: dict[str, Callable[[str], Bank]] = {
    "f32": lambda folder: KeyedBank("f32", NUM_ROWS, (3,), "f32"),
    "f16": lambda folder: KeyedBank("f16", NUM_ROWS, (2, 2), "f16"),
    "u8": lambda folder: KeyedBank("u8", NUM_ROWS, (5,), "u8"),
    "mapped": lambda folder: KeyedBank("mapped", NUM_ROWS, (3,), "f32", folder=folder),
    "few": lambda folder: KeyedBank("few", 7, (2,), "f32"),
    "columns": lambda folder: Bank(
        "columns", NUM_ROWS, {"a": Column(dtype="i64", shape=(2,), fill=5), "b": Column(dtype="f32")}
    ),
    "table": lambda folder: TableBank("table", 40, {"sums": Column(dtype="i64"), "mean": Column(dtype="f32")}),
}


class Write(NamedTuple):
    """Rows that all ranks write together."""

    index: Tensor  # type: ignore[assignment]
    position: Tensor
    values: dict[str, Tensor]


def random_values(bank: Bank, num_rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Values that each column's type holds exactly."""
    return {
        name: torch.randint(0, 200, (num_rows, *column.shape), generator=generator).to(DTYPES[column.dtype])
        for name, column in bank.spec.columns.items()
    }


def random_write(bank: Bank, num_rows: int, *, seed: int, rows: int | None = None) -> Write:
    """Rows drawn with repetition, positions without."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, rows or bank.spec.num_rows, (num_rows,), generator=generator)
    position = torch.randperm(num_rows, generator=generator)
    return Write(index, position, random_values(bank, num_rows, generator))


def own_rows(bank: Bank, num_rows: int) -> Tensor:
    """The rows of a list for all ranks that this rank hands in: unevenly many; everything if the bank is replicated."""
    if isinstance(bank, TableBank):
        return torch.arange(num_rows)
    return torch.tensor([row for row in range(num_rows) if row * row % 7 % comm.world_size() == comm.rank()]).long()


def write(bank: Bank, given: Write) -> None:
    """This rank's part of a write."""
    own = own_rows(bank, len(given.index))
    values = {name: value[own] for name, value in given.values.items()}
    bank.write(given.index[own], values, position=given.position[own])


class SlowBank:
    """The oracle: arrays, and a loop over rows in position order."""

    def __init__(self, bank: Bank) -> None:
        self.columns = {
            name: np.full((bank.spec.num_rows, *column.shape), column.fill, dtype=np.float64)
            for name, column in bank.spec.columns.items()
        }

    def write(self, given: Write) -> None:
        for row in given.position.argsort().tolist():
            for name, column in self.columns.items():
                column[int(given.index[row])] = given.values[name][row].double().numpy()

    def check(self, read: dict[str, Tensor], index: Tensor, bank: Bank) -> None:
        assert read.keys() == self.columns.keys()
        for name, column in self.columns.items():
            assert read[name].dtype == DTYPES[bank.spec.columns[name].dtype]
            np.testing.assert_array_equal(read[name].double().numpy(), column[index.numpy()])


def check_reads_back_and_the_last_position_wins(bank: Bank) -> None:
    """Rows never written hold the fill; empty requests, repeated rows and repeated writes included."""
    oracle = SlowBank(bank)
    everything = torch.arange(bank.spec.num_rows)
    oracle.check(bank.read(everything), everything, bank)
    for number, (num_rows, rows) in enumerate([(50, None), (50, 3), (0, None), (200, None)]):
        given = random_write(bank, num_rows, seed=number, rows=rows)
        write(bank, given)
        oracle.write(given)
        generator = torch.Generator().manual_seed(comm.rank())
        asked = torch.randint(0, bank.spec.num_rows, (13 * comm.rank(),), generator=generator)
        oracle.check(bank.read(asked), asked, bank)
    oracle.check(bank.read(everything), everything, bank)


def check_a_faulty_request_stops_all_ranks_and_changes_nothing(bank: Bank) -> None:
    """The last rank alone asks for what there is not, or writes what no bank takes."""
    write(bank, random_write(bank, 50, seed=1))
    everything = torch.arange(bank.spec.num_rows)
    before = bank.read(everything)
    is_faulty = comm.rank() == comm.world_size() - 1 or isinstance(bank, TableBank)
    index = torch.tensor([0, 1])
    values = random_values(bank, 2, torch.Generator().manual_seed(2))
    for outside in (-1, bank.spec.num_rows):
        bad = torch.tensor([0, outside]) if is_faulty else index
        with pytest.raises(BankError, match=f"row {outside}"):
            bank.read(bad)
        with pytest.raises(BankError, match=f"row {outside}"):
            bank.write(bad, values)
    for wrong in faulty_values(bank, values):
        with pytest.raises(BankError):
            bank.write(index, wrong if is_faulty else values)
    after = bank.read(everything)
    assert all(torch.equal(after[name], before[name]) for name in before)


def faulty_values(bank: Bank, values: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Numbers that are not finite, a column too few, a row too few, another type."""
    first = next(iter(values))
    wrong = [
        {name: value for name, value in values.items() if name != first},
        values | {"other": values[first]},
        values | {first: values[first][:1]},
        values | {first: values[first].to(torch.int16)},
    ]
    for name, column in bank.spec.columns.items():
        if column.dtype in ("f32", "f16"):
            wrong += [values | {name: torch.full_like(values[name], bad)} for bad in (torch.nan, -torch.inf)]
        if column.dtype == "f16":
            wrong.append(values | {name: torch.full(values[name].shape, 1e6)})  # infinite as f16
    return wrong


def check_no_rank_serves_rows_of_another(bank: Bank) -> None:
    """What would happen if ranks disagreed on who owns what."""
    if comm.world_size() == 1 or isinstance(bank, TableBank):
        return
    foreign = [i for i in range(bank.spec.num_rows) if i % bank.spec.num_shards not in bank.held_shards]
    if foreign:
        with pytest.raises(BankError, match=f"row {foreign[0]} asked of rank {comm.rank()}"):
            bank._places(torch.tensor(foreign[:1]))


SUITE = [
    check_reads_back_and_the_last_position_wins,
    check_a_faulty_request_stops_all_ranks_and_changes_nothing,
    check_no_rank_serves_rows_of_another,
]


def saved_in_two_commits(out: str, scratch: str, *, step: int = 10) -> list[Commit]:
    """Every bank, written much and saved, then written in three rows and saved again; on this number of ranks."""
    banks = {name: make(scratch) for name, make in BANKS.items()}
    commits: list[Commit] = []
    for number in range(2):
        for bank in banks.values():
            write(bank, random_write(bank, 300 if number == 0 else 3, seed=number))
        parent = commits[-1] if commits else None
        folder = f"checkpoints/{step + number:08d}-0001"
        records, files = save_banks(out, folder, banks, parent)
        for bank in banks.values():
            bank.mark_saved()
        commits.append(commit_with(records, files, step=step + number))
    return commits


def check_loaded(out: str, commit: Commit, scratch: str) -> None:
    """Whatever number of ranks saved, this number reads the same rows; and what is written next is saved alone."""
    banks = {name: make(scratch) for name, make in BANKS.items()}
    load_banks(out, commit, banks)
    for bank in banks.values():
        oracle = SlowBank(bank)
        for number in range(2):
            oracle.write(random_write(bank, 300 if number == 0 else 3, seed=number))
        everything = torch.arange(bank.spec.num_rows)
        oracle.check(bank.read(everything), everything, bank)
        assert bank.changed_shards() == []


def commit_with(records: dict, files: list, *, step: int = 1) -> Commit:
    """A commit of which the banks alone matter."""
    return Commit(
        format=FORMAT, step=step, epoch=0, samples_consumed=0, round=0, parent=None, attempt="0001", global_batch=1,
        num_lanes=1, window_samples=1, group_size=1, world_size=comm.world_size(), digests={}, versions={}, metrics={},
        bad_samples=[], files=files, banks=records,
    )  # fmt: skip


def saved_bank(out: str, commit: Commit, bank: Bank) -> dict[str, Tensor]:
    """Every row of a bank as a commit holds it."""
    load_banks(out, commit, {bank.name: bank})
    return bank.read(torch.arange(bank.spec.num_rows))


def assert_same_banks(one: str, other: str) -> None:
    """Two runs' newest commits hold bit-equal banks, at least one."""
    heads = [read_chain(url)[-1] for url in (one, other)]
    assert heads[0].banks.keys() == heads[1].banks.keys()
    assert heads[0].banks
    for name, record in heads[0].banks.items():
        rows = [
            saved_bank(url, head, Bank(name, record.spec.num_rows, record.spec.columns))
            for url, head in zip((one, other), heads, strict=True)
        ]
        assert all(torch.equal(rows[0][column], rows[1][column]) for column in rows[0]), name
