"""Owns communication between ranks after start-up: each verb is the identity on one rank.

Tensors are moved on the device they live on, so the caller chooses NCCL or gloo by where its tensor is.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from dist_mlpl.errors import MlplError, RankMismatchError

T = TypeVar("T")
Bytes = npt.NDArray[np.uint8]

HEAD_BYTES: Final = 24  # of a message between two ranks, before its rows
SHORT_BYTES: Final = 232  # of rows that any message may carry: indices, mostly

_FAULT: Final = -1  # rows of a rank that cannot send any
_CPU: Final = torch.device("cpu")
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


def gather_on_first_rank(value: T) -> list[T]:
    """Every rank's picklable value, in rank order, on rank 0; nothing elsewhere.

    Collective: all ranks, one gather of pickles.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


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


def on_first_rank(make: Callable[[], T]) -> T:
    """What rank 0 makes, or the error that stopped it, on all ranks: none waits for a rank that gave up.

    Collective: all ranks, one broadcast of a pickle.

    Args:
        make: is called on rank 0 alone; what it returns is picklable, and it has no collective in it.

    Raises:
        MlplError: rank 0's, on all ranks.
    """
    made: T | MlplError | None = None
    if rank() == 0:
        try:
            made = make()
        except MlplError as error:
            made = error
    made = broadcast_object(made)
    if isinstance(made, MlplError):
        raise made
    return cast(T, made)


@contextmanager
def shared_errors() -> Iterator[None]:
    """What one rank raises in a block without a collective, on all ranks: none waits for a rank that gave up.

    Collective: all ranks, one gather of pickles at the end of the block.

    Raises:
        MlplError: of the lowest rank that raised one, on all ranks.
    """
    own: MlplError | None = None
    try:
        yield
    except MlplError as error:
        own = error
    raise_first(own)


def raise_first(error: MlplError | None) -> None:
    """Raise, on all ranks, the error of the lowest rank that has one; return if none has.

    Collective: all ranks, one gather of pickles.

    Args:
        error: this rank's.

    Raises:
        MlplError: of the lowest rank that handed one in.
    """
    for error_of_rank in gather_objects(error):
        if error_of_rank is not None:
            raise error_of_rank


def is_stop_asked(is_asked: bool, failure: MlplError | None) -> bool:
    """Whether any rank was asked to stop; the same on every rank, so that all leave a loop in the same turn.

    Collective: all ranks, one all-reduce of 4 bytes; a gather of pickles too when a rank has failed.

    Args:
        is_asked: whether this rank was asked.
        failure: what went wrong here since the last call; None if nothing did.

    Raises:
        MlplError: the failure of the lowest rank that has one, on all ranks.
    """
    worst = int(reduce_max(torch.tensor([2 if failure is not None else int(is_asked)], dtype=torch.int32)))
    if worst == 2:
        raise_first(failure)
    return worst == 1


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
    if world_size() == 1:
        if error is not None:
            raise error
        return rows, counts
    width = math.prod(rows.shape[1:]) * rows.element_size()
    stops = [0] if error is not None else list(accumulate(counts, initial=0))
    flat = _sliceable(rows.reshape(-1).view(torch.uint8))

    def fill(destination: int, message: Any) -> None:
        message[:] = flat[stops[destination] * width : stops[destination + 1] * width]

    kind = f"{rows.dtype} {tuple(rows.shape[1:])}"
    found, num_received = _exchange(counts, width, fill, kind, expected, error, rows.device)
    return _joined(found).view(rows.dtype).view(sum(num_received), *rows.shape[1:]), num_received


def exchange_messages(
    lengths: list[int],
    fill: Callable[[int, Bytes], None],
    *,
    kind: str,
    expected: Room | None = None,
    error: MlplError | None = None,
) -> list[Bytes]:
    """As `exchange`, of bytes that are written where they leave from and read where they arrived: nothing is copied.

    Collective: all ranks, see `exchange`.

    Args:
        lengths: R numbers, bytes for each rank, this one included.
        fill: is called with a rank and (lengths[rank],) uint8, which it writes; ranks with nothing are left out.
        kind: what the messages hold, the same on every rank.
        expected: room in bytes, see `exchange`.
        error: see `exchange`; `fill` is not called then.

    Returns:
        R arrays (bytes,) uint8, from each rank, in memory that is the caller's; they may begin at any address.

    Raises:
        RankMismatchError: another kind on another rank; on all ranks.
        MlplError: see `exchange`.
    """
    if len(lengths) == 1:
        if error is not None:
            raise error
        message = np.empty(lengths[0], dtype=np.uint8)
        fill(0, message)
        return [message]
    return _exchange(lengths, 1, fill, kind, expected, error, _CPU)[0]


def _exchange(
    counts: list[int],
    width: int,
    fill: Callable[[int, Any], None],
    kind: str,
    expected: Room | None,
    error: MlplError | None,
    device: torch.device,
) -> tuple[list[Any], list[int]]:
    """Rows of `width` bytes from each rank, as slices of bytes, and how many they are. More than one rank."""
    size = world_size() if error is not None else len(counts)
    if error is not None:  # every rank sees it, and none waits for rows that will not come
        counts = [_FAULT] * size
    if expected is None:
        to_ranks = from_ranks = [SHORT_BYTES] * size
    else:
        to_ranks, from_ranks = ([count * width for count in room] for room in expected)
    lengths = [max(0, count) * width for count in counts]
    num_left = sum(max(0, length - room) for length, room in zip(lengths, to_ranks, strict=True))
    code = _code(kind)
    heads: Any = np.array([(count, code, num_left) for count in counts]).view(np.uint8)  # (R, HEAD_BYTES)
    if device != _CPU:
        heads = torch.from_numpy(heads).to(device)
    message = torch.empty(size * HEAD_BYTES + sum(to_ranks), dtype=torch.uint8, device=device)
    content, left = _sliceable(message), []
    start = 0
    for destination, (length, room) in enumerate(zip(lengths, to_ranks, strict=True)):
        content[start : start + HEAD_BYTES] = heads[destination]
        start += HEAD_BYTES
        if length > room:
            whole = _sliceable(message.new_empty(length))
            fill(destination, whole)
            content[start : start + room] = whole[:room]
            left.append(whole[room:])
        elif length:
            fill(destination, content[start : start + length])
        start += room
    arrived = _all_to_all(message, [HEAD_BYTES + room for room in to_ranks],
                          [HEAD_BYTES + room for room in from_ranks])  # fmt: skip

    starts = list(accumulate((HEAD_BYTES + room for room in from_ranks), initial=0))[:-1]
    told = _read_heads([arrived[start : start + HEAD_BYTES] for start in starts])
    num_received, codes, nums_left = zip(*told, strict=True)
    if _FAULT in num_received:
        raise_first(error)
    if codes.count(code) < size:
        kinds = gather_objects(kind)
        raise _exchange_error(f"rows of {', '.join(kinds)}", expected="rows of one type and shape on every rank")
    ends = [start + HEAD_BYTES + min(count * width, room)
            for start, count, room in zip(starts, num_received, from_ranks, strict=True)]  # fmt: skip
    found = [arrived[start + HEAD_BYTES : end] for start, end in zip(starts, ends, strict=True)]
    if any(nums_left):
        to_ranks = [max(0, length - room) for length, room in zip(lengths, to_ranks, strict=True)]
        from_ranks = [max(0, count * width - room) for count, room in zip(num_received, from_ranks, strict=True)]
        late = _all_to_all(_joined(left) if left else message[:0], to_ranks, from_ranks)
        stops = list(accumulate(from_ranks, initial=0))
        found = [
            _sliceable(_joined([part, late[start:stop]])) if stop > start else part
            for part, (start, stop) in zip(found, pairwise(stops), strict=True)
        ]
    return found, list(num_received)


def _all_to_all(content: Tensor, to_ranks: list[int], from_ranks: list[int]) -> Any:
    """Bytes for each rank, and bytes from each rank, to be sliced."""
    _sent["exchange"] += sum(to_ranks) - to_ranks[rank()]
    arrived = content.new_empty(sum(from_ranks))
    dist.all_to_all_single(arrived, content, from_ranks, to_ranks)
    return _sliceable(arrived)


def _read_heads(heads: list[Any]) -> list[list[int]]:
    """R times rows, code of their kind, and bytes for all ranks that are left."""
    if isinstance(heads[0], Tensor):
        return torch.cat(heads).view(torch.int64).view(-1, 3).tolist()  # once from the device
    return [head.view(np.int64).tolist() for head in heads]


def _sliceable(content: Tensor) -> Any:
    """What slices are taken of: on the CPU an array, of which that costs a tenth; the tensor itself elsewhere."""
    return content.numpy() if content.device.type == "cpu" else content


def _joined(parts: list[Any]) -> Tensor:
    """Slices one after the other, in memory of their own."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    joined = torch.empty(sum(map(len, parts)), dtype=torch.uint8)
    np.concatenate(parts, out=joined.numpy())
    return joined


@functools.cache
def _code(kind: str) -> int:
    return zlib.crc32(kind.encode())


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
