"""Owns the flow of batches from tars without an index, the counterpart of `stream`; `tars.LIMITS` lists its limits."""

from __future__ import annotations

import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dist_mlpl import comm, keyed, storage
from dist_mlpl.batch import Batch, Loading
from dist_mlpl.data.collate import BadSample, HostBatch, ImageMemory, clear, empty_batch, normalised, put, to_device
from dist_mlpl.data.delivery import Delivery
from dist_mlpl.data.label_store import Labels
from dist_mlpl.data.order import PADDING, EpochOrder, last_position
from dist_mlpl.data.stream import EVALUATION_BLOCK, Stream
from dist_mlpl.data.tars import TarSample, TarSet, check_num_tars, mixed, read_tar
from dist_mlpl.data.transform import Transform, use_one_thread_here
from dist_mlpl.errors import ShardError
from dist_mlpl.world import World

log = logging.getLogger(__name__)

T = TypeVar("T")
Indices = npt.NDArray[np.int64]


class TarStream(Delivery):
    """Batches for one rank from tars without an index; the counterpart of `Stream`. See `tars.LIMITS`.

    Args:
        tars: the tars of one split.
        transform: decodes and augments samples.
        world: this rank.
        seed: the run's seed.
        num_workers: decoding threads, beside one that reads; 0 reads and decodes in the thread that iterates.
        device: where batches go.
        max_bad_fraction: undecodable samples tolerated in an epoch, as a fraction of `data.unindexed.epoch_samples`.

    Raises:
        ConfigError: fewer tars to train on than ranks.
    """

    def __init__(
        self,
        tars: TarSet,
        transform: Transform,
        *,
        world: World,
        seed: int,
        num_workers: int,
        device: torch.device,
        max_bad_fraction: float,
    ) -> None:
        super().__init__(
            rank=world.rank, num_samples=tars.num_samples, max_bad_fraction=max_bad_fraction, repair="repair the tars"
        )
        if transform.train:
            check_num_tars(tars, world_size=world.size)
        self._tars, self._transform, self._world, self._device = tars, transform, world, device
        self._memory = ImageMemory()
        self._seed, self._num_workers = seed, num_workers
        self._reader = ThreadPoolExecutor(1, "read") if num_workers else None
        self._pool = ThreadPoolExecutor(num_workers, "decode", use_one_thread_here) if num_workers else None
        self._told: set[str] = set()  # tars whose ignored members were reported

    def close(self) -> None:
        """Stop reading and decoding."""
        for pool in (self._reader, self._pool):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    @property
    def loading(self) -> Loading:
        """This rank's waiting time since the stream was made and traffic of the process; samples are not counted."""
        traffic = storage.traffic()
        return Loading(self._waited_seconds, bytes_read=traffic.bytes_read, retries=traffic.retries)

    def train_batches(
        self, order: EpochOrder, labels: Labels, *, epoch: int, start: int, global_batch: int
    ) -> Iterator[Batch]:
        """This rank's share of every step from `start` to the end of the epoch.

        Args:
            order: this epoch's order; it says how many rows a rank has and which positions in the epoch they take.
            labels: unused, since labels come with the images.
            epoch: counted from 0; keys the permutation of the tars, the mixing and the augmentation.
            start: images of this epoch already consumed; each value gives another permutation of the tars.
            global_batch: G, a multiple of the order's group_size.

        Yields:
            One batch per step, with the same number of rows on every rank and at every step. `index` is an image's
            position in the epoch: distinct over all ranks, but no address in a manifest.

        Raises:
            DataError, ShardError, StorageError: see `read_tar`.
        """
        if start == 0:
            self._num_bad = 0
        size = self._world.size
        stop = last_position(start, global_batch=global_batch, num_samples=order.num_samples)
        steps = range(start, stop, global_batch)
        shares = (order.share(begin, global_batch, rank=self._world.rank, size=size) for begin in steps)
        host_batches = self._decoded(self._mixed(epoch, start), shares, epoch=epoch)
        finish = partial(normalised, transform=self._transform)
        yield from self._handed_out(to_device(host_batches, self._device, finish))

    def evaluation_batches(self, labels: Labels) -> Iterator[Batch]:
        """Every sample of the split once, each rank's tars in blocks of 32; ranks that finish early yield padding.

        Image n of rank r, counted from 0, has index n * R + r. Blocks depend on the number of ranks, and so do the
        last bits of their logits.

        Args:
            labels: unused, since labels come with the images.

        Collective: all ranks; one all-reduce of one integer per block.
        """
        rank, size = self._world.rank, self._world.size
        samples = self._read(self._tars.urls[rank::size])
        firsts = itertools.count(0, EVALUATION_BLOCK)
        blocks = (np.arange(first, first + EVALUATION_BLOCK) * size + rank for first in firsts)
        finish = partial(normalised, transform=self._transform)
        batches = to_device(self._decoded(samples, blocks, epoch=0), self._device, finish)
        while True:
            host = next(batches, None)
            if not int(comm.reduce_max(torch.tensor([int(host is not None)]))):
                return
            if host is None:
                nothing = np.full(EVALUATION_BLOCK, PADDING, dtype=np.int64)
                batch = self._begin(iter(()), nothing, 0).batch
                (host,) = to_device([HostBatch(batch, nothing, nothing, [])], self._device, finish)
            self._consumed.bad += host.bad
            yield host.batch

    def _mixed(self, epoch: int, start: int) -> Iterator[TarSample]:
        """This rank's samples without end: tars are permuted, dealt to the ranks and mixed, then all of it again."""
        for turn in itertools.count():
            chance = keyed.key("tars", self._seed, epoch, start, turn)
            own = keyed.permutation(chance, len(self._tars.urls))[self._world.rank :: self._world.size]
            samples = self._read([self._tars.urls[place] for place in own])
            mixing = keyed.key(chance, "mix", self._world.rank)
            yield from mixed(samples, shuffle_buffer=self._tars.settings.shuffle_buffer, key=mixing)

    def _read(self, urls: Sequence[str]) -> Iterator[TarSample]:
        for url in urls:
            ignored: Counter[str] = Counter()
            yield from read_tar(url, self._tars, ignored)
            if ignored and url not in self._told:
                self._told.add(url)
                counts = ", ".join(f"{count} {kind}" for kind, count in ignored.items())
                log.warning("%s: passed over %s", storage.shown(url), counts)

    def _decoded(self, samples: Iterator[TarSample], shares: Iterator[Indices], *, epoch: int) -> Iterator[HostBatch]:
        """Batches until the shares or the samples end; one thread reads ahead and the others decode."""
        read = self._reader.submit if self._reader else _at_once
        num_ahead = 3 if self._reader else 1
        pending: deque[Future[_Begun]] = deque()
        try:
            for positions in shares:
                pending.append(read(self._begin, samples, positions, epoch))
                if len(pending) >= num_ahead and len(pending) * len(positions) > 2 * self._num_workers:
                    if (host := _finished(pending.popleft())) is None:
                        return
                    yield host
            while pending and (host := _finished(pending.popleft())) is not None:
                yield host
        finally:
            for begun in pending:
                if not begun.cancel() and begun.exception() is None:
                    for job in begun.result().jobs:
                        job.cancel()

    def _begin(self, samples: Iterator[TarSample], positions: Indices, epoch: int) -> _Begun:
        """Take as many samples as there are positions, or as are left, and start decoding them into a batch."""
        taken = list(itertools.islice(samples, int((positions != PADDING).sum())))
        positions = np.where(np.arange(len(positions)) < len(taken), positions, PADDING)  # padding comes last
        batch = empty_batch(
            positions, num_classes=self._tars.manifest.num_classes, image_size=self._transform.settings.size,
            is_pinned=self._device.type == "cuda", memory=self._memory,
        )  # fmt: skip
        for row in range(len(taken), len(positions)):
            clear(batch, row)
        fill = self._pool.submit if self._pool else _at_once
        jobs = [fill(self._fill, batch, row, sample, epoch) for row, sample in enumerate(taken)]
        return _Begun(batch, positions, jobs)

    def _fill(self, batch: Batch, row: int, sample: TarSample, epoch: int) -> BadSample | None:
        position = int(batch.index[row])
        try:
            put(batch, row, self._transform(sample.image, epoch=epoch, position=position), sample.targets)
        except ShardError as error:
            clear(batch, row)
            return BadSample(position, sample.name, error.found)
        return None


AnyStream = Stream | TarStream  # batches of one split, with an index or without


class _Begun(NamedTuple):
    """A batch being decoded."""

    batch: Batch
    positions: Indices
    jobs: list[Future[BadSample | None]]


def _finished(begun: Future[_Begun]) -> HostBatch | None:
    """Wait until a batch is decoded and return it; None for one without samples."""
    batch, positions, jobs = begun.result()
    if not jobs:
        return None
    return HostBatch(batch, positions, positions, [bad for job in jobs if (bad := job.result()) is not None])


def _at_once(task: Callable[..., T], *arguments: Any) -> Future[T]:
    """Run a task in this thread, with the interface of a pool's `submit`."""
    future: Future[T] = Future()
    future.set_result(task(*arguments))
    return future
