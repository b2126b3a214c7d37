"""Owns how many beliefs a class may get: limits, and the least strength at which a class's beliefs fit within them.

A class's beliefs are counted by strength in two steps, a histogram of 992 bins and one of the 32 strengths inside the
bin where the limit falls, so that the cut is exact and the counts stay small: 76 MB at 9,605 classes.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.curriculum.select import NUM_KEYS, Candidates

FINE: Final = 32  # strengths per bin
NUM_BINS: Final = NUM_KEYS // FINE

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
        (C, 2) int64 >= 0. A class without known labels has no known share, hence no quota.
    """
    limits = np.full(num_known.shape, np.iinfo(np.int64).max)
    if settings.max_per_class is not None:
        limits[:] = settings.max_per_class
    if settings.prior_quota is not None:
        total = num_known.sum(axis=1)
        shares = num_known / np.maximum(total, 1)[:, None]
        quotas = np.floor(settings.prior_quota * shares * num_unknown[:, None]).astype(np.int64)
        limits = np.where(total[:, None] > 0, np.minimum(limits, quotas), limits)
    return np.maximum(limits - num_kept, 0)


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
