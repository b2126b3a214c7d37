"""Partial-label rules as slow loops over one dense matrix in source order: what `dist_mlpl.data.views` must equal."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def random_targets(
    num_samples: int, num_classes: int, *, seed: int, unknown: float = 0.3, present: float = 0.3
) -> npt.NDArray[np.int8]:
    """(N, C) int8 of -1, 0, +1 with given shares of unknown and present entries."""
    draws = np.random.default_rng(seed).random((num_samples, num_classes))
    return np.where(draws < unknown, 0, np.where(draws < unknown + present, 1, -1)).astype(np.int8)


def bernoulli(targets: npt.NDArray[np.int8], fraction: float, seed: int) -> npt.NDArray[np.int8]:
    """The reference procedure in one shot."""
    uniform = np.random.RandomState(seed).random_sample(targets.shape)
    return ((uniform < fraction) * targets).astype(np.int8)


def exact_count(targets: npt.NDArray[np.int8], percent: int, seed: int) -> npt.NDArray[np.int8]:
    """Drop int((100 - percent) * C / 100) entries of each row."""
    random, kept = np.random.RandomState(seed), targets.copy()
    num_classes = targets.shape[1]
    for row in kept:
        row[random.choice(num_classes, int((100 - percent) * num_classes / 100), replace=False)] = 0
    return kept


def dense_subset(targets: npt.NDArray[np.int8], fraction: float, seed: int) -> npt.NDArray[np.int8]:
    """Keep the rows that come first in a permutation."""
    chosen = np.random.RandomState(seed).permutation(len(targets))[: round(fraction * len(targets))]
    kept = np.zeros_like(targets)
    for row in chosen:
        kept[row] = targets[row]
    return kept


def single_positive(targets: npt.NDArray[np.int8], seed: int) -> npt.NDArray[np.int8]:
    """Keep one drawn positive of each row that has any."""
    random, kept = np.random.RandomState(seed), np.zeros_like(targets)
    for row, labels in enumerate(targets):
        positives = [column for column, label in enumerate(labels) if label == 1]
        if positives:
            kept[row, positives[random.randint(len(positives))]] = 1
    return kept


def digest(full: npt.NDArray[np.int8], kept: npt.NDArray[np.int8], shard_sizes: list[int]) -> str:
    """Digest of what `kept` hides of `full`, both in manifest order, entry by entry."""
    text, start = "", 0
    for size in shard_sizes:
        rows, classes = b"", b""
        for row in range(size):
            for column in range(full.shape[1]):
                if full[start + row, column] != kept[start + row, column]:
                    rows += row.to_bytes(4, "little")
                    classes += column.to_bytes(2, "little")
        text += hashlib.sha256(rows + classes).hexdigest()
        start += size
    return hashlib.sha256(text.encode()).hexdigest()
