"""Owns what methods with one trunk and one pooled linear head share: their forward, up to the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_mlpl.batch import Batch, StepOutput
from dist_mlpl.methods.base import HEATMAPS, Method, MethodSettings, step_output
from dist_mlpl.models.classifier import PooledHead


class PooledMethod(Method):
    """A trunk and a pooled linear head; subclasses define `losses`, and may correct the logits in `refine`.

    Args:
        settings: the method's settings.
        num_classes: C.
        image_size: H = W in pixels.
    """

    def __init__(self, settings: MethodSettings, *, num_classes: int, image_size: int) -> None:
        super().__init__(settings, num_classes=num_classes, image_size=image_size)
        self.head = PooledHead(
            self.backbone.num_features, num_classes, dropout=settings.dropout, pooling=settings.pooling
        )

    def forward(self, batch: Batch, recalled: dict[str, Tensor] | None) -> StepOutput:
        head = self.head(self.backbone(batch.images), with_heatmaps=self.is_asked(HEATMAPS))
        logits = self.refine(head.logits)
        extras = {"embedding": head.embedding, HEATMAPS: head.heatmaps}
        if recalled is None:
            return step_output(logits, {}, extras)
        with torch.autocast(logits.device.type, enabled=False):
            terms, more = self.losses(logits, batch, recalled)
            return step_output(logits, terms, extras | more)

    def refine(self, logits: Tensor) -> Tensor:
        """Turn the head's logits into those used for prediction and loss, (B, C). By default unchanged."""
        return logits

    def losses(
        self, logits: Tensor, batch: Batch, recalled: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the loss terms of a micro-batch, and the extras that `observe` needs.

        Args:
            logits: (B, C) float32, with a graph.
            batch: B rows of the step's batch.
            recalled: what `recall` returned for the whole step.

        Returns:
            Terms, () shares of the global batch's loss, each connected to `logits` whatever the labels; and extras.
        """
        raise NotImplementedError
