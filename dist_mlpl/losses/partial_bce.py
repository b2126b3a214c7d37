"""Owns binary cross-entropy over known labels: partial-BCE, its normaliser g(p), and the masked mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_mlpl.errors import ConfigError


def partial_bce(
    logits: Tensor, targets: Tensor, *, alpha: float = -4.45, beta: float = 5.45, gamma: float = 1.0
) -> Tensor:
    """Mean over images of g(p_i)/C * sum over known labels of softplus(-y x).

    p_i is the share of image i's labels that are known. An image with none counts in the mean and adds exactly 0.
    With every label known and alpha + beta = 1 this is `F.binary_cross_entropy_with_logits` bit for bit, gradient too.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}; a 0 has no part in value or gradient.
        alpha, beta, gamma: of `normaliser`. (0, 1, any) divides by C; (1, 0, -1) divides by the known count.

    Returns:
        () non-negative, connected to `logits` even when nothing is known.

    Source: Durand et al., CVPR 2019, eq. 1 and 2.
    """
    num_known = (targets != 0).sum(dim=1)  # (B,)
    known_fraction = num_known.clamp(min=1).to(_precise(logits)) / targets.shape[1]  # nothing known: any g will do
    return _known_bce(logits, targets, normaliser(known_fraction, alpha, beta, gamma)[:, None], reduction="mean")


def masked_mean_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of softplus(-y x) over all known labels of the batch: images with more labels weigh more.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}.

    Returns:
        () non-negative; 0, still connected to `logits`, when nothing is known.
    """
    return _known_bce(logits, targets, 1.0, reduction="sum") / (targets != 0).sum().clamp(min=1)


def normaliser(known_fraction: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """g(p) = alpha * p**gamma + beta, the weight of an image of which the share p of labels is known.

    Args:
        known_fraction: p, any shape, in [0, 1].
        alpha, beta, gamma: real; g(1) = alpha + beta.

    Returns:
        g, same shape; infinite at p = 0 when gamma is negative.

    Source: Durand et al., CVPR 2019, eq. 2.
    Differs: written around p = 1, so that g(1) is exactly alpha + beta in float32.
    """
    return (alpha + beta) + alpha * (known_fraction**gamma - 1.0)


def solve_normaliser(gamma: float, p0: float, g0: float) -> tuple[float, float]:
    """The (alpha, beta) with g(1) = 1 and g(p0) = g0; (1, 0.1, 5) gives the paper's -4.45, 5.45 before rounding.

    Args:
        gamma: exponent, not 0.
        p0: share of known labels, in (0, 1).
        g0: weight wanted there.

    Raises:
        ConfigError: no such normaliser exists.

    Source: Durand et al., CVPR 2019, section 3.1.
    """
    if gamma == 0 or not 0 < p0 < 1:
        raise ConfigError(
            f"gamma {gamma}, p0 {p0}",
            expected="gamma other than 0 and p0 strictly between 0 and 1",
            where="solve_normaliser",
            next_step="choose the share of known labels p0 at which the weight shall be g0, say 0.1 and 5",
        )
    alpha = (g0 - 1.0) / (p0**gamma - 1.0)
    return alpha, 1.0 - alpha


def _known_bce(logits: Tensor, targets: Tensor, weight: Tensor | float, *, reduction: str) -> Tensor:
    """() weighed softplus(-y x), reduced over all B * C entries, of which the unknown weigh exactly 0.

    The library's own weighing and mean keep its order of operations, hence the equal bits when nothing is unknown.
    """
    precise = _precise(logits)
    weight = (targets != 0).to(precise) * weight  # (B, C)
    return F.binary_cross_entropy_with_logits(
        logits.to(precise), (targets > 0).to(precise), weight=weight, reduction=reduction
    )


def _precise(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
