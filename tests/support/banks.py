"""Owns the bank suite: claims that hold for every bank, as functions that assert.

A new bank is one row of BANKS: how it is made, changed through its own verb, and held against a slow twin.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.bank_files import load_banks, save_banks
from dist_mlpl.banks.base import Bank, WritableBank
from dist_mlpl.banks.heatmaps import HeatmapBank
from dist_mlpl.banks.held import DTYPES, Column
from dist_mlpl.banks.keyed import KeyedBank
from dist_mlpl.banks.neighbours import Neighbours
from dist_mlpl.banks.table import TableBank
from dist_mlpl.chain import FORMAT, Commit, read_chain
from dist_mlpl.errors import BankError
from tests.support.class_banks import (
    SlowPrototypes,
    SlowRing,
    faulty_features,
    faulty_slots,
    make_prototypes,
    make_ring,
    update_prototypes,
    update_ring,
)
from tests.support.heatmaps import faulty_maps

NUM_ROWS = 2500  # more than two rows a shard, and not the same number in each


class Twin(Protocol):
    """What a bank should hold, by loops."""

    columns: dict[str, np.ndarray]  # (num_rows, *shape) by column
    tolerance: dict[str, float]  # columns of which the last bits are open, and by how much

    def update(self, seed: int, num_rows: int) -> None:
        """The update that all ranks make together."""


class Kind(NamedTuple):
    """A bank of the suite.

    Args:
        make: it, on this rank; the argument is a folder for memory-mapped ones.
        update: this rank's share of a random update of so many rows over all ranks, a function of the seed; all of it
            if the bank is replicated.
        twin: its slow twin, empty.
        faults: calls that must raise BankError on all ranks and change nothing, though only a rank that is given True
            does anything wrong.
        others: banks under its name that are of another make.
    """

    make: Callable[[str], Any]
    update: Callable[[Any, int, int], None]
    twin: Callable[[Any], Twin]
    faults: Callable[[Any], list[Callable[[bool], Any]]]
    others: list[Callable[[], Bank]]


# Banks that are written row by row ------------------------------------------------------------------------------------


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


def random_write(bank: Bank, num_rows: int, *, seed: int) -> Write:
    """Rows drawn with repetition, of three rows alone where the seed is odd; positions without."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 3 if seed % 2 else bank.spec.num_rows, (num_rows,), generator=generator)
    position = torch.randperm(num_rows, generator=generator)
    return Write(index, position, random_values(bank, num_rows, generator))


def own_rows(num_rows: int) -> Tensor:
    """The rows of a list for all ranks that this rank hands in: unevenly many."""
    return torch.tensor([row for row in range(num_rows) if row * row % 7 % comm.world_size() == comm.rank()]).long()


def write(bank: WritableBank, seed: int, num_rows: int) -> None:
    """This rank's part of a write."""
    given = random_write(bank, num_rows, seed=seed)
    own = torch.arange(num_rows) if isinstance(bank, TableBank) else own_rows(num_rows)
    values = {name: value[own] for name, value in given.values.items()}
    bank.write(given.index[own], values, position=given.position[own])


class SlowBank:
    """Arrays, and a loop over rows in position order."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self.tolerance: dict[str, float] = {}
        self.columns = {
            name: np.full((bank.spec.num_rows, *column.shape), column.fill, dtype=np.float64)
            for name, column in bank.spec.columns.items()
        }

    def update(self, seed: int, num_rows: int) -> None:
        given = random_write(self._bank, num_rows, seed=seed)
        for row in given.position.argsort().tolist():
            for name, column in self.columns.items():
                column[int(given.index[row])] = given.values[name][row].double().numpy()


def faulty_writes(bank: WritableBank) -> list[Callable[[bool], Any]]:
    """Rows that there are not, numbers that are not finite, a column too few, a row too few, another type."""
    index = torch.tensor([0, 1])
    values = random_values(bank, 2, torch.Generator().manual_seed(2))
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
    calls: list[Callable[[bool], Any]] = [
        lambda is_faulty, bad=bad: bank.write(index, bad if is_faulty else values) for bad in wrong
    ]
    outside = [torch.tensor([0, row]) for row in (-1, bank.spec.num_rows)]
    return calls + [lambda is_faulty, bad=bad: bank.write(bad if is_faulty else index, values) for bad in outside]


def row_kind(make: Callable[[str], Bank], *others: Callable[[], Bank]) -> Kind:
    """A bank that is written row by row."""
    return Kind(make, write, SlowBank, faulty_writes, list(others))


OTHER_SIZES: list[dict[str, int]] = [{"num_classes": 38}, {"capacity": 5}, {"width": 7}]


def prototype_kind(name: str) -> Kind:
    """Prototypes, whose way of gathering the name says."""
    sizes = [{"num_classes": 38}, {"num_prototypes": 4}, {"width": 7}]
    return Kind(
        lambda folder: make_prototypes(name, folder),
        update_prototypes,
        SlowPrototypes,
        lambda bank: [
            *faulty_features(bank, lambda ids, x, position: bank.add(ids, x, position=position)),
            *faulty_slots(bank),
        ],
        [lambda size=size: make_prototypes(name, **size) for size in sizes],  # type: ignore[misc]
    )


# The table ------------------------------------------------------------------------------------------------------------

BANKS: dict[str, Kind] = {
    "f32": row_kind(
        lambda folder: KeyedBank("f32", NUM_ROWS, (3,), "f32"),
        lambda: KeyedBank("f32", NUM_ROWS, (4,), "f32"),
    ),
    "f16": row_kind(
        lambda folder: KeyedBank("f16", NUM_ROWS, (2, 2), "f16"),
        lambda: KeyedBank("f16", NUM_ROWS, (2, 2), "f32"),
    ),
    "u8": row_kind(
        lambda folder: KeyedBank("u8", NUM_ROWS, (5,), "u8"),
        lambda: KeyedBank("u8", NUM_ROWS + 1, (5,), "u8"),
    ),
    "mapped": row_kind(lambda folder: KeyedBank("mapped", NUM_ROWS, (3,), "f32", folder=folder or None)),
    "few": row_kind(lambda folder: KeyedBank("few", 7, (2,), "f32")),
    "columns": row_kind(
        lambda folder: WritableBank(
            "columns", NUM_ROWS, {"a": Column(dtype="i64", shape=(2,), fill=5), "b": Column(dtype="f32")}
        )
    ),
    "table": row_kind(
        lambda folder: TableBank("table", 40, {"sums": Column(dtype="i64"), "mean": Column(dtype="f32")})
    ),
    "neighbours": row_kind(
        lambda folder: Neighbours("neighbours", NUM_ROWS, 6, dtype="f16"),
        lambda: Neighbours("neighbours", NUM_ROWS, 7, dtype="f16"),
    ),
    "ring": Kind(
        lambda folder: make_ring("ring", folder),
        update_ring,
        SlowRing,
        lambda ring: faulty_features(ring, ring.push),
        [lambda size=size: make_ring("ring", **size) for size in OTHER_SIZES],  # type: ignore[misc]
    ),
    "heatmaps": Kind(
        lambda folder: HeatmapBank("heatmaps", NUM_ROWS, num_slots=2, map_size=3, seed=0, folder=folder or None),
        write,
        SlowBank,
        lambda bank: [*faulty_writes(bank), *faulty_maps(bank)],
        [
            lambda: HeatmapBank("heatmaps", NUM_ROWS, num_slots=3, map_size=3, seed=0),
            lambda: HeatmapBank("heatmaps", NUM_ROWS, num_slots=2, map_size=4, seed=0),
        ],
    ),
    **{name: prototype_kind(name) for name in ("prototypes_kmeans", "prototypes_cosine", "prototypes_slots")},
}


# The suite ------------------------------------------------------------------------------------------------------------

UPDATES = [(0, 50), (1, 50), (2, 0), (4, 200), (3, 20)]  # seed, rows


def check(read: dict[str, Tensor], index: Tensor, bank: Bank, twin: Twin) -> None:
    """Rows that were read are those of the twin."""
    expected = twin.columns
    assert read.keys() == expected.keys()
    for name, column in expected.items():
        assert read[name].dtype == DTYPES[bank.spec.columns[name].dtype]
        found = read[name].double().numpy()
        np.testing.assert_allclose(found, column[index.numpy()], rtol=0, atol=twin.tolerance.get(name, 0.0))


def check_reads_back_what_a_loop_would_hold(kind: Kind, folder: str) -> str:
    """Rows never written hold the fill; empty requests, repeated rows and repeated writes included.

    Returns:
        Digest of all rows.
    """
    bank = kind.make(folder)
    twin = kind.twin(bank)
    everything = torch.arange(bank.spec.num_rows)
    check(Bank.read(bank, everything), everything, bank, twin)
    for seed, num_rows in UPDATES:
        kind.update(bank, seed, num_rows)
        twin.update(seed, num_rows)
        generator = torch.Generator().manual_seed(comm.rank())
        asked = torch.randint(0, bank.spec.num_rows, (13 * comm.rank(),), generator=generator)
        check(Bank.read(bank, asked), asked, bank, twin)
    whole = Bank.read(bank, everything)
    check(whole, everything, bank, twin)
    return hashlib.sha256(b"".join(column.numpy().tobytes() for column in whole.values())).hexdigest()


def check_a_faulty_request_stops_all_ranks_and_changes_nothing(kind: Kind, folder: str) -> None:
    """The last rank alone asks for what there is not, or hands in what no bank takes."""
    bank = kind.make(folder)
    kind.update(bank, 0, 60)
    everything = torch.arange(bank.spec.num_rows)
    before = Bank.read(bank, everything)
    is_faulty = comm.rank() == comm.world_size() - 1 or isinstance(bank, TableBank)
    for outside in (-1, bank.spec.num_rows):
        with pytest.raises(BankError, match=f"row {outside}"):
            Bank.read(bank, torch.tensor([0, outside]) if is_faulty else torch.tensor([0, 1]))
    for number, call in enumerate(kind.faults(bank)):
        with pytest.raises(BankError) as caught:
            _and_then(bank.flush, call, is_faulty)  # what is written is refused where it is delivered
        assert f"{bank.name!r}" in caught.value.where, number
    after = Bank.read(bank, everything)
    assert all(torch.equal(after[name], before[name]) for name in before)


def check_no_rank_serves_rows_of_another(kind: Kind, folder: str) -> None:
    """What would happen if ranks disagreed on who owns what."""
    bank = kind.make(folder)
    if comm.world_size() == 1 or isinstance(bank, TableBank):
        return
    foreign = [i for i in range(bank.spec.num_rows) if i % bank.spec.num_shards not in bank.held_shards]
    if foreign:
        with pytest.raises(BankError, match=f"row {foreign[0]} asked of rank {comm.rank()}"):
            bank._places(np.array(foreign[:1]))


def _and_then(second: Callable[[], Any], first: Callable[[bool], Any], is_faulty: bool) -> None:
    first(is_faulty)
    second()


def check_a_read_sees_what_was_just_written(kind: Kind, folder: str) -> None:
    """Updates one after the other, with nothing read, then one read by each rank of what it may: all are in it."""
    bank = kind.make(folder)
    twin = kind.twin(bank)
    for seed, num_rows in UPDATES:
        kind.update(bank, seed, num_rows)
        twin.update(seed, num_rows)
    everything = torch.arange(bank.spec.num_rows)
    check(Bank.read(bank, everything), everything, bank, twin)
    for seed, num_rows in [(6, 30), (7, 30)]:
        kind.update(bank, seed, num_rows)
        twin.update(seed, num_rows)
        asked = everything if comm.rank() == comm.world_size() - 1 else everything[:0]
        check(Bank.read(bank, asked), asked, bank, twin)


def check_rows_that_wait_are_delivered_before_a_bank_is_saved(kind: Kind, folder: str) -> None:
    """After `flush` owners hold everything; before it what waits cannot be left out of a file, or out of a load."""
    bank = kind.make(folder)
    twin = kind.twin(bank)
    kind.update(bank, 0, 60)
    twin.update(0, 60)
    if bank._staged is not None:
        for call in (bank.changed_shards, lambda: bank.pack([]), lambda: bank.unpack({}, [])):
            with pytest.raises(BankError, match="wait for their owners"):
                call()
    bank.flush()
    shards = bank.changed_shards()
    own = [row for shard in shards for row in range(shard, bank.spec.num_rows, bank.spec.num_shards)]
    if shards:
        packed = bank.pack(shards)
        assert packed.pop("shards").tolist() == shards
        check(packed, torch.tensor(own), bank, twin)
    others = set() if bank.is_replicated else set(bank.held_rows().tolist()) - set(own)
    for name, column in twin.columns.items():
        assert (column[sorted(others)] == bank.spec.columns[name].fill).all()
    num_sent = comm.traffic()
    bank.flush()  # nothing waits, nothing moves
    assert comm.traffic() == num_sent


def check_what_waits_outlives_a_faulty_request_and_what_is_refused_is_never_saved(kind: Kind, folder: str) -> None:
    """A bad index asked for takes nothing along; a bad row that waits is refused on all ranks, then it is gone."""
    bank = kind.make(folder)
    twin = kind.twin(bank)
    is_last = comm.rank() == comm.world_size() - 1 or isinstance(bank, TableBank)
    everything = torch.arange(bank.spec.num_rows)
    kind.update(bank, 0, 60)
    twin.update(0, 60)
    with pytest.raises(BankError, match="row -1"):
        Bank.read(bank, torch.tensor([-1]) if is_last else everything[:1])
    check(Bank.read(bank, everything), everything, bank, twin)
    for call in kind.faults(bank):
        with pytest.raises(BankError):
            _and_then(lambda: Bank.read(bank, everything[:1]), call, is_last)
        bank.flush()
        check(Bank.read(bank, everything), everything, bank, twin)


SUITE: list[Callable[[Kind, str], str | None]] = [
    check_reads_back_what_a_loop_would_hold,
    check_a_faulty_request_stops_all_ranks_and_changes_nothing,
    check_no_rank_serves_rows_of_another,
    check_a_read_sees_what_was_just_written,
    check_rows_that_wait_are_delivered_before_a_bank_is_saved,
    check_what_waits_outlives_a_faulty_request_and_what_is_refused_is_never_saved,
]

# Saving and loading ---------------------------------------------------------------------------------------------------

_SAVED = [(0, 300), (2, 3)]  # seed and rows before each of two commits


def saved_in_two_commits(out: str, scratch: str, *, step: int = 10) -> list[Commit]:
    """Every bank, changed much and saved, then in three rows and saved again; on this number of ranks."""
    banks = {name: kind.make(scratch) for name, kind in BANKS.items()}
    commits: list[Commit] = []
    for number, update in enumerate(_SAVED):
        for name, bank in banks.items():
            BANKS[name].update(bank, *update)
        parent = commits[-1] if commits else None
        folder = f"checkpoints/{step + number:08d}-0001"
        records, files = save_banks(out, folder, banks, parent)
        for bank in banks.values():
            bank.mark_saved()
        commits.append(commit_with(records, files, step=step + number))
    return commits


def check_loaded(out: str, commit: Commit, scratch: str) -> None:
    """Whatever number of ranks saved, this number reads the same rows and goes on as if nothing had happened."""
    banks = {name: kind.make(scratch) for name, kind in BANKS.items()}
    load_banks(out, commit, banks)
    for name, bank in banks.items():
        twin = BANKS[name].twin(bank)
        for update in _SAVED:
            twin.update(*update)
        everything = torch.arange(bank.spec.num_rows)
        check(Bank.read(bank, everything), everything, bank, twin)
        assert bank.changed_shards() == []
        BANKS[name].update(bank, 4, 30)
        twin.update(4, 30)
        check(Bank.read(bank, everything), everything, bank, twin)


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
        spec = record.spec
        rows = [
            saved_bank(url, head, Bank(name, spec.num_rows, spec.columns, num_shards=spec.num_shards))
            for url, head in zip((one, other), heads, strict=True)
        ]
        assert all(torch.equal(rows[0][column], rows[1][column]) for column in rows[0]), name
