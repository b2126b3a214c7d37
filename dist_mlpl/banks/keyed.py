"""Owns banks with one row per sample, addressed by the sample's index in the manifest's split."""

from __future__ import annotations

from typing import ClassVar

from dist_mlpl.banks.base import WritableBank
from dist_mlpl.banks.held import Column, Dtype


class KeyedBank(WritableBank):
    """A bank with columns `rows` (N, *shape) and `stamps` (N,) int32; a stamp is -1 until its row is written.

    The writer chooses what a stamp means: number of visits, epoch, or simply 1. Rows are zeros until they are written.
    u8 rows are stored without conversion.

    Args:
        name: the bank's name.
        num_samples: N of the train split.
        shape: the shape of one row.
        dtype: `f32`, `f16` or `u8`.
        folder: see `HeldRows`.
    """

    is_by_sample: ClassVar[bool] = True

    def __init__(
        self, name: str, num_samples: int, shape: tuple[int, ...], dtype: Dtype, *, folder: str | None = None
    ) -> None:
        columns = {"rows": Column(dtype=dtype, shape=shape), "stamps": Column(dtype="i32", fill=-1)}
        super().__init__(name, num_samples, columns, folder=folder)
