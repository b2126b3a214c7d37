"""Owns small tables that every rank holds whole although one rank makes each row: only rows that changed move."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.banks.rows import Kind, as_bytes, from_bytes


class Replica:
    """Columns of rows made by their owners, zeros until they are.

    Args:
        num_rows: of the table.
        kinds: type and shape of a row, by column.
    """

    def __init__(self, num_rows: int, kinds: list[Kind]) -> None:
        self._kinds = kinds
        self._num_rows = num_rows
        self._columns: list[Tensor] | None = None
        self._changed = torch.zeros(num_rows, dtype=torch.bool)

    def mark(self, index: Tensor) -> None:
        """Rows of this rank that others must hear of; (n,) int64."""
        self._changed[index] = True

    @property
    def marked(self) -> Tensor:
        """(n,) int64, the rows to send at the next `share`."""
        return self._changed.nonzero().squeeze(1)

    def share(self, rows: list[Tensor]) -> list[Tensor]:
        """Send the marked rows to everybody.

        Args:
            rows: (n, *shape) by column, of the `marked` rows in their order.

        Returns:
            (num_rows, *shape) by column: the table itself, which the next call changes.

        Collective: all ranks; 8 bytes a rank, then one all-gather of the rows and their 8-byte numbers, padded to the
        rank with most.
        """
        if self._columns is None:
            self._columns = [torch.zeros(self._num_rows, *shape, dtype=dtype) for dtype, shape in self._kinds]
        gathered = comm.gather_rows(as_bytes([self.marked, *rows]))
        index, *values = from_bytes(gathered, [(torch.int64, ()), *self._kinds])
        for column, value in zip(self._columns, values, strict=True):
            column[index] = value
        self._changed.fill_(False)
        return self._columns
