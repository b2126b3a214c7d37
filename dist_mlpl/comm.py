"""Owns communication between ranks after start-up; with one rank no function sends anything.

A tensor is sent from the device that it is on, so the caller chooses NCCL or gloo by where its tensor is.
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

from dist_mlpl.errors import MlplError, RankMismatchError, RunError

T = TypeVar("T")
Bytes = npt.NDArray[np.uint8]

HEAD_BYTES: Final = 24  # bytes of the header of a message between two ranks
SHORT_BYTES: Final = 232  # default room for rows in a message, enough for a few indices

_FAULT: Final = -1  # the row count in the header of a rank that has an error
_CPU: Final = torch.device("cpu")
_sent: Counter[str] = Counter()


class Room(NamedTuple):
    """Space reserved for rows in the messages to and from each rank, in rows (for `exchange_messages`, bytes).

    Both ends of a message must know it and agree, for example from an earlier exchange.
    """

    to_ranks: list[int]
    from_ranks: list[int]


def traffic() -> dict[str, int]:
    """Bytes of tensors that this rank has sent to other ranks since the process began, by kind of collective.

    `exchange` counts the messages that leave this rank; `reduce` what a ring moves, 2 (R - 1) / R of the tensor from
    each rank; `gather` R - 1 times the padded rows and 8 bytes; `broadcast` (R - 1) / R of the tensor, as if all ranks
    forwarded it equally. Pickled objects are not counted.
    """
    return dict(_sent)


def world_size() -> int:
    """Number of ranks in the process group, 1 when there is none."""
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
    """Every rank's picklable value, in rank order, on rank 0; an empty list elsewhere.

    Collective: all ranks, one gather of pickles.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, in rank order, on every rank; their numbers may differ.

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
    """The picklable value of rank `source`, on every rank.

    Collective: all ranks, one broadcast of a pickle.
    """
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def on_first_rank(make: Callable[[], T]) -> T:
    """Call a function on rank 0 and give its result, or its error, to all ranks: none waits for a rank that failed.

    Collective: all ranks, one broadcast of a pickle.

    Args:
        make: called on rank 0 only; it must return something picklable and contain no collective.

    Raises:
        MlplError: the one that `make` raised on rank 0, on all ranks.
        Exception: any other error of `make`, on rank 0; the other ranks raise RunError.
    """
    made: T | MlplError | None = None
    fault: Exception | None = None
    if rank() == 0:
        try:
            made = make()
        except Exception as error:
            fault, made = error, _told(error)
    made = broadcast_object(made)
    if fault is not None:
        raise fault
    if isinstance(made, MlplError):
        raise made
    return cast(T, made)


@contextmanager
def shared_errors() -> Iterator[None]:
    """Raise on all ranks what any rank raises in the block, which has no collective: none waits for a failed rank.

    Collective: all ranks, one gather of pickles at the end of the block.

    Raises:
        MlplError: the one of the lowest rank that raised one, on all ranks.
        Exception: any other error, on the rank that raised it; the other ranks raise RunError.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
    if fault is not None and not isinstance(fault, MlplError):
        gather_objects(_told(fault))
        raise fault
    raise_first(fault)


def _told(error: Exception) -> MlplError:
    """What other ranks hear of an error: itself, or, if it is a fault of the program, its text."""
    if isinstance(error, MlplError):
        return error
    return RunError(
        f"{type(error).__name__}: {error}",
        expected="no fault of the program",
        where=f"rank {rank()} of {world_size()}",
        next_step="the log of that rank has the traceback: keep it and report it",
    )


def raise_first(error: MlplError | None) -> None:
    """Raise, on all ranks, the error of the lowest rank that has one; return if none has.

    Collective: all ranks, one gather of pickles.

    Args:
        error: this rank's.

    Raises:
        MlplError: the one of the lowest rank that passed one, on all ranks.
    """
    for error_of_rank in gather_objects(error):
        if error_of_rank is not None:
            raise error_of_rank


def is_stop_asked(is_asked: bool, failure: MlplError | None) -> bool:
    """True if any rank was asked to stop; the same on every rank, so that all leave a loop in the same iteration.

    Collective: all ranks, one all-reduce of 4 bytes; a gather of pickles too when a rank has failed.

    Args:
        is_asked: True if this rank was asked.
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

    Calling it again on the received rows with the received counts sends every row back to where it came from.

    Each rank sends each rank one message: how many rows there are for it, whether anything is wrong, and as many bytes
    of the rows as there is room for. Bytes that find no room follow in a second message.

    Collective: all ranks, one uneven all-to-all of HEAD_BYTES and the room; a second one of the bytes left, if any.

    Args:
        rows: (n, ...) ordered by destination; n is free, the other dimensions and the type equal on every rank.
        counts: R numbers; the first counts[0] rows go to rank 0, the next counts[1] to rank 1, and so on. Sum is n.
        expected: room in rows; more or fewer may be sent. None: room of SHORT_BYTES to and from every rank.
        error: what this rank found wrong before it could send anything; all ranks raise it instead of moving rows.
            With `expected`, `rows` must have the right type and shape even then, but may be empty.

    Returns:
        The received rows in order of source rank, and how many came from each rank. With one rank, `rows` itself.

    Raises:
        RankMismatchError: counts that do not split the rows into one part per rank, or rows whose shape or type differs
            between ranks; on all ranks.
        MlplError: `error` of the lowest rank that passed one, on all ranks.
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
    """Exchange bytes like `exchange`, written straight into the send buffer and returned as views of what arrived.

    Bytes are copied only where they exceed the room.

    Collective: all ranks, see `exchange`.

    Args:
        lengths: R numbers, bytes for each rank, this one included.
        fill: called with a rank and a buffer (lengths[rank],) uint8, which it fills; with several ranks it is not
            called where the length is 0.
        kind: name of what the messages hold, the same on every rank.
        expected: room in bytes, see `exchange`.
        error: see `exchange`; `fill` is not called then.

    Returns:
        R arrays (bytes,) uint8, one from each rank, in memory that is the caller's; they may begin at any address.

    Raises:
        RankMismatchError: `kind` differs between ranks; on all ranks.
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
    """Exchange rows of `width` bytes between two or more ranks; see `exchange` and `exchange_messages`.

    Returns:
        The bytes from each rank, and how many rows each sent.
    """
    size = world_size() if error is not None else len(counts)
    if error is not None:  # told to every rank, so that none waits for rows that will not come
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
    """Send `to_ranks` bytes of `content` to each rank; return the `from_ranks` bytes of each, see `_sliceable`."""
    _sent["exchange"] += sum(to_ranks) - to_ranks[rank()]
    arrived = content.new_empty(sum(from_ranks))
    dist.all_to_all_single(arrived, content, from_ranks, to_ranks)
    return _sliceable(arrived)


def _read_heads(heads: list[Any]) -> list[list[int]]:
    """Read R headers: a rank's number of rows, the code of their kind, and its bytes for all ranks that follow."""
    if isinstance(heads[0], Tensor):
        return torch.cat(heads).view(torch.int64).view(-1, 3).tolist()  # once from the device
    return [head.view(np.int64).tolist() for head in heads]


def _sliceable(content: Tensor) -> Any:
    """A NumPy view of a CPU tensor, ten times cheaper to slice; on another device the tensor itself."""
    return content.numpy() if content.device.type == "cpu" else content


def _joined(parts: list[Any]) -> Tensor:
    """Concatenate slices into a new tensor."""
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
    """Copy rank `source`'s values to every rank, in place; returns the same tensor.

    Collective: all ranks, one broadcast of the tensor's bytes.
    """
    if world_size() > 1:
        _sent["broadcast"] += (world_size() - 1) * tensor.nbytes // world_size()
        dist.broadcast(tensor, src=source)
    return tensor
