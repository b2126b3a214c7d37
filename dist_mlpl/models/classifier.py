"""Owns the plain head: pool the feature map over its cells, drop out, classify linearly."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Pooling = Literal["average", "max"]


class HeadOutput(NamedTuple):
    """What a head makes of a feature map; float32 (float64 in a float64 model)."""

    logits: Tensor  # (B, C)
    embedding: Tensor  # (B, F), pooled features before dropout
    heatmaps: Tensor | None  # (B, C, h, w), evidence of each class in each cell, in logits; when asked for


class PooledHead(nn.Module):
    """Global pool, dropout, one linear layer.

    Args:
        num_features: F, channels of the feature map.
        num_classes: C.
        dropout: probability of dropping a pooled feature, in [0, 1).
        pooling: `average` over cells, or `max`, which lets an object of few cells count in full.
    """

    def __init__(
        self, num_features: int, num_classes: int, *, dropout: float = 0.0, pooling: Pooling = "average"
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(num_features, num_classes)
        nn.init.zeros_(self.linear.bias)

    def forward(self, feature_map: Tensor, *, with_heatmaps: bool = False) -> HeadOutput:
        """Classify.

        Args:
            feature_map: (B, F, h, w), any floating type.
            with_heatmaps: also compute class activation maps; with average pooling and no dropout their mean over cells
                is `logits`.

        Source: class activation maps: Zhou et al., CVPR 2016, section 2.
        """
        native = feature_map.dtype  # of the weights too: pooling is precise, the product runs in the model's own type
        precise = torch.promote_types(native, torch.float32)
        if self.pooling == "max":
            embedding = feature_map.amax(dim=(2, 3)).to(precise)  # (B, F)
        else:
            embedding = feature_map.mean(dim=(2, 3), dtype=precise)
        logits = self.linear(self.dropout(embedding).to(native)).to(precise)
        if not with_heatmaps:
            return HeadOutput(logits, embedding, None)
        # The layer itself is called on every cell: under ZeRO-3 its weight exists only inside its own call.
        cells = self.linear(feature_map.permute(0, 2, 3, 1))  # (B, h, w, C)
        return HeadOutput(logits, embedding, cells.permute(0, 3, 1, 2).to(precise))
