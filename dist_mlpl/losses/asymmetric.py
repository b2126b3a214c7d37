"""Owns the asymmetric focal loss with one exponent per kind of label: present, absent, unknown (ASL, P-ASL)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_mlpl.errors import ConfigError
from dist_mlpl.losses.rowwise import sum_of_rows

_SMALLEST_LIKELIHOOD = 1e-8  # lower bound of a logarithm's argument; below, the gradient is 0


class Focus(NamedTuple):
    """The parameters of the asymmetric focal loss.

    Args:
        gamma_pos, gamma_neg, gamma_unknown: focusing exponents of present, absent and unknown labels, >= 0.
        clip: probability margin of absent and unknown labels, in [0, 1): at p <= clip their loss is 0.
    """

    gamma_pos: float
    gamma_neg: float
    gamma_unknown: float
    clip: float

    def checked(self) -> Focus:
        """Return itself if the values are valid.

        Raises:
            ConfigError: an exponent below 0 or a margin outside [0, 1).
        """
        if min(self[:3]) < 0 or not 0 <= self.clip < 1:
            raise ConfigError(
                ", ".join(f"{name} {value:g}" for name, value in self._asdict().items()),
                expected="exponents of 0 or more and a clip from 0 up to, not including, 1",
                where="asymmetric_loss, selective_loss",
                next_step="start from 1, 2 and 7 with clip 0, or from ASL's 0, 4 and 4 with clip 0.05",
            )
        return self


def asymmetric_loss(
    logits: Tensor, targets: Tensor, *, gamma_pos: float, gamma_neg: float, gamma_unknown: float, clip: float = 0.0
) -> Tensor:
    """Sum over images and classes of -(1 - l)^gamma log l, where l is the likelihood of the label.

    l is p for a present label and min(1 - p + clip, 1) for an absent one; an unknown label counts as absent, with an
    exponent of its own. gamma_unknown = gamma_neg is ASL; three exponents are P-ASL in its Negative mode. The focal
    weight (1 - l)^gamma is not differentiated.

    Args:
        logits: (B, C), any floating type; computed in float32, or float64 if given so.
        targets: (B, C) int8 in {-1, 0, 1}.
        gamma_pos, gamma_neg, gamma_unknown: exponents >= 0; ASL on COCO 0, 4, 4; P-ASL on Open Images 1, 2, 7
            (second-hand).
        clip: probability margin in [0, 1); ASL on COCO 0.05.

    Returns:
        () non-negative, additive over images.

    Raises:
        ConfigError: see `Focus.checked`.

    Source: Ridnik et al., ICCV 2021; Ben-Baruch et al., CVPR 2022; the weight held constant as in the ASL training
        script and in all of the CSL code (ASL's memory-saving class differentiates it).
    Differs: without a margin, log-likelihoods are computed from logits, so that confident entries keep their precision.
    """
    focus = Focus(gamma_pos, gamma_neg, gamma_unknown, clip).checked()
    return sum_of_rows(lambda x, y: focal_losses(x, y, focus), logits, targets)


def focal_losses(logits: Tensor, targets: Tensor, focus: Focus, keep: Tensor | None = None) -> Tensor:
    """The loss of each entry, (b, C).

    Args:
        logits: (b, C) float32 or float64.
        targets: (b, C) int8 in {-1, 0, 1}.
        focus: checked by the caller.
        keep: (b, C) weight of each entry, a constant of the logits' type; None: 1.
    """
    # Arithmetic in place of `torch.where`, which is ten times slower on a CPU where labels are mixed.
    code = targets.to(logits.dtype)
    present = code.clamp(min=0)
    absent = present - code
    signed = (2.0 * present - 1.0) * logits
    gamma = (present * (focus.gamma_pos - focus.gamma_unknown)).add_(focus.gamma_unknown)
    gamma.add_(absent, alpha=focus.gamma_neg - focus.gamma_unknown)
    if focus.clip == 0:
        log_likelihood = F.logsigmoid(signed)
        weight = torch.exp(gamma * F.logsigmoid(-signed.detach()))  # log(1 - l), in full precision
        floor = math.log(_SMALLEST_LIKELIHOOD)
        log_likelihood = F.threshold(log_likelihood, floor, floor)
    else:
        likelihood = (torch.sigmoid(signed) + focus.clip * (1.0 - present)).clamp(max=1.0)
        weight = (1.0 - likelihood.detach()) ** gamma
        log_likelihood = likelihood.clamp(min=_SMALLEST_LIKELIHOOD).log()
    if keep is not None:
        weight *= keep
    return weight.neg_() * log_likelihood
