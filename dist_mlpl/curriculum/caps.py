"""Owns how many beliefs a class may get: limits, and the least strength at which a class's beliefs fit within them.

A class's beliefs are counted by strength in two steps, a histogram of 992 bins and one of the 32 strengths inside the
bin where the limit falls, so that the cut is exact and the counts stay small: 76 MB at 9,605 classes.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Final

import numpy as np
import numpy.typing as npt

from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.curriculum.select import NUM_KEYS, Candidates

FINE: Final = 32  # strengths per bin
NUM_BINS: Final = NUM_KEYS // FINE
# Known labels, with the share of present ones over all classes, that are added to each class's own before its share is
# taken. The share of 4 labels, 0.2 present, has a standard error of 0.2: fewer say less than the other classes do.
NUM_PRIOR_LABELS: Final = 4

Counts = npt.NDArray[np.int32]
PerClass = npt.NDArray[np.int64]  # (C, 2): absent, present


def class_limits(
    settings: CurriculumSettings, *, num_known: PerClass, num_unknown: npt.NDArray[np.int64], num_kept: PerClass
) -> PerClass:
    """How many new beliefs each class may get, by sign.

    Args:
        settings: `max_per_class` and `prior_quota`; the smaller limit applies.
        num_known: (C, 2) int64, known labels that are absent, present.
        num_unknown: (C,) int64, unknown labels.
        num_kept: (C, 2) int64, beliefs of earlier rounds that stay; they count against the limits.

    Returns:
        (C, 2) int64 >= 0. The quota of a sign is `prior_quota` times the class's unknown labels times the sign's share
        among its known labels and `NUM_PRIOR_LABELS` labels of the share over all classes, rounded down, exactly. A
        class without known labels has the share over all classes; if no label at all is known, there is no quota.
    """
    limits = np.full(num_known.shape, np.iinfo(np.int64).max)
    if settings.max_per_class is not None:
        limits[:] = settings.max_per_class
    if settings.prior_quota is not None:
        limits = np.minimum(limits, _quotas(settings.prior_quota, num_known, num_unknown))
    return np.maximum(limits - num_kept, 0)


def _quotas(prior_quota: float, num_known: PerClass, num_unknown: npt.NDArray[np.int64]) -> PerClass:
    """(C, 2) the quotas of `class_limits`; the largest int64 if no label is known."""
    known = num_known.astype(object)  # Python's integers: products of three counts pass 2**63
    of_sign = known.sum(axis=0)  # (2,) over all classes
    total = of_sign.sum()
    if total == 0:
        return np.full(num_known.shape, np.iinfo(np.int64).max)
    times, by = Decimal(str(prior_quota)).as_integer_ratio()
    expected = (known * total + NUM_PRIOR_LABELS * of_sign) * num_unknown.astype(object)[:, None] * times
    quotas = expected // ((known.sum(axis=1) + NUM_PRIOR_LABELS) * total * by)[:, None]
    return np.minimum(quotas, np.iinfo(np.int64).max).astype(np.int64)


def coarse_counts(beliefs: Candidates, num_classes: int) -> Counts:
    """Number of a shard's beliefs by class, sign and strength bin, (C, 2, NUM_BINS) int32."""
    places = _class_and_sign(beliefs) * NUM_BINS + beliefs.strengths // FINE
    return _counted(places, (num_classes, 2, NUM_BINS))


def crossing_bins(coarse: Counts, limits: PerClass) -> npt.NDArray[np.int64]:
    """The bin in which each class's beliefs, counted from the strongest down, exceed its limit; (C, 2), -1: all fit."""
    running = np.cumsum(coarse[:, :, ::-1], axis=2, dtype=np.int64)
    is_over = running > limits[:, :, None]
    return np.where(is_over.any(axis=2), NUM_BINS - 1 - is_over.argmax(axis=2), -1)


def fine_counts(beliefs: Candidates, crossing: npt.NDArray[np.int64]) -> Counts:
    """Number of a shard's beliefs inside their class's crossing bin, by strength, (C, 2, FINE) int32."""
    own = _class_and_sign(beliefs)
    is_inside = beliefs.strengths // FINE == crossing.reshape(-1)[own]
    places = own[is_inside] * FINE + beliefs.strengths[is_inside] % FINE
    return _counted(places, (*crossing.shape, FINE))


def least_strengths(
    coarse: Counts, fine: Counts, crossing: npt.NDArray[np.int64], limits: PerClass
) -> npt.NDArray[np.int64]:
    """The least strength at which a belief of each class and sign stays.

    Beliefs of equal strength stay or go together, so the result is within the limit whatever their order.

    Args:
        coarse: (C, 2, NUM_BINS) int32, from `coarse_counts`, summed over all shards.
        fine: (C, 2, FINE) int32, from `fine_counts`, summed over all shards.
        crossing: (C, 2) int64, from `crossing_bins`.
        limits: (C, 2) int64 >= 0, from `class_limits`.

    Returns:
        (C, 2) int64 in [0, NUM_KEYS], by absent, present; NUM_KEYS keeps none.
    """
    is_stronger = np.arange(NUM_BINS) > crossing[:, :, None]
    left = limits - np.where(is_stronger, coarse, 0).sum(axis=2, dtype=np.int64)
    is_over = np.cumsum(fine[:, :, ::-1], axis=2, dtype=np.int64) > left[:, :, None]
    first_over = np.where(is_over.any(axis=2), FINE - 1 - is_over.argmax(axis=2), -1)
    return np.where(crossing < 0, 0, crossing * FINE + first_over + 1)


def within_caps(beliefs: Candidates, least: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which beliefs of a shard stay under the result of `least_strengths`, (k,) bool."""
    return beliefs.strengths >= least.reshape(-1)[_class_and_sign(beliefs)]


def _class_and_sign(beliefs: Candidates) -> npt.NDArray[np.int64]:
    return beliefs.classes.astype(np.int64) * 2 + (beliefs.signs > 0)


def _counted(places: npt.NDArray[np.int64], shape: tuple[int, ...]) -> Counts:
    counts = np.zeros(int(np.prod(shape)), dtype=np.int32)
    found, times = np.unique(places, return_counts=True)
    counts[found] = times
    return counts.reshape(shape)
