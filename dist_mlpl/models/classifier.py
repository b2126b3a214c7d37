"""Owns the plain head: one linear classifier of a feature map, with pooling over cells before or after it."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Discriminator, Field, Tag
from torch import Tensor, nn

from dist_mlpl.errors import ConfigError
from dist_mlpl.settings import Settings


class WeldonSettings(Settings):
    """WELDON pooling: the cells that count are those with the highest and those with the lowest scores of a class.

    Args:
        num_top: number of highest scores, k+.
        num_bottom: number of lowest scores, k-; 0: none.

    Source: Durand, Thome, Cord, CVPR 2016. The k's used with partial labels are not published; 1 and 1 are the defaults
        of the first author's code (github.com/durandtibo/weldon.resnet.pytorch).
    """

    name: Literal["weldon"] = "weldon"  # the pooling; `average` and `max`, which have no settings, are plain words
    num_top: int = Field(1, ge=1)
    num_bottom: int = Field(1, ge=0)


def _kind(pooling: object) -> str:
    return "name" if isinstance(pooling, str) else "weldon"


# A name, or WELDON with its numbers: `pooling: {name: weldon, num_top: 3, num_bottom: 3}`.
Pooling = Annotated[
    Annotated[Literal["average", "max", "weldon"], Tag("name")] | Annotated[WeldonSettings, Tag("weldon")],
    Discriminator(_kind),
]


class HeadOutput(NamedTuple):
    """The output of a head; float32 (float64 in a float64 model)."""

    logits: Tensor  # (B, C)
    embedding: Tensor  # (B, F), pooled features before dropout
    heatmaps: Tensor | None  # (B, C, h, w), evidence of each class in each cell, in logits; None unless asked for


class PooledHead(nn.Module):
    """Pooling over cells, dropout, one linear layer; with WELDON the layer scores every cell and scores are pooled.

    Args:
        num_features: F, channels of the feature map.
        num_classes: C.
        dropout: probability of dropping a feature of an image, in all its cells alike, in [0, 1).
        pooling: of features over cells, the `average`, or the `max`, with which an object of few cells counts in full.
            `weldon`: of each class's scores, the mean of the highest plus the mean of the lowest; its scores are
            (B, h * w, C), 480 MB for 64 images of 14 x 14 cells and 9,605 classes, and rounded to autocast's type.
    """

    def __init__(
        self, num_features: int, num_classes: int, *, dropout: float = 0.0, pooling: Pooling = "average"
    ) -> None:
        super().__init__()
        self.pooling = WeldonSettings() if pooling == "weldon" else pooling
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(num_features, num_classes)
        nn.init.zeros_(self.linear.bias)

    def forward(self, feature_map: Tensor, *, with_heatmaps: bool = False) -> HeadOutput:
        """Classify a feature map.

        Args:
            feature_map: (B, F, h, w), any floating type.
            with_heatmaps: also compute class activation maps, without dropout. If there is no dropout, `logits` are
                their mean over cells with average pooling, and WELDON's pooling of them with WELDON.

        Raises:
            ConfigError: WELDON asks for more cells than there are.

        Source: class activation maps: Zhou et al., CVPR 2016, section 2.
        """
        precise = torch.promote_types(feature_map.dtype, torch.float32)
        if self.pooling == "max":
            embedding = feature_map.amax(dim=(2, 3)).to(precise)  # (B, F)
        else:
            embedding = feature_map.mean(dim=(2, 3), dtype=precise)
        if isinstance(self.pooling, WeldonSettings):
            logits = pool_regions(self._scores(self._dropped(feature_map)), self.pooling)
        else:
            with torch.autocast(feature_map.device.type, enabled=False):  # in bf16 few values: ties in AP
                logits = self.linear(self.dropout(embedding).to(self.linear.weight.dtype)).to(precise)
        heatmaps = self._scores(feature_map).permute(0, 3, 1, 2).to(precise) if with_heatmaps else None
        return HeadOutput(logits, embedding, heatmaps)

    def _scores(self, feature_map: Tensor) -> Tensor:
        """Score cells, (B, F, h, w) to (B, h, w, C), by calling the layer: under ZeRO-3 its weight exists only there.

        ZeRO-3's linear rounds before it adds the bias if inputs have more than two dimensions; given two, all engines
        agree in bf16 too.
        """
        cells = feature_map.permute(0, 2, 3, 1)
        scores: Tensor = self.linear(cells.flatten(0, 2)).unflatten(0, cells.shape[:3])
        return scores

    def _dropped(self, feature_map: Tensor) -> Tensor:
        """Apply dropout to the feature map (B, F, h, w), with one draw for all cells of an image."""
        if self.dropout.p == 0.0:
            return feature_map
        ones = torch.ones(feature_map.shape[:2], dtype=feature_map.dtype, device=feature_map.device)
        return feature_map * self.dropout(ones)[:, :, None, None]


def pool_regions(scores: Tensor, settings: WeldonSettings) -> Tensor:
    """Add the mean of the highest scores and the mean of the lowest ones, class by class.

    Args:
        scores: (B, h, w, C), any floating type.
        settings: how many of each.

    Returns:
        (B, C) float32, or float64 for such scores.

    Raises:
        ConfigError: more scores are asked for than there are cells.

    Source: Durand, Thome, Cord, CVPR 2016. The first author's later code halves the sum; here it is not halved.
    """
    scores = scores.flatten(1, 2)  # (B, L, C)
    num_cells = scores.shape[1]
    if max(settings.num_top, settings.num_bottom) > num_cells:
        raise ConfigError(
            f"WELDON pooling of {settings.num_top} highest and {settings.num_bottom} lowest of {num_cells} cells",
            expected=f"at most {num_cells} each",
            where="method.pooling",
            next_step="lower num_top and num_bottom, or raise transform.size",
        )
    precise = torch.promote_types(scores.dtype, torch.float32)
    pooled = scores.topk(settings.num_top, dim=1, sorted=False).values.to(precise).mean(dim=1)
    if settings.num_bottom == 0:
        return pooled
    return pooled + scores.topk(settings.num_bottom, dim=1, largest=False, sorted=False).values.to(precise).mean(dim=1)
