"""Owns the method of the class-aware selective loss (CSL, P-ASL), with the class prior that it estimates."""

from __future__ import annotations

from typing import Final, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.banks.base import Bank
from dist_mlpl.banks.held import Column
from dist_mlpl.banks.table import TableBank
from dist_mlpl.batch import Batch, Progress, StepOutput
from dist_mlpl.errors import BankError
from dist_mlpl.labels import UNKNOWN
from dist_mlpl.losses.selective import Mode, selective_loss
from dist_mlpl.methods.base import MethodSettings, training_targets
from dist_mlpl.methods.pooled import PooledMethod
from dist_mlpl.settings import Location

PRIOR = "prior"
# Probabilities are summed as multiples of 2**-32: sums of whole numbers are the same on any number of ranks.
_ONE: Final = 2**32


class CslSettings(MethodSettings):
    """The settings of the selective loss and its simpler variants.

    Args:
        mode: `selective`: unknown labels are weak negatives except those likely present; `negative`: all are (P-ASL;
            ASL with gamma_neg = gamma_unknown); `ignore`: none is.
        gamma_pos, gamma_neg, gamma_unknown: focusing exponents of present, absent and unknown labels.
        clip: probability margin of absent and unknown labels, in [0, 1).
        top_k: how many of the likeliest unknown labels of each image are left out; only in mode `selective`.
        prior_threshold: unknown labels of classes whose prior exceeds it are left out; only in mode `selective`, and
            together with one of the next two.
        prior_from: a run in mode `ignore`, whose predictions over its last epoch give the prior.
        ignore_epochs: number of first epochs that train in mode `ignore`; the last one's predictions give the prior.
    """

    name: Literal["csl"] = "csl"
    mode: Mode = "selective"
    gamma_pos: float = Field(0.0, ge=0.0)
    gamma_neg: float = Field(1.0, ge=0.0)
    gamma_unknown: float = Field(4.0, ge=0.0)
    clip: float = Field(0.0, ge=0.0, lt=1.0)
    top_k: int = Field(5, ge=0)
    prior_threshold: float | None = Field(None, gt=0.0, lt=1.0)
    prior_from: Location | None = None
    ignore_epochs: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check_selection(self) -> CslSettings:
        if self.mode != "selective":
            of_selective = ("top_k", "prior_threshold", "prior_from", "ignore_epochs")
            self.refuse_idle(of_selective, f"mode {self.mode!r} does not use it")
        if self.mode == "ignore":
            self.refuse_idle(("gamma_unknown",), "mode 'ignore' leaves unknown labels out")
        sources = [key for key in ("prior_from", "ignore_epochs") if getattr(self, key)]
        if len(sources) != (self.prior_threshold is not None):
            raise ValueError(
                f"prior_threshold {self.prior_threshold} with {' and '.join(sources) or 'no prior'}: "
                "a threshold needs one prior, of prior_from or of ignore_epochs, and a prior a threshold"
            )
        return self

    def build(self, *, num_classes: int, image_size: int) -> Csl:
        return Csl(self, num_classes=num_classes, image_size=image_size)


class Csl(PooledMethod):
    """A pooled linear head with the asymmetric loss, whose unknown labels are chosen by likelihood and class prior.

    The prior is stored in the table `prior`: for every class, the sum of predicted probabilities over the valid images
    that the current or last epoch in mode `ignore` has trained on, their number, and in how many of them the class's
    label was known. It is part of every commit.

    Source: Ben-Baruch et al., CVPR 2022.
    Differs: the loss is the mean over images of the sum over classes (the code's is the sum); the prior is the mean
        over one epoch of predictions made while training (the paper's: over a pass of the trained model; the code's:
        over all epochs); a class without any known label in that epoch has prior 0, so that its unknown labels are weak
        negatives: in mode `ignore` nothing trains its logit, whose predictions, about 1/2, say nothing of the class,
        and a prior above the threshold would leave its labels out for good.
    """

    def __init__(self, settings: CslSettings, *, num_classes: int, image_size: int) -> None:
        super().__init__(settings, num_classes=num_classes, image_size=image_size)
        self.settings = settings
        self._prior: TableBank | None = None

    def begin_run(self, *, num_samples: int, epoch_samples: int, group_size: int, seed: int) -> None:
        super().begin_run(num_samples=num_samples, epoch_samples=epoch_samples, group_size=group_size, seed=seed)
        if self.settings.mode == "ignore" or self.settings.prior_threshold is not None:
            columns = {name: Column(dtype="i64") for name in ("sums", "counts", "known")}
            self._prior = TableBank(PRIOR, self.num_classes, columns)

    def banks(self) -> dict[str, Bank]:
        return {} if self._prior is None else {PRIOR: self._prior}

    def bank_sources(self) -> dict[str, str]:
        return {} if self.settings.prior_from is None else {PRIOR: self.settings.prior_from}

    def begin_epoch(self, progress: Progress) -> None:
        super().begin_epoch(progress)
        if self._prior is not None and self._is_ignoring(progress):
            nothing = torch.zeros(self.num_classes, dtype=torch.int64)
            self._prior.write_all({"sums": nothing, "counts": nothing, "known": nothing})

    def recall(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        recalled = super().recall(batch, progress)
        recalled["is_ignoring"] = torch.tensor([self._is_ignoring(progress)])
        if self.settings.prior_threshold is not None and not self._is_ignoring(progress):
            recalled[PRIOR] = self.prior().to(batch.images.device)
        return recalled

    def prior(self) -> Tensor:
        """The estimated frequency of each class, (C,) float32 in [0, 1]; 0 where no label of the class was known.

        Raises:
            BankError: there are no predictions yet, or the method keeps no prior.
        """
        table = {} if self._prior is None else self._prior.read_all()
        if not table or int(table["counts"].min()) == 0:
            raise BankError(
                "a class prior of no predictions",
                expected="predictions of at least one step in mode `ignore`",
                where="method.prior_from, method.ignore_epochs",
                next_step="train the run that prior_from names in mode ignore, for an epoch or more",
            )
        means = table["sums"].double() / (table["counts"].double() * _ONE)
        return torch.where(table["known"] > 0, means, 0.0).float()

    def losses(
        self, logits: Tensor, batch: Batch, recalled: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        settings, valid, targets = self.settings, batch.valid, training_targets(batch)[batch.valid]
        is_ignoring = bool(recalled["is_ignoring"])
        loss = selective_loss(
            logits[valid],
            targets,
            mode="ignore" if is_ignoring else settings.mode,
            gamma_pos=settings.gamma_pos,
            gamma_neg=settings.gamma_neg,
            gamma_unknown=settings.gamma_unknown,
            clip=settings.clip,
            top_k=settings.top_k,
            prior=recalled.get(PRIOR),
            prior_threshold=settings.prior_threshold if PRIOR in recalled else None,
        )
        terms = {"csl": loss / recalled["num_valid"].clamp(min=1).squeeze()}
        if not is_ignoring or self._prior is None:
            return terms, {}
        sums = (torch.sigmoid(logits.detach()[valid].double()) * _ONE).round().long().sum(dim=0)  # (C,)
        counted = torch.stack([sums, valid.sum().expand_as(sums), (targets != UNKNOWN).sum(dim=0)])
        return terms, {"predicted": counted[None]}  # (1, 3, C) per micro-batch

    def observe(self, batch: Batch, output: StepOutput) -> None:
        super().observe(batch, output)
        if self._prior is None or "predicted" not in output.extras:
            return
        predicted = comm.reduce_sum(output.extras["predicted"].sum(dim=0).cpu())  # (3, C)
        table = self._prior.read_all()
        names = ("sums", "counts", "known")
        self._prior.write_all({name: table[name] + new for name, new in zip(names, predicted, strict=True)})

    def _is_ignoring(self, progress: Progress) -> bool:
        return self.settings.mode == "ignore" or progress.epoch < self.settings.ignore_epochs
