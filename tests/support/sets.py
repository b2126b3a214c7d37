"""Owns small packed sets of tests: copied into buckets, read back by hand, streamed for a whole epoch; small disks."""

from __future__ import annotations

import contextlib
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_mlpl import storage
from dist_mlpl.batch import Batch
from dist_mlpl.data.cache import ExtentCache
from dist_mlpl.data.fetch import Fetcher, Spans
from dist_mlpl.data.label_store import LabelStore
from dist_mlpl.data.manifest import Manifest, load_manifest
from dist_mlpl.data.order import EpochOrder
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.stream import Stream
from dist_mlpl.data.transform import Transform, TransformSettings
from dist_mlpl.world import World

SEED = 11
TRANSFORM = TransformSettings(size=8, color_jitter=0.3)


def copy_set(manifest: Manifest, url: str) -> Manifest:
    """The same set at another place."""
    for name in storage.list_names(manifest.url):
        storage.write_bytes(storage.join(url, name), storage.read_bytes(storage.join(manifest.url, name)))
    return load_manifest(url)


def images_of(manifest: Manifest, split: str) -> list[bytes]:
    """Every JPEG of a local set in manifest order, read as a tar is read, without its index."""
    found = []
    for entry in manifest.split(split).shards:
        with tarfile.open(manifest.shard_url(entry)) as tar:
            found += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]  # type: ignore[union-attr]
    return found


def stream_over(
    index: SplitIndex,
    cache: ExtentCache | None = None,
    *,
    rank: int = 0,
    size: int = 1,
    num_workers: int = 2,
    train: bool = True,
) -> Stream:
    """A stream that tolerates any number of undecodable samples."""
    return Stream(
        index,
        Fetcher(index, cache),
        Transform(TRANSFORM, seed=SEED, train=train),
        world=World(rank=rank, size=size),
        num_workers=num_workers,
        device=torch.device("cpu"),
        max_bad_fraction=1.0,
    )


def order_over(index: SplitIndex, *, epoch: int = 0, **options: int) -> EpochOrder:
    """An order of a few lanes and several windows each, for sets of a hundred samples."""
    lanes: dict[str, Any] = {"num_lanes": 3, "window_samples": 12, "group_size": 4, **options}
    return EpochOrder(index.shard_sizes, seed=SEED, epoch=epoch, **lanes)


def whole_epoch(manifest: Manifest, folder: Path | None = None, *, limit_bytes: int = 1 << 30) -> list[Batch]:
    """All batches of training on one rank, then those of the evaluation.

    Args:
        manifest: with splits train and test.
        folder: of the cache; None for none.
        limit_bytes: of the cache.
    """
    cache = ExtentCache(limit_bytes=limit_bytes, folder=folder) if folder else None
    train, test = (SplitIndex(manifest, split) for split in ("train", "test"))
    trained, judged = stream_over(train, cache), stream_over(test, cache, train=False)
    try:
        batches = trained.train_batches(order_over(train), LabelStore(train).at(0), epoch=0, start=0, global_batch=16)
        return [*batches, *judged.evaluation_batches(LabelStore(test).at(0))]
    finally:
        trained.close()
        judged.close()


def fetch_ahead(fetcher: Fetcher, spans: Spans) -> None:
    """Have some samples in the cache, or failed to be."""
    fetcher.follow([(0, spans)])
    wait_until(lambda: not is_running("follow"))


def wait_until_quiet() -> None:
    """Until the reads that closed fetchers left under way have ended."""
    wait_until(lambda: not is_running("follow", "fetch", "read"))


def is_running(*names: str) -> bool:
    """Whether a thread of such a name, as fetchers give them, lives."""
    return any(thread.name.split("_")[0] in names for thread in threading.enumerate())


def wait_until(is_so: Callable[[], bool]) -> None:
    """Look again and again, for a minute at most."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, "not within a minute"
        time.sleep(0.002)  # between looks at the condition


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of its own, mounted where the folder is to be; skips the test without the right to mount."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs"]
    mounted = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def assert_same_batches(found: list[Batch], expected: list[Batch]) -> None:
    """Equal to the bit, in every field of every batch."""
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        for name in Batch._fields:
            mine, theirs = getattr(one, name), getattr(other, name)
            assert (mine is None) == (theirs is None), (number, name)
            assert mine is None or torch.equal(mine, theirs), (number, name)
