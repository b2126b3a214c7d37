"""Owns the host memory of a batch: allocated empty, filled row by row from many threads, moved to the device."""

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
    """An undecodable sample, whose row stays in the batch with `valid` False."""

    index: int  # type: ignore[assignment]
    name: str
    reason: str


class HostBatch(NamedTuple):
    """One rank's share of a step on the host, and what `audit` needs to know about it."""

    batch: Batch  # images (B, 3, size, size) uint8, channels last in memory: a quarter of float32's bytes to move
    positions: Indices  # (B,) int64 in the epoch's order, -1 on padding
    indices: Indices  # (B,) int64, equal to `batch.index`
    bad: list[BadSample]
    encoded: Sequence[bytes | None] = ()  # (B,) JPEGs still to be decoded on the device, None on padding; else empty


class ImageMemory:
    """A pool of memory for image batches, reused as soon as no tensor refers to the batch it held.

    Otherwise a large batch's memory would come from the system each time and be zeroed page by page. Batches bound
    for a GPU lie in pinned memory, which torch pools in the same way.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[npt.NDArray[np.uint8]]] = {}

    def take(self, *shape: int) -> Tensor:
        """An uninitialised uint8 tensor of this shape."""
        free = self._free.setdefault(shape, [])
        memory = free.pop() if free else np.empty(shape, dtype=np.uint8)
        view = memory[...]  # the tensor and all its views keep this alive
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
    """A batch in which no row is valid yet; `put` and `clear` fill its rows.

    Args:
        indices: (B,) int64, -1 on padding.
        num_classes: C.
        image_size: side of the square images, in pixels.
        is_pinned: use page-locked memory, so that a copy to a GPU runs asynchronously; torch reuses such memory.
        memory: pool for images that are not pinned; None allocates new memory.
        has_beliefs: allocate `pseudo_targets`.
        has_soft: allocate `soft_targets`.
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
    """Fill one row with a sample and mark it valid.

    Args:
        batch: from `empty_batch`.
        row: in [0, B).
        decoded: the image; None when the device decodes it later.
        targets: (C,) int8, human labels.
        pseudo_targets: (C,) int8 beliefs; ignored in a batch without that field.
        soft_targets: (C,) float32 in [0, 1]; ignored in a batch without that field.
    """
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
    """Fill one row as padding or an undecodable sample: black, all labels unknown. `valid` is left as it is.

    Training sees other images there; see `dist_mlpl.data.delivery.without_blanks`.
    """
    batch.images[row].zero_()
    batch.targets[row].zero_()
    if batch.pseudo_targets is not None:
        batch.pseudo_targets[row].zero_()
    if batch.soft_targets is not None:
        batch.soft_targets[row].fill_(0.5)
    batch.crop[row].copy_(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    batch.flipped[row] = False


def normalised(host: HostBatch, transform: Transform) -> HostBatch:
    """The batch with its images normalised for the model, on the device they are on."""
    return host._replace(batch=host.batch._replace(images=transform.normalise(host.batch.images)))


def decoded_on_device(host: HostBatch, transform: Transform, *, epoch: int, name_of: Callable[[int], str]) -> HostBatch:
    """The batch with its JPEGs decoded, transformed and normalised on the device.

    Random draws are the same as when decoding on the host; pixels differ only as two JPEG decoders' do.

    Args:
        host: a batch on the device, with `encoded`.
        transform: the split's transform.
        epoch: counted from 0; keys the draws.
        name_of: sample index to name, for reports of undecodable samples.
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
    """Move batches to `device` and finish them there.

    On a GPU each batch is copied and finished on a separate stream while the previous step computes: one batch ahead,
    which costs the memory of one more batch.

    Args:
        batches: on the host, pinned if the device is a GPU.
        device: where the step runs.
        finish: the work left for the device: `normalised` or `decoded_on_device`.
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
    """The copy stream of a GPU, one for all passes: torch's allocator keeps freed memory per stream."""
    return torch.cuda.Stream(device)


def _arrived(host: HostBatch, copied: torch.cuda.Event) -> HostBatch:
    """Make the compute stream wait for the copy, and tell the allocator that it uses the memory."""
    computing = torch.cuda.current_stream()
    computing.wait_event(copied)
    for field in host.batch:
        if field is not None:
            field.record_stream(computing)
    return host
