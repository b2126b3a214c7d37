"""Owns banks with one row a sample: a sample's own memory, addressed by its index in the manifest's split."""

from __future__ import annotations

from typing import ClassVar

from dist_mlpl.banks.base import WritableBank
from dist_mlpl.banks.held import Column, Dtype


class KeyedBank(WritableBank):
    """Columns `rows` (n, *shape) and `stamps` (n,) int32, which is -1 where a row was never written.

    A stamp is the writer's own: number of visits, epoch, or 1. Rows hold zeros until they are written. Of u8 rows every
    value is kept as it is.

    Args:
        name: of the bank.
        num_samples: N of the train split.
        shape: of one row.
        dtype: `f32`, `f16` or `u8`.
        folder: see `Bank`.
    """

    is_by_sample: ClassVar[bool] = True

    def __init__(
        self, name: str, num_samples: int, shape: tuple[int, ...], dtype: Dtype, *, folder: str | None = None
    ) -> None:
        columns = {"rows": Column(dtype=dtype, shape=shape), "stamps": Column(dtype="i32", fill=-1)}
        super().__init__(name, num_samples, columns, folder=folder)
