"""Owns EN as part of a method: predictions averaged over a sample's earlier visits decide which labels are left out."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from dist_mlpl.banks.base import Bank
from dist_mlpl.banks.keyed import KeyedBank
from dist_mlpl.batch import Batch, Progress
from dist_mlpl.losses.single_positive import expected_negative_loss
from dist_mlpl.methods.unknown_loss import Named, UnknownLoss, ValidRows, mean_share, pick, valid_index

SCORES: Final = "scores"


class ExpectedNegative(UnknownLoss):
    """EN: an image's likeliest unknown labels, as many as positives are missing, are left out; the others are absent.

    The bank `scores` holds the mean probability (N, C) float16 over a sample's visits; its stamp is their number less
    1. In the first epoch nothing is left out; a sample not visited before is ranked by the step's own logits.

    Source: Verelst et al., WACV 2023; see `expected_negative_loss` for what is known of it.
    Differs: the mean is over all earlier visits alike; the method, and `spatial_consistency`, rank by a running average
        that forgets, of momentum mu 0.8.

    Args:
        num_classes: C.
        expected_positives: K, the expected number of positives of an image.
        folder: see `HeldRows`.
    """

    def __init__(self, *, num_classes: int, expected_positives: float, folder: str | None) -> None:
        self._num_classes, self._expected_positives, self._folder = num_classes, expected_positives, folder

    def begin_run(self, *, num_samples: int, seed: int) -> None:
        self._scores = KeyedBank(SCORES, num_samples, (self._num_classes,), "f16", folder=self._folder)

    def banks(self) -> dict[str, Bank]:
        return {SCORES: self._scores}

    def recall(self, batch: Batch, progress: Progress) -> Named:
        index, _ = valid_index(batch)
        read = {name: column.to(index.device) for name, column in self._scores.read(index).items()}
        num_expected = 0.0 if progress.epoch == 0 else self._expected_positives
        return {"remembered": index, SCORES: read["rows"].float(), "visits": read["stamps"] + 1,
                "num_expected": torch.tensor([num_expected], dtype=torch.float64)}  # fmt: skip

    def losses(self, rows: ValidRows, recalled: Named) -> tuple[Named, Named]:
        scores, visits = (pick(recalled["remembered"], recalled[name], rows.index) for name in (SCORES, "visits"))
        probs = torch.sigmoid(rows.logits.detach())
        is_new = visits[:, None] == 0
        loss = expected_negative_loss(
            rows.logits,
            rows.targets,
            torch.where(is_new, probs, scores),
            expected_positives=float(recalled["num_expected"]),
        )
        mean = scores + (probs - scores) / (visits[:, None] + 1)
        return {"expected_negative": mean_share(loss, rows)}, {SCORES: mean, "visits": visits}

    def observe(self, index: Tensor, logits: Tensor, targets: Tensor, extras: Named) -> None:
        self._scores.write(index, {"rows": extras[SCORES], "stamps": extras["visits"].to(torch.int32)})
