"""Owns SST's oracle: its terms and pseudo-labels, label by label, from a method's own features and logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dist_mlpl.batch import Batch
from dist_mlpl.methods.sst import Sst
from tests.support.losses import masked_mean_bce_oracle, partial_bce_oracle
from tests.support.semantic import contrastive_oracle, cosine, pair_logit, pair_loss_oracle, pair_slots


class SstOracle(NamedTuple):
    """What SST makes of a batch."""

    terms: dict[str, float]
    y_intra: Tensor  # (B, C) int8
    y_inter: Tensor


def sst_oracle(
    method: Sst, batch: Batch, ring: dict[int, list[Tensor]], *, epoch: int, ramp: float, group_size: int
) -> SstOracle:
    """One whole global batch of valid rows.

    Args:
        ring: features kept of a class.
        epoch: of the threshold.
        ramp: rho.
    """
    settings, faithful = method.settings, method.settings.faithful
    with torch.no_grad():
        f = method.head.decouple(method.backbone(batch.images)).class_features
        x = method.head.classify(f).double()
        f = f.double()
        likely = {
            (b, i, j): float(torch.sigmoid(pair_logit(method.pair_head, f[b, i].float(), f[b, j].float(), slot)))
            for b in range(len(f)) for (i, j), slot in pair_slots(method.pair_head).items()
        }  # fmt: skip
    y = batch.targets
    B, C = y.shape
    theta = 9.9
    if epoch >= settings.start_epoch:
        steps = epoch - settings.start_epoch
        theta = max(settings.threshold_floor, settings.threshold - steps * settings.threshold_step)

    y_intra, y_inter = y.clone(), y.clone()
    is_dense = method.pair_head.num_neighbours is None
    for b in range(B):
        present = [i for i in range(C) if y[b, i] == 1]
        for c in range(C):
            if y[b, c] != 0:
                continue
            beside = [
                likely.get((b, min(i, c), max(i, c)) if is_dense else (b, i, c), 0.0) for i in present
            ]  # fmt: skip
            if present and sum(beside) / len(beside) >= theta:
                y_intra[b, c] = 1
            kept = ring.get(c, [])
            total = sum(float(cosine(f[b, c], other.double())) for other in kept)
            if kept and total / (settings.ring_capacity if faithful else len(kept)) >= theta:
                y_inter[b, c] = 1

    used = [(b, i, j) for (b, i, j) in likely if faithful or (y[b, i] != 0 and y[b, j] != 0)]
    together = [bool(y[b, i] == 1 and y[b, j] == 1) for b, i, j in used]
    intra = pair_loss_oracle([likely[pair] for pair in used], together) / max(1, len(used))
    total, count = contrastive_oracle(f, y, group_size, keep_negatives_alone=faithful)

    def bce(targets: Tensor) -> float:
        if faithful:
            return masked_mean_bce_oracle(x, targets)
        if settings.normalization == "masked_mean":  # a mean over its own labels, but divided by the known ones alone
            return masked_mean_bce_oracle(x, targets) * int((targets != 0).sum()) / int((y != 0).sum())
        return partial_bce_oracle(x, targets, alpha=1.0, beta=0.0, gamma=-1.0)

    is_on = epoch >= settings.start_epoch
    return SstOracle(
        {
            "bce": bce(y),
            "bce_intra": settings.intra_weight * bce(y_intra) if is_on else 0.0,
            "bce_inter": settings.inter_weight * bce(y_inter) if is_on else 0.0,
            "intra": ramp * settings.pair_loss_weight * intra,
            "inter": ramp * settings.contrastive_weight * float(total) / max(1, count),
        },
        y_intra,
        y_inter,
    )
