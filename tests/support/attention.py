"""Owns slow oracles of the attention of classes over cells: by loops in float64, and with every tangent in memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """Inputs of the semantic attention."""

    cells: Tensor  # (B, L, D)
    keys: Tensor  # (C, k)
    projection: Tensor  # (k, D)
    query: Tensor  # (k,)


def random_case(B: int, L: int, D: int, C: int, k: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Case:
    """Scores of a spread that makes attention neither flat nor a single cell."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    cells, keys, projection, query = normal(B, L, D), normal(C, k), normal(k, D) / D**0.5, 4 * normal(k) / k**0.5
    return Case(cells.to(dtype), keys.to(dtype), projection.to(dtype), query.to(dtype))


def loop_attention(case: Case) -> tuple[Tensor, Tensor]:
    """Features (B, C, D) and attention (B, C, L), number by number; for small cases.

    s_bcl = sum_k query_k tanh((W1 cell_bl)_k key_ck); a = softmax over l; f_bc = sum_l a_bcl cell_bl.
    """
    cells, keys, projection, query = (tensor.double().tolist() for tensor in case)
    B, L, D = case.cells.shape
    C, k = case.keys.shape
    features, attention = torch.zeros(B, C, D, dtype=torch.float64), torch.zeros(B, C, L, dtype=torch.float64)
    for b in range(B):
        u = [[sum(projection[j][d] * cell[d] for d in range(D)) for j in range(k)] for cell in cells[b]]
        for c in range(C):
            scores = [sum(query[j] * math.tanh(u[i][j] * keys[c][j]) for j in range(k)) for i in range(L)]
            weights = [math.exp(score - max(scores)) for score in scores]
            for i in range(L):
                attention[b, c, i] = weights[i] / sum(weights)
                for d in range(D):
                    features[b, c, d] += weights[i] / sum(weights) * cells[b][i][d]
    return features, attention


def materialised_attention(case: Case) -> Tensor:
    """The same by one tensor of all tangents (B, L, C, k), left to autograd; features (B, C, D)."""
    u = case.cells @ case.projection.T
    z = torch.tanh(u[:, :, None] * case.keys)  # (B, L, C, k)
    return torch.einsum("blc,bld->bcd", (z @ case.query).softmax(dim=1), case.cells)
