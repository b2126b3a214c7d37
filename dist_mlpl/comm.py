"""Owns communication between ranks after start-up: each verb is the identity on one rank.

Tensors are moved on the device they live on, so the caller chooses NCCL or gloo by where its tensor is.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from typing import Any, Final, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dist_mlpl.errors import MlplError, RankMismatchError

T = TypeVar("T")

HEAD_BYTES: Final = 24  # of a message between two ranks, before its rows
SHORT_BYTES: Final = 232  # of rows that any message may carry: indices, mostly

_FAULT: Final = -1  # rows of a rank that cannot send any
_sent: Counter[str] = Counter()


class Room(NamedTuple):
    """Rows for which a message leaves room, by rank. Both ends of a message know it, from an earlier exchange say."""

    to_ranks: list[int]
    from_ranks: list[int]


def traffic() -> dict[str, int]:
    """Bytes of tensors that this rank has sent to other ranks since the process began, by verb.

    An exchange counts the messages that leave this rank; a reduction what a ring moves, 2 (R - 1) / R of the tensor
    from each rank; a gather R - 1 times the padded rows; a broadcast (R - 1) / R of the tensor, as if all ranks had
    passed it on alike. Pickled objects are not counted.
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


def exchange(
    rows: Tensor, counts: list[int], *, expected: Room | None = None, error: MlplError | None = None
) -> tuple[Tensor, list[int]]:
    """Send each row to one rank and receive the rows meant for this one.

    Calling it again on the received rows with the received counts sends every row back where it came from.

    Each rank sends each rank one message: how many rows there are for it, whether anything is wrong, and as many bytes
    of the rows as there is room for. What finds no room follows at once.

    Collective: all ranks, one uneven all-to-all of HEAD_BYTES and the room; another of what is left, if anything is.

    Args:
        rows: (n, ...) ordered by destination; n is free, the other dimensions and the type equal on every rank.
        counts: R numbers; the first counts[0] rows go to rank 0, the next counts[1] to rank 1, and so on. Sum is n.
        expected: room in rows; more or fewer may be sent. None: room of SHORT_BYTES to and from every rank.
        error: what this rank found wrong before it could send anything; all ranks raise it in place of moving rows.
            With `expected`, rows must have the right type and shape even so, but there may be none.

    Returns:
        The received rows in order of source rank, and how many came from each rank.

    Raises:
        RankMismatchError: counts that do not cut the rows into one part a rank, or rows whose shape or type differs
            between ranks; on all ranks.
        MlplError: `error` of the lowest rank that handed one in, on all ranks.
    """
    error = error or _counts_error(rows, counts)
    size = world_size()
    if size == 1:
        if error is not None:
            raise error
        return rows, counts
    if error is not None:  # every rank sees it, and none waits for rows that will not come
        rows, counts = rows[:0], [_FAULT] * size
    width = math.prod(rows.shape[1:]) * rows.element_size()
    if expected is None:
        to_ranks = from_ranks = [SHORT_BYTES] * size
    else:
        to_ranks, from_ranks = ([count * width for count in room] for room in expected)
    kind = zlib.crc32(f"{rows.dtype} {tuple(rows.shape[1:])}".encode())

    lengths = [max(0, count) * width for count in counts]
    fits = [min(length, room) for length, room in zip(lengths, to_ranks, strict=True)]
    num_left = sum(lengths) - sum(fits)
    heads = torch.tensor([[count, kind, num_left] for count in counts], dtype=torch.int64, device=rows.device)  # (R, 3)
    parts = rows.reshape(-1).view(torch.uint8).split(lengths)
    padding = parts[0].new_zeros(max(to_ranks) if fits != to_ranks else 0)
    message = []
    for head, part, fit, room in zip(heads.view(torch.uint8).unbind(), parts, fits, to_ranks, strict=True):
        message += [head, part[:fit] if num_left else part]
        if fit < room:
            message.append(padding[: room - fit])
    arrived = _all_to_all(torch.cat(message), [HEAD_BYTES + room for room in to_ranks],
                          [HEAD_BYTES + room for room in from_ranks])  # fmt: skip

    pieces = arrived.split([piece for room in from_ranks for piece in (HEAD_BYTES, room)])
    told: list[list[int]] = torch.cat(pieces[::2]).view(torch.int64).view(size, 3).tolist()
    if any(count == _FAULT for count, _, _ in told):
        raise next(fault for fault in gather_objects(error) if fault is not None)
    if any(other != kind for _, other, _ in told):
        kinds = gather_objects(f"{rows.dtype} {tuple(rows.shape[1:])}")
        raise _exchange_error(f"rows of {', '.join(kinds)}", expected="rows of one type and shape on every rank")
    num_received = [count for count, _, _ in told]
    found = [piece[: count * width] for piece, count in zip(pieces[1::2], num_received, strict=True)]
    if any(num_left for _, _, num_left in told):
        rest = torch.cat([part[fit:] for part, fit in zip(parts, fits, strict=True)])
        to_ranks = [length - fit for length, fit in zip(lengths, fits, strict=True)]
        from_ranks = [count * width - len(part) for count, part in zip(num_received, found, strict=True)]
        late = _all_to_all(rest, to_ranks, from_ranks).split(from_ranks)
        found = [piece for both in zip(found, late, strict=True) for piece in both]
    return torch.cat(found).view(rows.dtype).view(sum(num_received), *rows.shape[1:]), num_received


def _all_to_all(content: Tensor, to_ranks: list[int], from_ranks: list[int]) -> Tensor:
    """Bytes for each rank, and bytes from each rank."""
    _sent["exchange"] += sum(to_ranks) - to_ranks[rank()]
    arrived = content.new_empty(sum(from_ranks))
    dist.all_to_all_single(arrived, content, from_ranks, to_ranks)
    return arrived


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
