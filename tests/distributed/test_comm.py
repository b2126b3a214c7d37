"""Claims about communication on several gloo ranks, each verb against lists computed in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.errors import BankError, RankMismatchError
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]
NUM_CASES = 6


def rows_of(rank: int, case: int, dtype: torch.dtype, width: tuple[int, ...] = (3,)) -> Tensor:
    """A rank's rows: their number differs from rank to rank, some ranks have none, in one case all have none."""
    generator = torch.Generator().manual_seed(100 * case + rank)
    num_rows = 0 if case == 0 else int(torch.randint(0, 5, (), generator=generator))
    return torch.randint(0, 100, (num_rows, *width), generator=generator).to(dtype)


def counts_of(rank: int, world_size: int, case: int) -> list[int]:
    """How many of its rows a rank sends to each rank."""
    num_rows = len(rows_of(rank, case, torch.int64))
    generator = torch.Generator().manual_seed(7 * case + rank)
    to = torch.randint(0, world_size, (num_rows,), generator=generator)
    return torch.bincount(to, minlength=world_size).tolist()


def speak(rank: int, world_size: int) -> dict[str, Any]:
    """Everything a rank hears, by verb and case."""
    heard: dict[str, Any] = {"place": (comm.rank(), comm.world_size())}
    for dtype in DTYPES:
        for case in range(NUM_CASES):
            rows = rows_of(rank, case, dtype)
            heard[f"gather {dtype} {case}"] = comm.gather_rows(rows)
            received, counts = comm.exchange(rows, counts_of(rank, world_size, case))
            back, back_counts = comm.exchange(received, counts)
            heard[f"exchange {dtype} {case}"] = (received, counts)
            heard[f"back {dtype} {case}"] = (back, back_counts)
    heard["strided"] = comm.gather_rows(rows_of(rank, 3, torch.float32, (2, 4)).transpose(1, 2))
    heard["flat"] = comm.gather_rows(torch.full((rank,), float(rank)))
    heard["objects"] = comm.gather_objects({"rank": rank, "text": "x" * 1000 * rank})
    for source in range(world_size):
        heard[f"object of {source}"] = comm.broadcast_object(("said by", rank), source=source)
        heard[f"tensor of {source}"] = comm.broadcast_tensor(torch.full((2, 3), rank), source=source)
    values = torch.arange(6.0).reshape(2, 3) * (rank + 1)
    heard["sum is in place"] = comm.reduce_sum(values) is values
    heard["sum"] = values
    heard["max"] = comm.reduce_max(torch.tensor([rank, -rank, 5]))
    dist.barrier()
    return heard


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_hears_what_the_lists_say(world_size: int) -> None:
    ranks = range(world_size)
    for rank, heard in enumerate(run_ranks(speak, world_size)):
        assert heard["place"] == (rank, world_size)
        for dtype in DTYPES:
            for case in range(NUM_CASES):
                rows = [rows_of(r, case, dtype) for r in ranks]
                assert torch.equal(heard[f"gather {dtype} {case}"], torch.cat(rows))
                parts = [torch.split(rows[r], counts_of(r, world_size, case))[rank] for r in ranks]
                received, counts = heard[f"exchange {dtype} {case}"]
                assert counts == [len(part) for part in parts]
                assert received.dtype == dtype
                assert torch.equal(received, torch.cat(parts))
                back, back_counts = heard[f"back {dtype} {case}"]
                assert torch.equal(back, rows[rank])
                assert back_counts == counts_of(rank, world_size, case)
        strided = [rows_of(r, 3, torch.float32, (2, 4)).transpose(1, 2) for r in ranks]
        assert torch.equal(heard["strided"], torch.cat(strided))
        assert heard["flat"].tolist() == [float(r) for r in ranks for _ in range(r)]
        assert heard["objects"] == [{"rank": r, "text": "x" * 1000 * r} for r in ranks]
        for source in ranks:
            assert heard[f"object of {source}"] == ("said by", source)
            assert heard[f"tensor of {source}"].tolist() == [[source] * 3] * 2
        assert heard["sum is in place"]
        assert torch.equal(heard["sum"], torch.arange(6.0).reshape(2, 3) * sum(r + 1 for r in ranks))
        assert heard["max"].tolist() == [world_size - 1, 0, 5]


def exchange_what_cannot_be(rank: int, world_size: int) -> dict[str, tuple[str, str]]:
    """What every rank raises when one of them, the last, is at fault; and that they go on together after it."""
    is_faulty = rank == world_size - 1
    rows, counts = torch.zeros(world_size, 3), [1] * world_size
    own_fault = BankError("a fault of its own", expected="none", where=f"rank {rank}", next_step="nothing")
    cases: dict[str, dict[str, Any]] = {
        "too few counts": {"counts": counts[:-1]},
        "a count below 0": {"counts": [world_size + 1, *counts[2:], -1]},
        "counts of other rows": {"counts": [2, *counts[1:]]},
        "an own fault": {"error": own_fault},
        "rows of another type": {"rows": rows.int()},
        "rows of another width": {"rows": rows[:, :2]},
    }
    heard = {}
    for name, keys in cases.items():
        arguments = {"rows": rows, "counts": counts} | (keys if is_faulty else {})
        try:
            comm.exchange(**arguments)
            heard[name] = "nothing", ""
        except (RankMismatchError, BankError) as error:
            heard[name] = type(error).__name__, error.where
        assert comm.exchange(rows, counts)[1] == counts
    return heard


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_exchange_that_cannot_be_stops_all_ranks_alike(world_size: int) -> None:
    heard = run_ranks(exchange_what_cannot_be, world_size)
    last = world_size - 1
    for one in heard:
        for name in ("too few counts", "a count below 0", "counts of other rows"):
            assert one[name] == ("RankMismatchError", f"comm.exchange on rank {last} of {world_size}")
        assert one["an own fault"] == ("BankError", f"rank {last}")
        for name in ("rows of another type", "rows of another width"):
            assert one[name][0] == ("nothing" if world_size == 1 else "RankMismatchError")


def rooms_of(rank: int, world_size: int, case: int) -> comm.Room:
    """Room that all ranks agree on, whatever they send: just enough, none, too much here and too little there."""
    sent = torch.tensor([counts_of(r, world_size, case) for r in range(world_size)])
    other = torch.randint(0, 4, sent.shape, generator=torch.Generator().manual_seed(case))
    room = {0: sent, 1: torch.zeros_like(sent)}.get(case % 3, other)
    return comm.Room(room[rank].tolist(), room[:, rank].tolist())


def exchange_with_room(rank: int, world_size: int) -> dict[str, Any]:
    """What arrives with and without room for it, and in how many collectives."""
    heard: dict[str, Any] = {}
    number = 0
    before = dist.all_to_all_single

    def counted(*args: Any) -> Any:
        nonlocal number
        number += 1
        return before(*args)

    dist.all_to_all_single = counted  # type: ignore[assignment]
    for case in range(3 * NUM_CASES):
        rows, counts = rows_of(rank, case, torch.float32, (100,)), counts_of(rank, world_size, case)
        room = rooms_of(rank, world_size, case)
        plain, number = comm.exchange(rows, counts), 0
        found = comm.exchange(rows, counts, expected=room)
        heard[f"{case} same"] = torch.equal(plain[0], found[0]) and plain[1] == found[1]
        heard[f"{case} number"] = number
        fault = BankError("a fault", expected="none", where=f"rank {rank}", next_step="nothing")
        try:
            comm.exchange(rows, counts, expected=room, error=fault if rank == world_size - 1 else None)
        except BankError as error:
            heard[f"{case} fault"] = error.where
    rows, number = rows_of(rank, 2, torch.int64, ()), 0
    comm.exchange(rows, counts_of(rank, world_size, 2))
    heard["short"] = number
    return heard


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_room_changes_the_number_of_messages_and_nothing_else(world_size: int) -> None:
    for heard in run_ranks(exchange_with_room, world_size):
        for case in range(3 * NUM_CASES):
            assert heard[f"{case} same"]
            assert heard[f"{case} fault"] == f"rank {world_size - 1}"
            if case % 3 == 0:
                assert heard[f"{case} number"] == 1
        assert any(heard[f"{case} number"] == 2 for case in range(3 * NUM_CASES))
        assert heard["short"] == 1


def told(rank: int, world_size: int) -> dict[str, Any]:
    """What a rank hears of things that one rank makes, and of errors that one or several ranks meet."""

    def fail(where: str) -> BankError:
        return BankError("found", expected="expected", where=where, next_step="do")

    def refuse() -> None:
        raise fail("rank 0")

    heard: dict[str, Any] = {
        "made": comm.on_first_rank(lambda: ("by", comm.rank())),
        "gathered": comm.gather_on_first_rank(rank * 10),
    }
    with pytest.raises(BankError) as caught:
        comm.on_first_rank(refuse)
    heard["refused"] = caught.value.where
    for who in ((), (2,), (1, 2), (0,)):
        try:
            with comm.shared_errors():
                if rank in who:
                    raise fail(f"rank {rank}")
            heard[f"errors of {who}"] = None
        except BankError as error:
            heard[f"errors of {who}"] = error.where
    for asked, failed in (((), ()), ((1,), ()), ((0,), (1, 2)), ((), (2,))):
        try:
            failure = fail(f"rank {rank}") if rank in failed else None
            heard[f"{asked} asked, {failed} failed"] = comm.is_stop_asked(rank in asked, failure)
        except BankError as error:
            heard[f"{asked} asked, {failed} failed"] = error.where
    return heard


@pytest.mark.parametrize("world_size", [1, 3])
def test_what_one_rank_makes_or_fails_at_reaches_all(world_size: int) -> None:
    for rank, heard in enumerate(run_ranks(told, world_size)):
        assert heard == {
            "made": ("by", 0), "gathered": [10 * r for r in range(world_size)] if rank == 0 else [],
            "refused": "rank 0", "errors of ()": None, "errors of (0,)": "rank 0",
            "errors of (2,)": "rank 2" if world_size == 3 else None,
            "errors of (1, 2)": "rank 1" if world_size == 3 else None,
            "() asked, () failed": False, "(1,) asked, () failed": world_size == 3,
            "(0,) asked, (1, 2) failed": "rank 1" if world_size == 3 else True,
            "() asked, (2,) failed": "rank 2" if world_size == 3 else False,
        }  # fmt: skip
