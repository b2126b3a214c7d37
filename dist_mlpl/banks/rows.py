"""Owns rows of several tensors as rows of bytes or numpy records, the forms in which they travel between ranks."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.errors import MlplError

Kind = tuple[torch.dtype, tuple[int, ...]]  # type and shape of one row's part
Records = npt.NDArray[np.void]  # (n,) rows whose parts are fields
Integers = npt.NDArray[np.int64]
Span = tuple[int, int]  # first row and the one after the last


def as_bytes(parts: Sequence[Tensor]) -> Tensor:
    """Tensors side by side.

    Args:
        parts: (n, *shape) each, at least one.

    Returns:
        (n, bytes of a row) uint8.
    """
    flat = [part.reshape(len(part), math.prod(part.shape[1:])).contiguous().view(torch.uint8) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


def from_bytes(rows: Tensor, kinds: Sequence[Kind]) -> list[Tensor]:
    """What `as_bytes` joined.

    Args:
        rows: (n, bytes of a row) uint8, on the CPU.
        kinds: of each part, in order.

    Returns:
        (n, *shape) by part, in memory of their own.
    """
    parts, start, given = [], 0, rows.numpy()
    for dtype, shape in kinds:
        stop = start + math.prod(shape) * dtype.itemsize
        # Copied: bytes are seen as another type only from an aligned start.
        part = torch.empty(len(rows), stop - start, dtype=torch.uint8)
        part.numpy()[:] = given[:, start:stop]
        parts.append(part.view(dtype).view(len(rows), *shape))
        start = stop
    return parts


def kind_of(rows: Tensor) -> Kind:
    """Of rows (n, *shape)."""
    return rows.dtype, tuple(rows.shape[1:])


def record_type(kinds: Mapping[str, Kind]) -> np.dtype[np.void]:
    """Of rows with a field for each part, nothing between them. numpy reads and writes fields at any address."""
    return np.dtype([(name, numpy_type(dtype), shape) for name, (dtype, shape) in kinds.items()])


@functools.cache
def numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
    """Of the same numbers."""
    return torch.empty(0, dtype=dtype).numpy().dtype


class ByOwner(NamedTuple):
    """Rows in the order of the ranks that own them."""

    order: Integers  # (n,)
    counts: list[int]  # of rows for each rank

    @property
    def spans(self) -> list[Span]:
        """Of each rank's rows, in this order."""
        return list(pairwise(accumulate(self.counts, initial=0)))

    def places(self) -> Integers:
        """(n,) of each row in this order: writing rows there reads them once, gathering them would copy them twice."""
        places = np.empty_like(self.order)
        places[self.order] = np.arange(len(self.order))
        return places


def by_owner(owners: Integers, num_ranks: int) -> ByOwner:
    """Order of rows that ranks (n,) own; rows of one rank stay in the order given."""
    return ByOwner(owners.argsort(kind="stable"), np.bincount(owners, minlength=num_ranks).tolist())


def exchange_records(
    records: Records,
    spans: Sequence[Span],
    *,
    name: str,
    notes: comm.Bytes | None = None,
    room: comm.Room | None = None,
    error: MlplError | None = None,
) -> tuple[list[comm.Bytes], list[Records]]:
    """Send a span of records to each rank, and with it a note.

    Collective: all ranks, one `comm.exchange_messages`.

    Args:
        records: (n,) of one type on all ranks.
        spans: R, of the records that each rank is sent.
        name: of whose they are, for messages.
        notes: (R, bytes) uint8, of equal length on all ranks; None: empty ones.
        room: in records; None: room for the notes and SHORT_BYTES.
        error: raised on all ranks in place of sending anything.

    Returns:
        R notes (bytes,) and R arrays (n_r,) of records, as they arrived: on any address, in memory of the caller.
    """
    width, num_noted = records.itemsize, 0 if notes is None else notes.shape[1]
    content = records.view(np.uint8)

    def fill(rank: int, message: comm.Bytes) -> None:
        first, stop = spans[rank]
        if notes is not None:
            message[:num_noted] = notes[rank]
        message[num_noted:] = content[first * width : stop * width]

    if room is None:
        expected = comm.Room(*[[num_noted + comm.SHORT_BYTES] * len(spans)] * 2)
    else:
        expected = comm.Room(*([num_noted + count * width for count in counts] for counts in room))
    lengths = [num_noted + (stop - first) * width for first, stop in spans]
    arrived = comm.exchange_messages(lengths, fill, kind=name, expected=expected, error=error)
    told = [message[:num_noted] for message in arrived]
    return told, [message[num_noted:].view(records.dtype) for message in arrived]
