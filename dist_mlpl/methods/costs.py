"""Owns the estimated costs of a method's banks and heads: the numbers of one part, and the arithmetic of banks."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dist_mlpl import comm, keyed
from dist_mlpl.banks.base import Bank
from dist_mlpl.banks.rows import NUMBER_BYTES
from dist_mlpl.labels import PRESENT, UNKNOWN, Targets

_TRIALS: Final = 100  # batches drawn to estimate how many classes a step touches


class Scale(NamedTuple):
    """The sizes of a run that costs depend on, besides the method's own settings."""

    world_size: int  # R
    global_batch: int  # G
    num_cells: int  # L, cells of the feature map
    targets: Targets  # (n, C) int8, labels of n images as the run sees them, without pseudo-labels

    @property
    def share_images(self) -> float:
        """Mean number of images of a rank in a step."""
        return self.global_batch / self.world_size

    @property
    def positives(self) -> npt.NDArray[np.bool_]:
        """(n, C) bool, True where a class is known present in an image."""
        return self.targets == PRESENT

    @property
    def num_known(self) -> float:
        """Mean number of known labels of an image."""
        return float((self.targets != UNKNOWN).sum() / len(self.targets))

    @property
    def num_positives(self) -> float:
        """Mean number of known present labels of an image."""
        return float(self.positives.sum() / len(self.targets))

    @property
    def num_touched_classes(self) -> float:
        """Mean number of classes known present in some image of a step, estimated from keyed draws of batches."""
        size = _TRIALS * self.global_batch
        chosen = (keyed.uniform(keyed.key("touched classes"), size) * len(self.targets)).astype(np.int64)
        positives = self.positives
        return float(np.mean([positives[batch].any(axis=0).sum() for batch in chosen.reshape(_TRIALS, -1)]))


class Cost(NamedTuple):
    """The costs of one part of a method."""

    name: str
    held_bytes: float = 0.0  # memory of parameters, or of a bank's rows, on the rank that holds most
    kept_bytes: float = 0.0  # activations kept for the backward pass, per image
    sent_bytes: float = 0.0  # sent by an average rank to others in a step, as `comm.traffic` counts
    flops: float = 0.0  # per image, forward and backward; a multiply-add counts as two


def bank_cost(name: str, bank: Bank, scale: Scale, *, reads: float = 1.0, writes: float = 1.0) -> Cost:
    """Estimate the memory of a bank, and what `Bank.read` and `WritableBank.write` send.

    Written rows travel with the next read request, with room for as many rows as were read. Of a replicated bank
    nothing moves.

    Args:
        name: the bank's name.
        bank: any bank.
        scale: the sizes of the run.
        reads: rows read per image; 0 for a bank that a step does not read.
        writes: rows written per image; 0 for a bank that a step does not write.
    """
    R, B = scale.world_size, scale.share_images
    row_bytes = sum(column.num_bytes for column in bank.spec.columns.values())
    if bank.is_replicated:
        return Cost(name, held_bytes=bank.spec.num_rows * row_bytes)
    num_shards = bank.spec.num_shards
    owned = range(-(-num_shards // R))  # shards of rank 0, which has most
    held_rows = sum(max(0, -(-(bank.spec.num_rows - shard) // num_shards)) for shard in owned)
    sent = 0.0
    if reads or writes:
        sent = exchange_bytes(B * reads, 8, R) + (R - 1) * NUMBER_BYTES
        num_sent = max(reads, writes) if writes else 0.0
        sent += (R - 1) / R * B * num_sent * (16 + row_bytes)
    if reads:
        sent += exchange_bytes(B * reads, row_bytes, R, is_expected=True)
    return Cost(name, held_bytes=held_rows * row_bytes, sent_bytes=sent)


def pair_counts(targets: Targets, num_neighbours: int | None, *, trains_all: bool) -> tuple[float, float]:
    """Estimate the work of SST's pair head for an average image.

    Args:
        targets: (n, C) int8.
        num_neighbours: E; as neighbours are not chosen yet, all classes are taken as equally likely. None: all pairs,
            counted exactly.
        trains_all: True: the head learns from all pairs, not only from those of known classes.

    Returns:
        The mean number of pairs, and of their ends; a class that is the first of some pairs and the second of others
        counts twice.
    """
    present, is_open = targets == PRESENT, targets == UNKNOWN
    known = np.ones_like(present) if trains_all else ~is_open
    num_known, num_present, num_open = (kind.sum(axis=1) for kind in (known, present, is_open))
    if num_neighbours is None:
        num_pairs = num_known * (num_known - 1) / 2 + num_present * num_open
        num_firsts = _first_ends(known, present, is_open)
        num_seconds = _first_ends(known[:, ::-1], present[:, ::-1], is_open[:, ::-1])
    else:
        share = num_neighbours / (targets.shape[1] - 1)  # neighbours' share of all other classes
        to_known, to_open = share * (num_known - 1).clip(min=0), share * num_open  # pairs per first
        num_pairs = num_known * to_known + num_present * to_open  # two known classes pair both ways
        num_firsts = (num_known - num_present) * _chance(to_known) + num_present * _chance(to_known + to_open)
        num_seconds = num_known * _chance(to_known) + num_open * _chance(share * num_present)
    return float(num_pairs.mean()), float((num_firsts + num_seconds).mean())


def _chance(mean: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The probability of at least one event whose number is Poisson distributed with this mean."""
    return 1.0 - np.exp(-mean)


def _first_ends(
    known: npt.NDArray[np.bool_], present: npt.NDArray[np.bool_], is_open: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """(n,) number of classes that come first in some pair of two known classes, or of a present and an unknown one."""
    after = [kind[:, ::-1].cumsum(axis=1)[:, ::-1] - kind > 0 for kind in (known, present, is_open)]
    return ((known & after[0]) | (present & after[2]) | (is_open & after[1])).sum(axis=1)


def exchange_bytes(num_rows: float, row_bytes: float, world_size: int, *, is_expected: bool = False) -> float:
    """Bytes that an average rank sends in one `comm.exchange`, with rows spread evenly over ranks.

    Args:
        num_rows: rows of a rank.
        row_bytes: bytes of a row.
        world_size: R.
        is_expected: True: there is room for exactly these rows. False: messages shorter than `comm.SHORT_BYTES` are
            padded, with the number of rows per message Poisson distributed.
    """
    mean = num_rows / world_size
    filled = 0.0
    if not is_expected:
        chance = math.exp(-mean)  # probability that a message has no rows, then one, two and so on
        for number in range(math.ceil(comm.SHORT_BYTES / row_bytes)):
            filled += chance * (comm.SHORT_BYTES - number * row_bytes)
            chance *= mean / (number + 1)
    return (world_size - 1) * (comm.HEAD_BYTES + mean * row_bytes + filled)


def reduce_bytes(num_bytes: float, world_size: int) -> float:
    """Bytes that a rank sends in one all-reduce of `num_bytes` bytes."""
    return 2 * num_bytes * (world_size - 1) / world_size
