"""Owns the losses that treat suspicious unknown labels as missing positives: LL-R, LL-Ct, LL-Cp, Hill and SPLC.

The papers have present and unobserved labels only; here the formula for unobserved labels applies to unknown ones, and
known absent ones are never doubted. Losses are sums over images and classes; Large Loss's are means: divide by B * C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_mlpl.errors import ConfigError, nearest_names
from dist_mlpl.labels import PRESENT, UNKNOWN
from dist_mlpl.losses.rowwise import precise, sum_of_rows

Scheme = Literal["reject", "correct"]


def group_thresholds(
    logits: Tensor, targets: Tensor, *, num_large: Sequence[int], group_sizes: Sequence[int]
) -> Tensor:
    """Logits from which on unknown labels, taken as absent, have the largest losses of their group: exactly k of it.

    That loss grows with the logit, so ranking by logits is the same, and logits do not saturate. Of equal ones the
    first are taken, image by image in their order.

    Args:
        logits: (B, C), any floating type.
        targets: (B, C) int8 in {-1, 0, 1}.
        num_large: k of each group, >= 0. All unknown labels where a group has fewer.
        group_sizes: number of images of each group, in the order of the rows; the sum is B, and 0 is allowed.

    Returns:
        (B, C) float32, or float64 for such logits, without gradient: where `targets` is unknown and the logit is not
        below it, the loss is large. The same in a whole group but for equal logits beyond k, which get infinity.

    Source: Kim et al., CVPR 2022, with a batch for a group.
    Differs: the code takes all equal to the k-th, more than k.
    """
    x = logits.detach().to(precise(logits))
    if max(num_large, default=0) == 0:
        return x.new_tensor(math.inf).expand_as(x)
    sizes = torch.tensor(group_sizes)
    group = torch.arange(len(sizes)).repeat_interleave(sizes)  # (B,)
    place = torch.arange(x.shape[0]) - (sizes.cumsum(0) - sizes)[group]
    group, place = group.to(x.device), place.to(x.device)
    grouped = x.new_full((len(sizes), int(sizes.max()), x.shape[1]), -math.inf)
    grouped[group, place] = x.masked_fill(targets != UNKNOWN, -math.inf)
    flat = grouped.flatten(1)  # (groups, largest size * C)
    k = torch.tensor(num_large, device=x.device)[:, None].clamp(max=flat.shape[1])
    largest = flat.topk(min(max(num_large), flat.shape[1]), dim=1).values
    threshold = largest.gather(1, (k - 1).clamp(min=0)).masked_fill(k == 0, math.inf)  # (groups, 1)
    is_equal, num_left = flat == threshold, k - (flat > threshold).sum(dim=1, keepdim=True)
    is_late = is_equal & (is_equal.cumsum(dim=1, dtype=torch.int32) > num_left)
    return torch.where(is_late, math.inf, threshold).view_as(grouped)[group, place]


def large_loss(logits: Tensor, targets: Tensor, threshold: Tensor, *, scheme: Scheme) -> Tensor:
    """Sum of binary cross-entropies; unknown is absent, but at or above the threshold rejected or taken as present.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}.
        threshold: (B, C) from `group_thresholds`. Infinity gives plain assume-negative.
        scheme: `reject` (LL-R): no loss, no gradient; `correct` (LL-Ct, LL-Cp): the loss of a present label.

    Returns:
        () non-negative, additive over images for a given threshold; for the mean divide by B * C, rejected ones
        included.

    Raises:
        ConfigError: an unknown scheme.

    Source: Kim et al., CVPR 2022.
    """
    if scheme not in get_args(Scheme):
        raise ConfigError(
            f"scheme {scheme!r}",
            expected=nearest_names(scheme, get_args(Scheme)),
            where="large_loss",
            next_step="set scheme to one of these",
        )

    def losses(x: Tensor, y: Tensor, threshold: Tensor) -> Tensor:
        is_large = (y == UNKNOWN) & (x.detach() >= threshold)
        if scheme == "reject":
            return -F.logsigmoid(torch.where(y == PRESENT, x, -x)) * ~is_large
        return -F.logsigmoid(torch.where((y == PRESENT) | is_large, x, -x))

    return sum_of_rows(losses, logits, targets, threshold)


def permanent_corrections(logits: Tensor, targets: Tensor, threshold: Tensor) -> Tensor:
    """LL-Cp's corrections: unknown labels at or above the threshold, to be stored as present for good.

    Args:
        logits: (B, C), any floating type.
        targets: (B, C) int8 in {-1, 0, 1}.
        threshold: (B, C) from `group_thresholds`.

    Returns:
        (B, C) bool.

    Source: Kim et al., CVPR 2022, in BoostLU's code (Kim et al., CVPR 2023).
    Differs: the first code corrects with >= but stores with >, all but the k-th: nothing at all for k = 1.
    """
    return (targets == UNKNOWN) & (logits.detach().to(precise(logits)) >= threshold)


def hill_loss(
    logits: Tensor, targets: Tensor, *, margin: float = 1.0, gamma: float = 2.0, limit: float = 1.5
) -> Tensor:
    """Sum of a focal loss at x - m over present, (limit - p) p^2 over unknown, a focal loss over absent labels.

    At limit 1.5 the derivative of an unknown label's loss, 3 p (1 - p), vanishes at p = 1, where it is likely present.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}.
        margin: m, subtracted from the logits of present labels.
        gamma: focusing exponent of known labels, >= 0; differentiated.
        limit: the paper's lambda, >= 1.

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
    """Sum of focal losses; unknown is absent, but present where p exceeds the threshold while correcting.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}.
        is_correcting: False in the first epoch (of 10 to 30), True after.
        margin: m, subtracted from the logits of known present labels.
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
    """(b, C) -(1 - l)^gamma log l of the likelihood l = sigmoid(signed); value and gradient are always finite."""
    return torch.exp(gamma * F.logsigmoid(-signed)) * -F.logsigmoid(signed)
