"""Owns the flow of batches: bytes are prefetched, and threads decode them into batches ahead of the training step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator, model_validator

from dist_mlpl import storage
from dist_mlpl.batch import Batch, Loading
from dist_mlpl.data.collate import (
    BadSample,
    HostBatch,
    ImageMemory,
    clear,
    decoded_on_device,
    empty_batch,
    normalised,
    put,
    to_device,
)
from dist_mlpl.data.delivery import Delivery
from dist_mlpl.data.fetch import Fetcher, Spans, Ticket
from dist_mlpl.data.label_store import Labels
from dist_mlpl.data.mixture import MixedSet
from dist_mlpl.data.order import PADDING, EpochOrder, last_position
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.tars import TarSettings
from dist_mlpl.data.transform import Transform, use_one_thread_here
from dist_mlpl.data.views import check_rule
from dist_mlpl.errors import ShardError
from dist_mlpl.settings import Location, Settings
from dist_mlpl.world import World

ROWS_PER_JOB = 8  # rows that one thread decodes one after the other
READ_AHEAD_SAMPLES = 512  # samples per rank whose reads may be begun ahead: bounds the memory of encoded images
EVALUATION_ROUND = 2048  # samples of an evaluation that are prefetched at once, like a window in training
_SKIPPED_FRACTION = 0.5  # if more of a window than this is used already, its rest is read sample by sample
EVALUATION_BLOCK = 32  # fixed, so that a sample's logits are bit-equal on any rank and any number of ranks


Indices = npt.NDArray[np.int64]


class DataSettings(Settings):
    """Which data is read, and which of its labels a run may see."""

    # Folder or URL of the shards; or a list of these, or of {manifest, weight}, to be mixed in training.
    manifest: Location | tuple[MixedSet, ...] = ""
    unindexed: TarSettings | None = None  # tars to read without an index, in place of a manifest
    train_split: str = "train"  # the split of the manifest that is trained on
    eval_split: str = "test"  # the split that is evaluated: one of the manifest's, or `held_out`
    known_fraction: float | None = Field(None, gt=0.0, le=1.0)  # share of train labels kept known; null keeps all
    # The rule by which known_fraction is drawn; single_positive keeps one present label an image.
    known_rule: Literal["bernoulli", "single_positive", "dense_subset", "exact_count"] = "bernoulli"
    known_seed: int | None = None  # null: the rule's own (0; exact_count 1)
    # Share of the train split, in whole shards, kept out of training as the split `held_out`, to validate choices on.
    held_out_fraction: float | None = Field(None, gt=0.0, lt=1.0)
    view: str | None = None  # a view on disk, by its name beside the shards or its URL, that train labels pass through
    num_lanes: int = Field(64, ge=1)  # tracks that an epoch reads side by side; ranks share them
    window_samples: int = Field(4096, ge=1)  # samples of a lane that are shuffled together
    cache_bytes: int = Field(64 << 30, ge=0)  # size of each node's cache of remote shards; 0: none, single reads only
    num_workers: int = Field(2, ge=0)  # decoding threads of each rank; 0 decodes in the step itself
    decode_on: Literal["cpu", "gpu"] = "cpu"  # gpu: nvJPEG decodes and the GPU crops; threads only fetch
    max_bad_fraction: float = Field(1e-4, ge=0.0, le=1.0)  # share of undecodable samples tolerated in an epoch
    # fsspec keywords for remote URLs, optionally by scheme ({s3: {...}, https: {...}}); never saved or shown
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)

    @property
    def is_view_asked(self) -> bool:
        """Whether a view drawn in memory hides train labels."""
        return self.known_fraction is not None or self.known_rule != "bernoulli"

    @field_validator("manifest", mode="before")
    @classmethod
    def _sets(cls, value: Any) -> Any:
        """Turn a plain string in the list into a set of weight 1."""
        if not isinstance(value, (list, tuple)):
            return value
        return tuple({"manifest": one} if isinstance(one, str) else one for one in value)

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        if bool(self.manifest) == (self.unindexed is not None):
            raise ValueError("give one of data.manifest and data.unindexed, and not both")
        if not isinstance(self.manifest, str) and (self.is_view_asked or self.view is not None):
            raise ValueError("a view is drawn over one set: name one data.manifest, or leave the view out")
        if self.held_out_fraction is not None and not isinstance(self.manifest, str):
            raise ValueError("held_out_fraction is of one set: name one data.manifest, or leave it out")
        if self.held_out_fraction is not None and self.unindexed is not None:
            raise ValueError("held_out_fraction needs tars with an index: `dist-mlpl shards index`")
        if self.view is not None and self.is_view_asked:
            raise ValueError("give data.view or known_fraction and known_rule, and not both")
        if self.unindexed is not None and (self.is_view_asked or self.view is not None):
            raise ValueError("view, known_fraction and known_rule need tars with an index: `dist-mlpl shards index`")
        if self.unindexed is not None and self.decode_on != "cpu":
            raise ValueError(f"decode_on {self.decode_on} needs tars with an index: run `dist-mlpl shards index`")
        if self.is_view_asked:
            check_rule(self.known_rule, self.known_fraction)
        return self


class _Share(NamedTuple):
    """One rank's share of one step."""

    positions: Indices  # (B,) int64, -1 on padding
    indices: Indices  # (B,) int64, -1 on padding
    round: int  # the prefetch round it belongs to: a window of the order, or a stretch of an evaluation


class Stream(Delivery):
    """Batches of one split for one rank.

    Three things run concurrently: reads of upcoming samples and extents, decoding into the memory of upcoming
    batches, and the copy of the next batch to the device. All are bounded, and none changes what a batch holds.

    Args:
        index: the split.
        fetcher: for the same split.
        transform: decodes and augments samples.
        world: this rank.
        num_workers: decoding threads; 0 decodes in the thread that iterates.
        device: where batches go.
        max_bad_fraction: undecodable samples tolerated in an epoch, as a fraction of the split, in [0, 1].
        decodes_on_device: decode and crop JPEGs on `device` instead of in threads.
    """

    def __init__(
        self,
        index: SplitIndex,
        fetcher: Fetcher,
        transform: Transform,
        *,
        world: World,
        num_workers: int,
        device: torch.device,
        max_bad_fraction: float,
        decodes_on_device: bool = False,
    ) -> None:
        super().__init__(
            rank=world.rank, num_samples=index.num_samples, max_bad_fraction=max_bad_fraction,
            repair="run `dist-mlpl shards verify --decode`",
        )  # fmt: skip
        self._decodes_on_device = decodes_on_device
        self._index, self.fetcher, self._transform = index, fetcher, transform
        self._world, self._device = world, device
        self._memory = ImageMemory()
        self._num_workers = num_workers
        self._pool = ThreadPoolExecutor(num_workers, "decode", use_one_thread_here) if num_workers else None

    def close(self) -> None:
        """Stop reading and decoding."""
        self.fetcher.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def loading(self) -> Loading:
        """This rank's waiting time and reads: samples since the stream was made, traffic since the process began."""
        counts, traffic = self.fetcher.counts, storage.traffic()
        return Loading(
            waited_seconds=self._waited_seconds,
            bytes_read=traffic.bytes_read,
            retries=traffic.retries,
            num_samples=counts.local + counts.cached + counts.direct,
            num_direct=counts.direct,
        )

    def train_batches(
        self, order: EpochOrder, labels: Labels, *, epoch: int, start: int, global_batch: int
    ) -> Iterator[Batch]:
        """This rank's share of every step from `start` to the end of the epoch's plan.

        Args:
            order: this epoch's order.
            labels: the labels in force.
            epoch: counted from 0; keys the augmentation.
            start: samples of this epoch already consumed.
            global_batch: G, a multiple of the order's group_size.

        Yields:
            One batch per step, with the same number of rows on every rank and at every step.

        Raises:
            ShardError: a shard is missing or damaged.
            StorageError: a shard could not be read.
        """
        if start == 0:
            self._num_bad = 0
        host_batches = self.host_batches(order, labels, epoch=epoch, start=start, global_batch=global_batch)
        yield from self._handed_out(to_device(host_batches, self._device, self._finish(epoch)))

    def host_batches(
        self, order: EpochOrder, labels: Labels, *, epoch: int, start: int, global_batch: int
    ) -> Iterator[HostBatch]:
        """Like `train_batches`, but in host memory with uint8 images; nothing is recorded as consumed."""
        stop = last_position(start, global_batch=global_batch, num_samples=order.num_samples)
        rank, size = self._world.rank, self._world.size

        def shares() -> Iterator[_Share]:
            for begin in range(start, stop, global_batch):
                positions = order.share(begin, global_batch, rank=rank, size=size)
                yield _Share(positions, order.at(positions), order.window_at(begin)[0])

        def rounds() -> Iterator[tuple[int, Spans]]:
            first, used_fraction = order.window_at(start)
            lanes = order.lanes_read(start, global_batch, ranks=range(rank, rank + 1), size=size)
            for window in range(first + (used_fraction > _SKIPPED_FRACTION), max(map(order.num_windows, lanes))):
                in_lanes = [order.spans(lane, window) for lane in lanes if window < order.num_windows(lane)]
                yield window, [span for spans in in_lanes for span in spans]

        if start < stop:
            self.fetcher.follow(rounds())
        return self._decoded(shares(), labels, epoch=epoch)

    def evaluation_batches(self, labels: Labels) -> Iterator[Batch]:
        """Every sample of the split once, in manifest order, in fixed blocks of 32 dealt to the ranks.

        All ranks get the same number of blocks; padding rows have `valid` False and index -1.
        """
        num_samples = self._index.num_samples
        num_blocks = -(-num_samples // EVALUATION_BLOCK)
        rank, size = self._world.rank, self._world.size
        first, stop = (min(n * num_blocks // size * EVALUATION_BLOCK, num_samples) for n in (rank, rank + 1))
        yield from self._blocks([(first, stop)], labels, num_blocks=-(-num_blocks // size), are_padded=True)

    def span_batches(self, labels: Labels, spans: Spans, *, num_blocks: int) -> Iterator[Batch]:
        """Every sample of some spans once, in blocks of 32 that never cross spans; a span's last block may be shorter.

        What a block holds depends on its span alone.

        Args:
            labels: the labels in force.
            spans: (first, stop) sample indices.
            num_blocks: total number of blocks, padding blocks added at the end; at least `num_span_blocks(spans)`.
        """
        yield from self._blocks(spans, labels, num_blocks=num_blocks, are_padded=False)

    def _blocks(self, spans: Spans, labels: Labels, *, num_blocks: int, are_padded: bool) -> Iterator[Batch]:
        """Batches of the spans' samples; a block never crosses spans, the last of each is padded or short.

        Padding blocks follow until there are `num_blocks`.
        """

        def shares() -> Iterator[_Share]:
            number = seen = 0
            for first, stop in spans:
                for start in range(first, stop, EVALUATION_BLOCK):
                    indices = np.arange(start, start + EVALUATION_BLOCK)
                    indices[indices >= stop] = PADDING
                    indices = indices if are_padded else indices[indices != PADDING]
                    yield _Share(indices, indices, (seen + start - first) // EVALUATION_ROUND)
                    number += 1
                seen += stop - first
            padding = np.full(EVALUATION_BLOCK, PADDING, dtype=np.int64)
            for _ in range(number, num_blocks):
                yield _Share(padding, padding, seen // EVALUATION_ROUND)

        def pieces() -> Iterator[tuple[int, int, int]]:
            seen = 0
            for first, stop in spans:
                while first < stop:
                    end = min(stop, first + EVALUATION_ROUND - seen % EVALUATION_ROUND)
                    yield seen // EVALUATION_ROUND, first, end
                    seen, first = seen + end - first, end

        def rounds() -> Iterator[tuple[int, Spans]]:
            for number, parts in groupby(pieces(), key=itemgetter(0)):
                yield number, [span for _, first, end in parts for span in self._index.spans(first, end)]

        if spans:
            self.fetcher.follow(rounds())
        host_batches = self._decoded(shares(), labels, epoch=0)
        for host in to_device(host_batches, self._device, self._finish(0)):
            self._consumed.bad += host.bad
            yield host.batch

    def _finish(self, epoch: int) -> Callable[[HostBatch], HostBatch]:
        """The work left to do on a batch on the device."""
        if not self._decodes_on_device:
            return partial(normalised, transform=self._transform)
        return partial(decoded_on_device, transform=self._transform, epoch=epoch, name_of=self._index.name)

    def _decoded(self, shares: Iterator[_Share], labels: Labels, *, epoch: int) -> Iterator[HostBatch]:
        """Decode shares in order. Reads begin READ_AHEAD_SAMPLES ahead; decoding runs two steps ahead, or as many as
        give every thread two jobs.
        """
        read_ahead = self._begun(shares)
        if self._pool is None:
            for share, jobs in read_ahead:
                batch = self._empty(share, labels)
                yield _joined(share, batch, [self._fill(batch, share, labels, epoch, *job) for job in jobs])
            return
        pending: deque[tuple[_Share, Batch, list[Future[Filled]]]] = deque()
        num_jobs = 0
        try:
            for share, jobs in read_ahead:
                batch = self._empty(share, labels)
                futures = [self._pool.submit(self._fill, batch, share, labels, epoch, *job) for job in jobs]
                pending.append((share, batch, futures))
                num_jobs += len(futures)
                while len(pending) > 2 and num_jobs > 2 * self._num_workers:
                    num_jobs -= len(pending[0][2])
                    yield _finished(*pending.popleft())
            while pending:
                yield _finished(*pending.popleft())
        finally:
            for _, _, futures in pending:
                for future in futures:
                    future.cancel()

    def _begun(self, shares: Iterator[_Share]) -> Iterator[tuple[_Share, list[tuple[int, int, Ticket]]]]:
        """Shares whose reads have begun, with their decoding jobs: (first row, stop row, ticket)."""
        ahead: deque[tuple[_Share, list[tuple[int, int, Ticket]]]] = deque()
        num_samples = 0
        while True:
            while num_samples < READ_AHEAD_SAMPLES or len(ahead) < 2:
                share = next(shares, None)
                if share is None:
                    break
                ahead.append((share, self._jobs(share)))
                num_samples += len(share.indices)
            if not ahead:
                return
            share, jobs = ahead.popleft()
            num_samples -= len(share.indices)
            self.fetcher.use(share.round)
            yield share, jobs

    def _jobs(self, share: _Share) -> list[tuple[int, int, Ticket]]:
        jobs = []
        for row in range(0, len(share.indices), ROWS_PER_JOB):
            indices = share.indices[row : row + ROWS_PER_JOB]
            jobs.append((row, row + len(indices), self.fetcher.begin(indices[indices != PADDING])))
        return jobs

    def _empty(self, share: _Share, labels: Labels) -> Batch:
        return empty_batch(
            share.indices,
            num_classes=self._index.manifest.num_classes,
            image_size=self._transform.settings.size,
            is_pinned=self._device.type == "cuda",
            memory=self._memory,
            has_beliefs=labels.round is not None,
            has_soft=labels.has_soft,
        )

    def _fill(
        self, batch: Batch, share: _Share, labels: Labels, epoch: int, first: int, stop: int, ticket: Ticket
    ) -> Filled:
        """Decode rows [first, stop) of a batch in place, with their labels; or only fetch them, to decode on device."""
        bad: list[BadSample] = []
        encoded: list[bytes | None] = [None] * (stop - first) if self._decodes_on_device else []
        rows = [row for row in range(first, stop) if share.indices[row] != PADDING]
        for row in set(range(first, stop)).difference(rows):
            clear(batch, row)
        told = _told(labels, share.indices[rows])
        shards = [shard for shard, _ in ticket.places]
        are_sound = {shard: self._index.is_sound(shard) for shard in set(shards)}
        for row, content, known, shard in zip(rows, self.fetcher.take(ticket), told, shards, strict=True):
            if self._decodes_on_device:
                put(batch, row, None, *known)
                encoded[row - first] = content
                continue
            try:
                position = int(share.positions[row])
                put(
                    batch,
                    row,
                    self._transform(content, epoch=epoch, position=position, is_sound=are_sound[shard]),
                    *known,
                )
            except ShardError as error:
                clear(batch, row)
                index = int(share.indices[row])
                bad.append(BadSample(index, self._index.name(index), error.found))
        return Filled(bad, encoded)


def num_span_blocks(spans: Spans) -> int:
    """Number of blocks in `Stream.span_batches` for these spans, without padding."""
    return sum(-(-(stop - first) // EVALUATION_BLOCK) for first, stop in spans)


def _told(labels: Labels, indices: Indices) -> Iterator[tuple[Any, ...]]:
    """For each sample its labels of every kind that this round has: human labels, beliefs, soft labels."""
    targets = labels.targets(indices)
    kinds: list[Any] = [targets]
    if labels.round is not None:
        beliefs = labels.round.of(targets, indices)
        kinds += [beliefs.values] if beliefs.soft is None else [beliefs.values, beliefs.soft]
    return zip(*kinds, strict=True)


class Filled(NamedTuple):
    """The result of one decoding job, besides the rows that it filled."""

    bad: list[BadSample]
    encoded: list[bytes | None]  # a JPEG for each row (None on padding) if the device decodes; else empty


def _joined(share: _Share, batch: Batch, parts: list[Filled]) -> HostBatch:
    bad = [one for part in parts for one in part.bad]
    encoded = [one for part in parts for one in part.encoded]
    return HostBatch(batch, share.positions, share.indices, bad, encoded)


def _finished(share: _Share, batch: Batch, futures: list[Future[Filled]]) -> HostBatch:
    return _joined(share, batch, [future.result() for future in futures])
