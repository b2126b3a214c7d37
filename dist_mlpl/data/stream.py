"""Owns the flow of batches: bytes from shards, decoded in threads ahead of the step that needs them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator

from dist_mlpl.batch import Batch
from dist_mlpl.data.cache import ShardCache
from dist_mlpl.data.collate import collate
from dist_mlpl.data.label_store import Labels
from dist_mlpl.data.order import PADDING, EpochOrder, last_position
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.transform import DecodedImage, Transform, use_one_thread_here
from dist_mlpl.data.views import check_rule
from dist_mlpl.errors import DataError, ShardError
from dist_mlpl.settings import Settings
from dist_mlpl.world import World

EVALUATION_BLOCK = 32  # fixed, so that a sample's logits are bit-equal on any rank and any number of ranks


class DataSettings(Settings):
    """What is read, and which of its labels a run may see."""

    manifest: str  # folder or URL of the shards
    train_split: str = "train"
    eval_split: str = "test"
    known_fraction: float | None = Field(None, gt=0.0, le=1.0)  # of the train labels; null keeps all
    known_rule: Literal["bernoulli", "single_positive", "dense_subset", "exact_count"] = "bernoulli"
    known_seed: int | None = None  # null: the rule's own (0; exact_count 1)
    num_lanes: int = Field(64, ge=1)
    window_samples: int = Field(4096, ge=1)
    cache_bytes: int = Field(64 << 30, ge=0)  # of this node's shard cache; remote shards only
    num_workers: int = Field(2, ge=0)  # decoding threads of each rank; 0 decodes in the step itself
    max_bad_fraction: float = Field(1e-4, ge=0.0, le=1.0)  # undecodable samples of an epoch before the run stops
    storage_options: dict[str, Any] = Field(default_factory=dict)  # fsspec keywords of remote URLs; never written down

    @property
    def is_view_asked(self) -> bool:
        """Whether train labels are hidden."""
        return self.known_fraction is not None or self.known_rule != "bernoulli"

    @model_validator(mode="after")
    def _check_view(self) -> DataSettings:
        if self.is_view_asked:
            check_rule(self.known_rule, self.known_fraction)
        return self


class BadSample(NamedTuple):
    """A sample that kept its place with `valid` False."""

    index: int  # type: ignore[assignment]
    name: str
    reason: str


@dataclass
class Consumed:
    """What a rank was handed since the last commit: the evidence that `audit` reads."""

    positions: list[npt.NDArray[np.int64]] = field(default_factory=list)
    indices: list[npt.NDArray[np.int64]] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)


class Stream:
    """Batches of one split for one rank.

    Args:
        index: the split.
        cache: where its shards are read.
        transform: what a sample looks like.
        world: this rank.
        num_workers: decoding threads.
        device: where batches end up.
        max_bad_fraction: undecodable samples tolerated in an epoch, as a fraction of the split.
    """

    def __init__(
        self,
        index: SplitIndex,
        cache: ShardCache,
        transform: Transform,
        *,
        world: World,
        num_workers: int,
        device: torch.device,
        max_bad_fraction: float,
    ) -> None:
        self._index, self._cache, self._transform = index, cache, transform
        self._world, self._device = world, device
        self._num_workers = num_workers
        self._pool = ThreadPoolExecutor(num_workers, "decode", use_one_thread_here) if num_workers else None
        self._allowed_bad = max_bad_fraction * index.num_samples
        self._num_bad = 0  # over all ranks, this epoch
        self._consumed = Consumed()
        self.waited_seconds = 0.0  # spent in the training loop waiting for data, since the run began

    def close(self) -> None:
        """Stop the decoding threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def train_batches(
        self, order: EpochOrder, labels: Labels, *, epoch: int, start: int, global_batch: int
    ) -> Iterator[Batch]:
        """This rank's share of every step from `start` to the end of the epoch's plan.

        Args:
            order: of this epoch.
            labels: in force.
            epoch: keys the augmentation.
            start: samples of this epoch already consumed.
            global_batch: G.

        Returns:
            One batch a step, the same number of rows on every rank and at every step.

        Raises:
            ShardError: a shard is missing or damaged.
        """
        if start == 0:
            self._num_bad = 0
        stop = last_position(start, global_batch=global_batch, num_samples=order.num_samples)

        def shares() -> Iterator[npt.NDArray[np.int64]]:
            for begin in range(start, stop, global_batch):
                yield order.share(begin, global_batch, rank=self._world.rank, size=self._world.size)

        ahead = self._ahead(((positions, order.at(positions)) for positions in shares()), epoch=epoch)
        while True:
            began = time.perf_counter()
            step = next(ahead, None)
            self.waited_seconds += time.perf_counter() - began
            if step is None:
                return
            positions, indices, decoded = step
            self._consumed.positions.append(positions)
            self._consumed.indices.append(indices)
            yield self._batch(indices, self._drop_bad(indices, decoded), labels)

    def evaluation_batches(self, labels: Labels) -> Iterator[Batch]:
        """Every sample of the split once, in manifest order, in fixed blocks of 32 dealt to the ranks.

        All ranks run the same number of blocks; padding has `valid` False and index -1.
        """
        num_samples = self._index.num_samples
        num_blocks = -(-num_samples // EVALUATION_BLOCK)
        rank, size = self._world.rank, self._world.size
        blocks = list(range(rank * num_blocks // size, (rank + 1) * num_blocks // size))
        blocks += [num_blocks] * (-(-num_blocks // size) - len(blocks))  # beyond the end: all padding

        def shares() -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
            for block in blocks:
                indices = np.arange(block * EVALUATION_BLOCK, (block + 1) * EVALUATION_BLOCK)
                indices[indices >= num_samples] = PADDING
                yield indices, indices

        for _, indices, decoded in self._ahead(shares(), epoch=0):
            yield self._batch(indices, self._drop_bad(indices, decoded), labels)

    def take_consumed(self) -> Consumed:
        """What was handed out since the last call, and forget it."""
        consumed, self._consumed = self._consumed, Consumed()
        return consumed

    def remember_bad(self, num_bad: int) -> None:
        """Count undecodable samples of this epoch that an earlier attempt met."""
        self._num_bad = num_bad

    def stop_if_bad(self, num_bad: int) -> None:
        """Count a step's undecodable samples over all ranks, and stop the run above the limit.

        Args:
            num_bad: of all ranks, the same on every rank, so that all stop together.

        Raises:
            DataError: more than `data.max_bad_fraction` of the split failed in this epoch.
        """
        self._num_bad += num_bad
        if self._num_bad > self._allowed_bad:
            names = "; ".join(f"{bad.name} ({bad.reason})" for bad in self._consumed.bad[-3:])
            raise DataError(
                f"{self._num_bad} undecodable samples in this epoch",
                expected=f"at most {self._allowed_bad:g} of {self._index.num_samples} (data.max_bad_fraction)",
                where=f"rank {self._world.rank}: {names or 'none of its own; see the other ranks'}",
                next_step="run `dist-mlpl shards verify --decode`, or raise data.max_bad_fraction",
            )

    def _batch(self, indices: npt.NDArray[np.int64], decoded: Sequence[DecodedImage | None], labels: Labels) -> Batch:
        real = indices != PADDING
        targets = np.zeros((len(indices), self._index.manifest.num_classes), dtype=np.int8)
        targets[real] = labels.targets(indices[real])
        batch = collate(decoded, targets, indices, self._transform.settings.size).to(self._device)
        return batch._replace(images=self._transform.normalise(batch.images))

    def _drop_bad(
        self, indices: npt.NDArray[np.int64], decoded: Sequence[DecodedImage | BadSample | None]
    ) -> list[DecodedImage | None]:
        """Undecodable samples noted and turned into empty places."""
        kept: list[DecodedImage | None] = []
        for one in decoded:
            if isinstance(one, BadSample):
                self._consumed.bad.append(one)
                one = None
            kept.append(one)
        return kept

    def _ahead(
        self, steps: Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]], *, epoch: int
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], list[DecodedImage | BadSample | None]]]:
        """Decode steps in order, a few steps before they are asked for."""
        if self._pool is None:
            for positions, indices in steps:
                rows = zip(positions.tolist(), indices.tolist(), strict=True)
                yield positions, indices, [self._load(p, i, epoch) for p, i in rows]
            return
        pending: deque[tuple[Any, Any, list[Future]]] = deque()
        try:
            for positions, indices in steps:
                rows = zip(positions.tolist(), indices.tolist(), strict=True)
                jobs = [self._pool.submit(self._load, p, i, epoch) for p, i in rows]
                pending.append((positions, indices, jobs))
                if len(pending) > 2 and len(pending) * len(positions) > 2 * self._num_workers:
                    yield _finished(pending)
            while pending:
                yield _finished(pending)
        finally:
            for _, _, jobs in pending:
                for job in jobs:
                    job.cancel()

    def _load(self, position: int, index: int, epoch: int) -> DecodedImage | BadSample | None:
        """One sample's bytes, decoded and augmented."""
        if index == PADDING:
            return None
        place = self._index.place(index)
        content = self._cache.read(self._index.shards[place.shard], place.offset, place.num_bytes)
        try:
            return self._transform(content, epoch=epoch, position=position)
        except ShardError as error:
            return BadSample(index, self._index.name(index), error.found)


def _finished(pending: deque) -> tuple[Any, Any, list[DecodedImage | BadSample | None]]:
    positions, indices, jobs = pending.popleft()
    return positions, indices, [job.result() for job in jobs]
