"""Owns small tables that every rank holds whole, though each row is made by one rank: only changed rows move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.banks.rows import Integers, Kind, Records, Section, exchange_records, no_room, record_type


class Replica:
    """A table held whole by every rank; a row is zeros until its owner shares it.

    Args:
        num_rows: rows of the table.
        kinds: type and shape of a row's part, by column.
        name: the name of the bank whose table it is, for messages.
    """

    def __init__(self, num_rows: int, kinds: Mapping[str, Kind], *, name: str) -> None:
        self._num_rows, self._kinds, self._name = num_rows, dict(kinds), name
        self._rank, self._num_ranks = comm.rank(), comm.world_size()
        self._record = np.dtype([("index", np.int64), ("values", record_type(kinds))])
        self._columns: list[Tensor] | None = None
        self._copies: tuple[torch.device, list[Tensor]] | None = None  # on another device
        self._is_newer = np.zeros(num_rows, dtype=np.bool_)  # rows that changed since `_copies` were made

    @property
    def columns(self) -> list[Tensor]:
        """The columns, (num_rows, *shape) each, on the CPU: the table itself, which `take` changes."""
        if self._columns is None:
            self._columns = [torch.zeros(self._num_rows, *shape, dtype=dtype) for dtype, shape in self._kinds.values()]
        return self._columns

    def on(self, device: torch.device) -> list[Tensor]:
        """The columns on a device: the table itself on the CPU, elsewhere a copy, to which only changed rows move.

        Args:
            device: the same at every call.

        Returns:
            The columns, (num_rows, *shape) each; the next call changes a copy in place.
        """
        if device == self.columns[0].device:
            return self.columns
        if self._copies is None or self._copies[0] != device:
            self._copies = device, [column.to(device, copy=True) for column in self.columns]
        elif self._is_newer.any():
            rows = torch.from_numpy(np.flatnonzero(self._is_newer))
            for copy, column in zip(self._copies[1], self.columns, strict=True):
                copy.index_copy_(0, rows.to(device), column[rows].to(device))
        self._is_newer[:] = False
        return self._copies[1]

    def clear(self) -> None:
        """Set all rows to zeros."""
        for column in self.columns:
            column.zero_()
        self._is_newer[:] = True

    def records(self, index: Integers) -> tuple[Records, Mapping[str, npt.NDArray[Any]]]:
        """Make records for rows `index` (n,), to be filled and shared.

        Returns:
            The records (n,), and views (n, *shape) of their values by column, for the caller to fill.
        """
        records = np.empty(len(index), dtype=self._record)
        records["index"] = index
        return records, {name: records["values"][name] for name in self._kinds}

    def section(self, records: Records, *, expected: list[int] | None = None) -> Section:
        """Make a message section that sends the same rows to every rank; `take` stores what arrives from each.

        Args:
            records: from `records`, filled; rows that no other rank sends.
            expected: how many rows each rank is expected to send, the same list on every rank; None: 0 from each.
        """
        size = self._num_ranks
        room = no_room(size) if expected is None else comm.Room([expected[self._rank]] * size, expected)
        return Section(records, [(0, len(records))] * size, room)

    def take(self, parts: Sequence[Records]) -> None:
        """Store the rows that arrived from each rank."""
        for part in parts:
            self._is_newer[part["index"]] = True
        for name, column in zip(self._kinds, self.columns, strict=True):
            table = column.numpy()
            for part in parts:
                table[part["index"]] = part["values"][name]

    def share(self, records: Records) -> None:
        """Send rows to all ranks, this one included, which store them.

        Args:
            records: from `records`, filled; rows that no other rank sends.

        Collective: all ranks, one `comm.exchange_messages` without room for rows, which so follow in a second message.
        """
        _, (parts,) = exchange_records([self.section(records)], name=self._name)
        self.take(parts)
