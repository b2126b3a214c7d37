"""Owns what a scoring pass keeps of a stretch of one shard: answers that may be believed, and counts for thresholds.

A part holds a bounded number of answers per image and no dense scores. It is made only from whole blocks of its
stretch, so every rank would make the same one.
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

_MAX_CODES = 1 << 20  # known labels that are listed before they are counted


class Part(NamedTuple):
    """The scores kept of a stretch of a shard, or of a whole shard.

    Args:
        candidates: in row-major order.
        num_known: (C, 2) int32, known labels that are absent, present.
        num_samples: images that were scored.
        num_undecodable: images that could not be decoded.
        codes, counts: (k,) int64 flat bins and (k,) int64 counts: a sparse histogram for thresholds over the whole
            split. Bins are magnitudes of unknown labels' scores for score_fraction, and `known_codes` for
            class_precision; other strategies have none.
    """

    candidates: Candidates
    num_known: npt.NDArray[np.int32]
    num_samples: int
    num_undecodable: int
    codes: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    @classmethod
    def join(cls, parts: list[Part]) -> Part:
        """Join the stretches of a shard, in order; their sparse counts are concatenated."""
        return cls(
            Candidates.join([part.candidates for part in parts]),
            np.sum([part.num_known for part in parts], axis=0, dtype=np.int32),
            sum(part.num_samples for part in parts),
            sum(part.num_undecodable for part in parts),
            np.concatenate([part.codes for part in parts]),
            np.concatenate([part.counts for part in parts]),
        )

    def add_counts(self, total: npt.NDArray[Any]) -> None:
        """Add the sparse counts to a flat dense histogram, in place."""
        np.add.at(total, self.codes, self.counts.astype(total.dtype))


class PartMaker:
    """Makes a part from its blocks, in order.

    Args:
        settings: the curriculum's settings.
        num_classes: C.
        first_row: row of the shard at which the part begins.
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
        """Add the next block.

        Args:
            scores, variances: (B, C) float16; see `candidates`.
            targets: (B, C) int8, human labels as the run sees them.
            valid: (B,) bool, False for padding and undecodable images.
            num_rows: number of rows before the padding.
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
        """Count the listed codes, so that the list stays short."""
        codes, times = np.unique(np.concatenate(self._codes), return_counts=True)
        both = np.concatenate([self._counted[0], codes]), np.concatenate([self._counted[1], times])
        found, places = np.unique(both[0], return_inverse=True)
        totals = np.zeros(len(found), dtype=np.int64)
        np.add.at(totals, places, both[1])
        self._codes, self._counted = [], (found, totals)

    def part(self) -> Part:
        """The part; call this once all its blocks have been added."""
        if self._codes:
            self._settle_codes()
        codes, counts = self._counted
        if self._settings.strategy == "score_fraction":
            codes = np.flatnonzero(self._by_key)
            counts = self._by_key[codes]
        listed = Candidates.join(self._candidates)
        return Part(listed, self._num_known, self._num_samples, self._num_undecodable, codes, counts)


def encode_part(part: Part, *, origin: str) -> bytes:
    """Encode a part as the bytes of a file; equal parts give equal bytes.

    Args:
        part: the part.
        origin: hexadecimal digest of the round's plan.
    """
    numbers = np.array([part.num_samples, part.num_undecodable], dtype=np.int64)
    arrays = {"num_known": part.num_known, "numbers": numbers, "codes": part.codes, "counts": part.counts}
    made_from = np.frombuffer(bytes.fromhex(origin), dtype=np.uint8)
    return safetensors.numpy.save({**part.candidates._asdict(), **arrays, "origin": made_from})


def decode_part(content: bytes, *, origin: str, where: str) -> Part:
    """Decode a part.

    Args:
        content: bytes of the file.
        origin: hexadecimal digest of the round's plan.
        where: the file's URL, for messages.

    Raises:
        CheckpointError: the file is damaged, or was made from another plan.
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
    """The error for an unusable file of a scoring pass; the caller raises it."""
    return CheckpointError(
        found,
        expected="a part of this round, as its pass wrote it",
        where=storage.shown(where),
        next_step="remove this file, and it is scored again; or drop the round: `dist-mlpl labels rollback RUN`",
    )
