"""Owns how many beliefs a class may get: limits, and the strength from which on a class's beliefs fit within them.

A class's beliefs are counted by strength in two steps, a histogram of 992 bins and one of the 32 strengths inside the
bin where the limit falls, so that the cut is exact and the counts stay small: 76 MB at 9,605 classes.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.curriculum.select import NUM_KEYS, Candidates

FINE: Final = 32  # strengths in a bin
NUM_BINS: Final = NUM_KEYS // FINE

Counts = npt.NDArray[np.int32]
PerClass = npt.NDArray[np.int64]  # (C, 2): absent, present


def class_limits(
    settings: CurriculumSettings, *, num_known: PerClass, num_unknown: npt.NDArray[np.int64], num_kept: PerClass
) -> PerClass:
    """How many new beliefs each class may get, by sign.

    Args:
        settings: `max_per_class` and `prior_quota`; the smaller limit counts.
        num_known: (C, 2) known labels that are absent, present.
        num_unknown: (C,) labels that nobody told.
        num_kept: (C, 2) beliefs of earlier rounds that stay; they count against the limits.

    Returns:
        (C, 2). A class without known labels has no share to go by and no quota.
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
    """Beliefs of a shard by class, sign and bin of strength, (C, 2, NUM_BINS)."""
    places = _class_and_sign(beliefs) * NUM_BINS + beliefs.strengths // FINE
    return _counted(places, (num_classes, 2, NUM_BINS))


def crossing_bins(coarse: Counts, limits: PerClass) -> npt.NDArray[np.int64]:
    """The bin, from the strongest down, in which each class's beliefs pass its limit; -1 where all fit, (C, 2)."""
    running = np.cumsum(coarse[:, :, ::-1], axis=2, dtype=np.int64)
    is_over = running > limits[:, :, None]
    return np.where(is_over.any(axis=2), NUM_BINS - 1 - is_over.argmax(axis=2), -1)


def fine_counts(beliefs: Candidates, crossing: npt.NDArray[np.int64]) -> Counts:
    """Beliefs of a shard inside their class's crossing bin by strength, (C, 2, FINE)."""
    own = _class_and_sign(beliefs)
    is_inside = beliefs.strengths // FINE == crossing.reshape(-1)[own]
    places = own[is_inside] * FINE + beliefs.strengths[is_inside] % FINE
    return _counted(places, (*crossing.shape, FINE))


def least_strengths(
    coarse: Counts, fine: Counts, crossing: npt.NDArray[np.int64], limits: PerClass
) -> npt.NDArray[np.int64]:
    """The strength from which on each class's beliefs stay, (C, 2); NUM_KEYS where none does.

    Beliefs of equal strength stay or go together, so that the result is within the limit whatever their order.
    """
    is_stronger = np.arange(NUM_BINS) > crossing[:, :, None]
    left = limits - np.where(is_stronger, coarse, 0).sum(axis=2, dtype=np.int64)
    is_over = np.cumsum(fine[:, :, ::-1], axis=2, dtype=np.int64) > left[:, :, None]
    first_over = np.where(is_over.any(axis=2), FINE - 1 - is_over.argmax(axis=2), -1)
    return np.where(crossing < 0, 0, crossing * FINE + first_over + 1)


def within_caps(beliefs: Candidates, least: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which beliefs of a shard stay, (k,)."""
    return beliefs.strengths >= least.reshape(-1)[_class_and_sign(beliefs)]


def _class_and_sign(beliefs: Candidates) -> npt.NDArray[np.int64]:
    return beliefs.classes.astype(np.int64) * 2 + (beliefs.signs > 0)


def _counted(places: npt.NDArray[np.int64], shape: tuple[int, ...]) -> Counts:
    counts = np.zeros(int(np.prod(shape)), dtype=np.int32)
    found, times = np.unique(places, return_counts=True)
    counts[found] = times
    return counts.reshape(shape)
