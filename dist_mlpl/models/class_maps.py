"""Owns the fully convolutional form of the plain head: maps of a few classes per image, without those of the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_mlpl.models.classifier import PooledHead, Pooling


class RowLinear(nn.Linear):
    """A linear layer that can also apply only some of its rows, different ones for each image."""

    def forward(self, input: Tensor, classes: Tensor | None = None) -> Tensor:
        """Apply all rows, (..., F) to (..., C), or the rows `classes` (n, M) of each image, (n, L, F) to (n, L, M)."""
        if classes is None:
            return super().forward(input)
        weight = F.embedding(classes, self.weight)  # (n, M, F); its backward adds in a fixed order, indexing's does not
        bias = F.embedding(classes, self.bias[:, None]).mT  # (n, 1, M)
        return input @ weight.mT + bias


class SlotHead(PooledHead):
    """The plain head, which can also score every cell for chosen classes.

    With average pooling and no dropout an image's logit is the mean of its map. The maps of 32 of 9,605 classes take
    1/300 of the memory and time that all maps take.

    Args:
        num_features, num_classes, dropout, pooling: see `PooledHead`.
    """

    def __init__(
        self, num_features: int, num_classes: int, *, dropout: float = 0.0, pooling: Pooling = "average"
    ) -> None:
        super().__init__(num_features, num_classes, dropout=dropout, pooling=pooling)
        self.linear = RowLinear(num_features, num_classes)
        nn.init.zeros_(self.linear.bias)

    def class_maps(self, feature_map: Tensor, classes: Tensor) -> Tensor:
        """Compute the evidence of chosen classes in each cell, as logits.

        Args:
            feature_map: (n, F, h, w), any floating type.
            classes: (n, M) int64 in [0, C).

        Returns:
            (n, M, h, w) float32, or float64 in a float64 model.
        """
        scores = self.linear(feature_map.flatten(2).mT, classes)  # (n, L, M)
        precise = torch.promote_types(feature_map.dtype, torch.float32)
        return scores.to(precise).mT.unflatten(2, feature_map.shape[2:])
