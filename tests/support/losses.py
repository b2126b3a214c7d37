"""Owns slow oracles of the losses: plain loops over Python floats, which are float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softplus(value: float) -> float:
    """log(1 + exp(value)) without overflow."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def partial_bce_oracle(logits: Tensor, targets: Tensor, *, alpha: float, beta: float, gamma: float) -> float:
    """Durand's eq. 1 image by image, label by label."""
    B, C = targets.shape
    total = 0.0
    for row in range(B):
        known = [c for c in range(C) if int(targets[row, c]) != 0]
        if known:
            g = alpha * (len(known) / C) ** gamma + beta
            total += g / C * sum(softplus(-int(targets[row, c]) * float(logits[row, c])) for c in known)
    return total / B


def partial_bce_gradient_oracle(logits: Tensor, targets: Tensor, *, alpha: float, beta: float, gamma: float) -> Tensor:
    """(B, C) float64: g(p_i) / (B C) * (sigmoid(x) - [y = +1]) where known, 0 elsewhere."""
    B, C = targets.shape
    gradient = torch.zeros(B, C, dtype=torch.float64)
    for row in range(B):
        num_known = sum(int(targets[row, c]) != 0 for c in range(C))
        for c in range(C):
            if int(targets[row, c]) != 0:
                g = alpha * (num_known / C) ** gamma + beta
                sigmoid = 1.0 / (1.0 + math.exp(-float(logits[row, c])))
                gradient[row, c] = g / (B * C) * (sigmoid - (int(targets[row, c]) == 1))
    return gradient


def masked_mean_bce_oracle(logits: Tensor, targets: Tensor) -> float:
    """Mean over every known label; 0 when there is none."""
    losses = [
        softplus(-int(targets[row, c]) * float(logits[row, c]))
        for row in range(targets.shape[0])
        for c in range(targets.shape[1])
        if int(targets[row, c]) != 0
    ]
    return sum(losses) / len(losses) if losses else 0.0


def random_targets(shape: tuple[int, int], known_fraction: float, generator: torch.Generator) -> Tensor:
    """(B, C) int8: each label known with this probability, then present with probability 0.3."""
    is_known = torch.rand(shape, generator=generator) < known_fraction
    is_present = torch.rand(shape, generator=generator) < 0.3
    return torch.where(is_known, torch.where(is_present, 1, -1), 0).to(torch.int8)
