"""Owns the partial-BCE method: trunk, linear head, an optional graph over the labels, one loss over known labels."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.batch import Batch, Progress
from dist_mlpl.labels import ABSENT, UNKNOWN
from dist_mlpl.losses.partial_bce import image_mean_bce, masked_mean_bce, partial_bce, solve_normaliser
from dist_mlpl.methods.base import MethodSettings, training_targets
from dist_mlpl.methods.pooled import PooledMethod
from dist_mlpl.models.graph import LabelGraph, LabelGraphSettings


class PartialBceSettings(MethodSettings):
    """The settings of partial-BCE and of the plain losses it is compared with.

    Args:
        graph: a label graph on top of the logits; null: none.
        normalization: `durand`: mean over images, each weighted by g of its share of known labels; `image_mean`: mean
            over images of the mean over the image's known labels; `masked_mean`: mean over the known labels of the
            global batch; `assume_negative`: unknown counts as absent, mean over all labels.
        alpha, beta, gamma: g(p) = alpha * p**gamma + beta of `durand`; alpha + beta is 1, so that images with all
            labels known get plain binary cross-entropy.
        p0, g0: instead of alpha and beta: a share of known labels in (0, 1) and the weight g(p0) wanted there; 0.1 and
            5 give the paper's alpha and beta before rounding.
        pseudo_weight: w in [0, 1]: the loss is w times the loss with pseudo-labels plus 1 - w times that without them.
            At 1, as in the paper, a pseudo-label counts like a human one, in the loss and in p; at 0 it has no part.
    """

    name: Literal["partial_bce"] = "partial_bce"
    graph: LabelGraphSettings | None = None
    normalization: Literal["durand", "image_mean", "masked_mean", "assume_negative"] = "durand"
    alpha: float = -4.45
    beta: float = 5.45
    gamma: float = 1.0
    p0: float | None = Field(None, gt=0.0, lt=1.0)
    g0: float | None = Field(None, gt=0.0)
    pseudo_weight: float = Field(1.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _check_normaliser(self) -> PartialBceSettings:
        if self.normalization != "durand":
            because = f"normalization {self.normalization!r} does not use g(p)"
            self.refuse_idle(("alpha", "beta", "gamma", "p0", "g0"), because)
        if (self.p0 is None) != (self.g0 is None):
            raise ValueError("p0 and g0 go together: the share of known labels p0 at which the weight shall be g0")
        if self.p0 is not None:
            self.refuse_idle(("alpha", "beta"), "alpha and beta follow from p0 and g0: set one pair or the other")
        if self.p0 is not None and self.gamma == 0.0:
            raise ValueError("gamma 0 makes g(p) the same for every p; p0 and g0 need another")
        alpha, beta = self.coefficients
        if not abs(alpha + beta - 1.0) <= 1e-6:
            raise ValueError(f"alpha + beta is {alpha + beta:g}; it must be 1, so that g(1) = 1 (or set p0 and g0)")
        if (beta < 0 and self.gamma > 0) or (alpha < 0 and self.gamma < 0):
            raise ValueError(
                f"g(p) = {alpha:g} * p**{self.gamma:g} + {beta:g} is negative for small p: choose a larger g there"
            )
        return self

    @property
    def coefficients(self) -> tuple[float, float]:
        """(alpha, beta), as given or computed from p0 and g0."""
        if self.p0 is None or self.g0 is None:
            return self.alpha, self.beta
        return solve_normaliser(self.gamma, self.p0, self.g0)

    def build(self, *, num_classes: int, image_size: int) -> PartialBce:
        return PartialBce(self, num_classes=num_classes, image_size=image_size)


class PartialBce(PooledMethod):
    """One loss over known labels, human ones and, from the first relabelling round on, pseudo-labels; no banks.

    With a graph, loss and predictions use its corrected logits; heatmaps are still those of the head.

    Source: Durand et al., CVPR 2019.
    """

    def __init__(self, settings: PartialBceSettings, *, num_classes: int, image_size: int) -> None:
        super().__init__(settings, num_classes=num_classes, image_size=image_size)
        self.settings = settings
        self.graph = None if settings.graph is None else LabelGraph(settings.graph, num_classes)

    @torch.no_grad()
    def recall(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """See `Method.recall`; adds `num_human`, the number of known human labels, if the loss divides by it.

        Collective: all ranks, one all-reduce of 8 bytes, or two, of 8 and of 4.
        """
        recalled = super().recall(batch, progress)
        if self.settings.normalization == "masked_mean" and self.settings.pseudo_weight < 1.0:
            num_human = (training_targets(batch._replace(pseudo_targets=None)) != UNKNOWN).sum()
            recalled["num_human"] = comm.reduce_sum(num_human.float()[None])
        return recalled

    def refine(self, logits: Tensor) -> Tensor:
        return logits if self.graph is None else self.graph(logits)

    def losses(
        self, logits: Tensor, batch: Batch, recalled: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"bce": self._share(logits, batch, recalled)}, {}

    def _share(self, logits: Tensor, batch: Batch, recalled: dict[str, Tensor]) -> Tensor:
        """() this micro-batch's share of the global batch's loss."""
        weight = 1.0 if batch.pseudo_targets is None else self.settings.pseudo_weight
        believed = human = logits.new_zeros(())  # whichever has weight 0 is not computed
        if weight > 0.0:
            believed = self._loss(logits, training_targets(batch), batch.valid, recalled, "num_known")
        if weight < 1.0:
            targets = training_targets(batch._replace(pseudo_targets=None))
            human = self._loss(logits, targets, batch.valid, recalled, "num_human")
        return torch.lerp(human, believed, weight)

    def _loss(
        self, logits: Tensor, targets: Tensor, valid: Tensor, recalled: dict[str, Tensor], num_known: str
    ) -> Tensor:
        """() the share of the global batch's loss on `targets` (B, C); `num_known` names their count in `recalled`."""
        settings = self.settings
        if settings.normalization == "masked_mean":
            own = (targets != UNKNOWN).sum()
            return masked_mean_bce(logits, targets) * (own / recalled[num_known].clamp(min=1)).squeeze()
        part = (len(valid) / recalled["num_valid"].clamp(min=1)).squeeze()  # the losses below divide by padding too
        if settings.normalization == "image_mean":
            return image_mean_bce(logits, targets) * part
        if settings.normalization == "assume_negative":
            everything = torch.where((targets == UNKNOWN) & valid[:, None], ABSENT, targets)
            return partial_bce(logits, everything, alpha=0.0, beta=1.0) * part
        alpha, beta = settings.coefficients
        return partial_bce(logits, targets, alpha=alpha, beta=beta, gamma=settings.gamma) * part
