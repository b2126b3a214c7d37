"""Owns small tables that every rank holds whole: one row per class, or a single row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_mlpl.banks.base import WritableBank
from dist_mlpl.banks.held import Column


class TableBank(WritableBank):
    """A replicated bank, read and written whole.

    What is written must be the same on every rank: made from reduced numbers, in an order independent of ranks.

    Args:
        name: the bank's name.
        num_rows: C, or 1.
        columns: by name.
    """

    def __init__(self, name: str, num_rows: int, columns: Mapping[str, Column]) -> None:
        super().__init__(name, num_rows, columns, is_replicated=True)

    def read_all(self) -> dict[str, Tensor]:
        """Copies of all rows, (num_rows, *shape) by column name."""
        return self.read(self._all)

    def write_all(self, values: Mapping[str, Tensor]) -> None:
        """Replace every row.

        Raises:
            BankError: see `WritableBank.write`.
        """
        self.write(self._all, values)

    @property
    def _all(self) -> Tensor:
        return torch.arange(self.spec.num_rows)
