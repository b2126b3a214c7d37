"""Owns what a loss of the single-positive family is to its method, and what such losses share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dist_mlpl.banks.base import Bank
from dist_mlpl.batch import Batch, Progress
from dist_mlpl.losses.single_positive import count_penalty

Named = dict[str, Tensor]


class ValidRows(NamedTuple):
    """The valid rows of a micro-batch, n of them, in their order."""

    logits: Tensor  # (n, C) float32, with a graph
    targets: Tensor  # (n, C) int8, human labels where known, this round's beliefs elsewhere
    human_targets: Tensor  # (n, C) int8
    pseudo_targets: Tensor | None  # (n, C) int8
    soft_targets: Tensor | None  # (n, C)
    index: Tensor  # type: ignore[assignment]  # (n,) int64
    group_sizes: list[int]  # valid rows of each group of images that may interact; the sum is n
    num_valid: Tensor  # () float32, valid images of the global batch, at least 1


class UnknownLoss:
    """One way to learn from unknown labels. What it remembers lives in banks; see `Method` for when it is asked."""

    def begin_run(self, *, num_samples: int, seed: int) -> None:
        """Make banks. None by default."""

    def banks(self) -> dict[str, Bank]:
        """By name. None by default."""
        return {}

    def recall(self, batch: Batch, progress: Progress) -> Named:
        """What `losses` needs for the whole step, labels of padding and undecodable rows left aside.

        Collective: all ranks, where a bank is read.
        """
        return {}

    def losses(self, rows: ValidRows, recalled: Named) -> tuple[Named, Named]:
        """Shares of the global batch's loss, and extras with a row for each valid row or one for the micro-batch."""
        raise NotImplementedError

    def observe(self, index: Tensor, logits: Tensor, targets: Tensor, extras: Named) -> None:
        """Write banks after the update. Nothing by default.

        Args:
            index: (n,) int64 of this rank's valid rows of the whole step.
            logits: (n, C).
            targets: (n, C) int8, as in `ValidRows`.
            extras: of all micro-batches.

        Collective: all ranks.
        """


def mean_share(total: Tensor, rows: ValidRows) -> Tensor:
    """A sum over images and classes as a share of the mean over both in the global batch."""
    return total / (rows.num_valid * rows.logits.shape[1])


def count_share(logits: Tensor, rows: ValidRows, *, expected_positives: float) -> Tensor:
    """() share of the mean of R(p) over groups of images, each group weighed by its valid images.

    Source: Cole et al., CVPR 2021, whose batches are of 8 or 16 images.
    Differs: R is taken of each group of `group_size` images, not of the global batch, so that it neither depends on
        micro-batches and ranks nor has to be known over all of them before the backward pass.

    Args:
        logits: (n, C) of the rows, or of their label estimates.
        rows: which cut the logits into groups.
        expected_positives: k of an image.
    """
    groups = logits.split(rows.group_sizes)
    penalties = [count_penalty(group, expected_positives=expected_positives) * len(group) for group in groups]
    return torch.stack(penalties).sum() / rows.num_valid


def valid_index(batch: Batch) -> tuple[Tensor, Tensor]:
    """(n,) ascending indices of the valid rows, and (n,) the rows of the batch that they are."""
    rows = batch.valid.nonzero().squeeze(1)
    order = batch.index[rows].argsort()
    return batch.index[rows][order], rows[order]


def pick(ascending: Tensor, remembered: Tensor, index: Tensor) -> Tensor:
    """Remembered rows (m, ...) of ascending indices (m,), for the indices (n,) of a micro-batch among them."""
    return remembered[torch.searchsorted(ascending, index)]
