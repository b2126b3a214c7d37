"""Owns a slow oracle of WELDON pooling: cell by cell, over Python floats, which are float64."""

from __future__ import annotations

import torch
from torch import Tensor


def weldon_oracle(feature_map: Tensor, weight: Tensor, bias: Tensor, num_top: int, num_bottom: int) -> Tensor:
    """(B, C) float64 from (B, F, h, w), (C, F) and (C,): scores of all cells, sorted, their two ends averaged."""
    B, F, h, w = feature_map.shape
    C = weight.shape[0]
    weight, bias = weight.detach(), bias.detach()
    logits = torch.zeros(B, C, dtype=torch.float64)
    for b in range(B):
        for c in range(C):
            scores = sorted(
                float(bias[c]) + sum(float(weight[c, f]) * float(feature_map[b, f, y, x]) for f in range(F))
                for y in range(h)
                for x in range(w)
            )
            bottom = sum(scores[:num_bottom]) / num_bottom if num_bottom else 0.0
            logits[b, c] = sum(scores[-num_top:]) / num_top + bottom
    return logits
