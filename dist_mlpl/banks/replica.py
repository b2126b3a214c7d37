"""Owns small tables that every rank holds whole although one rank makes each row: only rows that changed move."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.banks.rows import Kind, as_bytes, from_bytes
from dist_mlpl.errors import MlplError


class Replica:
    """Columns of rows made by their owners, zeros until they are.

    Args:
        num_rows: of the table.
        kinds: type and shape of a row, by column.
    """

    def __init__(self, num_rows: int, kinds: list[Kind]) -> None:
        self._kinds: list[Kind] = [(torch.int64, ()), *kinds]  # a row travels with its number
        self._num_rows = num_rows
        self._columns: list[Tensor] | None = None

    @property
    def columns(self) -> list[Tensor]:
        """(num_rows, *shape) each: the table itself, which `share` changes."""
        if self._columns is None:
            self._columns = [torch.zeros(self._num_rows, *shape, dtype=dtype) for dtype, shape in self._kinds[1:]]
        return self._columns

    def share(
        self,
        index: Tensor,
        rows: list[Tensor],
        *,
        notes: Tensor | None = None,
        expected: list[int] | None = None,
        error: MlplError | None = None,
    ) -> Tensor:
        """Send rows to everybody, and with them a note to each rank.

        Args:
            index: (n,) int64, rows that no other rank sends.
            rows: (n, *shape) by column.
            notes: (R, bytes) uint8, a note for each rank, of equal length on all ranks; None: empty ones.
            expected: so many rows each rank is expected to send, the same list on every rank; None: none.
            error: raised on all ranks in place of sending anything.

        Returns:
            (R, bytes) uint8, the note from each rank.

        Collective: all ranks, one `comm.exchange` with room for notes and expected rows.
        """
        size = comm.world_size()
        notes = torch.empty(size, 0, dtype=torch.uint8) if notes is None else notes
        content = as_bytes([index, *rows])  # (n, bytes of a row)
        num_noted, width = notes.shape[1], content.shape[1]
        message = torch.cat([part for note in notes for part in (note, content.view(-1))])
        room = [num_noted + count * width for count in expected or [0] * size]
        arrived, sizes = comm.exchange(
            message, [num_noted + content.numel()] * size,
            expected=comm.Room([room[comm.rank()]] * size, room), error=error,
        )  # fmt: skip
        parts = arrived.split([length for each in sizes for length in (num_noted, each - num_noted)])
        changed, *values = from_bytes(torch.cat(parts[1::2]).view(-1, width), self._kinds)
        for column, value in zip(self.columns, values, strict=True):
            column.numpy()[changed.numpy()] = value.numpy()
        return torch.stack(parts[::2])
