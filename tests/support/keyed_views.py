"""The keyed rules of views as slow loops over one dense matrix in source order: what `shards.view_rules` must equal."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from dist_mlpl.keyed import hash_integers, key

Targets = npt.NDArray[np.int8]


def chance(rule: str, seed: int, source_row: int, column: int) -> int:
    """64 bits for one label; `dist_mlpl.keyed` has oracles of its own."""
    place = np.array([source_row * 65536 + column], dtype=np.uint64)
    return int(hash_integers(key("view", rule, seed), place)[0])


def is_below(bits: int, probability: float) -> bool:
    """Whether the 53 high bits, as a number in [0, 1), are below a probability, in exact arithmetic."""
    return Fraction(bits >> 11, 1 << 53) < Fraction(probability)


def keyed_bernoulli(targets: Targets, source_rows: list[int], fraction: float, seed: int) -> Targets:
    """Keep what is drawn below the fraction."""
    seen = targets.copy()
    for row, column in np.argwhere(targets != 0):
        if not is_below(chance("keyed_bernoulli", seed, source_rows[row], column), fraction):
            seen[row, column] = 0
    return seen


def keyed_exact_count(targets: Targets, source_rows: list[int], percent: int, seed: int) -> Targets:
    """Hide the highest draws of each row."""
    seen = targets.copy()
    for row, labels in enumerate(targets):
        known = [
            (chance("keyed_exact_count", seed, source_rows[row], column), column)
            for column, label in enumerate(labels)
            if label
        ]
        for _, column in sorted(known, reverse=True)[: (100 - percent) * len(known) // 100]:
            seen[row, column] = 0
    return seen


def noisy(targets: Targets, source_rows: list[int], flip_present: float, flip_absent: float, seed: int) -> Targets:
    """Turn some labels round."""
    seen = targets.copy()
    for row, column in np.argwhere(targets != 0):
        probability = flip_present if targets[row, column] == 1 else flip_absent
        if is_below(chance("noisy", seed, source_rows[row], column), probability):
            seen[row, column] = -targets[row, column]
    return seen


def web(targets: Targets, source_rows: list[int], seed: int) -> Targets:
    """One positive, the rest of the known absent; nothing for a row without positives."""
    seen = np.zeros_like(targets)
    for row, labels in enumerate(targets):
        drawn = [(chance("web", seed, source_rows[row], c), c) for c, label in enumerate(labels) if label == 1]
        if drawn:
            seen[row] = np.where(labels != 0, -1, 0)
            seen[row, min(drawn)[1]] = 1
    return seen


def digest(full: Targets, seen: Targets, shard_sizes: list[int], *, replaces: bool) -> str:
    """Digest of what `seen` changes of `full`, both in manifest order, entry by entry."""
    text, start = "", 0
    for size in shard_sizes:
        rows, classes, values = b"", b"", b""
        for row in range(size):
            for column in range(full.shape[1]):
                if full[start + row, column] != seen[start + row, column]:
                    rows += row.to_bytes(4, "little")
                    classes += column.to_bytes(2, "little")
                    values += int(seen[start + row, column]).to_bytes(1, "little", signed=True)
        text += hashlib.sha256(rows + classes + (values if replaces else b"")).hexdigest()
        start += size
    return hashlib.sha256(text.encode()).hexdigest()
