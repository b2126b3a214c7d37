"""Owns Large Loss as part of a method: the threshold that earlier steps leave, and LL-Cp's lasting corrections."""

from __future__ import annotations

import math
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.banks.base import Bank
from dist_mlpl.banks.held import Column
from dist_mlpl.banks.keyed import KeyedBank
from dist_mlpl.banks.table import TableBank
from dist_mlpl.batch import Batch, Progress
from dist_mlpl.labels import PRESENT, UNKNOWN
from dist_mlpl.losses.large_loss import large_loss, large_loss_threshold, permanent_corrections
from dist_mlpl.methods.unknown_loss import Named, UnknownLoss, ValidRows, mean_share, pick, valid_index

Variant = Literal["ll_r", "ll_ct", "ll_cp"]
FRACTIONS: Final[dict[Variant, float]] = {"ll_r": 0.005, "ll_ct": 0.002, "ll_cp": 0.001}

THRESHOLD: Final = "large_loss_threshold"
CORRECTIONS: Final = "corrections"
EARLIER: Final = "earlier_corrections"  # those that the step began with
_NEWEST_SHARE = 0.1  # of the newest step in the threshold


class LargeLoss(UnknownLoss):
    """Unknown labels of the largest losses are taken out (LL-R), as present (LL-Ct), or as present for good (LL-Cp).

    The table `large_loss_threshold` holds the average over earlier steps of the logit from which on a loss is large;
    LL-Cp's bank `corrections` one bit for each class of every sample.

    Source: Kim et al., CVPR 2022.
    Differs: the threshold is that of earlier global batches, the newest weighing a tenth, not of the rank's own batch:
        so it is known before the first micro-batch and the same on all ranks. The first step that should reject does
        not.

    Args:
        variant: `ll_r`, `ll_ct` or `ll_cp`.
        num_classes: C.
        fraction: of all labels of a batch; times epochs finished for LL-R and LL-Ct.
        folder: see `Bank`.
    """

    def __init__(self, variant: Variant, *, num_classes: int, fraction: float, folder: str | None) -> None:
        self._variant, self._num_classes = variant, num_classes
        self._fraction, self._folder = fraction, folder
        self._corrections: KeyedBank | None = None

    def begin_run(self, *, num_samples: int, seed: int) -> None:
        columns = {"logit": Column(dtype="f32"), "num_steps": Column(dtype="i64")}
        self._threshold = TableBank(THRESHOLD, 1, columns)
        if self._variant == "ll_cp":
            shape = (-(-self._num_classes // 8),)
            self._corrections = KeyedBank(CORRECTIONS, num_samples, shape, "u8", folder=self._folder)

    def banks(self) -> dict[str, Bank]:
        banks: dict[str, Bank] = {THRESHOLD: self._threshold}
        return banks if self._corrections is None else banks | {CORRECTIONS: self._corrections}

    def recall(self, batch: Batch, progress: Progress) -> Named:
        fraction = self._fraction * (progress.epoch if self._variant != "ll_cp" else progress.epoch > 0)
        table = self._threshold.read_all()
        is_known = fraction > 0 and int(table["num_steps"]) > 0
        logit = table["logit"] if is_known else torch.full((1,), math.inf)
        recalled = {
            "fraction": torch.tensor([min(1.0, fraction)], dtype=torch.float64),
            "threshold": logit.to(batch.targets.device),
        }
        if self._corrections is None:
            return recalled
        index, _ = valid_index(batch)
        bits = torch.from_numpy(_unpacked(self._corrections.read(index)["rows"].numpy(), self._num_classes))
        return recalled | {"remembered": index, CORRECTIONS: bits.to(index.device)}

    def losses(self, rows: ValidRows, recalled: Named) -> tuple[Named, Named]:
        threshold = recalled["threshold"].squeeze()
        targets, extras = rows.targets, {"fraction": recalled["fraction"]}
        if self._corrections is not None:
            earlier = pick(recalled["remembered"], recalled[CORRECTIONS], rows.index)
            targets = _with(earlier, targets)
            extras[EARLIER] = earlier
            extras[CORRECTIONS] = earlier | permanent_corrections(rows.logits, targets, threshold)
        scheme: Literal["reject", "correct"] = "reject" if self._variant == "ll_r" else "correct"
        loss = large_loss(rows.logits, targets, threshold, scheme=scheme)
        return {"large_loss": mean_share(loss, rows)}, extras

    def observe(self, index: Tensor, logits: Tensor, targets: Tensor, extras: Named) -> None:
        if self._corrections is not None:
            # What this step has corrected counts as unknown here: without it the threshold could only fall.
            targets, corrected = _with(extras[EARLIER], targets), extras[CORRECTIONS]
            chosen = corrected.any(dim=1)  # a row that was corrected once is written again; its bits never fall
            packed = torch.from_numpy(np.packbits(corrected[chosen].cpu().numpy(), axis=1))
            stamps = torch.zeros(len(packed), dtype=torch.int32)
            self._corrections.write(index[chosen], {"rows": packed, "stamps": stamps})
        newest = large_loss_threshold(logits, targets, fraction=float(extras["fraction"][0]), reduce=comm.reduce_sum)
        if not math.isfinite(newest):
            return  # nothing is asked for, or fewer labels are unknown than asked for
        table = self._threshold.read_all()
        share = _NEWEST_SHARE if int(table["num_steps"]) > 0 else 1.0
        logit = table["logit"].lerp(newest.float().cpu(), share)
        self._threshold.write_all({"logit": logit, "num_steps": table["num_steps"] + 1})


def _with(corrected: Tensor, targets: Tensor) -> Tensor:
    """Targets in which corrected unknown labels are present; a known label always wins."""
    return torch.where(corrected & (targets == UNKNOWN), PRESENT, targets)


def _unpacked(rows: np.ndarray, num_classes: int) -> np.ndarray:
    """(n, C) bool of (n, bytes) uint8."""
    return np.unpackbits(rows, axis=1, count=num_classes).astype(bool)
