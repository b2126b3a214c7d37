"""Owns the method for few known positives, whose loss is a setting: AN to APL, Large Loss, SPLC or Hill."""

from __future__ import annotations

from typing import Final, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dist_mlpl.banks.base import Bank
from dist_mlpl.batch import Batch, Progress, StepOutput
from dist_mlpl.labels import PRESENT
from dist_mlpl.losses.large_loss import hill_loss, splc_loss
from dist_mlpl.losses.single_positive import assume_negative_loss, entropy_loss, observed_loss
from dist_mlpl.methods.base import MethodSettings, training_targets
from dist_mlpl.methods.expected_negative import ExpectedNegative
from dist_mlpl.methods.large_loss import FRACTIONS, LargeLoss
from dist_mlpl.methods.pooled import PooledMethod
from dist_mlpl.methods.role import Role
from dist_mlpl.methods.unknown_loss import Named, UnknownLoss, ValidRows, count_share, mean_share

Loss = Literal[
    "an", "an_ls", "wan", "epr", "role", "en", "em", "apl", "ll_r", "ll_ct", "ll_cp", "splc", "hill"
]  # fmt: skip

# The losses that read each key; set for another loss, a key would silently do nothing.
_READ_BY: Final[dict[str, tuple[Loss, ...]]] = {
    "smoothing": ("an_ls",),
    "unknown_weight": ("wan",),
    "expected_positives": ("epr", "role", "en"),
    "estimate_rate": ("role",),
    "entropy_weight": ("em", "apl"),
    "pseudo_weight": ("apl",),
    "large_fraction": ("ll_r", "ll_ct", "ll_cp"),
    "margin": ("splc", "hill"),
    "gamma": ("splc", "hill"),
    "limit": ("hill",),
    "present_threshold": ("splc",),
    "bank_folder": ("role", "en", "ll_cp"),
}


class SinglePositiveSettings(MethodSettings):
    """The loss and its constants; settings of other losses are refused.

    Args:
        loss: `an` assume negative, `an_ls` with label smoothing, `wan` with a weight, `epr` expected positives, `role`
            with estimated labels, `en` expected negatives, `em` entropy maximisation, `apl` with a round's soft
            pseudo-labels, `ll_r`, `ll_ct`, `ll_cp` large losses rejected, corrected, or so for good; `splc`; `hill`.
        smoothing: an_ls: in [0, 1).
        unknown_weight: wan: weight of unknown labels; null: 1 / (C - 1).
        expected_positives: epr, role, en: expected positives of an image; VOC 1.5, COCO 2.9, NUS-WIDE 1.9, CUB 31.4.
        estimate_rate: role: step size of a sample's estimates along their gradient at a visit.
        entropy_weight: em, apl: choose it smaller the larger C is.
        pseudo_weight: apl: VOC 0.02, COCO 0.9, NUS-WIDE 0.2, CUB 0.4.
        large_fraction: share of all labels, per epoch finished (ll_r, ll_ct) or from the second epoch on (ll_cp); null:
            0.005, 0.002 and 0.001, as in BoostLU (Kim et al., CVPR 2023).
        margin, gamma: splc, hill: see `hill_loss`.
        limit: hill: lambda.
        present_threshold: splc: probability above which an unknown label is taken as present, from the second epoch on.
        bank_folder: role, en, ll_cp: local folder for the memory-mapped bank; null: host memory.
    """

    name: Literal["single_positive"] = "single_positive"
    loss: Loss = "an"
    smoothing: float = Field(0.1, ge=0.0, lt=1.0)
    unknown_weight: float | None = Field(None, ge=0.0)
    expected_positives: float | None = Field(None, gt=0.0)
    estimate_rate: float = Field(1.0, gt=0.0)
    entropy_weight: float = Field(0.1, ge=0.0)
    pseudo_weight: float = Field(0.9, ge=0.0)
    large_fraction: float | None = Field(None, gt=0.0, lt=1.0)
    margin: float = 1.0
    gamma: float = Field(2.0, ge=0.0)
    limit: float = Field(1.5, ge=1.0)
    present_threshold: float = Field(0.6, gt=0.0, lt=1.0)
    bank_folder: str | None = None

    @model_validator(mode="after")
    def _refuse_what_the_loss_ignores(self) -> SinglePositiveSettings:
        unread = [key for key, losses in _READ_BY.items() if self.loss not in losses]
        self.refuse_idle(unread, f"loss {self.loss!r} does not use it")
        if self.loss in _READ_BY["expected_positives"] and self.expected_positives is None:
            raise ValueError(f"loss {self.loss!r} needs expected_positives: the positives of an average image")
        if self.loss == "en" and self.expected_positives is not None and self.expected_positives < 0.5:
            raise ValueError("expected_positives below 0.5 leaves no label out: loss 'en' would be 'an'")
        return self

    def build(self, *, num_classes: int, image_size: int) -> SinglePositive:
        return SinglePositive(self, num_classes=num_classes, image_size=image_size)

    def build_loss(self, num_classes: int) -> UnknownLoss:
        """Build the loss of the method."""
        if self.loss == "role":
            assert self.expected_positives is not None
            return Role(
                num_classes=num_classes,
                expected_positives=self.expected_positives,
                rate=self.estimate_rate,
                folder=self.bank_folder,
            )
        if self.loss == "en":
            assert self.expected_positives is not None
            return ExpectedNegative(
                num_classes=num_classes, expected_positives=self.expected_positives, folder=self.bank_folder
            )
        if self.loss in ("ll_r", "ll_ct", "ll_cp"):
            fraction = FRACTIONS[self.loss] if self.large_fraction is None else self.large_fraction
            return LargeLoss(self.loss, num_classes=num_classes, fraction=fraction, folder=self.bank_folder)
        return PlainLoss(self)


class SinglePositive(PooledMethod):
    """A pooled linear head with one loss of the family. Invalid rows have no part in losses or banks.

    The losses of Cole et al., EN, EM, APL and Large Loss are means over images and classes, SPLC and Hill means over
    images of sums over classes, all over the valid images of the global batch.
    """

    def __init__(self, settings: SinglePositiveSettings, *, num_classes: int, image_size: int) -> None:
        super().__init__(settings, num_classes=num_classes, image_size=image_size)
        self._loss = settings.build_loss(num_classes)
        self._group_size = 1

    def begin_run(self, *, num_samples: int, epoch_samples: int, group_size: int, seed: int) -> None:
        super().begin_run(num_samples=num_samples, epoch_samples=epoch_samples, group_size=group_size, seed=seed)
        self._group_size = group_size
        self._loss.begin_run(num_samples=num_samples, seed=seed)

    def banks(self) -> dict[str, Bank]:
        return self._loss.banks()

    def recall(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return super().recall(batch, progress) | self._loss.recall(batch, progress)

    def losses(self, logits: Tensor, batch: Batch, recalled: Named) -> tuple[Named, Named]:
        valid = batch.valid
        rows = ValidRows(
            logits=logits[valid],
            targets=training_targets(batch)[valid],
            human_targets=batch.targets[valid],
            pseudo_targets=None if batch.pseudo_targets is None else batch.pseudo_targets[valid],
            soft_targets=None if batch.soft_targets is None else batch.soft_targets[valid],
            index=batch.index[valid],
            group_sizes=[int(group.sum()) for group in valid.cpu().split(self._group_size)],  # one wait for the device
            num_valid=recalled["num_valid"].clamp(min=1).squeeze(),
        )
        return self._loss.losses(rows, recalled)

    def observe(self, batch: Batch, output: StepOutput) -> None:
        super().observe(batch, output)
        valid = batch.valid
        self._loss.observe(batch.index[valid], output.logits[valid], training_targets(batch)[valid], output.extras)


class PlainLoss(UnknownLoss):
    """A loss of the family that has no bank.

    Args:
        settings: the loss and its constants.
    """

    def __init__(self, settings: SinglePositiveSettings) -> None:
        self._settings = settings

    def recall(self, batch: Batch, progress: Progress) -> Named:
        return {"is_correcting": torch.tensor([progress.epoch > 0])} if self._settings.loss == "splc" else {}

    def losses(self, rows: ValidRows, recalled: Named) -> tuple[Named, Named]:
        settings, x, y = self._settings, rows.logits, rows.targets
        if settings.loss == "epr":
            assert settings.expected_positives is not None
            count = count_share(x, rows, expected_positives=settings.expected_positives)
            return {"observed": mean_share(observed_loss(x, y), rows), "count": count}, {}
        if settings.loss == "splc":
            loss = splc_loss(
                x,
                y,
                is_correcting=bool(recalled["is_correcting"]),
                margin=settings.margin,
                gamma=settings.gamma,
                threshold=settings.present_threshold,
            )
            return {"splc": loss / rows.num_valid}, {}
        if settings.loss == "hill":
            loss = hill_loss(x, y, margin=settings.margin, gamma=settings.gamma, limit=settings.limit)
            return {"hill": loss / rows.num_valid}, {}
        return {settings.loss: mean_share(self._summed_loss(rows), rows)}, {}

    def _summed_loss(self, rows: ValidRows) -> Tensor:
        """() the loss summed over rows and classes, for losses whose mean over both is taken."""
        settings, x, y = self._settings, rows.logits, rows.targets
        if settings.loss == "em":
            return entropy_loss(x, y, entropy_weight=settings.entropy_weight)
        if settings.loss == "apl" and rows.pseudo_targets is not None:
            soft = rows.soft_targets
            return entropy_loss(
                x,
                rows.human_targets,
                entropy_weight=settings.entropy_weight,
                pseudo_targets=rows.pseudo_targets,
                soft_targets=(rows.pseudo_targets == PRESENT).float() if soft is None else soft,
                pseudo_weight=settings.pseudo_weight,
            )
        if settings.loss == "apl":  # before the first round
            return entropy_loss(x, y, entropy_weight=settings.entropy_weight)
        if settings.loss == "an_ls":
            return assume_negative_loss(x, y, smoothing=settings.smoothing)
        if settings.loss == "wan":
            weight = settings.unknown_weight
            return assume_negative_loss(x, y, unknown_weight=1 / max(1, x.shape[1] - 1) if weight is None else weight)
        return assume_negative_loss(x, y)
