"""Owns the losses made for one known positive per image: AN, AN-LS, WAN, EPR, ROLE, EN, EM and APL.

The papers have present and unobserved labels only. Here a known absent one costs -log(1 - p) in every loss, and the
formula for unobserved labels applies to unknown ones. Losses are sums over images and classes; the papers' are means:
divide by B * C.

  AN     assume_negative_loss(...)
  AN-LS  assume_negative_loss(..., smoothing=0.1)
  WAN    assume_negative_loss(..., unknown_weight=1 / (C - 1))
  EPR    observed_loss(...) / (B * C) + count_penalty(logits, ...)
  ROLE   estimator_loss(...) / (B * C) + (count_penalty(logits, ...) + count_penalty(estimates, ...)) / 2
  EN     expected_negative_loss(...)
  EM     entropy_loss(...)
  APL    entropy_loss(..., pseudo_targets=..., soft_targets=..., pseudo_weight=...)

Source: Cole et al., CVPR 2021 (AN to ROLE), Verelst et al., WACV 2023 (EN), Zhou et al., ECCV 2022 (EM, APL); values as
in their released code; EN has none. Logarithms are nl(v) = -log(v + 1e-5), in EN exact.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_mlpl.errors import ConfigError
from dist_mlpl.labels import ABSENT, PRESENT, UNKNOWN
from dist_mlpl.losses.rowwise import sum_of_rows, top_of_rows
from dist_mlpl.losses.threshold import Reduce

_EPSILON = 1e-5


def observed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of nl(p) over present and nl(1 - p) over absent labels; unknown ones have no part in value or gradient.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}.

    Returns:
        (), additive over images.
    """
    return sum_of_rows(_observed, logits, targets)


def assume_negative_loss(
    logits: Tensor, targets: Tensor, *, smoothing: float = 0.0, unknown_weight: float = 1.0
) -> Tensor:
    """Sum of nl(p) over present, nl(1 - p) over absent and unknown labels: AN; AN-LS with smoothing; WAN with a weight.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}.
        smoothing: e of AN-LS, in [0, 1): for present and unknown labels their own term weighs 1 - e, the opposite e.
        unknown_weight: weight of unknown labels; WAN's is 1 / (C - 1).

    Returns:
        (), additive over images.

    Source: Cole et al., CVPR 2021; e on both sides, as in the released code (e / 2 is the usual smoothing).
    """

    def losses(x: Tensor, y: Tensor) -> Tensor:
        is_present, is_unknown = (y == PRESENT).to(x.dtype), (y == UNKNOWN).to(x.dtype)
        share = (1.0 - smoothing) * is_present + smoothing * is_unknown  # weight of nl(p)
        return (1.0 + (unknown_weight - 1.0) * is_unknown) * _soft(x, share)

    return sum_of_rows(losses, logits, targets)


def count_penalty(logits: Tensor, *, expected_positives: float, reduce: Reduce | None = None) -> Tensor:
    """EPR's R(p): the squared difference of an image's mean predicted number of positives and k, divided by C^2.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        expected_positives: k; VOC 1.5, COCO 2.9, NUS-WIDE 1.9, CUB 31.4.
        reduce: sums a tensor over ranks; None for one rank.

    Returns:
        () non-negative: this rank's share. The shares sum to R of the batch of all ranks, their gradients to its
        gradient; second derivatives across ranks are left out. 0 when this rank has no image.

    Collective: through `reduce`, on all ranks, two numbers.

    Source: Cole et al., CVPR 2021.
    """
    count = sum_of_rows(torch.sigmoid, logits)
    num_images = logits.shape[0]
    whole = torch.stack([count.detach(), count.new_tensor(num_images)])
    whole = whole if reduce is None else reduce(whole)
    # The value is that of all ranks, the gradient this rank's own.
    mean = (whole[0] + (count - count.detach())) / whole[1].clamp(min=1)
    penalty = ((mean - expected_positives) / logits.shape[1]) ** 2
    return penalty - penalty.detach() * (1.0 - num_images / whole[1].clamp(min=1))


def estimator_loss(logits: Tensor, estimates: Tensor, targets: Tensor) -> Tensor:
    """ROLE without its penalties: classifier and label estimator each learn from known labels and from the other.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        estimates: (B, C), the label estimator's logits; it starts at logit(0.995) where present, logit(0.005) where
            absent, uniform in logit(0.4) to logit(0.6) where unknown.
        targets: (B, C) int8 in {-1, 0, 1}.

    Returns:
        (), additive over images, with gradients in both `logits` and `estimates`.

    Source: Cole et al., CVPR 2021.
    """

    def losses(x: Tensor, other: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (_observed(x, y) + _soft(x, torch.sigmoid(other.to(x.dtype))))

    return sum_of_rows(losses, logits, estimates.detach(), targets) + sum_of_rows(
        losses, estimates, logits.detach(), targets
    )


def num_expected_positives(expected_positives: float) -> int:
    """Round the expected number of positives of an image to a whole number, halves up."""
    return math.floor(expected_positives + 0.5)


def expected_negative_loss(logits: Tensor, targets: Tensor, scores: Tensor, *, expected_positives: float) -> Tensor:
    """Sum of -log p over present and -log(1 - p) over absent and expected absent labels.

    Unknown labels are expected absent except the likeliest of each image by `scores`, as many as K, rounded, less the
    image's present labels. These have no part in value or gradient.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}.
        scores: (B, C) float, by which unknown labels are ranked: predictions averaged over earlier epochs. Of equal
            scores any may come first.
        expected_positives: K; the values of Cole et al. for EPR are a starting point, the paper's are not known. 0
            leaves nothing out: AN with exact logarithms, for epochs before there are scores.

    Returns:
        () non-negative, additive over images.

    Source: Verelst et al., WACV 2023, for the principle; no code is known and the rule here is a reconstruction.
    """
    num_expected = num_expected_positives(expected_positives)

    def losses(x: Tensor, y: Tensor, ranking: Tensor) -> Tensor:
        num_present = (y == PRESENT).sum(dim=1, keepdim=True)
        left_out = top_of_rows(ranking.to(x.dtype), y.to(x.dtype).abs(), num_expected, used=num_present)
        return -F.logsigmoid(torch.where(y == PRESENT, x, -x)) * (1.0 - left_out)

    return sum_of_rows(losses, logits, targets, scores.detach())


def entropy_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    entropy_weight: float,
    pseudo_targets: Tensor | None = None,
    soft_targets: Tensor | None = None,
    pseudo_weight: float = 1.0,
) -> Tensor:
    """Sum of nl over known labels, less the weighted entropy of unknown ones (EM), plus nl to soft pseudo-labels (APL).

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}.
        entropy_weight: a >= 0; VOC 0.2, COCO and NUS-WIDE 0.1, CUB 0.01; choose it smaller the larger C is.
        pseudo_targets: (B, C) int8; where it is not 0 and the label is unknown, `soft_targets` replaces the entropy.
        soft_targets: (B, C) in [0, 1], the score at which the label was pseudo-labelled.
        pseudo_weight: b >= 0; VOC 0.02, COCO 0.9, NUS-WIDE 0.2, CUB 0.4.

    Returns:
        (), additive over images; may be negative, as entropy is maximised.

    Raises:
        ConfigError: pseudo-targets without soft targets, or the other way round.

    Source: Zhou et al., ECCV 2022.
    """

    def unlabelled(x: Tensor, y: Tensor) -> Tensor:
        is_unknown = (y == UNKNOWN).to(x.dtype)
        return _observed(x, y) - entropy_weight * is_unknown * _soft(x, torch.sigmoid(x))

    if pseudo_targets is None and soft_targets is None:
        return sum_of_rows(unlabelled, logits, targets)
    if pseudo_targets is None or soft_targets is None:
        raise ConfigError(
            f"{'soft' if pseudo_targets is None else 'pseudo'}_targets alone",
            expected="pseudo_targets and soft_targets, or neither",
            where="entropy_loss",
            next_step="give both of a relabelling round, or neither for EM",
        )

    def losses(x: Tensor, y: Tensor, pseudo: Tensor, soft: Tensor) -> Tensor:
        is_pseudo = (y == UNKNOWN) & (pseudo != UNKNOWN)
        believed = pseudo_weight * _soft(x, torch.where(is_pseudo, soft, 0.0).to(x.dtype))
        return torch.where(is_pseudo, believed, unlabelled(x, y))

    return sum_of_rows(losses, logits, targets, pseudo_targets, soft_targets.detach())


def _negative_logs(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(b, C) each: nl(p) and nl(1 - p)."""
    return -torch.log(torch.sigmoid(logits) + _EPSILON), -torch.log(torch.sigmoid(-logits) + _EPSILON)


def _observed(logits: Tensor, targets: Tensor) -> Tensor:
    """(b, C) nl(p) where present, nl(1 - p) where absent, 0 where unknown."""
    present, absent = _negative_logs(logits)
    return (targets == PRESENT) * present + (targets == ABSENT) * absent


def _soft(logits: Tensor, probs: Tensor) -> Tensor:
    """(b, C) expected nl for labels that are present with probabilities `probs`."""
    present, absent = _negative_logs(logits)
    return probs * present + (1.0 - probs) * absent
