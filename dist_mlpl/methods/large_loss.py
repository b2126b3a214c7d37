"""Owns Large Loss as part of a method: how many labels of each group to doubt, and LL-Cp's permanent corrections."""

from __future__ import annotations

import math
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from dist_mlpl import keyed
from dist_mlpl.banks.base import Bank
from dist_mlpl.banks.keyed import KeyedBank
from dist_mlpl.batch import Batch, Progress
from dist_mlpl.labels import PRESENT, UNKNOWN
from dist_mlpl.losses.large_loss import group_thresholds, large_loss, permanent_corrections
from dist_mlpl.methods.unknown_loss import Named, UnknownLoss, ValidRows, mean_share, pick, valid_index

Variant = Literal["ll_r", "ll_ct", "ll_cp"]
# Those of BoostLU's configuration (Kim et al., CVPR 2023); Large Loss's own code has 0 as default, and tries 0.001 to
# 0.05.
FRACTIONS: Final[dict[Variant, float]] = {"ll_r": 0.005, "ll_ct": 0.002, "ll_cp": 0.001}

CORRECTIONS: Final = "corrections"


class LargeLoss(UnknownLoss):
    """Unknown labels with the largest losses are rejected (LL-R), taken as present (LL-Ct), or so for good (LL-Cp).

    LL-Cp's bank `corrections` holds one bit for each class of every sample; the others remember nothing.

    Source: Kim et al., CVPR 2022, whose batches are of 16 images.
    Differs: the largest losses are those of each group of `group_size` images, not of a rank's batch: no rank and no
        micro-batch cuts a group, so none changes the choice. Of a group of n valid images, floor(n C r + u) losses are
        large, r the share and u in [0, 1) keyed by seed, step and the group's first valid image, so that their mean is
        n C r; the code's ceil(B C r) is never below 1, which in groups could be many times what is asked for.

    Args:
        variant: `ll_r`, `ll_ct` or `ll_cp`.
        num_classes: C.
        fraction: share of all labels, known ones included, whose losses count as large; for LL-R and LL-Ct per epoch
            finished, for LL-Cp at every visit after the first epoch.
        folder: see `HeldRows`.
    """

    def __init__(self, variant: Variant, *, num_classes: int, fraction: float, folder: str | None) -> None:
        self._variant, self._num_classes = variant, num_classes
        self._fraction, self._folder = fraction, folder
        self._corrections: KeyedBank | None = None

    def begin_run(self, *, num_samples: int, seed: int) -> None:
        self._seed = seed
        if self._variant == "ll_cp":
            shape = (-(-self._num_classes // 8),)
            self._corrections = KeyedBank(CORRECTIONS, num_samples, shape, "u8", folder=self._folder)

    def banks(self) -> dict[str, Bank]:
        return {} if self._corrections is None else {CORRECTIONS: self._corrections}

    def recall(self, batch: Batch, progress: Progress) -> Named:
        fraction = self._fraction * (progress.epoch if self._variant != "ll_cp" else progress.epoch > 0)
        recalled = {
            "fraction": torch.tensor([min(1.0, fraction)], dtype=torch.float64),
            "step": torch.tensor([progress.step]),
        }
        if self._corrections is None:
            return recalled
        index, _ = valid_index(batch)
        bits = torch.from_numpy(_unpacked(self._corrections.read(index)["rows"].numpy(), self._num_classes))
        return recalled | {"remembered": index, CORRECTIONS: bits.to(index.device)}

    def losses(self, rows: ValidRows, recalled: Named) -> tuple[Named, Named]:
        targets = rows.targets
        if self._corrections is not None:
            earlier = pick(recalled["remembered"], recalled[CORRECTIONS], rows.index)
            targets = torch.where(earlier & (targets == UNKNOWN), PRESENT, targets)  # a known label always wins
        num_large = self._num_large(rows, recalled)
        thresholds = group_thresholds(rows.logits, targets, num_large=num_large, group_sizes=rows.group_sizes)
        scheme: Literal["reject", "correct"] = "reject" if self._variant == "ll_r" else "correct"
        loss = large_loss(rows.logits, targets, thresholds, scheme=scheme)
        extras: Named = {}
        if self._corrections is not None:
            extras[CORRECTIONS] = earlier | permanent_corrections(rows.logits, targets, thresholds)
        return {"large_loss": mean_share(loss, rows)}, extras

    def observe(self, index: Tensor, logits: Tensor, targets: Tensor, extras: Named) -> None:
        if self._corrections is None:
            return
        corrected = extras[CORRECTIONS]
        chosen = corrected.any(dim=1)  # rows with corrections are written again; bits are never cleared
        packed = torch.from_numpy(np.packbits(corrected[chosen].cpu().numpy(), axis=1))
        stamps = torch.zeros(len(packed), dtype=torch.int32)
        self._corrections.write(index[chosen], {"rows": packed, "stamps": stamps})

    def _num_large(self, rows: ValidRows, recalled: Named) -> list[int]:
        """How many losses of each group are large: on average over steps, the share of its labels."""
        fraction, step = float(recalled["fraction"]), int(recalled["step"])

        def count(group: Tensor) -> int:
            if len(group) == 0 or fraction == 0.0:
                return 0
            u = keyed.uniform(keyed.key("large losses", self._seed, step, int(group[0])), 1)[0]
            return math.floor(len(group) * self._num_classes * fraction + u)

        return [count(group) for group in rows.index.cpu().split(rows.group_sizes)]


def _unpacked(rows: np.ndarray, num_classes: int) -> np.ndarray:
    """Unpack bits from (n, bytes) uint8 to (n, C) bool."""
    return np.unpackbits(rows, axis=1, count=num_classes).astype(bool)
