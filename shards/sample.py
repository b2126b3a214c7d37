"""Owns sampling some of many images: the choice, the same on every machine, and their bytes, read by range."""

from __future__ import annotations

import io
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import numpy.typing as npt
from PIL import Image

from dist_mlpl import storage
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.keyed import hash_integers, key

Indices = npt.NDArray[np.int64]

_HEADER_BYTES = 16 << 10  # bytes read first for a frame header, which follows metadata of any length
_THREADS = 16
_BLOCK = 1 << 20


def choose(candidates: Iterable[Indices], count: int, *, seed: int, split: str) -> Indices:
    """Draw up to `count` samples: those with the lowest hashes, so a smaller draw is a subset of a larger one.

    Args:
        candidates: sample indices to draw from, in parts of (n,) int64.
        count: most samples to draw, >= 0.
        seed: seed of the draw.
        split: name of the split.

    Returns:
        (k,) int64, ascending.
    """
    salt, best = key("look", seed, split), np.empty(0, dtype=np.int64)
    for part in candidates:
        best = np.concatenate([best, part])
        if len(best) > count:
            lowest = np.argsort(hash_integers(salt, best.astype(np.uint64)), kind="stable")[:count]
            best = best[lowest]
    return np.sort(best)


def every(num_samples: int) -> Iterator[Indices]:
    """All samples of a split, in parts."""
    for start in range(0, num_samples, _BLOCK):
        yield np.arange(start, min(start + _BLOCK, num_samples), dtype=np.int64)


def read_images(index: SplitIndex, indices: Indices, *, num_bytes: int | None = None) -> Iterator[bytes]:
    """Read the JPEGs of some samples, in order, several at once.

    Args:
        index: the split.
        indices: (n,) int64 in [0, N).
        num_bytes: number of bytes from the beginning of each JPEG; None for all.

    Raises:
        ShardError: an index is missing or damaged.
        StorageError: a shard is missing or could not be read.
    """

    def read(place: tuple[int, int]) -> bytes:
        shard, row = place
        table, url = index.shard_index(shard), index.manifest.shard_url(index.shards[shard])
        start, length = int(table.offsets[row]), int(table.num_bytes[row])
        try:
            return storage.read_bytes(url, start, start + (length if num_bytes is None else min(length, num_bytes)))
        except FileNotFoundError as error:
            next_step = "restore it: `dist-mlpl shards verify` lists what else is missing"
            raise storage.missing(url, what="the shard", next_step=next_step) from error

    with ThreadPoolExecutor(_THREADS, "look") as pool:
        rest = iter(index.rows(indices))
        jobs = deque(pool.submit(read, place) for place in islice(rest, 2 * _THREADS))
        while jobs:
            yield jobs.popleft().result()
            jobs.extend(pool.submit(read, place) for place in islice(rest, 1))


def image_sizes(index: SplitIndex, indices: Indices) -> npt.NDArray[np.int32]:
    """Width and height of some samples, from their headers.

    Returns:
        (n, 2) int32, width and height in pixels; zeros where no header can be read.
    """
    sizes, again = np.zeros((len(indices), 2), dtype=np.int32), []
    for place, content in enumerate(read_images(index, indices, num_bytes=_HEADER_BYTES)):
        sizes[place] = header_size(content)
        if sizes[place, 0] == 0 and len(content) == _HEADER_BYTES:
            again.append(place)  # long metadata or damage: read the whole image
    for missed, content in zip(again, read_images(index, indices[again]), strict=True):
        sizes[missed] = header_size(content)
    return sizes


def header_size(content: bytes) -> tuple[int, int]:
    """Width and height of a JPEG from its beginning; (0, 0) if the header cannot be read."""
    try:
        with open_jpeg(content) as image:
            return image.width, image.height
    except UNREADABLE:
        return 0, 0


# What Pillow raises on damaged headers or pixels, and on images with far too many pixels.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def open_jpeg(content: bytes) -> Image.Image:
    """Open a JPEG and read its header only; the EXIF orientation is not applied, as in training.

    Raises:
        UNREADABLE: no JPEG header, or far too many pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata, and large images, which shards may hold
        return Image.open(io.BytesIO(content), formats=("JPEG",))
