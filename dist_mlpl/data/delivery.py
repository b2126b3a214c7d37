"""Owns what a stream notes of the batches it hands out: waiting time, evidence for `audit`, undecodable samples."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from dist_mlpl.batch import Batch
from dist_mlpl.data.collate import BadSample, HostBatch
from dist_mlpl.data.order import PADDING
from dist_mlpl.errors import DataError
from dist_mlpl.spans import span


@dataclass
class Consumed:
    """The samples handed to a rank since the last commit: the evidence that `audit` reads."""

    positions: list[npt.NDArray[np.int64]] = field(default_factory=list)
    indices: list[npt.NDArray[np.int64]] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)


class Delivery:
    """Base of the streams: hands out their batches and notes what the run must know about them.

    Args:
        rank: this process's rank, for messages.
        num_samples: number of samples that `max_bad_fraction` is a fraction of.
        max_bad_fraction: undecodable samples tolerated in an epoch, in [0, 1].
        repair: what to do about undecodable samples, for the message.
    """

    def __init__(self, *, rank: int, num_samples: int, max_bad_fraction: float, repair: str) -> None:
        self._rank, self._num_samples, self._repair = rank, num_samples, repair
        self._allowed_bad = max_bad_fraction * num_samples
        self._num_bad = 0  # over all ranks, this epoch
        self._consumed = Consumed()
        self._waited_seconds = 0.0

    def take_consumed(self) -> Consumed:
        """Return what was handed out since the last call, and forget it."""
        consumed, self._consumed = self._consumed, Consumed()
        return consumed

    def remember_bad(self, num_bad: int) -> None:
        """Set the number of undecodable samples that earlier attempts met in this epoch, over all ranks."""
        self._num_bad = num_bad

    def stop_if_bad(self, num_bad: int) -> None:
        """Add a step's undecodable samples to this epoch's count, and stop the run above the limit.

        Args:
            num_bad: over all ranks, the same on every rank, so that all stop together.

        Raises:
            DataError: more than the tolerated fraction failed in this epoch.
        """
        self._num_bad += num_bad
        if self._num_bad > self._allowed_bad:
            names = "; ".join(f"{bad.name} ({bad.reason})" for bad in self._consumed.bad[-3:])
            raise DataError(
                f"{self._num_bad} undecodable samples in this epoch",
                expected=f"at most {self._allowed_bad:g} of {self._num_samples} (data.max_bad_fraction)",
                where=f"rank {self._rank}: {names or 'none of its own; see the other ranks'}",
                next_step=f"{self._repair}, or raise data.max_bad_fraction",
            )

    def _handed_out(self, batches: Iterator[HostBatch]) -> Iterator[Batch]:
        """Training batches, on the device, as they are waited for and noted; see `without_blanks`."""
        while True:
            began = time.perf_counter()
            with span("data"):
                host = next(batches, None)
            self._waited_seconds += time.perf_counter() - began
            if host is None:
                return
            self._consumed.positions.append(host.positions)
            self._consumed.indices.append(host.indices)
            self._consumed.bad += host.bad
            yield without_blanks(host)


def without_blanks(host: HostBatch) -> Batch:
    """A batch whose rows without a sample show images of its valid rows, in turn; `valid` and labels stay.

    Padding and undecodable samples have no part in any loss, but a BatchNorm that trains takes its statistics over all
    rows: black images would move them. A batch without any valid row stays black.
    """
    batch = host.batch
    if not host.bad and not (host.indices == PADDING).any():  # known on the host: nothing waits for the device
        return batch
    rows = torch.arange(batch.num_images, device=batch.valid.device)
    valid_first = torch.argsort(~batch.valid, stable=True)
    in_turn = valid_first[rows % batch.valid.sum().clamp(min=1)]
    return batch._replace(images=batch.images[torch.where(batch.valid, rows, in_turn)])
