"""Claims: metrics are bit-equal for any number of ranks; `run_ranks`, which every distributed test uses, is sound."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from dist_mlpl import comm
from dist_mlpl.errors import RankMismatchError, RunError
from dist_mlpl.metrics import Evaluation, Scores
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

N, C, BLOCK = 157, 11, 8


def make_case(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, C) logits with many ties and partial targets; class 3 has no positive, class 7 no known entry."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-6, 7, (N, C), generator=generator) / 3
    targets = torch.randint(-1, 2, (N, C), generator=generator).to(torch.int8)
    targets[:, 3] = -targets[:, 3].abs()
    targets[:, 7] = 0
    return logits, targets


def score_share(rank: int, world_size: int, seed: int) -> Evaluation:
    """Score an uneven, interleaved share in padded blocks; the last of four ranks has no image at all."""
    logits, targets = make_case(seed)
    num_owners = min(world_size, 3)
    owner = torch.randint(0, num_owners, (N,), generator=torch.Generator().manual_seed(seed))
    scores = Scores(C, top_k=2)
    for index in (owner == rank).nonzero()[:, 0].flip(0).split(BLOCK):
        valid = torch.zeros(BLOCK, dtype=torch.bool)
        valid[: len(index)] = True
        padded = torch.zeros(BLOCK, dtype=torch.int64)
        padded[: len(index)] = index
        garbage = torch.where(valid[:, None], logits[padded], float("nan"))
        scores.add(garbage, targets[padded], torch.where(valid, padded, -1), valid)
    return scores.merge()


def test_any_number_of_ranks_gives_the_bits_of_one_process_on_every_rank() -> None:
    expected = score_share(0, 1, seed=5)
    for world_size in (1, 2, 3, 4):
        for found in run_ranks(score_share, world_size, 5):
            torch.testing.assert_close(found.precision, expected.precision, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(found.counts, expected.counts, rtol=0, atol=0)
            assert found.metrics() == expected.metrics()


def test_more_ranks_than_classes_still_merge() -> None:
    def one_class(rank: int, world_size: int) -> dict[str, float]:
        scores = Scores(1)
        target = torch.tensor([[1 if rank else -1]], dtype=torch.int8)
        scores.add(torch.tensor([[float(rank)]]), target, torch.tensor([rank]), torch.tensor([True]))
        return scores.merge().metrics()

    for metrics in run_ranks(one_class, 3):
        assert metrics["mAP"] == 1.0
        assert metrics["num_images"] == 3


def test_an_image_scored_on_two_ranks_is_refused_on_all_and_named() -> None:
    def overlap(rank: int, world_size: int) -> str:
        scores = Scores(2)
        index = torch.tensor([rank, 40 + rank // 2])  # ranks 0 and 1 share image 40
        scores.add(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.int8), index, torch.tensor([True, True]))
        with pytest.raises(RankMismatchError) as caught:
            scores.merge()
        return str(caught.value)

    for message in run_ranks(overlap, 3):
        assert "index 40, on ranks [0, 1]" in message


def test_a_nan_on_one_rank_is_refused_on_all() -> None:
    def broken(rank: int, world_size: int) -> str:
        scores = Scores(2)
        logits = torch.tensor([[0.0, float("nan") if rank else 1.0]])
        scores.add(logits, torch.ones(1, 2, dtype=torch.int8), torch.tensor([rank]), torch.tensor([True]))
        with pytest.raises(RunError) as caught:
            scores.merge()
        return str(caught.value)

    for message in run_ranks(broken, 2):
        assert "first at index 1" in message


def test_exchange_delivers_every_row_once_and_a_second_exchange_returns_it() -> None:
    def there_and_back(rank: int, world_size: int) -> tuple[bool, bool]:
        counts = [(rank + peer) % 3 for peer in range(world_size)]
        rows = torch.tensor([[rank, peer, i] for peer, count in enumerate(counts) for i in range(count)]).reshape(-1, 3)
        received, num_received = comm.exchange(rows, counts)
        expected = [[peer, rank, i] for peer in range(world_size) for i in range((rank + peer) % 3)]
        back, _ = comm.exchange(received, num_received)
        return received.tolist() == expected, torch.equal(back, rows)

    assert run_ranks(there_and_back, 3) == [(True, True)] * 3


def test_children_get_rank_variables_one_thread_and_the_callers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(rank: int, world_size: int) -> tuple[list[str | None], int, int]:
        names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SET_BY_TEST", "SET_BY_CALL"]
        return [os.environ.get(name) for name in names], torch.get_num_threads(), dist.get_rank()

    monkeypatch.setenv("SET_BY_TEST", "a")
    assert run_ranks(place, 2, env={"SET_BY_CALL": "b"}) == [
        (["0", "2", "0", "2", "a", "b"], 1, 0),
        (["1", "2", "1", "2", "a", "b"], 1, 1),
    ]


def test_a_child_may_start_the_process_group_itself() -> None:
    def start(rank: int, world_size: int) -> float:
        assert not dist.is_initialized()
        dist.init_process_group("gloo")
        return float(comm.reduce_sum(torch.ones(())))

    assert run_ranks(start, 2, use_group=False) == [2.0, 2.0]


def test_the_first_exception_reaches_the_caller_while_peers_wait_in_a_collective() -> None:
    def fail(rank: int, world_size: int) -> None:
        print("about to fail")
        if rank == 1:
            raise RankMismatchError("one", expected="two", where="here", next_step="count")
        dist.barrier()

    with pytest.raises(RankMismatchError) as caught:
        run_ranks(fail, 3)
    notes = "\n".join(caught.value.__notes__)
    assert "raised on rank 1" in notes
    assert "in fail" in notes
    assert "about to fail" in notes


def test_a_rank_that_dies_is_named_with_its_exit_code() -> None:
    def die(rank: int, world_size: int) -> None:
        if rank == 1:
            os._exit(7)
        dist.barrier()

    with pytest.raises(RuntimeError, match="rank 1 died with exit code 7"):
        run_ranks(die, 2)


def test_ranks_that_hang_are_ended_and_show_where_they_stood() -> None:
    def hang(rank: int, world_size: int) -> int:
        if rank == 0:
            os.read(os.pipe()[0], 1)
        return rank

    with pytest.raises(TimeoutError, match="in hang"):
        run_ranks(hang, 2, timeout_seconds=3)
