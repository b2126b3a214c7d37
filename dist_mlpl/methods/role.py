"""Owns ROLE: label estimates, one row per sample, that the classifier learns from and that learn from it."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor

from dist_mlpl import keyed
from dist_mlpl.banks.base import Bank
from dist_mlpl.banks.keyed import KeyedBank
from dist_mlpl.batch import Batch, Progress
from dist_mlpl.labels import ABSENT, PRESENT
from dist_mlpl.losses.single_positive import estimator_loss
from dist_mlpl.methods.base import training_targets
from dist_mlpl.methods.unknown_loss import Named, UnknownLoss, ValidRows, count_share, mean_share, pick, valid_index

ESTIMATES: Final = "estimates"


class Role(UnknownLoss):
    """Regularised online label estimation.

    The bank `estimates` holds logits (N, C) float32. A row never written has its initial value: logit(0.995) where the
    label is known present, logit(0.005) where absent, uniform in logit(0.4) to logit(0.6) where unknown, keyed by seed,
    sample and class.

    Source: Cole et al., CVPR 2021.
    Differs: a row moves by plain gradient descent whenever its sample is trained on, along the gradient of the sample's
        own loss summed over classes (the code's Adam keeps two more tables and moves rows between visits); the count
        penalty is taken of groups of images, see `count_share`.

    Args:
        num_classes: C.
        expected_positives: k, the expected number of positives of an image.
        rate: step size of a row.
        folder: see `HeldRows`.
    """

    def __init__(self, *, num_classes: int, expected_positives: float, rate: float, folder: str | None) -> None:
        self._num_classes, self._expected_positives = num_classes, expected_positives
        self._rate, self._folder = rate, folder

    def begin_run(self, *, num_samples: int, seed: int) -> None:
        self._estimates = KeyedBank(ESTIMATES, num_samples, (self._num_classes,), "f32", folder=self._folder)
        self._key = keyed.key("label estimates", seed)

    def banks(self) -> dict[str, Bank]:
        return {ESTIMATES: self._estimates}

    def recall(self, batch: Batch, progress: Progress) -> Named:
        index, rows = valid_index(batch)
        read = self._estimates.read(index)
        start = self._start(index.cpu(), training_targets(batch)[rows].cpu())
        estimates = torch.where(read["stamps"][:, None] < 0, start, read["rows"])
        return {"remembered": index, ESTIMATES: estimates.to(index.device)}

    def losses(self, rows: ValidRows, recalled: Named) -> tuple[Named, Named]:
        estimates = pick(recalled["remembered"], recalled[ESTIMATES], rows.index).requires_grad_()
        fit = mean_share(estimator_loss(rows.logits, estimates, rows.targets), rows)
        k = self._expected_positives
        present, estimated = (count_share(x, rows, expected_positives=k) for x in (rows.logits, estimates))
        count = 0.5 * (present + estimated)
        (slope,) = torch.autograd.grad(fit + count, estimates, retain_graph=True)
        slope = slope * (rows.num_valid * self._num_classes)  # gradient of the sample's own sum, whatever the batch
        return {"role": fit, "count": count}, {ESTIMATES: estimates, "estimate_gradient": slope}

    def observe(self, index: Tensor, logits: Tensor, targets: Tensor, extras: Named) -> None:
        moved = extras[ESTIMATES] - self._rate * extras["estimate_gradient"]
        self._estimates.write(index, {"rows": moved, "stamps": torch.ones(len(index), dtype=torch.int32)})

    def _start(self, index: Tensor, targets: Tensor) -> Tensor:
        """(n, C) float32 initial estimates, for samples that were never visited."""
        classes = np.arange(self._num_classes, dtype=np.uint64)
        cells = index.numpy().astype(np.uint64)[:, None] * np.uint64(self._num_classes) + classes
        uniform = torch.from_numpy(keyed.uniform_of(self._key, cells))  # in [0, 1)
        start = ((2.0 * uniform - 1.0) * _logit(0.6)).float()
        return start.masked_fill(targets == PRESENT, _logit(0.995)).masked_fill(targets == ABSENT, _logit(0.005))


def _logit(p: float) -> float:
    return math.log(p / (1.0 - p))
