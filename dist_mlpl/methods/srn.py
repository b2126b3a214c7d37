"""Owns SRN: a plain classifier corrected by the attention maps of all classes, trained in stages."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dist_mlpl.batch import Batch, StepOutput
from dist_mlpl.errors import CheckpointError
from dist_mlpl.labels import UNKNOWN
from dist_mlpl.losses.partial_bce import masked_mean_bce
from dist_mlpl.methods.base import HEATMAPS, Method, MethodSettings, step_output, training_targets
from dist_mlpl.models.classifier import PooledHead
from dist_mlpl.models.spatial import SpatialBranch, SpatialSettings
from dist_mlpl.models.trunk_layers import map_shape, tapped_maps

Stage = Literal["main", "attention", "branch", "joint"]

_PARTS: Final[dict[str, tuple[str, ...]]] = {  # prefixes of the names of their parameters and buffers
    "main": ("backbone.", "head."),
    "attention": ("spatial.hidden.", "spatial.maps.attention_", "spatial.maps.confidence_"),
    "branch": ("spatial.maps.mixing_", "spatial.regularization."),
}
_TRAINED: Final[dict[Stage, tuple[str, ...]]] = {
    "main": ("main",),
    "attention": ("attention",),
    "branch": ("branch",),
    "joint": ("main", "attention", "branch"),
}
# The parts that a stage must find in the run it starts from, and the stage of that run.
_TAKEN_OVER: Final[dict[Stage, tuple[str, ...]]] = {
    "main": (),
    "attention": ("main",),
    "branch": ("main", "attention"),
    "joint": ("main", "attention", "branch"),
}
_BEFORE: Final[dict[Stage, Stage]] = {"attention": "main", "branch": "attention", "joint": "branch"}


class SrnSettings(MethodSettings):
    """The stage, and the branch's sizes. Pooling and dropout are those of the main classifier.

    Args:
        stage: what is trained, all else being frozen: `main`, trunk and plain classifier; `attention`, attention and
            confidence maps; `branch`, the regularising part; `joint`, everything. Each stage is a run of its own,
            chained by init_from in this order; `joint` without init_from trains everything at once from the start.
        spatial: sizes of the branch; not used in stage main, so that one section serves the whole chain.
        alpha: weight of the main classifier in the final logits, in [0, 1].
        faithful: True: as published, where that is known and differs: the loss is the sum over known labels divided by
            the number of images, and weighted attention is mixed without scaling it up first.
    """

    name: Literal["srn"] = "srn"
    stage: Stage = "joint"
    spatial: SpatialSettings = SpatialSettings()
    alpha: float = Field(0.5, ge=0.0, le=1.0)
    faithful: bool = False

    @model_validator(mode="after")
    def _check_start(self) -> SrnSettings:
        if self.stage in ("attention", "branch") and self.init_from is None:
            raise ValueError(
                f"stage {self.stage!r} needs init_from, a run of stage {_BEFORE[self.stage]!r}: "
                f"its {' and '.join(_TAKEN_OVER[self.stage])} part stays as it was trained there"
            )
        if self.stage == "main":
            self.refuse_idle(("alpha",), "stage 'main' has one classifier only: set it in the stages that average two")
        return self

    def build(self, *, num_classes: int, image_size: int) -> Srn:
        return Srn(self, num_classes=num_classes, image_size=image_size)


class Srn(Method):
    """Main classifier y_cls, attention classifier y_att, and y_sr, computed from all classes' weighted attention maps.

        stage       trained                      loss                   logits
        main        trunk, head                  F(y_cls)               y_cls
        attention   attention, confidence        F(y_att)               alpha y_cls + (1 - alpha) y_att
        branch      regularising part            F(y_sr)                y_hat = alpha y_cls + (1 - alpha) y_sr
        joint       everything                   F(y_hat) + F(y_att)    y_hat

    F is binary cross-entropy, a mean over the known labels of the global batch, pseudo-labels included. A stage does
    not build parts that a later stage adds; frozen parts keep their BatchNorm statistics and have no dropout. Stage
    main equals `partial_bce` with `masked_mean`, and stage attention can start from a run of any method with the same
    trunk and pooled head. Heatmaps are confidence-weighted attention; in stage main, class activation maps.

    Source: Zhu et al., CVPR 2017. Its code (github.com/zhufengx/SRN_multilabel) holds the data and loss layers and the
        evaluation, not the network.
    Differs: unknown labels have no part in any F. Unless `faithful`: F is a mean, not a sum over classes divided by
        images (the learning rates of the paper go with its sum); weighted attention is scaled by its number of cells
        before it is mixed. BatchNorm in the regularising part is a setting (`spatial.norm`), as the paper does not
        say. Logits of stage attention are the paper's ResNet-SRN-att, whose weighting is not published; here it is
        alpha.
    """

    def __init__(self, settings: SrnSettings, *, num_classes: int, image_size: int) -> None:
        super().__init__(settings, num_classes=num_classes, image_size=image_size)
        self.settings = settings
        self.head = PooledHead(
            self.backbone.num_features, num_classes, dropout=settings.dropout, pooling=settings.pooling
        )
        self.spatial: SpatialBranch | None = None
        if settings.stage != "main":
            shape = map_shape(self.backbone, settings.spatial.layer, image_size=image_size)
            self.spatial = SpatialBranch(
                settings.spatial,
                shape,
                num_classes,
                is_regularising=settings.stage != "attention",
                use_scale=not settings.faithful,
            )
        for name, parameter in self.named_parameters():
            if not name.startswith(_prefixes(_TRAINED[settings.stage])):
                parameter.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Srn:
        """Set the mode, except that a frozen main part stays in eval mode (it has BatchNorm and dropout)."""
        super().train(mode)
        if "main" not in _TRAINED[self.settings.stage]:
            self.backbone.eval()
            self.head.eval()
        return self

    def check_start(self, url: str, taken: Collection[str]) -> None:
        names = [*dict(self.named_parameters()), *dict(self.named_buffers())]
        needed = [name for name in names if name.startswith(_prefixes(_TAKEN_OVER[self.settings.stage]))]
        absent = [name for name in needed if name not in taken]
        if absent:
            stage = self.settings.stage
            raise CheckpointError(
                f"{len(absent)} of {len(needed)} tensors that stage {stage!r} starts from are not there with this name"
                f" and shape, first {absent[0]!r}",
                expected=f"a run of stage {_BEFORE[stage]!r} with the same trunk, classes and sizes",
                where=f"method.init_from: {url}",
                next_step=f"train stage {_BEFORE[stage]!r} first and name its run, with the same method.spatial",
            )

    def forward(self, batch: Batch, recalled: dict[str, Tensor] | None) -> StepOutput:
        is_explaining = self.is_asked(HEATMAPS)
        if self.spatial is None:
            head = self.head(self.backbone(batch.images), with_heatmaps=is_explaining)
            final, heatmaps = head.logits, head.heatmaps
            losses = {"main": final}
        else:
            tapped, feature_map = tapped_maps(self.backbone, batch.images, self.settings.spatial.layer)
            head = self.head(feature_map)
            spatial = self.spatial(tapped, with_heatmaps=is_explaining)
            second = spatial.attended if spatial.regularised is None else spatial.regularised
            final, heatmaps = self._averaged(head.logits, second), spatial.heatmaps
            losses = {
                "attention": {"attention": spatial.attended},
                "branch": {"branch": second},
                "joint": {"final": final, "attention": spatial.attended},
            }[self.settings.stage]
        extras = {"embedding": head.embedding, HEATMAPS: heatmaps}
        if recalled is None:
            return step_output(final, {}, extras)
        with torch.autocast(final.device.type, enabled=False):
            terms = {name: self._share(logits, batch, recalled) for name, logits in losses.items()}
            return step_output(final, terms, extras)

    def _averaged(self, main: Tensor, second: Tensor) -> Tensor:
        """Average two sets of logits (B, C), weighted by alpha."""
        return self.settings.alpha * main + (1.0 - self.settings.alpha) * second

    def _share(self, logits: Tensor, batch: Batch, recalled: dict[str, Tensor]) -> Tensor:
        """() this micro-batch's share of F over the global batch."""
        targets = training_targets(batch)
        total = masked_mean_bce(logits, targets) * (targets != UNKNOWN).sum()  # over these rows' known labels
        return total / recalled["num_valid" if self.settings.faithful else "num_known"].clamp(min=1).squeeze()


def _prefixes(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The prefixes of the names of these parts' tensors."""
    return tuple(prefix for part in parts for prefix in _PARTS[part])
