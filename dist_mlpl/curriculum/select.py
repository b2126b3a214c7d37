"""Owns which of a model's answers are believed: pure functions of scores, equal on any number of ranks.

Scores are rounded to float16 before anything is decided, so a histogram over all 31,744 magnitudes is exact, and the
decisions can be reproduced from the files of the round.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_mlpl.curriculum.schedule import MAX_SCORE, CurriculumSettings
from dist_mlpl.errors import ConfigError

NUM_KEYS: Final = 0x7C00  # number of finite float16 magnitudes; a key is the rank of one, ascending
SIGNED_WIDTH: Final = 64  # magnitudes per bin of `signed_bins`: sixteen bins from one power of two to the next
NUM_SIGNED_BINS: Final = 2 * NUM_KEYS // SIGNED_WIDTH
_SIGN: Final = 0x8000
_CLASSES_AT_ONCE: Final = 32  # classes processed at once in `class_cuts`: 250 KB of tails

Half = npt.NDArray[np.float16]
Keys = npt.NDArray[np.uint16]
Mask = npt.NDArray[np.bool_]


class Candidates(NamedTuple):
    """k answers that may be believed, in row-major order.

    Args:
        rows: (k,) int32.
        classes: (k,) uint16.
        scores: (k,) float16, logits.
        strengths: (k,) uint16 in [0, NUM_KEYS); larger ones are believed first.
    """

    rows: npt.NDArray[np.int32]
    classes: npt.NDArray[np.uint16]
    scores: Half
    strengths: Keys

    @property
    def signs(self) -> npt.NDArray[np.int8]:
        """(k,) int8, the answers: -1 absent, +1 present."""
        return np.where(is_present(self.scores), np.int8(1), np.int8(-1))

    def where(self, chosen: npt.NDArray[Any]) -> Candidates:
        """The candidates that a (k,) mask selects."""
        return Candidates._make(column[chosen] for column in self)

    @classmethod
    def join(cls, parts: list[Candidates]) -> Candidates:
        """Concatenate lists."""
        columns = np.empty(0, np.int32), np.empty(0, np.uint16), np.empty(0, np.float16), np.empty(0, np.uint16)
        return cls(*(np.concatenate(column) for column in zip(columns, *parts, strict=True)))  # type: ignore[arg-type]


def rounded(values: Tensor) -> Half:
    """Round finite numbers to the nearest float16, clamped to its finite range; -0 becomes +0.

    Args:
        values: any shape, any device.

    Returns:
        Same shape, float16, on the host.
    """
    half = values.detach().float().clamp(-MAX_SCORE, MAX_SCORE).half().cpu().numpy()
    bits = half.view(np.uint16)
    bits[bits == _SIGN] = 0
    return half


def is_present(scores: Half) -> Mask:
    """Which scores from `rounded` answer present, that is, are >= 0; same shape, bool."""
    return scores.view(np.uint16) < _SIGN


def keys_of(scores: Half) -> Keys:
    """Key of each score: the rank of |score| among the NUM_KEYS float16 magnitudes, from 0; same shape, uint16."""
    return scores.view(np.uint16) & np.uint16(_SIGN - 1)


def key_from(value: float) -> int:
    """Key of the smallest magnitude >= a value >= 0."""
    key = int(keys_of(np.array([value], dtype=np.float16))[0])
    return key + (value_of(key) < value)


def key_above(value: float) -> int:
    """Key of the smallest magnitude > a value >= 0."""
    key = int(keys_of(np.array([value], dtype=np.float16))[0])
    return key + (value_of(key) <= value)


def value_of(key: int) -> float:
    """The magnitude with a key; infinity for NUM_KEYS."""
    return float(np.array([key], dtype=np.uint16).view(np.float16)[0])


def signed_bins(scores: Half) -> npt.NDArray[np.int64]:
    """Bin of each score, in [0, NUM_SIGNED_BINS), ascending with it; scores >= 0 are in the upper half. int64."""
    keys = keys_of(scores).astype(np.int64)
    return np.where(is_present(scores), NUM_KEYS + keys, NUM_KEYS - 1 - keys) // SIGNED_WIDTH


def candidates(
    scores: Half, variances: Half | None, is_unknown: Mask, settings: CurriculumSettings, *, first_row: int = 0
) -> Candidates:
    """The answers of a block that the strategy may still believe; without a global threshold, those it does believe.

    With `max_per_image`, only the strongest of each sign in each image; among equals, those of the first classes.

    Args:
        scores: (B, C) float16, from `rounded`.
        variances: (B, C) float16, variance of the scores over passes; None unless the strategy is uncertainty.
        is_unknown: (B, C) bool, labels that may be believed at all; all False in rows without an image.
        settings: the curriculum's settings.
        first_row: row of the shard at which the block begins.
    """
    keys = keys_of(scores)
    is_positive = is_present(scores)
    strengths = keys
    if settings.strategy == "uncertainty":
        assert variances is not None
        spread = keys_of(variances)
        strengths = (NUM_KEYS - 1) - spread
        chosen = is_unknown & (spread < key_above(settings.max_variance))
    elif settings.strategy == "positive_only":
        chosen = is_unknown & is_positive & (keys >= key_from(settings.logit_threshold))
    elif settings.strategy in ("score_threshold", "ensemble", "neighbours"):
        limit = settings.logit_threshold
        chosen = is_unknown & np.where(is_positive, keys >= key_from(limit), keys >= key_above(limit))
    else:  # score_fraction and class_precision decide when every score has been seen
        chosen = is_unknown
    if settings.max_per_image is not None:
        chosen = _strongest(chosen, is_positive, strengths, settings.max_per_image)
    rows, classes = np.nonzero(chosen)
    return Candidates(
        (rows + first_row).astype(np.int32), classes.astype(np.uint16), scores[rows, classes], strengths[rows, classes]
    )


def _strongest(chosen: Mask, is_positive: Mask, strengths: Keys, limit: int) -> Mask:
    """Keep the `limit` strongest chosen answers of each sign in each row, (B, C) bool."""
    num_classes = chosen.shape[1]
    kept = np.zeros_like(chosen)
    for side in (chosen & is_positive, chosen & ~is_positive):
        is_over = np.count_nonzero(side, axis=1) > limit
        kept |= side & ~is_over[:, None]
        if is_over.any():
            # Rank by strength, then class: all ranks differ, so the partition is the same everywhere.
            places = np.arange(num_classes, 0, -1, dtype=np.uint32)
            ranks = np.where(side[is_over], (strengths[is_over].astype(np.uint32) + 1) << 16, 0) + places
            least = np.partition(ranks, num_classes - limit, axis=1)[:, num_classes - limit]
            kept[is_over] |= side[is_over] & (ranks >= least[:, None])
    return kept


class Cut(NamedTuple):
    """A global threshold: it takes all magnitudes above `key`, and the first `num_at_key` entries at it."""

    key: int
    num_at_key: int


def fraction_cut(key_counts: npt.NDArray[np.int64], fraction: float) -> Cut:
    """The cut that takes exactly round(fraction * n) of n scores, the largest magnitudes first.

    Among equal magnitudes, the first in manifest order, then class order, are taken.

    Args:
        key_counts: (NUM_KEYS,) int64, number of unknown labels of the whole split by magnitude of their score.
        fraction: share of the scores to take, in (0, 1].
    """
    wanted = round(fraction * int(key_counts.sum()))
    at_least = np.cumsum(key_counts[::-1])[::-1]  # (NUM_KEYS,) scores of this magnitude or more
    if wanted == 0:
        return Cut(NUM_KEYS, 0)
    key = int(np.flatnonzero(at_least >= wanted)[-1])
    return Cut(key, wanted - int(at_least[key] - key_counts[key]))


def above_cut(candidates: Candidates, cut: Cut, num_earlier: int) -> Mask:
    """Which candidates of a shard the cut takes, (k,) bool.

    Args:
        candidates: the shard's candidates, in row-major order.
        cut: the cut of the whole split.
        num_earlier: number of candidates at `cut.key` in earlier shards.
    """
    keys = keys_of(candidates.scores)
    is_at_key = keys == cut.key
    return (keys > cut.key) | (is_at_key & (np.cumsum(is_at_key) + num_earlier <= cut.num_at_key))


class ClassCuts(NamedTuple):
    """Thresholds per class: present at or above bin `present`, absent below bin `absent`; see `signed_bins`."""

    present: npt.NDArray[np.int64]  # (C,) in [NUM_SIGNED_BINS / 2, NUM_SIGNED_BINS]
    absent: npt.NDArray[np.int64]  # (C,) in [0, NUM_SIGNED_BINS / 2]


def class_cuts(known_counts: npt.NDArray[np.integer], *, precision: float, min_known: int) -> ClassCuts:
    """The lowest threshold of each class and sign at which answers about known labels reach a precision.

    Thresholds are edges of bins, so the precision at them is exact. A class with fewer than `min_known` answers of a
    sign about known labels takes the threshold of all classes together; one that never reaches the precision has none.

    Args:
        known_counts: (C, 2, NUM_SIGNED_BINS), number of known labels that are absent [:, 0] and present [:, 1], by bin
            of their score.
        precision: share of answers that must be right, in (0.5, 1].
        min_known: see above, at least 1.

    Raises:
        ConfigError: no known label is absent, or none is present, so precision cannot be measured.
    """
    totals = known_counts.sum(axis=(0, 2), dtype=np.int64)
    if not totals.all():
        raise ConfigError(
            f"{int(totals[0]):,} known labels that are absent and {int(totals[1]):,} that are present",
            expected="both, to measure how often the model is right",
            where="curriculum.strategy class_precision",
            next_step="choose another strategy: labels of one kind say nothing about precision",
        )
    middle = NUM_SIGNED_BINS // 2
    right_first = known_counts[:, ::-1, ::-1]  # mirroring the scores turns absent answers into present ones
    above = [
        _lowest_bins(counts[:, :, middle:], precision=precision, min_known=min_known)
        for counts in (known_counts, right_first)
    ]
    return ClassCuts(present=middle + above[0], absent=middle - above[1])


def _lowest_bins(counts: npt.NDArray[np.integer], *, precision: float, min_known: int) -> npt.NDArray[np.int64]:
    """First bin of each class at or above which answers reach the precision, (C,) int64; the number of bins if none.

    A few classes at a time, so that their tails fit the CPU's cache and no copy of all counts is made.

    Args:
        counts: (C, 2, n) number of wrong and right answers by bin.
    """
    num_classes, _, num_bins = counts.shape
    own = np.empty(num_classes, dtype=np.int64)
    is_enough = np.empty(num_classes, dtype=bool)
    of_all = np.zeros((1, 2, num_bins), dtype=np.int64)
    for first in range(0, num_classes, _CLASSES_AT_ONCE):
        some = slice(first, first + _CLASSES_AT_ONCE)
        # Sums over each bin and those above it.
        tails = np.cumsum(counts[some, :, ::-1], axis=2, dtype=np.int64)[:, :, ::-1]
        own[some] = _lowest(tails, precision)
        is_enough[some] = tails[:, :, 0].sum(axis=1) >= min_known
        of_all += tails.sum(axis=0)
    return np.where(is_enough, own, _lowest(of_all, precision))


def _lowest(tails: npt.NDArray[np.int64], precision: float) -> npt.NDArray[np.int64]:
    wrong, right = tails[:, 0], tails[:, 1]
    is_good = (right >= precision * (wrong + right)) & (right > 0)
    return np.where(is_good.any(axis=1), is_good.argmax(axis=1), is_good.shape[1])


def above_class_cuts(candidates: Candidates, cuts: ClassCuts) -> Mask:
    """Which candidates the thresholds of their classes take, (k,) bool."""
    bins = signed_bins(candidates.scores)
    of_class = candidates.classes
    return np.where(is_present(candidates.scores), bins >= cuts.present[of_class], bins < cuts.absent[of_class])


def known_codes(scores: Half, targets: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    """Flat bins of the scores of known labels in the counts that `class_cuts` takes.

    Args:
        scores: (B, C) float16, from `rounded`.
        targets: (B, C) int8; 0 is unknown.

    Returns:
        (k,) int64 flat positions in (C, 2, NUM_SIGNED_BINS), one for each known label.
    """
    places = np.flatnonzero(targets != 0)  # on a flat mask: several times faster than `nonzero` of (B, C) int8
    is_present = targets.reshape(-1)[places] > 0
    bins = signed_bins(scores.reshape(-1)[places])
    return (places % targets.shape[1] * 2 + is_present) * NUM_SIGNED_BINS + bins


def agreed(codes: npt.NDArray[np.int64], signs: npt.NDArray[np.int8], earlier: list[tuple[Any, Any]]) -> Mask:
    """Which proposals every earlier round also made, with the same sign.

    Args:
        codes: (k,) int64, codes of a shard's proposals, ascending; see `overlays.codes_of`.
        signs: (k,) int8, -1 or +1.
        earlier: codes and signs of each earlier round.

    Returns:
        (k,) bool.
    """
    kept = np.ones(len(codes), dtype=bool)
    for other_codes, other_signs in earlier:
        places = np.searchsorted(other_codes, codes)
        inside = places < len(other_codes)
        found = np.zeros(len(codes), dtype=bool)
        at = places[inside]
        found[inside] = (other_codes[at] == codes[inside]) & (other_signs[at] == signs[inside])
        kept &= found
    return kept


def check_scores(scores: Tensor, valid: Tensor) -> tuple[int, int] | None:
    """Row and column of a non-finite score; None if all are finite. Rows without an image are ignored.

    Args:
        scores: (B, C) float.
        valid: (B,) bool, False in rows without an image.
    """
    if math.isfinite(float(scores[valid].abs().sum(dtype=torch.float64))):
        return None
    row, column = torch.nonzero(~torch.isfinite(scores) & valid[:, None])[0].tolist()
    return row, column
