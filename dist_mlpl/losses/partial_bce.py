"""Owns binary cross-entropy over known labels: partial-BCE, its normaliser g(p), and the masked mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_mlpl.errors import ConfigError
from dist_mlpl.losses.rowwise import precise, row_blocks

Weigh = Callable[[Tensor], Tensor]  # (b,) counts of known labels -> (b,) weights of the images

_FEW = 1 / 10  # below this share of known labels, gathering them is faster on a CPU


def partial_bce(
    logits: Tensor, targets: Tensor, *, alpha: float = -4.45, beta: float = 5.45, gamma: float = 1.0
) -> Tensor:
    """Mean over images of g(p_i)/C * sum over known labels of softplus(-y x).

    p_i is the share of image i's labels that are known. An image with none counts in the mean and adds exactly 0.
    With every label known and alpha + beta = 1 this equals `F.binary_cross_entropy_with_logits` bit for bit, gradient
    included.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}; a 0 has no part in value or gradient.
        alpha, beta, gamma: see `normaliser`. (0, 1, any) divides by C; (1, 0, -1) divides by the known count.

    Returns:
        () non-negative, connected to `logits` even when nothing is known.

    Source: Durand et al., CVPR 2019, eq. 1 and 2.
    """

    def weigh(num_known: Tensor) -> Tensor:
        return normaliser(num_known.clamp(min=1) / targets.shape[1], alpha, beta, gamma)  # none known: any g will do

    return _mean_over_entries(logits, targets, weigh)


def image_mean_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over images of the mean of softplus(-y x) over the image's known labels: all images weigh the same.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}.

    Returns:
        () non-negative; an image with nothing known counts in the mean and adds 0.
    """
    return partial_bce(logits, targets, alpha=1.0, beta=0.0, gamma=-1.0)


def masked_mean_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of softplus(-y x) over all known labels of the batch: images with more labels weigh more.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}.

    Returns:
        () non-negative; 0, still connected to `logits`, when nothing is known.
    """
    mean = _mean_over_entries(logits, targets, torch.ones_like)
    return mean * (targets.numel() / torch.count_nonzero(targets).clamp(min=1).to(mean.dtype))


def normaliser(known_fraction: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """g(p) = alpha * p**gamma + beta, the weight of an image whose share of known labels is p.

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
        g0: the weight wanted at p0.

    Raises:
        ConfigError: gamma is 0, or p0 outside (0, 1).

    Source: Durand et al., CVPR 2019.
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


def _mean_over_entries(logits: Tensor, targets: Tensor, weigh: Weigh) -> Tensor:
    """() mean over all B * C entries of the image's weight times softplus(-y x), or 0 where unknown."""
    if targets.numel() == 0:
        return logits.to(precise(logits)).sum()
    if logits.device.type == "cpu" and int(torch.count_nonzero(targets)) < _FEW * targets.numel():
        return _mean_of_few(logits, targets, weigh)
    mean: Tensor = _DenseMean.apply(logits, targets, weigh)
    return mean


def _mean_of_few(logits: Tensor, targets: Tensor, weigh: Weigh) -> Tensor:
    """Compute `_mean_over_entries` from the known entries only."""
    index = targets.flatten().nonzero()[:, 0]  # (K,) addresses of the known labels
    rows = index.div(targets.shape[1], rounding_mode="floor")
    num_known = rows.bincount(minlength=targets.shape[0]).to(precise(logits))  # (B,)
    x = logits.flatten()[index].to(precise(logits))  # (K,)
    is_present = (targets.flatten()[index] > 0).to(x.dtype)
    total = F.binary_cross_entropy_with_logits(x, is_present, weight=weigh(num_known)[rows], reduction="sum")
    return total / targets.numel()


class _DenseMean(torch.autograd.Function):
    """`_mean_over_entries` over all entries, in blocks; keeps only its arguments for the backward pass.

    Value and gradient do what `F.binary_cross_entropy_with_logits` does, on the same numbers in the same order, so the
    bits are equal. The gradient's sigmoid runs over the whole tensor at once, so that threads split it at the same
    places.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weigh: Weigh) -> Tensor:
        ctx.weigh = weigh
        ctx.save_for_backward(logits, targets)
        losses = torch.empty_like(logits, dtype=precise(logits))  # (B, C)
        for part in row_blocks(logits):
            x = logits[part].to(losses.dtype)
            is_present, weights = _coded(targets[part], weigh, x.dtype)
            log_sigmoid = x.clamp(max=0).sub_(x.abs().neg_().exp_().log1p_())
            torch.mul(1.0 - is_present, x, out=losses[part]).sub_(log_sigmoid).mul_(weights)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets = ctx.saved_tensors
        slope = torch.sigmoid(logits.to(precise(logits)))  # (B, C)
        if torch.is_grad_enabled():  # a second derivative is wanted: nothing in place
            is_present, weights = _coded(targets, ctx.weigh, slope.dtype)
            slope = (slope - is_present) * grad_outputs[0] * weights / slope.numel()
        else:
            for part in row_blocks(logits):
                is_present, weights = _coded(targets[part], ctx.weigh, slope.dtype)
                slope[part].sub_(is_present).mul_(grad_outputs[0]).mul_(weights).div_(slope.numel())
        return slope.to(logits.dtype), None, None


def _coded(targets: Tensor, weigh: Weigh, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(b, C) 1.0 where present, else 0; and (b, C) the image's weight where known, 0 where unknown."""
    code = targets.to(dtype)
    is_known = code.abs()
    return code.clamp(min=0), is_known.mul_(weigh(is_known.sum(dim=1))[:, None])
