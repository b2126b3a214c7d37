"""Owns the library's label code (-1 absent, 0 unknown, +1 present) and the converters from other codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from dist_mlpl.errors import LabelCodeError

ABSENT, UNKNOWN, PRESENT = -1, 0, 1
CODES = (ABSENT, UNKNOWN, PRESENT)

Targets = npt.NDArray[np.int8]
Unlisted = Literal["absent", "unknown"]


def check_codes(targets: npt.NDArray, *, where: str) -> Targets:
    """Check that every entry is -1, 0 or +1, and return the array as int8.

    Args:
        targets: any shape, any numeric type.
        where: what the array is, for the message.

    Raises:
        LabelCodeError: another value; the message has the first one and its position.
    """
    return _checked(targets, CODES, expected="-1 (absent), 0 (unknown) or +1 (present)", where=where)


def _checked(values: npt.NDArray, allowed: Sequence[int], *, expected: str, where: str) -> Targets:
    array = np.asarray(values)
    bad = ~np.isin(array, allowed)
    if bad.any():
        position = tuple(int(i) for i in np.argwhere(bad)[0])
        raise LabelCodeError(
            f"label value {array[position].item()!r} at {position}",
            expected=expected,
            where=where,
            next_step="convert at the border with dist_mlpl.labels.from_one_zero, from_nan or from_confidence",
        )
    return array.astype(np.int8)


def from_one_zero(values: npt.NDArray, *, zero: Unlisted, where: str = "labels") -> Targets:
    """Convert {1, 0, -1} codes whose zero means `absent` (CSL: -1 unknown) or `unknown` (SST, Durand: -1 absent).

    The two conventions use the same values, so the meaning of zero has no default: a wrong choice would train on
    wrong labels without an error.

    Args:
        values: any shape, entries in {-1, 0, 1}.
        zero: what 0 means in the source.
        where: what the array is, for the message.

    Raises:
        LabelCodeError: any other value.
    """
    codes = check_codes(values, where=where)
    if zero == "unknown":
        return codes
    return np.where(codes == 1, PRESENT, np.where(codes == 0, ABSENT, UNKNOWN)).astype(np.int8)


def from_nan(values: npt.NDArray, *, where: str = "labels") -> Targets:
    """Convert {1.0 present, 0.0 absent, NaN unknown} (mlcpl's convention).

    Raises:
        LabelCodeError: any other value, including -1.
    """
    is_known = ~np.isnan(values)
    ones = _checked(np.where(is_known, values, 0), (0, 1), expected="1 (present), 0 (absent) or NaN", where=where)
    return np.where(is_known, 2 * ones - 1, UNKNOWN).astype(np.int8)


def from_confidence(confidences: npt.NDArray, *, where: str = "labels") -> Targets:
    """Convert Open Images human confidences (1 verified present, 0 verified absent) of listed rows.

    Raises:
        LabelCodeError: any other value: machine confidences are predictions, not labels.
    """
    ones = _checked(confidences, (0, 1), expected="1 (verified present) or 0 (verified absent)", where=where)
    return (2 * ones - 1).astype(np.int8)


def dense_targets(
    positives: Sequence[npt.NDArray], negatives: Sequence[npt.NDArray], *, num_classes: int, unlisted: Unlisted
) -> Targets:
    """Make a dense target matrix from the class ids of B samples.

    Args:
        positives: B integer arrays of class columns that are present.
        negatives: B integer arrays of class columns that are absent.
        num_classes: C.
        unlisted: what a class in neither list means: `absent` or `unknown`.

    Returns:
        (B, C) int8. A class in both lists is present (the sharding tool refuses such rows).

    Raises:
        LabelCodeError: a class id outside [0, C); a negative one would count from the last class.
    """
    ids = np.concatenate([*positives, *negatives]) if len(positives) else np.empty(0)
    if len(ids) and not 0 <= ids.min() <= ids.max() < num_classes:
        raise LabelCodeError(
            f"class ids from {ids.min()} to {ids.max()}",
            expected=f"columns of {num_classes} classes, from 0",
            where="dense_targets",
            next_step="number the classes from 0, in the order of the class list",
        )
    fill = ABSENT if unlisted == "absent" else UNKNOWN
    targets = np.full((len(positives), num_classes), fill, dtype=np.int8)  # (B, C)
    for row, (present, absent) in enumerate(zip(positives, negatives, strict=True)):
        targets[row, absent] = ABSENT
        targets[row, present] = PRESENT
    return targets
