"""Owns the losses that take suspicious unknown labels for missing positives: LL-R, LL-Ct, LL-Cp, Hill and SPLC.

The papers know present and unobserved labels; here the formula for the unobserved is for unknown labels alone and known
absent ones are never doubted. Losses are sums over images and classes; Large Loss means divide by B * C.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_mlpl.errors import ConfigError, nearest_names
from dist_mlpl.labels import PRESENT, UNKNOWN
from dist_mlpl.losses.rowwise import precise, sum_of_rows
from dist_mlpl.losses.threshold import Reduce, kth_largest

Scheme = Literal["reject", "correct"]


def large_loss_threshold(logits: Tensor, targets: Tensor, *, fraction: float, reduce: Reduce | None = None) -> Tensor:
    """The logit of the k-th largest loss among unknown labels taken as absent, k = ceil(B * C * fraction).

    That loss grows with the logit, so the logit ranks as well and never saturates.

    Args:
        logits: (B, C), any floating type.
        targets: (B, C) int8 in {-1, 0, 1}.
        fraction: r of all B * C entries, in [0, 1]. LL-R and LL-Ct: epochs finished times a rate (0.005 and 0.002);
            LL-Cp: a rate (0.001) in every batch after the first epoch.
        reduce: sums a tensor over ranks; B is then the images of all.

    Returns:
        () without gradient; infinite for k = 0, minus infinite when fewer labels are unknown.

    Collective: through `reduce`, on all ranks: one integer, then see `kth_largest`.

    Source: Kim et al., CVPR 2022.
    Differs: over the batch of all ranks; the original's is per device, where ranks with easy images reject too much.
    """
    num_images = torch.tensor([logits.shape[0]], device=logits.device)
    num_images = num_images if reduce is None else reduce(num_images)
    k = math.ceil(int(num_images) * logits.shape[1] * fraction)
    doubted = logits.detach().masked_select(targets == UNKNOWN).to(precise(logits))
    return kth_largest(doubted, k, reduce=reduce)


def large_loss(logits: Tensor, targets: Tensor, threshold: Tensor, *, scheme: Scheme) -> Tensor:
    """Sum of binary cross-entropies, unknown taken as absent; from the threshold on rejected or taken as present.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}.
        threshold: () of `large_loss_threshold`, or an average of earlier ones. Infinite is plain assume-negative.
        scheme: `reject` (LL-R): no loss, no gradient; `correct` (LL-Ct, LL-Cp): the loss of a present label.

    Returns:
        () non-negative, additive over images for a given threshold; rejected labels count in the mean's B * C.

    Raises:
        ConfigError: another scheme.

    Source: Kim et al., CVPR 2022.
    """
    if scheme not in get_args(Scheme):
        raise ConfigError(
            f"scheme {scheme!r}",
            expected=nearest_names(scheme, get_args(Scheme)),
            where="large_loss",
            next_step="set scheme to one of these",
        )

    def losses(x: Tensor, y: Tensor) -> Tensor:
        is_large = (y == UNKNOWN) & (x.detach() >= threshold)
        if scheme == "reject":
            return -F.logsigmoid(torch.where(y == PRESENT, x, -x)) * ~is_large
        return -F.logsigmoid(torch.where((y == PRESENT) | is_large, x, -x))

    return sum_of_rows(losses, logits, targets)


def permanent_corrections(logits: Tensor, targets: Tensor, threshold: Tensor) -> Tensor:
    """LL-Cp's flips: unknown labels strictly above the threshold, to be stored as present for good.

    Args:
        logits: (B, C), any floating type.
        targets: (B, C) int8 in {-1, 0, 1}.
        threshold: () of `large_loss_threshold`.

    Returns:
        (B, C) bool.

    Source: Kim et al., CVPR 2022; the code stores with > and corrects with >=.
    """
    return (targets == UNKNOWN) & (logits.detach().to(precise(logits)) > threshold)


def hill_loss(
    logits: Tensor, targets: Tensor, *, margin: float = 1.0, gamma: float = 2.0, limit: float = 1.5
) -> Tensor:
    """Sum of a focal loss at x - m over present, (limit - p) p^2 over unknown, a focal loss over absent labels.

    At limit 1.5 the slope in p of an unknown label, 3 p (1 - p), dies out at p = 1, where it is likely present.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}.
        margin: m, subtracted from the logits of present labels.
        gamma: focusing exponent of known labels, >= 0; differentiated.
        limit: lambda, >= 1.

    Returns:
        () non-negative, additive over images.

    Source: Zhang et al., arXiv 2112.07368.
    """

    def losses(x: Tensor, y: Tensor) -> Tensor:
        probs = torch.sigmoid(x)
        known = _focal(torch.where(y == PRESENT, x - margin, -x), gamma)
        return torch.where(y == UNKNOWN, (limit - probs) * probs**2, known)

    return sum_of_rows(losses, logits, targets)


def splc_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    is_correcting: bool,
    margin: float = 1.0,
    gamma: float = 2.0,
    threshold: float = 0.6,
) -> Tensor:
    """Sum of focal losses, unknown taken as absent; while correcting, as present where p exceeds the threshold.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}.
        is_correcting: False in the first epoch (of 10 to 30), True after.
        margin: m, subtracted from the logits of labels known to be present.
        gamma: focusing exponent, >= 0; differentiated.
        threshold: tau on p, in (0, 1); 0.6, or 0.65 where three quarters of the positives are known.

    Returns:
        () non-negative, additive over images.

    Source: Zhang et al., arXiv 2112.07368.
    """

    def losses(x: Tensor, y: Tensor) -> Tensor:
        is_present = y == PRESENT
        shifted = torch.where(is_present, x - margin, x)
        if is_correcting:
            is_present = is_present | ((y == UNKNOWN) & (torch.sigmoid(x.detach()) > threshold))
        return _focal(torch.where(is_present, shifted, -shifted), gamma)

    return sum_of_rows(losses, logits, targets)


def _focal(signed: Tensor, gamma: float) -> Tensor:
    """(b, C) -(1 - l)^gamma log l of the likelihood l = sigmoid(signed); finite with its slope for all logits."""
    return torch.exp(gamma * F.logsigmoid(-signed)) * -F.logsigmoid(signed)
