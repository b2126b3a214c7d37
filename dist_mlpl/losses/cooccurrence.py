"""Owns the co-occurrence loss: asymmetric focal cross-entropy on the probability that two classes are both present."""

from __future__ import annotations

import torch
from torch import Tensor

_CLIP = 0.05  # probability margin of pairs that are not both present
_SMALLEST_LIKELIHOOD = 1e-8  # lower bound of a logarithm's argument; below, the gradient is 0


def cooccurrence_loss(logits: Tensor, is_together: Tensor) -> Tensor:
    """Sum over pairs of -(1 - p) log p where both classes are present, of -(1 - n)^2 log n elsewhere.

    p = sigmoid(logit), n = min(1 - p + 0.05, 1). The focal weights are differentiated too.

    Args:
        logits: (M,), one per pair, any floating type; computed in float32, or float64 if given so.
        is_together: (M,) bool, True where both classes are present.

    Returns:
        () non-negative; 0 and connected for M = 0.

    Source: SST's code (gamma 1 and 2), where the weights are not held constant.
    """
    p = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    absent = (1.0 - p + _CLIP).clamp(max=1.0)
    of_together = (1.0 - p) * p.clamp(min=_SMALLEST_LIKELIHOOD).log()
    of_others = (1.0 - absent) ** 2 * absent.log()
    return -torch.where(is_together, of_together, of_others).sum()
