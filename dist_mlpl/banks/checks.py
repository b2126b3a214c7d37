"""Owns the checks of rows and values that a bank is given or asked for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from dist_mlpl.banks.rows import Integers, Kind
from dist_mlpl.errors import BankError


def index_error(index: Integers, *, num_rows: int, where: str) -> BankError | None:
    """The error for row indices (n,) outside [0, num_rows), or None."""
    if not len(index) or (index.min() >= 0 and index.max() < num_rows):
        return None
    is_outside = (index < 0) | (index >= num_rows)
    return BankError(
        f"row {index[is_outside][0]}",
        expected=f"an index in [0, {num_rows}), the rows of the manifest's split or its classes",
        where=where,
        next_step="hand in rows that are `valid` alone; padding has index -1",
    )


def value_error(
    values: Mapping[str, Tensor], kinds: Mapping[str, Kind], *, num_rows: int, where: str
) -> BankError | None:
    """The error for values, already cast, that do not match the columns' kinds or are not finite, or None."""
    found = {name: (value.dtype, tuple(value.shape)) for name, value in values.items()}
    wanted = {name: (dtype, (num_rows, *shape)) for name, (dtype, shape) in kinds.items()}
    if found != wanted:
        return BankError(
            f"values {found}", expected=f"{wanted}", where=where, next_step="hand in every column, one row each"
        )
    for name, value in values.items():
        if value.is_floating_point() and not np.isfinite(value.numpy()).all():
            return BankError(
                f"column {name!r} would hold a number that is not finite",
                expected="finite numbers; nothing was written",
                where=where,
                next_step="lower the learning rate; if the column is f16, keep values below 65,504",
            )
    return None


def feature_error(class_id: Tensor, features: Tensor, position: Tensor, *, width: int, where: str) -> BankError | None:
    """The error for float32 features not (n, width) or not finite, or positions not (n,), of n class ids; or None."""
    n = len(class_id)
    if tuple(features.shape) != (n, width) or tuple(position.shape) != (n,):
        return BankError(
            f"features {tuple(features.shape)} and positions {tuple(position.shape)} for {n} classes",
            expected=f"({n}, {width}) and ({n},)",
            where=where,
            next_step="hand in one feature and one position for each class id",
        )
    if not np.isfinite(features.numpy()).all():
        return BankError(
            "a feature that is not finite",
            expected="finite numbers; nothing was taken in",
            where=where,
            next_step="lower the learning rate",
        )
    return None
