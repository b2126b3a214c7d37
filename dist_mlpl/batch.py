"""Owns the tuples passed between the library's parts: a batch in, a step's output out, and where the run stands.

They are named tuples because DeepSpeed's hooks look inside tuples, lists and dicts and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One rank's share of a global batch (or a micro-batch of it). Optional fields are None where a run has none."""

    images: Tensor  # (B, 3, H, W) float32, normalised if the config says so
    targets: Tensor  # (B, C) int8, human labels after the view: -1 absent, 0 unknown, +1 present
    pseudo_targets: Tensor | None  # (B, C) int8, pseudo-labels of this round, same coding
    soft_targets: Tensor | None  # (B, C) float32 in [0, 1], probability of presence
    index: Tensor  # type: ignore[assignment]  # (B,) int64, position in the manifest's split; -1 on padding
    crop: Tensor  # (B, 4) float32 in [0, 1], (left, top, width, height) as fractions of the full image
    flipped: Tensor  # (B,) bool, True where mirrored left to right after the crop
    valid: Tensor  # (B,) bool, False for padding and undecodable samples

    @property
    def num_images(self) -> int:
        """B, padding included."""
        return int(self.valid.shape[0])

    def rows(self, start: int, stop: int) -> Batch:
        """Rows [start, stop) as a batch of views."""
        return Batch._make(None if field is None else field[start:stop] for field in self)

    def to(self, device: torch.device) -> Batch:
        """Copy every field to `device`, without waiting for the copies."""
        return Batch._make(None if field is None else field.to(device, non_blocking=True) for field in self)


# Prefix of extras that are reported; each is a () tensor, this rank's share, summed over micro-batches and ranks.
METRIC: Final = "metric/"


class StepOutput(NamedTuple):
    """What a method's forward returns for a micro-batch, and the engine for a whole step."""

    loss: Tensor  # () float32; see `Method.forward` for its scale
    terms: dict[str, Tensor]  # weighted loss terms by name, each (); their sum is `loss`
    logits: Tensor  # (B, C) float32
    extras: dict[str, Any]  # the method's own: what `observe` or a report needs; tensors are detached


class Loading(NamedTuple):
    """Totals of this rank's data loading since the run began; they never fall."""

    waited_seconds: float = 0.0  # time that the training loop waited for batches
    bytes_read: int = 0  # read from remote stores, by the whole process
    retries: int = 0  # repeated requests to remote stores
    num_samples: int = 0  # samples read, from any source
    num_direct: int = 0  # those of them that needed a network read of their own: cache misses


@dataclass(frozen=True, slots=True)
class RunLength:
    """The length of a run, in epochs and samples.

    Args:
        num_epochs: epochs of the whole run.
        num_samples: samples of one epoch; N, except for mixtures with weights.
    """

    num_epochs: int
    num_samples: int

    @property
    def total_samples(self) -> int:
        """Samples of the whole run, the length over which schedules run."""
        return self.num_epochs * self.num_samples

    def samples_seen(self, epoch: int, samples_consumed: int) -> int:
        """Samples from the start of the run to this position."""
        return epoch * self.num_samples + samples_consumed


class Progress(NamedTuple):
    """Where a run stands. (epoch, samples_consumed) is the position; `round` names the labels in force."""

    epoch: int = 0  # epochs finished
    samples_consumed: int = 0  # samples of this epoch's order already trained on
    step: int = 0  # updates since the run began, over all attempts
    round: int = 0  # committed relabelling round whose overlay is in force; 0: none
    fraction: float = 0.0  # finished part of the whole run, in [0, 1]

    def next(self, num_samples: int, length: RunLength) -> Progress:
        """The position one update of `num_samples` samples later."""
        consumed = self.samples_consumed + num_samples
        fraction = length.samples_seen(self.epoch, consumed) / length.total_samples
        return self._replace(samples_consumed=consumed, step=self.step + 1, fraction=min(1.0, fraction))

    def next_epoch(self, length: RunLength) -> Progress:
        """The first position of the following epoch; the step count goes on."""
        fraction = (self.epoch + 1) / length.num_epochs
        return self._replace(epoch=self.epoch + 1, samples_consumed=0, fraction=min(1.0, fraction))

    def due(self, every_steps: int | None) -> bool:
        """True when the step is a positive multiple of `every_steps`; never with None."""
        return every_steps is not None and self.step > 0 and self.step % every_steps == 0
