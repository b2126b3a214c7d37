"""Owns the class-aware selective loss (CSL): which unknown labels take part as weak negatives, and which do not."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from dist_mlpl.errors import ConfigError, nearest_names
from dist_mlpl.labels import UNKNOWN
from dist_mlpl.losses.asymmetric import Focus, focal_losses
from dist_mlpl.losses.rowwise import precise, sum_of_rows, top_of_rows
from dist_mlpl.losses.threshold import Reduce, kth_largest

Mode = Literal["ignore", "negative", "selective"]
Scope = Literal["image", "batch"]


def selective_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    mode: Mode,
    gamma_pos: float,
    gamma_neg: float,
    gamma_unknown: float,
    clip: float = 0.0,
    top_k: int | None = None,
    scope: Scope = "image",
    prior: Tensor | None = None,
    prior_threshold: float | None = None,
    exclude_prior_ignored: bool = True,
    reduce: Reduce | None = None,
) -> Tensor:
    """Sum over images and classes of the asymmetric loss, without the unknown labels that are likely present.

    `ignore` leaves out every unknown label, `negative` none. `selective` leaves out the unknown labels of frequent
    classes (`prior`) and the likeliest unknown labels (`top_k`); what remains is a weak negative. Known labels always
    take part. Ignored labels have no part in value or gradient.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}.
        mode: as above; the arguments after `clip` apply to `selective` only.
        gamma_pos, gamma_neg, gamma_unknown: exponents >= 0; on Open Images 1, 2, 7 (second-hand), on COCO 0, 1, 4.
        clip: probability margin of absent and unknown labels, in [0, 1).
        top_k: K, how many of the likeliest unknown labels to ignore; 5 of COCO's 80 classes, 200 of Open Images' 9,605
            (second-hand). None: 0.
        scope: `image`: K of every image; `batch`: the K * B likeliest of the batch of all ranks, and all tied with the
            last of them.
        prior: (C,) estimated frequency of each class, in [0, 1].
        prior_threshold: classes whose prior exceeds it are ignored where unknown; 0.5 on COCO, 0.05 on Open Images
            (second-hand). Set it on the scale of the estimated prior, which overestimates frequencies.
        exclude_prior_ignored: False lets labels that the prior ignores use up places of the top K, as the released
            code does.
        reduce: sums a tensor over ranks; needed by scope `batch` on several ranks.

    Returns:
        () non-negative; additive over images except in scope `batch`, where the ranks' shares sum to the batch's loss.

    Raises:
        ConfigError: an unknown mode or scope; only one of `prior` and `prior_threshold`, or a prior of another shape;
            see also `Focus.checked`.

    Collective: in scope `batch`, through `reduce`: one integer and twice 512 KiB (float32).

    Source: Ben-Baruch et al., CVPR 2022; values as in the released code.
    Differs: the top K is per image, as in the paper (the code's is `batch`); classes ignored by the prior are not
        candidates; candidates are ranked by logit, which does not saturate as the sigmoid does.
    """
    focus = Focus(gamma_pos, gamma_neg, gamma_unknown, clip).checked()
    _check_choices(mode, scope)
    if mode == "negative":
        return sum_of_rows(lambda x, y: focal_losses(x, y, focus), logits, targets)
    if mode == "ignore":
        return sum_of_rows(lambda x, y: focal_losses(x, y, focus, keep=y.to(x.dtype).abs()), logits, targets)

    frequent = _frequent_classes(prior, prior_threshold, targets)  # (C,)
    barred = frequent if exclude_prior_ignored else None  # classes whose unknown labels do not compete for the top K
    bound = None
    if scope == "batch":
        is_candidate = targets == UNKNOWN if barred is None else (targets == UNKNOWN) & (barred == 0)
        bound = _batch_bound(logits, is_candidate, top_k or 0, reduce)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        known, scores = y.to(x.dtype).abs(), x.detach()
        no_candidate = known if barred is None else torch.maximum(known, barred)
        if bound is None:
            left_out = top_of_rows(scores, no_candidate, top_k or 0)
        else:
            left_out = (1.0 - no_candidate) * (scores >= bound)
        if frequent is not None:
            left_out = torch.maximum(left_out, (1.0 - known) * frequent)
        return focal_losses(x, y, focus, keep=1.0 - left_out)

    return sum_of_rows(losses, logits, targets)


def _check_choices(mode: str, scope: str) -> None:
    for name, value, valid in (("mode", mode, get_args(Mode)), ("scope", scope, get_args(Scope))):
        if value not in valid:
            raise ConfigError(
                f"{name} {value!r}",
                expected=nearest_names(value, valid),
                where="selective_loss",
                next_step=f"set {name} to one of these",
            )


def _frequent_classes(prior: Tensor | None, prior_threshold: float | None, targets: Tensor) -> Tensor | None:
    """(C,) 1.0 for classes whose unknown labels the prior rule ignores, 0.0 for the others; None without a rule."""
    num_classes = targets.shape[1]
    if prior is None and prior_threshold is None:
        return None
    if prior is None or prior_threshold is None or prior.shape != (num_classes,):
        raise ConfigError(
            f"prior of shape {None if prior is None else tuple(prior.shape)}, prior_threshold {prior_threshold}",
            expected=f"both, the prior of shape ({num_classes},), or neither",
            where="selective_loss",
            next_step="estimate the prior with a model trained in mode `ignore`, and ignore classes above, say, 0.05",
        )
    return (prior.to(targets.device) > prior_threshold).float()


def _batch_bound(logits: Tensor, candidates: Tensor, top_k: int, reduce: Reduce | None) -> Tensor:
    """() the smallest logit among the top_k * B likeliest candidates of the batch of all ranks.

    Collective: through `reduce`, on all ranks; see `selective_loss`.
    """
    num_images = torch.tensor([logits.shape[0]], device=logits.device)
    num_images = num_images if reduce is None else reduce(num_images)
    likely = logits.detach().masked_select(candidates).to(precise(logits))
    return kth_largest(likely, top_k * int(num_images), reduce=reduce)
