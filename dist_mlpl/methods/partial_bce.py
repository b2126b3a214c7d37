"""Owns the partial-BCE method: a trunk, a pooled linear head and one loss over known labels, with its baselines."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from dist_mlpl.batch import Batch, StepOutput
from dist_mlpl.labels import ABSENT, UNKNOWN
from dist_mlpl.losses.partial_bce import masked_mean_bce, partial_bce
from dist_mlpl.methods.base import HEATMAPS, Method, MethodSettings, step_output, training_targets
from dist_mlpl.models.classifier import PooledHead


class PartialBceSettings(MethodSettings):
    """Partial-BCE and the two plain losses it is compared with.

    Args:
        normalization: `durand`: mean over images, each weighed by g of its known share; `masked_mean`: mean over the
            known labels of the global batch; `assume_negative`: unknown counts as absent, mean over all labels.
        alpha, beta, gamma: g(p) = alpha * p**gamma + beta of `durand`; alpha + beta is 1, so that images with all
            labels known get plain binary cross-entropy.
    """

    name: Literal["partial_bce"] = "partial_bce"
    normalization: Literal["durand", "masked_mean", "assume_negative"] = "durand"
    alpha: float = -4.45
    beta: float = 5.45
    gamma: float = 1.0

    @model_validator(mode="after")
    def _check_normaliser(self) -> PartialBceSettings:
        alpha, beta, gamma = self.alpha, self.beta, self.gamma
        fields = type(self).model_fields
        changed = [key for key in ("alpha", "beta", "gamma") if getattr(self, key) != fields[key].default]
        if changed and self.normalization != "durand":
            raise ValueError(f"{', '.join(changed)} set, but normalization {self.normalization!r} does not use g(p)")
        if not abs(alpha + beta - 1.0) <= 1e-6:
            raise ValueError(
                f"alpha + beta is {alpha + beta:g}; it must be 1, so that g(1) = 1 "
                "(losses.partial_bce.solve_normaliser gives both from g at a known share)"
            )
        if (beta < 0 and gamma > 0) or (alpha < 0 and gamma < 0):
            raise ValueError(
                f"g(p) = {alpha:g} * p**{gamma:g} + {beta:g} is negative for small p: choose a larger g there"
            )
        return self

    def build(self, *, num_classes: int, image_size: int) -> PartialBce:
        return PartialBce(self, num_classes=num_classes, image_size=image_size)


class PartialBce(Method):
    """One loss over known labels; no banks.

    Source: Durand et al., CVPR 2019, section 3.1.
    Differs: global average pooling for the paper's WELDON pooling.
    """

    def __init__(self, settings: PartialBceSettings, *, num_classes: int, image_size: int) -> None:
        super().__init__(settings, num_classes=num_classes, image_size=image_size)
        self.settings = settings
        self.head = PooledHead(
            self.backbone.num_features, num_classes, dropout=settings.dropout, pooling=settings.pooling
        )

    def forward(self, batch: Batch, recalled: dict[str, Tensor] | None) -> StepOutput:
        head = self.head(self.backbone(batch.images), with_heatmaps=self.is_asked(HEATMAPS))
        extras = {"embedding": head.embedding, HEATMAPS: head.heatmaps}
        if recalled is None:
            return step_output(head.logits, {}, extras)
        with torch.autocast(head.logits.device.type, enabled=False):
            return step_output(head.logits, {"bce": self._share(head.logits, batch, recalled)}, extras)

    def _share(self, logits: Tensor, batch: Batch, recalled: dict[str, Tensor]) -> Tensor:
        """() this micro-batch's part of the global batch's loss."""
        targets, settings = training_targets(batch), self.settings
        if settings.normalization == "masked_mean":
            num_known = (targets != UNKNOWN).sum()
            return masked_mean_bce(logits, targets) * (num_known / recalled["num_known"].clamp(min=1)).squeeze()
        part = (batch.num_images / recalled["num_valid"].clamp(min=1)).squeeze()  # the loss divides by padding too
        if settings.normalization == "assume_negative":
            is_assumed = (targets == UNKNOWN) & batch.valid[:, None]
            everything = torch.where(is_assumed, ABSENT, targets)
            return partial_bce(logits, everything, alpha=0.0, beta=1.0) * part
        return partial_bce(logits, targets, alpha=settings.alpha, beta=settings.beta, gamma=settings.gamma) * part
