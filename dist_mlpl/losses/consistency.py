"""Owns the losses that compare predictions with a memory of earlier ones: of an image's classes, and of their maps.

Losses are sums over images of means, so that a batch may be cut between any two images.

Source: Verelst et al., WACV 2023; no code is known. The L1 distance is that of a third party's re-implementation, which
    states it for maps; for classes it is an assumption.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_mlpl.losses.rowwise import precise


def consistency_loss(logits: Tensor, scores: Tensor, is_told: Tensor) -> Tensor:
    """CL: sum over images of the mean distance |p - q| over the classes that have a history.

    Args:
        logits: (n, M), any floating type; computed in float32, or float64 if given so.
        scores: (n, M) in [0, 1], q: running averages of earlier predictions, constants.
        is_told: (n, M) bool, classes with a history; the others have no part in value or gradient.

    Returns:
        () non-negative, additive over images; an image without history adds 0.
    """
    probs = torch.sigmoid(logits.to(precise(logits)))
    return _mean_distances(probs, scores, is_told).sum()


def spatial_consistency_loss(map_logits: Tensor, history: Tensor) -> Tensor:
    """SCL: sum over images of the mean distance |F - H| over the cells that have a history.

    Args:
        map_logits: (n, M, G, G), F before the sigmoid, any floating type; computed in float32, or float64 if given so.
        history: (n, M, G, G) in [0, 1], H as the view shows it, constants; NaN where a cell has none: such cells have
            no part in value or gradient.

    Returns:
        () non-negative, additive over images; an image without history adds 0.

    Differs: the mean is over cells with history; the re-implementation's is over all cells of all classes, with 0 for
        cells never seen, which makes it an assume-negative loss at first.
    """
    probs = torch.sigmoid(map_logits.to(precise(map_logits)))
    return _mean_distances(probs.flatten(1), history.flatten(1), ~history.isnan().flatten(1)).sum()


def _mean_distances(probs: Tensor, memory: Tensor, is_told: Tensor) -> Tensor:
    """(n,) mean distances over the entries of rows (n, k) where `is_told`; 0 where a row has none."""
    known = torch.where(is_told, memory.detach().to(probs.dtype), 0.0)  # a NaN times 0 would be a NaN
    distances = (probs - known).abs() * is_told
    return distances.sum(dim=1) / is_told.sum(dim=1).clamp(min=1)
