"""Owns nearest images and their votes as slow loops, and embeddings that make them hard to find."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def slow_units(vectors: Tensor) -> np.ndarray:
    """Unit vectors in float32."""
    found = np.zeros(vectors.shape, dtype=np.float32)
    for row, vector in enumerate(vectors.double().numpy()):
        found[row] = vector / max(math.sqrt(float(vector @ vector)), 1e-9)
    return found


def slow_nearest(vectors: Tensor, index: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All cosines in float64, rounded to float32, sorted: larger first, of equal ones the lower index."""
    rows, asked = slow_units(vectors).astype(np.float64), slow_units(queries).astype(np.float64)
    scores = torch.full((len(queries), k), -torch.inf)
    found = torch.full((len(queries), k), -1)
    for number, query in enumerate(asked):
        cosines = (rows * query).sum(axis=1).astype(np.float32)
        order = sorted(range(len(rows)), key=lambda row: (-cosines[row], int(index[row])))[:k]
        scores[number, : len(order)] = torch.from_numpy(cosines[order])
        found[number, : len(order)] = index[order]
    return scores, found


def crowded(num_rows: int, width: int, *, seed: int) -> Tensor:
    """Embeddings among which many are equal, nearly equal, or zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, width, generator=generator)
    rows[num_rows // 2 : 3 * num_rows // 4] = rows[0]
    near = rows[3 * num_rows // 4 :]
    near[:] = rows[1] + 1e-6 * near
    rows[5] = 0.0
    return rows


def slow_votes(neighbours: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(B, C) log (p + 1) / (a + 1) of the neighbours (B, k), -1 for nobody, by their (N, C) labels."""
    found = np.zeros((len(neighbours), targets.shape[1]))
    for row, own in enumerate(neighbours):
        for column in range(targets.shape[1]):
            told = [targets[voter, column] for voter in own if voter >= 0]
            found[row, column] = math.log((told.count(1) + 1) / (told.count(-1) + 1))
    return found
