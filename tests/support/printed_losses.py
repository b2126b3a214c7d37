"""Owns the papers' equations as tensor code, line by line: what the package's losses are timed against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def printed_partial_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Durand's eq. 1 as printed."""
    C = targets.shape[1]
    p = (targets != 0).sum(dim=1) / C
    g = -4.45 * p**1.0 + 5.45
    present = (targets == 1) * torch.log(1 / (1 + torch.exp(-logits)))
    absent = (targets == -1) * torch.log(torch.exp(-logits) / (1 + torch.exp(-logits)))
    return (-(g / C) * (present + absent).sum(dim=1)).mean()


def stable_partial_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """The same with softplus(-y x), the stable form."""
    C = targets.shape[1]
    known = targets != 0
    p = known.sum(dim=1) / C
    g = -4.45 * p**1.0 + 5.45
    return (g / C * (known * F.softplus(-targets * logits)).sum(dim=1)).mean()


def printed_selective(logits: Tensor, targets: Tensor, *, top_k: int) -> Tensor:
    """CSL: exponents 1, 2, 7 and the top K of every image."""
    positive, negative, unknown = (targets == 1).float(), (targets == -1).float(), (targets == 0).float()
    p = torch.sigmoid(logits)
    q = 1 - p
    log_p, log_q = torch.log(p.clamp(min=1e-8)), torch.log(q.clamp(min=1e-8))
    likelihoods = positive * log_p + negative * log_q + unknown * log_q
    with torch.no_grad():
        focus = (1 - p * positive - q * (negative + unknown)) ** (1 * positive + 2 * negative + 7 * unknown)
        likely = torch.where(unknown > 0, p, -1.0).topk(top_k, dim=1).indices
        selected = torch.ones_like(p).scatter_(1, likely, 0.0)
        selected = torch.where(unknown > 0, selected, 1.0)
    return -(likelihoods * focus * selected).sum()
