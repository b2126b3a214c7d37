"""Owns the memory of one batch on the host: made empty, filled row by row from many threads, moved in one copy."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_mlpl.batch import Batch
from dist_mlpl.data.jpeg import decode_on
from dist_mlpl.data.transform import DecodedImage, Transform
from dist_mlpl.errors import ShardError

Indices = npt.NDArray[np.int64]


class BadSample(NamedTuple):
    """A sample that kept its place with `valid` False."""

    index: int  # type: ignore[assignment]
    name: str
    reason: str


class HostBatch(NamedTuple):
    """One rank's share of a step on the host, and what `audit` will want to know of it."""

    batch: Batch  # images uint8, (B, 3, size, size) in rows of pixels: a quarter of the bytes of float32 to move
    positions: Indices  # (B,) int64 of the epoch's order, -1 on padding
    indices: Indices  # (B,) int64, those of `batch.index`
    bad: list[BadSample]
    encoded: Sequence[bytes | None] = ()  # a JPEG for each row that is still to be decoded on the device


class ImageMemory:
    """Memory of batches of images, used again as soon as no tensor is left of the batch it held.

    A large batch's memory would else come from the system each time, and be cleared page by page first. Batches that
    go to a GPU lie in pinned memory, of which torch keeps account in the same way.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[npt.NDArray[np.uint8]]] = {}

    def take(self, *shape: int) -> Tensor:
        """A uint8 tensor that holds anything."""
        free = self._free.setdefault(shape, [])
        memory = free.pop() if free else np.empty(shape, dtype=np.uint8)
        view = memory[...]  # what the tensor and all its views keep alive
        weakref.finalize(view, free.append, memory).atexit = False
        return torch.from_numpy(view)


def empty_batch(
    indices: Indices,
    *,
    num_classes: int,
    image_size: int,
    is_pinned: bool,
    memory: ImageMemory | None = None,
    has_beliefs: bool = False,
    has_soft: bool = False,
) -> Batch:
    """A batch in which no row is valid yet; `put` and `clear` make its rows.

    Args:
        indices: (B,) int64, -1 on padding.
        num_classes: C.
        image_size: side of the square images.
        is_pinned: page-locked, so that a copy to a GPU needs nobody's attention; torch reuses such memory.
        memory: of images that are not pinned; None: new.
        has_beliefs: with `pseudo_targets`.
        has_soft: with `soft_targets`.
    """
    num_images = len(indices)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=is_pinned)

    shape = (num_images, image_size, image_size, 3)
    images = empty(*shape, dtype=torch.uint8) if is_pinned else (memory or ImageMemory()).take(*shape)
    return Batch(
        images=images.permute(0, 3, 1, 2),
        targets=empty(num_images, num_classes, dtype=torch.int8),
        pseudo_targets=empty(num_images, num_classes, dtype=torch.int8) if has_beliefs else None,
        soft_targets=empty(num_images, num_classes, dtype=torch.float32) if has_soft else None,
        index=empty(num_images, dtype=torch.int64).copy_(torch.from_numpy(indices)),
        crop=empty(num_images, 4, dtype=torch.float32),
        flipped=empty(num_images, dtype=torch.bool),
        valid=empty(num_images, dtype=torch.bool).fill_(False),
    )


def put(
    batch: Batch,
    row: int,
    decoded: DecodedImage | None,
    targets: npt.NDArray[np.int8],
    pseudo_targets: npt.NDArray[np.int8] | None = None,
    soft_targets: npt.NDArray[np.float32] | None = None,
) -> None:
    """Fill one row with a sample: its image, unless that comes later, and its (C,) labels of each kind."""
    if decoded is not None:
        batch.images[row].copy_(decoded.image)
        batch.crop[row].copy_(decoded.crop)
        batch.flipped[row] = decoded.flipped
    for field, labels in (
        (batch.targets, targets), (batch.pseudo_targets, pseudo_targets), (batch.soft_targets, soft_targets)
    ):  # fmt: skip
        if field is not None and labels is not None:
            field[row].copy_(torch.from_numpy(labels))
    batch.valid[row] = True


def clear(batch: Batch, row: int) -> None:
    """Make one row that of padding, or of a sample that could not be decoded: black, nothing known."""
    batch.images[row].zero_()
    batch.targets[row].zero_()
    if batch.pseudo_targets is not None:
        batch.pseudo_targets[row].zero_()
    if batch.soft_targets is not None:
        batch.soft_targets[row].fill_(0.5)
    batch.crop[row].copy_(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    batch.flipped[row] = False


def normalised(host: HostBatch, transform: Transform) -> HostBatch:
    """Images as the model wants them, on the device that they are on."""
    return host._replace(batch=host.batch._replace(images=transform.normalise(host.batch.images)))


def decoded_on_device(host: HostBatch, transform: Transform, *, epoch: int, name_of: Callable[[int], str]) -> HostBatch:
    """Images decoded and transformed on the device, for a batch that brought its JPEGs along.

    The draws are those of decoding on the host; pixels differ from it as one JPEG decoder's do from another's.
    """
    batch, bad = host.batch, list(host.bad)
    rows = [row for row, content in enumerate(host.encoded) if content is not None]
    pictures = decode_on(batch.images.device, [content for content in host.encoded if content is not None])
    for row, picture in zip(rows, pictures, strict=True):
        index = int(host.indices[row])
        if isinstance(picture, ShardError):
            clear(batch, row)
            batch.valid[row] = False
            bad.append(BadSample(index, name_of(index), picture.found))
            continue
        view = transform.view(picture, epoch=epoch, position=int(host.positions[row]))
        batch.images[row].copy_(view.image)
        batch.crop[row].copy_(view.crop)
        batch.flipped[row] = view.flipped
    return normalised(host._replace(batch=batch, bad=bad, encoded=()), transform)


def to_device(
    batches: Iterable[HostBatch], device: torch.device, finish: Callable[[HostBatch], HostBatch]
) -> Iterator[HostBatch]:
    """Batches on `device`, finished there.

    On a GPU each batch is copied and finished on a stream of its own while the step before it computes: one batch
    ahead, which costs the memory of one more batch.

    Args:
        batches: on the host, pinned if the device is a GPU.
        device: where the step runs.
        finish: what is left to do on the device, `normalised` at least.
    """
    if device.type != "cuda":
        for host in batches:
            yield finish(host._replace(batch=host.batch.to(device)))
        return
    copies = _copies(device)
    ahead: tuple[HostBatch, torch.cuda.Event] | None = None
    for host in batches:
        with torch.cuda.stream(copies):
            moved = finish(host._replace(batch=host.batch.to(device)))
            copied = torch.cuda.Event()
            copied.record(copies)
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = moved, copied
    if ahead is not None:
        yield _arrived(*ahead)


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream that copies to a GPU, one for all passes: freed memory stays with the stream that it was taken on."""
    return torch.cuda.Stream(device)


def _arrived(host: HostBatch, copied: torch.cuda.Event) -> HostBatch:
    """Let the computing stream wait for the copy, and the allocator know that it uses the memory."""
    computing = torch.cuda.current_stream()
    computing.wait_event(copied)
    for field in host.batch:
        if field is not None:
            field.record_stream(computing)
    return host
