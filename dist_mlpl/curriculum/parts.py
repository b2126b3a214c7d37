"""Owns what a scoring pass keeps of a stretch of one shard: answers that may be believed, counts behind thresholds.

A part holds a bounded number of answers an image and no dense scores; it is made from whole blocks of its stretch
alone, so whoever makes it makes the same one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from dist_mlpl import storage
from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.curriculum.select import NUM_KEYS, Candidates, Half, candidates, keys_of, known_codes
from dist_mlpl.errors import CheckpointError
from dist_mlpl.labels import PRESENT, UNKNOWN, Targets

_MAX_CODES = 1 << 20  # of known labels, listed before they are counted


class Part(NamedTuple):
    """A stretch of a shard, scored, or the whole shard.

    Args:
        candidates: in row-major order.
        num_known: (C, 2) int32, known labels that are absent, present.
        num_samples: images that were scored.
        num_undecodable: images that could not be.
        codes, counts: sparse counts behind a threshold of the whole split: places (k,) int64, and how many (k,) int64.
            Magnitudes of unknown labels' scores for score_fraction, `known_codes` for class_precision.
    """

    candidates: Candidates
    num_known: npt.NDArray[np.int32]
    num_samples: int
    num_undecodable: int
    codes: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    @classmethod
    def join(cls, parts: list[Part]) -> Part:
        """The stretches of a shard, in order; their sparse counts listed one after the other."""
        return cls(
            Candidates.join([part.candidates for part in parts]),
            np.sum([part.num_known for part in parts], axis=0, dtype=np.int32),
            sum(part.num_samples for part in parts),
            sum(part.num_undecodable for part in parts),
            np.concatenate([part.codes for part in parts]),
            np.concatenate([part.counts for part in parts]),
        )

    def add_counts(self, total: npt.NDArray[Any]) -> None:
        """Add the sparse counts to dense ones, flat."""
        np.add.at(total, self.codes, self.counts.astype(total.dtype))


class PartMaker:
    """Makes a part from its blocks, in order.

    Args:
        settings: of the curriculum.
        num_classes: C.
        first_row: of the part in its shard.
    """

    def __init__(self, settings: CurriculumSettings, num_classes: int, *, first_row: int) -> None:
        self._settings = settings
        self._candidates: list[Candidates] = []
        self._num_known = np.zeros((num_classes, 2), dtype=np.int32)
        self._num_samples = self._num_undecodable = 0
        self._next_row = first_row
        self._by_key = np.zeros(NUM_KEYS, dtype=np.int64)
        self._codes: list[npt.NDArray[np.int64]] = []  # not counted yet
        self._counted = np.empty(0, np.int64), np.empty(0, np.int64)

    def add(
        self, scores: Half, variances: Half | None, targets: Targets, valid: npt.NDArray[np.bool_], num_rows: int
    ) -> None:
        """One block.

        Args:
            scores, variances: (B, C); see `candidates`.
            targets: (B, C) int8, human labels as the run sees them.
            valid: (B,), False for padding and undecodable images.
            num_rows: rows that are no padding; they come first.
        """
        is_unknown = (targets == UNKNOWN) & valid[:, None]
        known = np.where(valid[:, None], targets, UNKNOWN)
        self._candidates.append(candidates(scores, variances, is_unknown, self._settings, first_row=self._next_row))
        num_present = np.count_nonzero(known == PRESENT, axis=0)
        self._num_known[:, 0] += np.count_nonzero(known, axis=0) - num_present
        self._num_known[:, 1] += num_present
        self._num_samples += int(valid.sum())
        self._num_undecodable += num_rows - int(valid.sum())
        self._next_row += num_rows
        if self._settings.strategy == "score_fraction":
            self._by_key += np.bincount(keys_of(scores)[is_unknown], minlength=NUM_KEYS)
        elif self._settings.strategy == "class_precision":
            self._codes.append(known_codes(scores, known))
            if sum(map(len, self._codes)) > _MAX_CODES:
                self._settle_codes()

    def _settle_codes(self) -> None:
        """Count what was listed, so that the list stays short."""
        codes, times = np.unique(np.concatenate(self._codes), return_counts=True)
        both = np.concatenate([self._counted[0], codes]), np.concatenate([self._counted[1], times])
        found, places = np.unique(both[0], return_inverse=True)
        totals = np.zeros(len(found), dtype=np.int64)
        np.add.at(totals, places, both[1])
        self._codes, self._counted = [], (found, totals)

    def part(self) -> Part:
        """The part, once all its blocks were added."""
        if self._codes:
            self._settle_codes()
        codes, counts = self._counted
        if self._settings.strategy == "score_fraction":
            codes = np.flatnonzero(self._by_key)
            counts = self._by_key[codes]
        listed = Candidates.join(self._candidates)
        return Part(listed, self._num_known, self._num_samples, self._num_undecodable, codes, counts)


def encode_part(part: Part, *, origin: str) -> bytes:
    """A part as a file; equal parts give equal bytes.

    Args:
        part: to write.
        origin: digest of the round's plan, hexadecimal.
    """
    numbers = np.array([part.num_samples, part.num_undecodable], dtype=np.int64)
    arrays = {"num_known": part.num_known, "numbers": numbers, "codes": part.codes, "counts": part.counts}
    made_from = np.frombuffer(bytes.fromhex(origin), dtype=np.uint8)
    return safetensors.numpy.save({**part.candidates._asdict(), **arrays, "origin": made_from})


def decode_part(content: bytes, *, origin: str, where: str) -> Part:
    """Read a part.

    Raises:
        CheckpointError: it does not read, or was made from another plan.
    """
    try:
        arrays = safetensors.numpy.load(content)
        made_from = arrays["origin"].tobytes().hex()
        listed = Candidates(*(arrays[name] for name in Candidates._fields))
        num_samples, num_undecodable = arrays["numbers"].tolist()
        part = Part(listed, arrays["num_known"], num_samples, num_undecodable, arrays["codes"], arrays["counts"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise unusable(f"a part that does not read: {error}", where) from error
    if made_from != origin:
        raise unusable(f"a part of the plan {made_from[:16]}...", where)
    return part


def unusable(found: str, where: str) -> CheckpointError:
    """What to raise about a file of a pass."""
    return CheckpointError(
        found,
        expected="a part of this round, as its pass wrote it",
        where=storage.shown(where),
        next_step="remove this file, and it is scored again; or drop the round: `dist-mlpl labels rollback RUN`",
    )
