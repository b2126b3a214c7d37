"""Our side of `bench_stream`, one measurement a process; the last line on standard output is the answer, as JSON.

python -m tests.bench.stream_ours ours|bare SHARDS SIZE BATCH WORKERS WARMUP TIMED      images a second
python -m tests.bench.stream_ours first SHARDS FRACTION EPOCH REPEATS                   seconds to a first batch
python -m tests.bench.stream_ours order NUM_SAMPLES NUM_SHARDS FRACTION                 seconds and bytes to an index
"""

from __future__ import annotations

import itertools
import json
import sys
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_mlpl import storage
from dist_mlpl.data.cache import ExtentCache
from dist_mlpl.data.collate import HostBatch
from dist_mlpl.data.fetch import Fetcher
from dist_mlpl.data.label_store import LabelStore
from dist_mlpl.data.manifest import load_manifest
from dist_mlpl.data.order import EpochOrder
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.stream import DataSettings, Stream
from dist_mlpl.data.transform import Transform, TransformSettings, use_one_thread_here
from dist_mlpl.world import World

SEED, GROUP_SIZE = 0, 8
# A set of 2,304 samples has the lanes and windows of one of 300,000, in small.
SMALL_LANES, SMALL_WINDOW = 8, 64


def transform(size: int) -> Transform:
    """The defaults: random resized crop of (0.25, 1) and (3/4, 4/3), flip; images stay uint8 numbers."""
    return Transform(TransformSettings(size=size, mean=None, std=None), seed=SEED, train=True)


def batches_of(
    shards: str, *, size: int, batch: int, workers: int, fraction: float = 0.0, epoch: int = 0, **order: int
) -> tuple[Stream, Iterator[HostBatch]]:
    """A stream as `dist_mlpl.train` builds it, and its batches from a fraction of an epoch on."""
    settings = DataSettings(manifest=shards, num_workers=workers)
    index = SplitIndex(load_manifest(settings.manifest), settings.train_split)
    cache = ExtentCache(limit_bytes=settings.cache_bytes) if storage.is_remote(shards) else None
    stream = Stream(
        index,
        Fetcher(index, cache),
        transform(size),
        world=World(),
        num_workers=settings.num_workers,
        device=torch.device("cpu"),
        max_bad_fraction=settings.max_bad_fraction,
    )
    lanes = {"num_lanes": settings.num_lanes, "window_samples": settings.window_samples, **order}
    epoch_order = EpochOrder(index.shard_sizes, seed=SEED, epoch=epoch, group_size=GROUP_SIZE, **lanes)
    start = int(fraction * index.num_samples) // batch * batch
    labels = LabelStore(index).at(0)
    return stream, stream.host_batches(epoch_order, labels, epoch=epoch, start=start, global_batch=batch)


def ours(shards: str, *, size: int, batch: int, workers: int, warmup: int, timed: int) -> dict[str, float]:
    """Images a second over `timed` batches that follow `warmup` others."""
    stream, batches = batches_of(shards, size=size, batch=batch, workers=workers)
    for _ in range(warmup):
        next(batches)
    began = time.perf_counter()
    for _ in range(timed):
        made = next(batches).batch
    seconds = time.perf_counter() - began
    assert made.images.shape == (batch, 3, size, size), made.images.shape
    assert made.images.dtype == torch.uint8, made.images.dtype
    assert made.targets.shape[0] == batch, made.targets.shape
    assert bool(made.valid.all())
    batches.close()  # type: ignore[attr-defined]
    stream.close()
    return {"images_per_second": timed * batch / seconds}


def bare(shards: str, *, size: int, batch: int, workers: int, warmup: int, timed: int) -> dict[str, float]:
    """The limit: the same decoder and crop over JPEGs in memory, into one buffer; no shards, order or labels."""
    jpegs = jpegs_of(shards)[: (warmup + timed) * batch]
    make = transform(size)
    buffer = torch.empty(batch, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)  # laid out as in our batches
    began = finished = 0.0
    numbers = itertools.count()  # next() on it is atomic

    def work() -> None:
        nonlocal began, finished
        use_one_thread_here()
        for number in numbers:
            if number == warmup * batch:
                began = time.perf_counter()
            if number >= len(jpegs):
                break
            buffer[number % batch] = make(jpegs[number], epoch=0, position=number, is_sound=True).image
        finished = time.perf_counter()  # of the last thread in the end

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"images_per_second": (len(jpegs) - warmup * batch) / (finished - began)}


def jpegs_of(shards: str) -> list[bytes]:
    """Every JPEG of SHARDS/*.tar, in a drawn order."""
    found = []
    for path in sorted(Path(shards).glob("*.tar")):
        with tarfile.open(path) as tar:
            members = (member for member in tar if member.name.endswith(".jpg"))
            found += [file.read() for file in map(tar.extractfile, members) if file is not None]
    return [found[at] for at in np.random.default_rng(SEED).permutation(len(found)).tolist()]


def first_batch(shards: str, *, fractions: list[float], epoch: int, repeats: int) -> dict[str, list[float]]:
    """Seconds from nothing but imports to the first batch, by fraction of the epoch at which it lies."""
    found: dict[str, list[float]] = {str(fraction): [] for fraction in fractions}
    for repeat in range(repeats):
        for fraction in fractions if repeat % 2 == 0 else reversed(fractions):
            began = time.perf_counter()
            stream, batches = batches_of(
                shards, size=224, batch=64, workers=2, fraction=fraction, epoch=epoch + repeat,
                num_lanes=SMALL_LANES, window_samples=SMALL_WINDOW,
            )  # fmt: skip
            next(batches)
            found[str(fraction)].append(time.perf_counter() - began)
            batches.close()  # type: ignore[attr-defined]
            stream.close()
    return found


def order_cost(num_samples: int, num_shards: int, fraction: float) -> dict[str, float]:
    """Seconds to the first index of an epoch's order, peak of traced memory and growth of the process in four steps."""
    sizes = [num_samples // num_shards + (shard < num_samples % num_shards) for shard in range(num_shards)]
    start = int(fraction * num_samples) // GROUP_SIZE * GROUP_SIZE
    EpochOrder([100] * 10, seed=SEED, epoch=0).indices(0, 1)  # what a process does once is not the order's

    began = time.perf_counter()
    EpochOrder(sizes, seed=SEED, epoch=0, group_size=GROUP_SIZE).at(np.array([start]))
    seconds = time.perf_counter() - began

    def four_steps() -> EpochOrder:
        order = EpochOrder(sizes, seed=SEED, epoch=0, group_size=GROUP_SIZE)
        for step in range(4):  # of 1,024, which touches every lane
            order.at(order.share(start + 1024 * step, 1024, rank=0, size=1))
        return order

    before = resident_bytes()
    order = four_steps()
    resident = resident_bytes() - before
    del order
    tracemalloc.start()
    four_steps()
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"seconds": seconds, "traced_bytes": traced, "resident_bytes": resident}


def resident_bytes() -> int:
    """Of this process, now."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) * 1024


def main(arguments: list[str]) -> None:
    verb, *rest = arguments
    answer: Any
    if verb in ("ours", "bare"):
        shards, *numbers = rest
        names = ("size", "batch", "workers", "warmup", "timed")
        answer = {"ours": ours, "bare": bare}[verb](shards, **dict(zip(names, map(int, numbers), strict=True)))
    elif verb == "first":
        shards, fractions, epoch, repeats = rest
        parsed = [float(text) for text in fractions.split(",")]
        answer = first_batch(shards, fractions=parsed, epoch=int(epoch), repeats=int(repeats))
    else:
        answer = order_cost(int(rest[0]), int(rest[1]), float(rest[2]))
    print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
