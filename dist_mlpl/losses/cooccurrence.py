"""Owns the loss of pairs of classes: asymmetric focal cross-entropy on how likely two classes are present together."""

from __future__ import annotations

import torch
from torch import Tensor

_CLIP = 0.05  # probability margin of pairs that are not together
_SMALLEST_LIKELIHOOD = 1e-8  # logarithms are taken of nothing smaller; beyond, the gradient is 0


def cooccurrence_loss(logits: Tensor, is_together: Tensor) -> Tensor:
    """Sum over pairs of -(1 - p) log p where both classes are present, of -(1 - n)^2 log n elsewhere.

    p = sigmoid(logit), n = min(1 - p + 0.05, 1). The focal weights have a gradient too.

    Args:
        logits: (M,), any floating type; computed in float32, or float64 if given so.
        is_together: (M,) bool.

    Returns:
        () non-negative; 0 and connected for M = 0.

    Source: SST's code (gamma 1 and 2), where the weights are not held constant.
    """
    p = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    absent = (1.0 - p + _CLIP).clamp(max=1.0)
    of_together = (1.0 - p) * p.clamp(min=_SMALLEST_LIKELIHOOD).log()
    of_others = (1.0 - absent) ** 2 * absent.log()
    return -torch.where(is_together, of_together, of_others).sum()
