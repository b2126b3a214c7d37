"""Owns communication between ranks after start-up: each verb is the identity on one rank.

Tensors are moved on the device they live on, so the caller chooses NCCL or gloo by where its tensor is.
"""

from __future__ import annotations

import zlib
from collections import Counter
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dist_mlpl.errors import MlplError, RankMismatchError

T = TypeVar("T")

_sent: Counter[str] = Counter()


def traffic() -> dict[str, int]:
    """Bytes of tensors that this rank has sent to other ranks since the process began, by verb.

    An exchange counts the rows that leave this rank and the numbers that announce them; a reduction what a ring moves,
    2 (R - 1) / R of the tensor from each rank; a gather R - 1 times the padded rows; a broadcast (R - 1) / R of the
    tensor, as if all ranks had passed it on alike. Pickled objects are not counted.
    """
    return dict(_sent)


def world_size() -> int:
    """Ranks of the process group, 1 when there is none."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0 when there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place.

    Collective: all ranks, one all-reduce of the tensor's bytes.

    Args:
        tensor: any shape, same on every rank.

    Returns:
        The same tensor, holding the sum on every rank.
    """
    if world_size() > 1:
        _count_reduction(tensor)
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def reduce_max(tensor: Tensor) -> Tensor:
    """Largest value over ranks, in place.

    Collective: all ranks, one all-reduce of the tensor's bytes.
    """
    if world_size() > 1:
        _count_reduction(tensor)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def _count_reduction(tensor: Tensor) -> None:
    _sent["reduce"] += 2 * (world_size() - 1) * tensor.nbytes // world_size()


def gather_objects(value: T) -> list[T]:
    """Every rank's picklable value, in rank order, on every rank. For small control data.

    Collective: all ranks, one gather of pickles.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate rows of different number from every rank, in rank order, on every rank.

    Collective: all ranks; the row counts, then one all-gather padded to the longest.

    Args:
        rows: (n_r, ...) with n_r free and the other dimensions equal on every rank.

    Returns:
        (sum of n_r, ...).
    """
    if world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([rows.shape[0]], dtype=torch.int64, device=rows.device))
    longest = max(int(count) for count in counts)
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    _sent["gather"] += (world_size() - 1) * (8 + padded.nbytes)
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def broadcast_object(value: T, *, source: int = 0) -> T:
    """The picklable value of rank `source`, on every rank: one rank decides, the others follow.

    Collective: all ranks, one broadcast of a pickle.
    """
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def exchange(rows: Tensor, counts: list[int], *, error: MlplError | None = None) -> tuple[Tensor, list[int]]:
    """Send each row to one rank and receive the rows meant for this one.

    Calling it again on the received rows with the received counts sends every row back where it came from.

    Collective: all ranks; R pairs of numbers, then one uneven all-to-all of the rows.

    Args:
        rows: (n, ...) ordered by destination; n is free, the other dimensions and the type equal on every rank.
        counts: R numbers; the first counts[0] rows go to rank 0, the next counts[1] to rank 1, and so on. Sum is n.
        error: what this rank found wrong before it could send anything; all ranks raise it in place of moving rows.

    Returns:
        The received rows in order of source rank, and how many came from each rank.

    Raises:
        RankMismatchError: counts that do not cut the rows into one part a rank, or rows whose shape or type differs
            between ranks; on all ranks.
        MlplError: `error` of the lowest rank that handed one in, on all ranks.
    """
    error = error or _counts_error(rows, counts)
    if world_size() == 1:
        if error is not None:
            raise error
        return rows, counts
    # A faulty rank sends -1: every rank sees it, and none waits for rows that will not come.
    kind = zlib.crc32(f"{rows.dtype} {tuple(rows.shape[1:])}".encode())
    announced = [-1] * world_size() if error is not None else counts
    sent = torch.tensor([[count, kind] for count in announced], dtype=torch.int64, device=rows.device)  # (R, 2)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    from_ranks: list[int] = received[:, 0].tolist()
    if min(from_ranks) < 0:
        raise next(fault for fault in gather_objects(error) if fault is not None)
    if bool((received[:, 1] != kind).any()):
        kinds = gather_objects(f"{rows.dtype} {tuple(rows.shape[1:])}")
        raise _exchange_error(f"rows of {', '.join(kinds)}", expected="rows of one type and shape on every rank")
    arrived = rows.new_empty((sum(from_ranks), *rows.shape[1:]))
    _sent["exchange"] += 16 * (world_size() - 1) + rows[0:1].nbytes * (rows.shape[0] - counts[rank()])
    dist.all_to_all_single(arrived, rows.contiguous(), from_ranks, counts)
    return arrived, from_ranks


def _counts_error(rows: Tensor, counts: list[int]) -> RankMismatchError | None:
    if len(counts) == world_size() and min(counts) >= 0 and sum(counts) == rows.shape[0]:
        return None
    return _exchange_error(
        f"counts {counts} for {rows.shape[0]} rows", expected=f"{world_size()} counts from 0 on whose sum is the rows"
    )


def _exchange_error(found: str, *, expected: str) -> RankMismatchError:
    return RankMismatchError(
        found,
        expected=expected,
        where=f"comm.exchange on rank {rank()} of {world_size()}",
        next_step="this is a fault of the caller: keep the log and report it",
    )


def broadcast_tensor(tensor: Tensor, *, source: int = 0) -> Tensor:
    """Rank `source`'s values on every rank, in place.

    Collective: all ranks, one broadcast of the tensor's bytes.
    """
    if world_size() > 1:
        _sent["broadcast"] += (world_size() - 1) * tensor.nbytes // world_size()
        dist.broadcast(tensor, src=source)
    return tensor
