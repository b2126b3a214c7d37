"""Owns the forms in which rows of several tensors travel between ranks: rows of bytes, or NumPy records."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.errors import MlplError

NUMBER_BYTES: Final = 8  # bytes of an integer in a message

Kind = tuple[torch.dtype, tuple[int, ...]]  # type and shape of one row's part
Records = npt.NDArray[np.void]  # (n,) rows with a field for each part
Integers = npt.NDArray[np.int64]
Span = tuple[int, int]  # first row, and the one after the last


def as_bytes(parts: Sequence[Tensor]) -> Tensor:
    """Join tensors side by side as rows of bytes.

    Args:
        parts: (n, *shape) each, at least one.

    Returns:
        (n, bytes of a row) uint8.
    """
    flat = [part.reshape(len(part), math.prod(part.shape[1:])).contiguous().view(torch.uint8) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


def from_bytes(rows: Tensor, kinds: Sequence[Kind]) -> list[Tensor]:
    """Take apart what `as_bytes` joined.

    Args:
        rows: (n, bytes of a row) uint8, on the CPU.
        kinds: type and shape of each part, in order.

    Returns:
        A tensor (n, *shape) for each part, copied.
    """
    parts, start, given = [], 0, rows.numpy()
    for dtype, shape in kinds:
        stop = start + math.prod(shape) * dtype.itemsize
        # Copied: bytes can be viewed as another type only from an aligned address.
        part = torch.empty(len(rows), stop - start, dtype=torch.uint8)
        part.numpy()[:] = given[:, start:stop]
        parts.append(part.view(dtype).view(len(rows), *shape))
        start = stop
    return parts


def kind_of(rows: Tensor) -> Kind:
    """The type and shape of one row of a tensor (n, *shape)."""
    return rows.dtype, tuple(rows.shape[1:])


def record_type(kinds: Mapping[str, Kind]) -> np.dtype[np.void]:
    """The NumPy type of rows with one field per part, unpadded; NumPy reads and writes fields at any address."""
    return np.dtype([(name, numpy_type(dtype), shape) for name, (dtype, shape) in kinds.items()])


@functools.cache
def numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
    """The NumPy dtype equal to a torch dtype."""
    return torch.empty(0, dtype=dtype).numpy().dtype


class ByOwner(NamedTuple):
    """Rows in the order of the ranks that own them."""

    order: Integers  # (n,) row indices sorted by owner
    counts: list[int]  # R, rows of each rank

    @property
    def spans(self) -> list[Span]:
        """The span of each rank's rows in this order."""
        return list(pairwise(accumulate(self.counts, initial=0)))

    def places(self) -> Integers:
        """(n,) each row's place in this order: scattering rows to it saves the extra copy that gathering makes."""
        places = np.empty_like(self.order)
        places[self.order] = np.arange(len(self.order))
        return places


def by_owner(owners: Integers, num_ranks: int) -> ByOwner:
    """Sort rows by the ranks (n,) that own them; rows of one rank stay in the order given."""
    return ByOwner(owners.argsort(kind="stable"), np.bincount(owners, minlength=num_ranks).tolist())


def no_room(num_ranks: int) -> comm.Room:
    """No reserved space: for messages whose size neither side knows in advance."""
    return comm.Room([0] * num_ranks, [0] * num_ranks)


class Section(NamedTuple):
    """A message's section of records, or numbers, of one type, with a span for each rank."""

    records: npt.NDArray[Any]  # (n,)
    spans: Sequence[Span]  # R, the records sent to each rank
    room: comm.Room | None = None  # reserved space, in records; None: SHORT_BYTES to and from each rank

    def num_bytes(self, numbers: Sequence[int]) -> list[int]:
        """Bytes of each of these numbers of records."""
        return [number * self.records.itemsize for number in numbers]

    def room_bytes(self) -> tuple[list[int], list[int]]:
        """Bytes of room for this section in the message to each rank and from each rank."""
        if self.room is None:
            return ([comm.SHORT_BYTES] * len(self.spans),) * 2
        return self.num_bytes(self.room.to_ranks), self.num_bytes(self.room.from_ranks)


def exchange_records(
    sections: Sequence[Section], *, name: str, notes: comm.Bytes | None = None, error: MlplError | None = None
) -> tuple[list[comm.Bytes], list[list[npt.NDArray[Any]]]]:
    """Send to each rank, in one message, a note and a span of the records of each section.

    A message is the note, the number of records of each section but the last, and the records, without padding.

    Collective: all ranks, one `comm.exchange_messages`.

    Args:
        sections: at least one, of the same types on all ranks.
        name: the bank's name, which must agree on all ranks.
        notes: (R, bytes) uint8, of equal length on all ranks; None: empty notes.
        error: raised on all ranks instead of sending anything.

    Returns:
        R notes (bytes,), and for each section R arrays (n_r,) of records, as they arrived. The memory is the caller's;
        it is aligned only if the lengths of notes and records are multiples of 8 bytes.
    """
    num_noted = 0 if notes is None else notes.shape[1]
    begin = num_noted + NUMBER_BYTES * (len(sections) - 1)  # where the first section begins
    counts = [[stop - first for first, stop in section.spans] for section in sections]
    contents = [section.records.view(np.uint8) for section in sections]

    def fill(rank: int, message: comm.Bytes) -> None:
        if notes is not None:
            message[:num_noted] = notes[rank]
        message[num_noted:begin].view(np.int64)[:] = [numbers[rank] for numbers in counts[:-1]]
        start = begin
        for section, content in zip(sections, contents, strict=True):
            first, stop = (row * section.records.itemsize for row in section.spans[rank])
            message[start : start + stop - first] = content[first:stop]
            start += stop - first

    def added(parts: Iterable[Sequence[int]]) -> list[int]:
        return [begin + sum(of_rank) for of_rank in zip(*parts, strict=True)]

    lengths = added(section.num_bytes(numbers) for section, numbers in zip(sections, counts, strict=True))
    to_ranks, from_ranks = (added(side) for side in zip(*(section.room_bytes() for section in sections), strict=True))
    arrived = comm.exchange_messages(lengths, fill, kind=name, expected=comm.Room(to_ranks, from_ranks), error=error)
    found: list[list[npt.NDArray[Any]]] = [[] for _ in sections]
    for message in arrived:
        start = begin
        numbers = message[num_noted:begin].view(np.int64).tolist()
        for parts, section, number in zip(found, sections, [*numbers, None], strict=True):
            stop = None if number is None else start + number * section.records.itemsize
            parts.append(message[start:stop].view(section.records.dtype))
            start = stop or 0  # start of the next section; only the last has no number
    return [message[:num_noted] for message in arrived], found
