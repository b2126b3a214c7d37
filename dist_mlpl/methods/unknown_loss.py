"""Owns the interface between a loss of the single-positive family and its method, and what such losses share."""

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
    targets: Tensor  # (n, C) int8, human labels where known, this round's pseudo-labels elsewhere
    human_targets: Tensor  # (n, C) int8
    pseudo_targets: Tensor | None  # (n, C) int8
    soft_targets: Tensor | None  # (n, C)
    index: Tensor  # type: ignore[assignment]  # (n,) int64
    group_sizes: list[int]  # number of valid rows in each group of images that may interact; the sum is n
    num_valid: Tensor  # () float32, valid images of the global batch, at least 1


class UnknownLoss:
    """A loss with its banks; its methods are called by the `Method` methods of the same names."""

    def begin_run(self, *, num_samples: int, seed: int) -> None:
        """Make the loss's banks; none by default. See `Method.begin_run`."""

    def banks(self) -> dict[str, Bank]:
        """The loss's banks by name. None by default."""
        return {}

    def recall(self, batch: Batch, progress: Progress) -> Named:
        """Compute what `losses` needs for the whole step, for valid rows only. Nothing by default.

        Collective: all ranks, if a bank is read.
        """
        return {}

    def losses(self, rows: ValidRows, recalled: Named) -> tuple[Named, Named]:
        """Compute shares of the global batch's loss, and extras with one row per valid row or per micro-batch."""
        raise NotImplementedError

    def observe(self, index: Tensor, logits: Tensor, targets: Tensor, extras: Named) -> None:
        """Write banks after the update. Does nothing by default.

        Args:
            index: (n,) int64, sample indices of this rank's valid rows of the whole step.
            logits: (n, C).
            targets: (n, C) int8, see `ValidRows`.
            extras: those of `losses`, joined over micro-batches.

        Collective: all ranks.
        """


def mean_share(total: Tensor, rows: ValidRows) -> Tensor:
    """Turn a sum over images and classes into a share of the mean over both in the global batch."""
    return total / (rows.num_valid * rows.logits.shape[1])


def count_share(logits: Tensor, rows: ValidRows, *, expected_positives: float) -> Tensor:
    """() share of the mean of R(p) over groups of images, each group weighted by its number of valid images.

    Source: Cole et al., CVPR 2021, whose batches are of 8 or 16 images.
    Differs: R is taken of each group of `group_size` images, not of the global batch, so that it neither depends on
        micro-batches and ranks nor has to be known over all of them before the backward pass.

    Args:
        logits: (n, C) of the rows, or of their label estimates.
        rows: the rows, with the sizes of their groups.
        expected_positives: k, the expected number of positives of an image.
    """
    groups = logits.split(rows.group_sizes)
    penalties = [count_penalty(group, expected_positives=expected_positives) * len(group) for group in groups]
    return torch.stack(penalties).sum() / rows.num_valid


def valid_index(batch: Batch) -> tuple[Tensor, Tensor]:
    """(n,) ascending sample indices of the valid rows, and (n,) their rows in the batch."""
    rows = batch.valid.nonzero().squeeze(1)
    order = batch.index[rows].argsort()
    return batch.index[rows][order], rows[order]


def pick(ascending: Tensor, remembered: Tensor, index: Tensor) -> Tensor:
    """(n, ...) the rows of `remembered` (m, ...), which has indices `ascending` (m,), for `index` (n,) among them."""
    return remembered[torch.searchsorted(ascending, index)]
